"""Which of timm's families can be resized: one small member of each, certified and cut in half.

    python bench/studies/families.py [FAMILY ...] [--limit SECONDS] [--results DIR]

Each is certified, cut in half, run, trained, saved and loaded, in a process of its own. All of them
take about an hour, and write coverage.md; the exit code is 1 if fewer than 90 % pass. Of some
families only a table is printed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from tabulate import tabulate
from timm.models import list_models, list_modules
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from speed.l1_torch_pruning import prune_alone

from widthbench import api
from widthbench.children import Child, ChildDied, Say
from widthbench.errors import UsageError, did_you_mean
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.report.speed import where
from widthbench.width.assembly import discover
from widthbench.width.certify import certify
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.doctor import diagnose
from widthbench.width.proofs import TOLERANCE

Row = dict[str, Any]
TITLE = "# What of timm's families can be resized"
# pixels, above which a network is looked at with 224: attention over 768 px does not fit this
# memory in float64
LARGE = 400


def members(families: Sequence[str] = ()) -> dict[str, tuple[str, int]]:
    """The member of each timm family (module) with the fewest parameters, and the number of
    members.

    Networks are built without memory for their weights, which takes about two minutes for all.

    Args:
        families: Which ones; all of timm's if none is named.

    Raises:
        UsageError: If timm has no such family.
    """
    known = list_modules()
    for family in families:
        if family not in known:
            raise UsageError(f"timm has no family '{family}'{did_you_mean(family, known)}")
    found: dict[str, tuple[str, int]] = {}
    for family in families or known:
        sizes: dict[str, int] = {}
        names = list_models(module=family)
        for name in names:
            try:
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some cannot be built without memory, or need what is not installed
                continue
        if names:
            found[family] = (
                min(sizes, key=lambda n: (sizes[n], n)) if sizes else names[0],
                len(names),
            )
    return found


def survey(name: str) -> Row:
    """One network: its groups, how well they are proven, and what half of it does.

    Args:
        name: Any timm model name; it is built untrained, at the input size that it was published
            with, or at 224 px where that is above 400 px.

    Returns:
        Counts by grade, the largest errors of the split and gate probes over all exact groups at
        once, seconds, and for the 50 % L1 resize of all certified groups whether it runs forwards,
        backwards, and comes back from saved weights the same.
    """
    row: Row = {"model": name}
    try:
        model, x = built(name)
        row["input"] = " x ".join(map(str, x.shape[1:]))
        with torch.no_grad():
            model(x)
    except Exception as error:
        return row | {"problem": f"does not load: {_first(error)}"}
    begin = time.perf_counter()
    found = discover(model, x)
    row["discovery s"] = round(time.perf_counter() - begin, 2)
    begin = time.perf_counter()
    groups = certify(model, found, x)
    row["certification s"] = round(time.perf_counter() - begin, 1)
    row |= diagnose(model, groups, x, verify=True)
    row["heads"] = sum(g.heads and g.grade == "exact" for g in groups.values())
    row["reasons"] = dict(
        Counter(g.reason for g in groups.values() if g.grade == "frozen").most_common()
    )
    worst = max(float(row["split error"]), float(row["gates vs removal"]))
    unsound = "" if worst < TOLERANCE else f"all exact groups at once miss the bound: {worst:.1e}"
    row["problem"] = groups.problem or unsound or ("" if row["exact"] else "no exact group")
    try:
        outcome = api.outcome("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")
    except UsageError as error:
        return row | {"problem": row["problem"] or f"cannot be halved: {_first(error)}"}
    half, cost = outcome.resized, CostModel(model, groups, x)
    assert half is not None  # apply() always fills it in
    row["half MACs"] = round(count_macs(half, x) / max(cost.original.macs, 1), 4)
    for what, check in (
        ("forwards", _forwards),
        ("backwards", _backwards),
        ("saved and loaded", _reloads),
    ):
        try:
            problem = "" if check(half, x) else f"half of it, {what}, gives something else"
        except Exception as error:
            problem = f"half of it does not run {what}: {_first(error)}"
        row["problem"] = row["problem"] or problem
    return row


def _first(error: BaseException) -> str:
    return shorten(
        (str(error).strip().splitlines() or [type(error).__name__])[0], 160, placeholder=" …"
    )


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _forwards(half: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return all(bool(torch.isfinite(t).all()) for t in _tensors(half.eval()(x)))


def _backwards(half: nn.Module, x: Tensor) -> bool:
    """In training mode: finite gradients, and not for none of its parameters."""
    half.train()
    try:
        torch.stack(
            [t.square().mean() for t in _tensors(half(torch.cat([x, x.flip(-1)])))]
        ).sum().backward()
    finally:
        half.eval()
    slopes = [p.grad for p in half.parameters() if p.grad is not None]
    half.zero_grad(set_to_none=True)
    return bool(slopes) and all(bool(torch.isfinite(g).all()) for g in slopes)


def _reloads(half: nn.Module, x: Tensor) -> bool:
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(half)
    with torch.no_grad():
        for t in (
            other.state_dict().values()
        ):  # what is not saved, such as tables that the code makes, stays
            t.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        return all(
            torch.equal(a, b) for a, b in zip(_tensors(half(x)), _tensors(other(x)), strict=True)
        )


def survey_alone(name: str) -> Row:
    """What Torch-Pruning's own pruner makes of a network at 50 % of its channels by L1 norm, for
    comparison.

    Returns:
        ``alone``: the share of MACs that its half has, or why there is none.
    """
    model, x = built(name)
    shapes, macs = [t.shape for t in _tensors(model(x))], count_macs(model, x)
    begin = time.perf_counter()
    try:
        prune_alone(model, x)
    except Exception as error:
        return {"alone": f"raises {type(error).__name__}: {_first(error)}"}
    row: Row = {"alone s": round(time.perf_counter() - begin, 2)}
    try:
        if [t.shape for t in _tensors(model(x))] != shapes:
            return row | {"alone": "half of it gives something of another shape"}
        share = count_macs(model, x) / max(macs, 1)
    except Exception as error:
        return row | {"alone": f"half of it does not run: {_first(error)}"}
    return row | {"alone": round(share, 4)}


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A timm network, untrained, and an input ``[1, C, H, W]`` of the size that it was published
    with, or of 224 px above 400.
    """
    channels, height, width, classes = models.native(name)
    if max(height, width) > LARGE:
        height = width = 224
    model = models.create(name, classes=classes, channels=channels, size=height)
    return model, torch.randn(
        1, channels, height, width, generator=torch.Generator().manual_seed(0)
    )


