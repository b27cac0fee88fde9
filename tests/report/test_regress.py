"""The gate on speed: verdicts, second looks, exit codes; commits are installed for themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from widthbench import cli
from widthbench.errors import UsageError
from widthbench.report import regress

MEASURING = '''
import dataclasses, json, pathlib

@dataclasses.dataclass(frozen=True)
class Item:
    name: str
    def __str__(self):
        return self.name

def items(device):
    return [Item(n) for n in ("alpha", "beta", "gamma")]

class Worker:
    """Says what the installed package's file says: one answer per request and process, the last one
    again and again."""
    made = 0

    def __init__(self, path, *, frugal=False, environment=None):
        assert environment["WIDTHBENCH_CACHE"]
        self.site, self.frugal, self.asked = pathlib.Path(path[0]), frugal, 0
        self.numbers = json.loads((self.site / "toy" / "numbers.json").read_text())
        Worker.made += 1
        self.late = Worker.made > 4  # of a second look

    def where(self):
        return str(self.site / "toy" / "__init__.py")

    def ask(self, item, memory=False, **request):
        found = self.numbers.get(item.name, {"skip": "no such thing"})
        if "ms" not in found:
            return found
        if memory:
            assert self.frugal
            return {"peak": found.get("peak", 1.0)}
        value = found["late"] if self.late and "late" in found else found["ms"]
        return {"ms": [value]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "toy"
version = "1"
[tool.setuptools]
packages = ["toy"]
package-data = { toy = ["*.json"] }
"""


def git(root, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def committed(root: Path, numbers, measuring=MEASURING):
    """A commit of a small project whose benchmarks give the numbers; gives its hash."""
    if not (root / ".git").is_dir():
        (root / "toy").mkdir(parents=True)
        git(root, "init", "-q", "-b", "main")
    (root / "pyproject.toml").write_text(PROJECT)
    (root / "toy" / "__init__.py").write_text("")
    (root / "toy" / "numbers.json").write_text(json.dumps(numbers))
    if measuring:
        (root / regress.MEASURING).parent.mkdir(parents=True, exist_ok=True)
        (root / regress.MEASURING).write_text(measuring)
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "numbers")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def copied(monkeypatch):
    """Commits are unpacked, not built: the verdicts do not need pip."""

    def install(root, commit, folder):
        folder.mkdir(parents=True)
        packed = subprocess.run(
            ["git", "archive", commit], cwd=root, check=True, capture_output=True
        ).stdout
        (folder / "source").mkdir()
        subprocess.run(["tar", "-x", "-C", str(folder / "source")], input=packed, check=True)
        return folder / "source"

    monkeypatch.setattr(regress, "install", install)


def compared(tmp_path, base, head, **options):
    first = committed(tmp_path, base)
    second = committed(tmp_path, head)
    return regress.compare(first, second, root=tmp_path, **options)


EVEN = {n: {"ms": 10.0} for n in ("alpha", "beta", "gamma")}


def verdicts(found):
    return {r.what: r.verdict for r in found.rows}


def test_an_unchanged_commit_passes(tmp_path, copied):
    found = compared(tmp_path, EVEN, EVEN)
    assert verdicts(found) == dict.fromkeys(EVEN, "same")
    assert found.exit_code == 0
    assert "none of 3 benchmarks got worse" in found.markdown()


def test_a_slowdown_beyond_the_factor_is_called_so_after_twice_as_many_pairs(tmp_path, copied):
    found = compared(tmp_path, EVEN, EVEN | {"beta": {"ms": 20.0}})
    assert verdicts(found) == {"alpha": "same", "beta": "slower", "gamma": "same"}
    beta = next(r for r in found.rows if r.what == "beta")
    assert (beta.base, beta.head, beta.ratio, beta.pairs) == (10.0, 20.0, 2.0, 10)
    assert found.exit_code == 1
    text = found.markdown()
    assert "1 of 3 benchmarks got worse" in text
    assert text.index("| beta") < text.index("| alpha")  # the worst first
    assert "**slower**" in text


@pytest.mark.parametrize(
    ("ms", "verdict"), [(14.9, "same"), (15.1, "slower"), (6.0, "faster"), (7.0, "same")]
)
def test_the_factor_is_the_border(tmp_path, copied, ms, verdict):
    assert verdicts(compared(tmp_path, EVEN, EVEN | {"alpha": {"ms": ms}}))["alpha"] == verdict


