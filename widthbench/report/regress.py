"""Has a commit made anything slower? Two commits side by side in one environment, in turn, and
again before the verdict.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from widthbench.errors import UsageError, did_you_mean

MEASURING = Path("bench") / "speed" / "measuring.py"
LEAST = 0.1  # seconds of a timed sample
NOTABLE = 16.0  # MiB; differences below are those of allocators
Verdict = Literal["same", "faster", "slower", "more memory", "new", "broken", "not here"]
BAD: tuple[Verdict, ...] = ("slower", "more memory")


@dataclass(frozen=True)
class Comparison:
    """One benchmark at two commits.

    Attributes:
        what: Its name.
        base: Median ms at the one, NaN where there is none.
        head: At the other.
        ratio: Median over pairs of head over base.
        spread: The least and the largest pair.
        memory: Peak MiB above what was held before, at each.
        verdict: "same" (within the factor), "faster", "slower", "more memory", "new" (base lacks
            it), "broken" (head fails, or lacks what base has), or "not here" (neither has it on
            this machine).
        pairs: How many; more where a first look was beyond the factor.
        note: Why something is new, broken or not here.
    """

    what: str
    verdict: Verdict
    base: float = float("nan")
    head: float = float("nan")
    ratio: float = float("nan")
    spread: tuple[float, float] = (float("nan"), float("nan"))
    memory: tuple[float, float] = (float("nan"), float("nan"))
    pairs: int = 0
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """Plain data, with None where there is no number."""
        finite = lambda v: None if v != v else v  # noqa: E731
        return {
            k: (
                [finite(x) for x in v]
                if isinstance(v, tuple)
                else finite(v)
                if isinstance(v, float)
                else v
            )
            for k, v in asdict(self).items()
        }


@dataclass(frozen=True)
class Regression:
    """All comparisons of two commits.

    Attributes:
        base: The one commit.
        head: The other.
        factor: From which ratio on something counts as slower.
        rows: The comparisons.
        device: Where they ran.
    """

    base: str
    head: str
    factor: float
    device: str = "cpu"
    rows: Sequence[Comparison] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """2 if a benchmark broke, 1 if one is slower or takes more memory, else 0."""
        verdicts = {r.verdict for r in self.rows}
        return (
            2
            if "broken" in verdicts or verdicts <= {"not here"}
            else 1
            if verdicts & set(BAD)
            else 0
        )

    def markdown(self) -> str:
        """A table for a pull request, the worst first."""
        order = ("broken", *BAD, "faster", "same", "new", "not here")
        lines = [
            {
                "benchmark": r.what,
                "base, ms": _number(r.base),
                "head, ms": _number(r.head),
                "head / base": _number(r.ratio),
                "pairs": (
                    f"{_number(r.spread[0])} to {_number(r.spread[1])} (n = {r.pairs})"
                    if r.pairs
                    else ""
                ),
                "peak memory, MiB": " → ".join(map(_number, r.memory)) if r.pairs else "",
                "verdict": f"**{r.verdict}**" if r.verdict in (*BAD, "broken") else r.verdict,
            }
            for r in sorted(
                self.rows, key=lambda r: (order.index(r.verdict), -r.ratio if r.pairs else 0)
            )
        ]
        bad, broke, compared = (
            sum(r.verdict in v for r in self.rows)
            for v in (BAD, ("broken",), (*BAD, "faster", "same"))
        )
        title = (
            f"{bad or 'none'} of {len(self.rows)} benchmarks got worse"
            if compared
            else "nothing could be compared"
        )
        title += f", {broke} broke" if broke else ""
        notes = "".join(f"- {r.what}: {r.note}\n" for r in self.rows if r.note)
        table = tabulate(lines, headers="keys", tablefmt="pipe", disable_numparse=True)
        return (
            f"### Speed of `{self.head[:12]}` against `{self.base[:12]}`: {title}\n\n{table}\n\n"
            f"Medians on {self.device}. Slower means more than {self.factor:g}x, in a second look"
            " too, by fresh processes and twice as many pairs; more memory means more than"
            f" {self.factor:g}x and {NOTABLE:g} MiB.\n" + (f"\n{notes}" if notes else "")
        )


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def commit_of(root: Path, name: str) -> str:
    """The hash of a commit, branch or tag.

    Raises:
        UsageError: If there is no such thing, or no repository.
    """
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UsageError(f"git cannot be run ({error}); install it") from error
    if done.returncode:
        raise UsageError(
            f"'{name}' is no commit of the repository at {root}; name a branch, a tag or a hash"
            " that `git log` shows"
        )
    return done.stdout.strip()


def _top(folder: Path) -> Path:
    """The repository that a folder lies in, or the folder, if in none."""
    answer = _git(folder, "rev-parse", "--show-toplevel")
    return Path(answer) if answer else folder


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def install(root: Path, commit: str, folder: Path) -> Path:
    """Unpack a commit under ``folder/source`` and install it, without what it depends on, under
    ``folder/site``; gives the latter.

    Raises:
        UsageError: If pip cannot build it, with pip's last line.
    """
    source, site = folder / "source", folder / "site"
    source.mkdir(parents=True)
    packed = folder / "source.tar"
    subprocess.run(["git", "archive", "--output", str(packed), commit], cwd=root, check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(source, filter="data")
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        str(site),
    ]
    if _can_build():
        words.append("--no-build-isolation")
    done = subprocess.run([*words, str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"commit {commit[:12]} cannot be installed: {last}")
    return site


def _can_build() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def _loaded(path: Path) -> Any:
    """The module that measures."""
    if not path.is_file():
        raise UsageError(
            f"the head commit has no {MEASURING}: it is older than `widthbench regress`; name a"
            " newer one"
        )
    name = f"widthbench_measuring_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _two(
    measuring: Any, sites: Mapping[str, Path], caches: Path, frugal: bool = False
) -> Iterator[dict[str, Any]]:
    """A fresh process for each commit."""
    with ExitStack() as stack:
        yield {
            side: stack.enter_context(
                measuring.Worker(
                    [site], frugal=frugal, environment={"WIDTHBENCH_CACHE": str(caches / side)}
                )
            )
            for side, site in sites.items()
        }


def _pairs(
    workers: Mapping[str, Any], item: Any, count: int
) -> list[dict[str, Any]] | dict[str, dict[str, Any]]:
    """``{"base": ms, "head": ms}`` per pair, who goes first alternating; or the answers of both,
    where one of them is no number.
    """
    pairs = []
    for i in range(count):
        sides = ("base", "head") if i % 2 else ("head", "base")
        answers = {side: workers[side].ask(item, rounds=1, least=LEAST) for side in sides}
        if any("ms" not in a for a in answers.values()):
            return answers
        pairs.append({side: statistics.median(a["ms"]) for side, a in answers.items()})
    return pairs


def _peaks(
    workers: Mapping[str, Any], item: Any
) -> tuple[float, float] | dict[str, dict[str, Any]]:
    """MiB of both; or the answers, where one of them failed. NaN where the system does not say."""
    answers = {side: workers[side].ask(item, memory=True) for side in ("base", "head")}
    if any("peak" not in a for a in answers.values()):
        return answers
    return float(answers["base"]["peak"]), float(answers["head"]["peak"])


def _more(peaks: tuple[float, float], factor: float) -> bool:
    return peaks[1] > factor * peaks[0] and peaks[1] - peaks[0] > NOTABLE


def _missing(what: str, answers: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """The verdict where a side gave no number."""
    base, head = answers["base"], answers["head"]
    reason = {
        side: str(a.get("error") or a.get("skip") or "").strip().splitlines()
        for side, a in answers.items()
    }
    last = {side: lines[-1] if lines else "" for side, lines in reason.items()}
    for side in ("head", "base"):
        if "error" in answers[side]:
            return Comparison(what, "broken", note=f"{side} fails: {last[side]}")
    if "skip" in head and "ms" in base:
        return Comparison(what, "broken", note=f"head lacks it: {last['head']}")
    if "skip" in head:
        return Comparison(what, "not here", note=last["head"])
    return Comparison(what, "new", note=f"base has no number: {last['base']}")


def compare(
    base: str,
    head: str = "HEAD",
    *,
    root: Path | None = None,
    factor: float = 1.5,
    pairs: int = 5,
    only: Sequence[str] = (),
    device: str = "cpu",
    tell: Callable[[str], None] = lambda text: None,
) -> Regression:
    """Compare the speed of two commits.

    Both are installed beside each other and measured by head's benchmarks in the environment at
    hand, one process for each, sample by sample in turn. What is beyond the factor is measured
    again by fresh processes, twice as often; it counts if the second look says the same.

    Args:
        base: The commit that was, as git names it.
        head: The commit that is.
        root: The repository; by default the working directory's.
        factor: From which median ratio on something is slower, above 1.
        pairs: Pairs of samples of a first look.
        only: Parts of names; none means all.
        device: "cpu" or "cuda".
        tell: Called with each verdict as it is found.

    Raises:
        UsageError: On a commit or a benchmark that does not exist, one that cannot be installed, or
            a factor of at most 1.
    """
    if not 1 < factor < math.inf:
        raise UsageError(
            f"the factor must be above 1 and finite, not {factor:g}: a ratio of 1 is no change"
        )
    if device == "cuda":
        import torch  # takes seconds, and nothing else here needs it

        if not torch.cuda.is_available():
            raise UsageError(
                "device 'cuda' is asked for, but torch finds no GPU: nothing could be measured"
            )
    root = _top((root or Path.cwd()).resolve())
    commits = {"base": commit_of(root, base), "head": commit_of(root, head)}
    if _git(root, "status", "--porcelain", "--untracked-files=no"):
        tell("there are uncommitted changes: they are not measured, commits are")
    work = Path(tempfile.mkdtemp(prefix="widthbench-regress-"))
    try:
        sites = {side: install(root, commit, work / side) for side, commit in commits.items()}
        measuring = _loaded(work / "head" / "source" / MEASURING)
        chosen = _chosen(measuring.items(device), only)
        rows: list[Comparison] = []
        with (
            _two(measuring, sites, work) as timing,
            _two(measuring, sites, work, frugal=True) as remembering,
        ):
            for side, worker in timing.items():
                _from(worker.where(), sites[side])
            for item in chosen:
                again = lambda: _two(measuring, sites, work)  # noqa: E731
                row = _compared(
                    item,
                    timing,
                    remembering,
                    again,
                    lambda: _two(measuring, sites, work, frugal=True),
                    factor,
                    pairs,
                )
                rows.append(row)
                tell(
                    f"[{len(rows)}/{len(chosen)}] {row.what}: {_number(row.ratio)} {row.verdict}"
                    f" {row.note}".rstrip()
                )
        return Regression(commits["base"], commits["head"], factor, device, rows)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compared(
    item: Any,
    timing: Any,
    remembering: Any,
    again: Callable[[], Any],
    again_frugal: Callable[[], Any],
    factor: float,
    count: int,
) -> Comparison:
    what = str(item)
    pairs = _pairs(timing, item, count)
    if isinstance(pairs, dict):
        return _missing(what, pairs)
    if _ratio(pairs) > factor:
        with again() as fresh:
            repeated = _pairs(fresh, item, 2 * count)
        if isinstance(repeated, dict):
            return _missing(what, repeated)
        pairs = repeated
    peaks = _peaks(remembering, item)
    if not isinstance(peaks, dict) and _more(peaks, factor):
        with again_frugal() as fresh:
            peaks = _peaks(fresh, item)
    if isinstance(peaks, dict):
        return _missing(what, peaks)
    ratio, ratios = _ratio(pairs), [p["head"] / p["base"] for p in pairs]
    verdict: Verdict = (
        "slower" if ratio > factor else "more memory" if _more(peaks, factor) else "same"
    )
    if verdict == "same" and ratio < 1 / factor:
        verdict = "faster"
    middle = {side: statistics.median(p[side] for p in pairs) for side in ("base", "head")}
    return Comparison(
        what,
        verdict,
        middle["base"],
        middle["head"],
        ratio,
        (min(ratios), max(ratios)),
        peaks,
        len(pairs),
    )


def _ratio(pairs: Sequence[Mapping[str, float]]) -> float:
    return statistics.median(p["head"] / p["base"] for p in pairs)


def _chosen(items: Sequence[Any], only: Sequence[str]) -> list[Any]:
    for text in only:
        if not any(text in str(item) for item in items):
            raise UsageError(
                f"no benchmark's name holds '{text}'{did_you_mean(text, [str(i) for i in items])}"
            )
    return [item for item in items if not only or any(text in str(item) for text in only)]


def _from(where: str, site: Path) -> None:
    """That a process measures the commit that it should, and not what the environment has.

    Raises:
        UsageError: If it does not.
    """
    if not Path(os.path.realpath(where)).is_relative_to(os.path.realpath(site)):
        raise UsageError(
            f"a process measures the widthbench in {where}, not the commit under {site}; is"
            " PYTHONPATH overruled?"
        )