def apart(what: Callable[[str], Row], name: str, threads: int, limit_s: float) -> Row:
    """A row made in a process of its own."""
    here, there = (_module(f.__module__) for f in (made, what))
    request = {"module": there, "function": what.__name__, "of": name, "threads": threads}
    with Child(f"{here}:{made.__name__}", path=sys.path) as child:
        try:
            row: Row = child.ask(request, limit_s=limit_s)
        except ChildDied as died:
            row = {"problem": str(died)}
    return row


def _module(name: str) -> str:
    """How a process that runs no script finds a module."""
    return Path(str(sys.modules[name].__file__)).stem if name == "__main__" else name


def made(request: Mapping[str, Any], _: Say) -> Row:
    """A row, in the process that makes it."""
    torch.set_num_threads(request["threads"])
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as empty:  # certificates are made anew, and once
        os.environ["WIDTHBENCH_CACHE"] = empty
        make = getattr(importlib.import_module(request["module"]), request["function"])
        try:
            row: Row = make(request["of"])
        except Exception as error:
            row = {"problem": f"{type(error).__name__}: {_first(error)}"}
    return row


def survey_all(
    chosen: Mapping[str, tuple[str, int]], *, limit_s: float, threads: int = 1
) -> Iterator[Row]:
    """A row for each family: ours and Torch-Pruning's, each in a process of its own that may take
    so many seconds.

    Args:
        chosen: By family, the network and the number of members.
        limit_s: Seconds for one network; Torch-Pruning has at most 120 of them.
        threads: CPU threads.
    """
    for family, (name, count) in chosen.items():
        row = {
            "family": family,
            "members": count,
            "model": name,
            **apart(survey, name, threads, limit_s),
        }
        other = apart(survey_alone, name, threads, min(limit_s, 120))
        yield row | ({"alone": other["problem"]} if "problem" in other else other)


def passed(row: Row) -> bool:
    """Whether a family loads, has an exact group, and half of its member runs, trains and comes
    back.
    """
    return not row.get("problem")