def test_what_a_second_look_does_not_confirm_is_noise(tmp_path, copied):
    found = compared(tmp_path, EVEN, EVEN | {"beta": {"ms": 30.0, "late": 11.0}})
    assert verdicts(found)["beta"] == "same"
    assert next(r for r in found.rows if r.what == "beta").ratio == pytest.approx(1.1)
    assert found.exit_code == 0


def test_memory_counts_beyond_the_factor_and_what_allocators_differ_by(tmp_path, copied):
    base = {
        n: {"ms": 10.0, "peak": p} for n, p in (("alpha", 2.0), ("beta", 40.0), ("gamma", 100.0))
    }
    head = {
        n: {"ms": 10.0, "peak": p} for n, p in (("alpha", 12.0), ("beta", 90.0), ("gamma", 140.0))
    }
    found = compared(tmp_path, base, head)
    assert verdicts(found) == {"alpha": "same", "beta": "more memory", "gamma": "same"}
    assert found.exit_code == 1


def test_broken_benchmarks_outweigh_slow_ones_and_new_ones_are_no_fault(tmp_path, copied):
    base = {"alpha": {"ms": 10.0}, "beta": {"ms": 10.0}}
    head = {
        "alpha": {"error": "Traceback\nValueError: no"},
        "beta": {"ms": 90.0},
        "gamma": {"ms": 10.0},
    }
    found = compared(tmp_path, base, head)
    assert verdicts(found) == {"alpha": "broken", "beta": "slower", "gamma": "new"}
    assert found.exit_code == 2
    assert "alpha: head fails: ValueError: no" in found.markdown()
    assert "gamma: base has no number: no such thing" in found.markdown()


def test_what_head_lacks_is_broken_and_what_neither_has_is_not_here(tmp_path, copied):
    found = compared(tmp_path, {"alpha": {"ms": 1.0}}, {}, only=["alpha", "beta"])
    assert verdicts(found) == {"alpha": "broken", "beta": "not here"}
    assert found.exit_code == 2
    nothing = compared(tmp_path, {}, {})
    assert nothing.exit_code == 2  # what compares nothing shows nothing
    assert "nothing could be compared" in nothing.markdown()


def test_a_base_that_breaks_is_no_new_benchmark(tmp_path, copied):
    found = compared(tmp_path, EVEN | {"alpha": {"error": "boom"}}, EVEN)
    assert verdicts(found) == {"alpha": "broken", "beta": "same", "gamma": "same"}
    assert found.exit_code == 2
    assert "none of 3 benchmarks got worse, 1 broke" in found.markdown()
    assert "alpha: base fails: boom" in found.markdown()


def test_a_head_that_dies_where_memory_is_measured_is_broken(tmp_path, copied):
    dying = MEASURING.replace(
        "assert self.frugal\n",
        'assert self.frugal\n            if found.get("dies"):\n                return '
        '{"error": "killed"}\n',
    )
    first, second = (
        committed(tmp_path, EVEN),
        committed(tmp_path, EVEN | {"beta": {"ms": 10.0, "dies": True}}, measuring=dying),
    )
    found = regress.compare(first, second, root=tmp_path)
    assert verdicts(found)["beta"] == "broken"
    assert found.exit_code == 2


def test_it_runs_from_a_folder_within_and_says_what_it_leaves_out(tmp_path, copied):
    first, second = committed(tmp_path, EVEN), committed(tmp_path, EVEN)
    (tmp_path / "toy" / "numbers.json").write_text("{}")
    said = []
    found = regress.compare(first, second, root=tmp_path / "toy", tell=said.append)
    assert found.exit_code == 0
    assert "uncommitted changes" in said[0]


def test_a_measured_commit_borrows_nothing_from_an_editable_installation(tmp_path):
    """What a commit lacks must be missing, even where the environment has it."""
    root = Path(__file__).resolve().parents[2]
    measuring = regress._loaded(root / regress.MEASURING)
    site = tmp_path / "site"
    site.mkdir()
    for name, source in {
        "": "widthbench",
        "methods": "methods",
        "baselines": "baselines",
        "_suites": "bench/suites",
        "_recipes": "bench/recipes",
        "_claims": "bench/claims",
    }.items():
        subprocess.run(
            ["cp", "-r", str(root / source), str(site / "widthbench" / name)], check=True
        )
    lenet = next(i for i in measuring.items() if str(i).startswith("technique l1-norm"))
    environment = {"WIDTHBENCH_CACHE": str(tmp_path / "cache")}
    with measuring.Worker([site], environment=environment) as worker:
        assert worker.where().startswith(str(site))
        assert "ms" in worker.ask(lenet, rounds=1, least=0.0)
    (site / "widthbench" / "baselines" / "l1_norm.py").unlink()
    with measuring.Worker([site], environment=environment) as worker:
        assert "ms" not in worker.ask(lenet, rounds=1, least=0.0)


