"""The house: imports run down its floors only, and techniques are guests."""

import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent


def test_no_import_runs_up():
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("widthbench", exclude_type_checking_imports=True)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # which names the circle


def test_nothing_in_the_package_imports_a_technique():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "widthbench").rglob("*.py")
        if p.name != "__main__.py"
    ]
    code = "import sys\nfor n in ('methods', 'baselines'): sys.modules[f'widthbench.{n}'] = None\n"
    code += "".join(
        f"import {m.removesuffix('.__init__')}\n" for m in modules if "engines.ray" not in m
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("task", "technique.task"),
        ("models", "networks.models"),
        ("records", "experiment.records"),
        ("measure", "training.measuring"),
    ],
)
def test_a_module_of_an_earlier_version_is_an_error_that_says_where_it_is(old, new):
    with pytest.raises(ModuleNotFoundError, match=f"widthbench.{old} is now widthbench.{new}$"):
        importlib.import_module(f"widthbench.{old}")
    importlib.import_module(f"widthbench.{new}")
