"""Run the code of docs/notebook.ipynb again, and keep what it shows.

python docs/notebook.py
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).with_suffix(".ipynb")


def main() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.clear()  # times
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata["language_info"].pop("version", None)
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
