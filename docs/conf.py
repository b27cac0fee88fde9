"""How the documentation is built: `sphinx-build -W docs docs/_build`, with the extra `docs`
installed.

Pages of techniques and the API are written from docstrings, the registry and the committed claims,
into docs/_made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from tabulate import tabulate

import widthbench
from widthbench.technique import registry

HERE = Path(__file__).parent
ROOT = HERE.parent
MADE = HERE / "_made"
REPOSITORY = os.environ.get(
    "WIDTHBENCH_REPOSITORY", ""
)  # where links to files that are no pages lead, if anywhere

project = "widthbench"
author = "The widthbench authors"
version = release = widthbench.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
nb_execution_mode = "off"  # as committed: `python docs/notebook.py` runs it
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"widthbench {version}"
html_extra_path = ["_made/site"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["myst.header", "ref.python"]

FIGURES = {
    "neuron-merging": (
        "merging-lenet",
        "error-macs.png",
        "Merging, pruning by its criterion, and NMF on trained LeNets",
    ),
    "nmf": (
        "merging-lenet",
        "error-macs.png",
        "NMF beside merging on trained LeNets, nothing trained after",
    ),
    "neuron-removal": (
        "shrinking",
        "curves-accuracy.png",
        "Test accuracy against the share of neurons removed, by ranking",
    ),
    "autoprune": (
        "autoprune-lenet",
        "trajectory-autoprune.png",
        "AutoPrune along its steps, by estimator and decoupling",
    ),
    "splitting": ("growing", "trajectory-splitting.png", "Widths and losses as networks grow"),
    "autoslim": ("lenets", "trajectory-autoslim.png", "AutoSlim's greedy path"),
}
ELSE = ("digits", "error-macs.png", "Every technique on the suite digits")
PARTS = {
    "Using it": [
        "widthbench.api",
        "widthbench.technique.base",
        "widthbench.technique.task",
        "widthbench.technique.budget",
        "widthbench.technique.parameters",
        "widthbench.technique.trajectory",
        "widthbench.technique.registry",
        "widthbench.contract",
    ],
    "Channel groups": [
        "widthbench.width.groups",
        "widthbench.width.resize",
        "widthbench.width.gates",
        "widthbench.width.certify",
        "widthbench.width.proofs",
        "widthbench.width.cost",
        "widthbench.width.norms",
        "widthbench.sensitivity.ablation",
        "widthbench.sensitivity.derivatives",
        "widthbench.sensitivity.splitting_matrices",
        "widthbench.width.adapters",
    ],
    "The protocol": [
        "widthbench.experiment.cell",
        "widthbench.experiment.protocol",
        "widthbench.experiment.bases",
        "widthbench.experiment.billing",
        "widthbench.experiment.keys",
        "widthbench.experiment.controls",
        "widthbench.experiment.suites",
        "widthbench.experiment.records",
        "widthbench.experiment.store",
        "widthbench.recipe",
        "widthbench.training.loop",
        "widthbench.training.graphed",
        "widthbench.training.recalibration",
        "widthbench.training.measuring",
        "widthbench.data.splits",
        "widthbench.data.sources",
        "widthbench.networks.weights",
        "widthbench.networks.models",
    ],
    "Results": [
        "widthbench.claims.ledger",
        "widthbench.report.verify",
        "widthbench.report.build",
        "widthbench.report.columns",
        "widthbench.report.lines",
        "widthbench.report.tables",
        "widthbench.statistics",
        "widthbench.report.exports",
        "widthbench.report.figures",
        "widthbench.report.widths",
        "widthbench.report.site",
        "widthbench.report.regress",
        "widthbench.provenance",
    ],
}


def technique_page(name: str, claims: list[dict[str, object]]) -> str:
    """A technique: what it does, its parameters, its figure, its paper, its claims."""
    cls = registry.load(name)
    own = [c for c in claims if c["technique"] == name]
    suite, file, caption = FIGURES.get(name, ELSE)
    picture = f"{name.replace(':', '-')}.png"
    figure = ROOT / "results" / "published" / suite / "figures" / file
    shutil.copy(figure, MADE / "techniques" / picture)
    parts = [
        f"# {name}",
        (
            f"Looks at: **{cls.access}** data. Starts from a **{cls.start}**"
            f" network{'; grows it' if cls.grows else ''}."
        ),
        (
            f"```{{eval-rst}}\n.. autoclass:: {cls.__module__}.{cls.__qualname__}\n  "
            " :no-members:\n```"
        ),
        (
            f"## What it looks like\n\n```{{figure}} {picture}\n:alt: {caption}\n\n{caption} (suite"
            f" `{suite}`)\n```"
        ),
    ]
    if own:
        parts.append("## What its document claims")
        rows = [[f"**{c['id']}**", str(c["text"]).replace("|", "\\|"), c["verdict"]] for c in own]
        parts.append(tabulate(rows, headers=["claim", "what", "verdict"], tablefmt="pipe"))
        parts.append(
            "Row by row, with the records: the [page of results](../results.md), and"
            " `results/published/claims.md`."
        )
    if cls.bibtex:
        parts.append(f"## Paper\n\n```bibtex\n{cls.bibtex.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def make() -> None:
    """Write all pages that are made from code and results."""
    shutil.rmtree(MADE, ignore_errors=True)
    (MADE / "techniques").mkdir(parents=True)
    (MADE / "api").mkdir()
    claims = json.loads((ROOT / "results" / "published" / "claims.json").read_text())
    names = registry.names()
    ours = [n for n in names if registry.owner(n).startswith("widthbench")]
    for name in ours:
        (MADE / "techniques" / f"{name.replace(':', '-')}.md").write_text(
            technique_page(name, claims)
        )
    listed = "\n".join(n.replace(":", "-") for n in ours)
    (MADE / "techniques" / "index.md").write_text(
        f"# Techniques\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    for title, modules in PARTS.items():
        blocks = "\n\n".join(
            f"## {m}\n\n```{{eval-rst}}\n.. automodule:: {m}\n```" for m in modules
        )
        (MADE / "api" / f"{title.lower().replace(' ', '-')}.md").write_text(
            f"# {title}\n\n{blocks}\n"
        )
    listed = "\n".join(t.lower().replace(" ", "-") for t in PARTS)
    (MADE / "api" / "index.md").write_text(
        f"# API\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )
    link = '<a href="../site.html">All leaderboards, claims and records, on one page</a>'
    page = (
        f"# Results\n\n{link}: tables to sort and filter, charts, and the record behind each row.\n"
    )
    (MADE / "results.md").write_text(page)
    from widthbench.report import site

    (MADE / "site").mkdir()
    site.write(ROOT / "results" / "published", into=MADE / "site")


def links(app: object, docname: str, source: list[str]) -> None:
    """Links to files of the repository that are no pages here become plain text, or links to the
    repository.
    """
    target = r"\[([^\]]*)\]\(\.\./([^)]+)\)"
    if not docname.startswith("_made"):
        source[0] = re.sub(
            target, rf"[\1]({REPOSITORY}/\2)" if REPOSITORY else r"\1 (`\2`)", source[0]
        )


def setup(app: object) -> None:
    """Sphinx calls this first."""
    make()
    app.connect("source-read", links)  # type: ignore[attr-defined]