def test_bad_input_is_named(tmp_path, copied):
    one = committed(tmp_path, EVEN)
    with pytest.raises(UsageError, match="'nowhere' is no commit of the repository"):
        regress.compare("nowhere", root=tmp_path)
    with pytest.raises(UsageError, match=r"no benchmark's name holds 'alfa'.*alpha"):
        regress.compare(one, root=tmp_path, only=["alfa"])
    with pytest.raises(UsageError, match="above 1 and finite, not 1"):
        regress.compare(one, root=tmp_path, factor=1.0)
    with pytest.raises(UsageError, match="finite"):
        regress.compare(one, root=tmp_path, factor=float("inf"))
    with pytest.raises(UsageError, match="is no commit of the repository"):
        regress.compare("HEAD", root=tmp_path.parent)
    (tmp_path / regress.MEASURING).unlink()
    committed(tmp_path, EVEN, measuring="")
    with pytest.raises(UsageError, match=r"no bench/speed/measuring\.py: it is older"):
        regress.compare(one, root=tmp_path)


def test_processes_that_measure_another_installation_are_refused(tmp_path, copied):
    elsewhere = MEASURING.replace(
        'str(self.site / "toy" / "__init__.py")', "'/usr/lib/toy/__init__.py'"
    )
    one = committed(tmp_path, EVEN, measuring=elsewhere)
    with pytest.raises(UsageError, match="not the commit under"):
        regress.compare(one, root=tmp_path)


def test_commits_are_built_by_pip_apart_from_each_other(tmp_path):
    one, two = (
        committed(tmp_path / "here", {"alpha": {"ms": 1.0}}),
        committed(tmp_path / "here", {"alpha": {"ms": 2.0}}),
    )
    sites = [regress.install(tmp_path / "here", c, tmp_path / c) for c in (one, two)]
    assert [json.loads((s / "toy" / "numbers.json").read_text())["alpha"]["ms"] for s in sites] == [
        1.0,
        2.0,
    ]
    assert all(list(s.glob("toy-1.dist-info")) for s in sites)


def test_a_commit_that_cannot_be_built_is_named(tmp_path):
    committed(tmp_path / "here", EVEN)
    (tmp_path / "here" / "pyproject.toml").write_text("[project]\nname = 5\n")
    git(tmp_path / "here", "commit", "-qam", "broken")
    commit = git(tmp_path / "here", "rev-parse", "HEAD")
    with pytest.raises(UsageError, match=f"commit {commit[:12]} cannot be installed: "):
        regress.install(tmp_path / "here", commit, tmp_path / "out")


def test_the_command_prints_and_writes_a_table_and_gives_the_exit_code(
    tmp_path, copied, monkeypatch, capsys
):
    base = committed(tmp_path / "here", EVEN)
    committed(tmp_path / "here", EVEN | {"alpha": {"ms": 25.0}})
    monkeypatch.chdir(tmp_path / "here")
    assert (
        cli.main(["regress", base, "--only", "alpha", "--write", str(tmp_path / "table.md")]) == 1
    )
    out = capsys.readouterr()
    assert "**slower**" in out.out
    assert "[1/1] alpha: 2.5 slower" in out.err
    assert (tmp_path / "table.md").read_text().strip() == out.out.strip()
    assert cli.main(["regress", base, "--only", "beta", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["ratio"] == 1.0
    assert cli.main(["regress", "nowhere"]) == 2


def test_json_has_no_nan(tmp_path, copied):
    found = compared(tmp_path, {"alpha": {"error": "x"}}, {"alpha": {"error": "x"}}, only=["alpha"])
    assert found.rows[0].plain()["ratio"] is None
    assert "NaN" not in json.dumps([r.plain() for r in found.rows])


@pytest.mark.slow
def test_a_planted_slowdown_of_one_technique_fails_the_gate_and_its_removal_is_faster(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = root / "bench" / "gate.py"
    done = subprocess.run(
        [sys.executable, str(script), "--unchanged", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