def page(rows: Sequence[Row]) -> str:
    """The survey as a page of markdown."""
    good = [r for r in rows if passed(r)]
    share = 100 * len(good) / max(1, len(rows))
    split, removal = (
        max((float(r[k]) for r in rows if k in r), default=0.0)
        for k in ("split error", "gates vs removal")
    )
    table = [
        {
            "family": r["family"],
            "of": r["members"],
            "model": f"`{r['model']}`",
            "input": r.get("input", ""),
            "exact": r.get("exact", ""),
            "heads": r.get("heads", ""),
            "coupled": r.get("coupled", ""),
            "frozen": r.get("frozen", ""),
            "MACs": r.get("MACs", ""),
            "down to": r.get("down to", ""),
            "half's": _percent(r.get("half MACs")),
            "discovery": f"{r['discovery s']:.2f} s" if "discovery s" in r else "",
            "certification": f"{r['certification s']:.1f} s" if "certification s" in r else "",
            "split error": r.get("split error", ""),
            "gates vs removal": r.get("gates vs removal", ""),
            "passes": "yes" if passed(r) else "**no**",
            "Torch-Pruning's half": (
                _percent(r["alone"]) if isinstance(r.get("alone"), float) else "–"
            ),
        }
        for r in rows
    ]
    why: Counter[str] = Counter()
    for r in rows:
        for reason, n in r.get("reasons", {}).items():
            why[_general(reason)] += n
    runs = [r["alone"] for r in rows if isinstance(r.get("alone"), float)]
    others = (
        "\n".join(
            f"- {r['family']} (`{r['model']}`): {r['alone']}"
            for r in rows
            if isinstance(r.get("alone"), str)
        )
        or "- none"
    )
    failed = (
        "\n".join(
            f"- {r['family']} (`{r['model']}`): {r['problem']}" for r in rows if not passed(r)
        )
        or "- none"
    )
    reasons = "\n".join(f"- {n} groups: {reason}" for reason, n in why.most_common(25)) or "- none"
    return f"""{TITLE}

One member of each of timm's {len(rows)} families, the one with the fewest parameters, untrained, at
the input size that it was published with, or at 224 px where that is above {LARGE} px. {len(good)}
of {len(rows)} ({share:.0f} %) load, have at least one exact group, and survive a 50 % L1 resize of
all certified groups forwards, backwards (in training mode) and through saved weights. Largest
errors over all exact groups of all of them, all groups of a network at once: splitting {split:.1e},
removal against gates {removal:.1e} (relative, float64; the bound is 1e-9).

"exact" groups may be resized, heads among them; "coupled" ones with scope="all" only; "down to" is
the share of the MACs that is left with one channel per group, "half's" the share after the resize.
"Torch-Pruning's half" is the share that its own pruner leaves at 50 % of the channels by L1 norm,
without our groups and certificates: in {len(runs)} of {len(rows)} families the network that it
leaves runs, in {sum(r > 0.99 for r in runs)} of these with no less than 99 % of the MACs. Written
by `python bench/studies/families.py`.

{tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True)}

Those that do not pass:

{failed}

What Torch-Pruning's own pruner says or leaves where its half does not run (it may take 120 s):

{others}

Why groups are frozen, most frequent first:

{reasons}

{where()}, timm {timm.__version__}
"""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _general(reason: str) -> str:
    """A reason without the numbers and names of one network."""
    for mark in (": ", " by "):
        head, found, _ = reason.partition(mark)
        if found and head.startswith(("a resized network", "splitting its", "removing channels")):
            return head
    return shorten(reason, 100, placeholder=" …")


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``coverage.md`` and ``coverage.jsonl``."""
    files = [folder / "coverage.jsonl", folder / "coverage.md"]
    write_atomic(files[0], "".join(json.dumps(r) + "\n" for r in rows))
    write_atomic(files[1], page(rows))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of timm (default: all)")
    parser.add_argument(
        "--limit", type=float, default=900, metavar="S", help="seconds for one network (900)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where coverage.md goes (results)",
    )
    options = parser.parse_args()
    rows = []
    for row in survey_all(members(options.families), limit_s=options.limit):
        rows.append(row)
        print(
            f"{row['family']} ({row['model']}): {row.get('problem') or 'passes'}",
            file=sys.stderr,
            flush=True,
        )
    if options.families:  # a part of them is no page
        keys = (
            "family",
            "model",
            "exact",
            "coupled",
            "frozen",
            "down to",
            "split error",
            "gates vs removal",
            "problem",
        )
        print(tabulate([{k: r.get(k, "") for k in keys} for r in rows], headers="keys"))
    else:
        print("\n".join(map(str, write(rows, options.results))))
    return 0 if sum(map(passed, rows)) >= 0.9 * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
