"""How far networks can be resized: timm's architectures, torchvision's, and structures of the
field, beside what Torch-Pruning does with each.

    python bench/studies/coverage.py [NAME ...] [--hours H] [--limit SECONDS] [--results DIR]

Each network is certified, brought down to one channel per group on paper, cut in half, run,
trained, saved and loaded, in a process of its own; then Torch-Pruning's own pruner halves it,
and what that leaves is held against the whole network with the removed inputs at zero. NAME is
a network of timm's, a family of timm's, "torchvision:NAME" or "structure:NAME". Without one,
structures come first, then the smallest member of every family, then the second smallest, and
so on, until the hours are over; rows that this code has measured before are kept. Writes
coverage.md and coverage.jsonl; the exit code is 1 if fewer than 90 % pass.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
import torch_pruning as tp
import torchvision
from tabulate import tabulate
from timm.models import list_models, list_modules
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from speed.l1_torch_pruning import pruner_alone
from studies.structures import STRUCTURES

from widthbench import api
from widthbench.children import Child, ChildDied, Say
from widthbench.errors import CostError, UsageError, did_you_mean
from widthbench.networks import models
from widthbench.paths import write_atomic
from widthbench.provenance import code_digest
from widthbench.report.speed import where
from widthbench.width import Groups, keep, resize, separated
from widthbench.width.assembly import discover
from widthbench.width.certify import certify
from widthbench.width.cost import CostModel, count_macs
from widthbench.width.doctor import diagnose
from widthbench.width.inputs import Inputs
from widthbench.width.proofs import TOLERANCE

Row = dict[str, Any]
TITLE = "# How far networks can be resized"
# pixels, above which a network is looked at with 224: attention over 768 px does not fit this
# memory in float64
LARGE = 400
HEAVY = 100e6  # parameters, above which a network is left out: its float64 copies do not fit
REACH = 0.1  # share of the MACs above which a network is named with its reason
ALIKE = 1e-5  # relative, float64: Torch-Pruning's half against the masked whole


def families(chosen: Sequence[str] = ()) -> dict[str, list[str]]:
    """Timm's networks by family (module), those with the fewest parameters first.

    They are built without memory for their weights, which takes some minutes for all; those above
    100 M parameters are left out.

    Args:
        chosen: Which ones; all if none is named.
    """
    found: dict[str, list[str]] = {}
    for family in chosen or (m for m in list_modules() if f"timm.models.{m}" in sys.modules):
        sizes: dict[str, int] = {}
        for name in list_models(module=family):
            try:
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some cannot be built without memory, or need what is not installed
                continue
        found[family] = sorted((n for n in sizes if sizes[n] <= HEAVY), key=lambda n: (sizes[n], n))
    return found


def names(chosen: Sequence[str] = ()) -> list[str]:
    """The networks, in the order in which they are looked at.

    Args:
        chosen: Networks, or families of timm's; all if none is named.

    Raises:
        UsageError: If there is none of a name.
    """
    vision = torchvision.models.list_models(module=torchvision.models)
    vision += torchvision.models.list_models(module=torchvision.models.segmentation)
    others = [f"structure:{n}" for n in STRUCTURES] + [f"torchvision:{n}" for n in vision]
    known = {*others, *list_models()}
    if chosen and (missing := [n for n in chosen if n not in known and n not in list_modules()]):
        raise UsageError(f"there is no network '{missing[0]}'{did_you_mean(missing[0], known)}")
    if chosen and all(n in known for n in chosen):
        return [*chosen]
    by_family = families([n for n in chosen if n not in known])
    if chosen:
        return [m for n in chosen for m in ([n] if n in known else by_family[n])]
    turns = itertools.zip_longest(*by_family.values())
    timms = [name for turn in turns for name in turn if name is not None]
    first = len(by_family)
    return [
        *(n for n in others if n.startswith("structure:")),
        *timms[:first],
        *(n for n in others if n.startswith("torchvision:")),
        *timms[first:],
    ]


def survey(name: str) -> Row:
    """One network: its groups, how well they are proven, and what half of it does.

    Args:
        name: Of the network.

    Returns:
        Counts by grade, the largest errors of the split and gate probes over all exact groups at
        once, seconds, and for the 50 % L1 resize of all certified groups whether it runs forwards,
        backwards, and comes back from saved weights the same.
    """
    row: Row = {"model": name}
    try:
        model, x = built(name)
        row["input"] = " and ".join(" x ".join(map(str, s[1:])) for s in x.shapes)
        with torch.no_grad():
            x.run(model)
    except Exception as error:
        return row | {"problem": f"does not load: {_first(error)}"}
    row["params"] = sum(p.numel() for p in model.parameters())
    begin = time.process_time()
    found = discover(model, x)
    row["discovery s"] = round(time.process_time() - begin, 2)
    begin = time.process_time()
    groups = certify(model, found, x)
    row["certification s"] = round(time.process_time() - begin, 1)
    row |= diagnose(model, groups, x, verify=True)
    row["heads"] = sum(g.heads and g.grade == "exact" for g in groups.values())
    row["reasons"] = dict(
        Counter(g.reason for g in groups.values() if g.grade == "frozen").most_common()
    )
    row["least blocks"] = max((g.blocks for g in groups.values() if g.grade != "frozen"), default=1)
    worst = max(float(row["split error"]), float(row["gates vs removal"]))
    unsound = "" if worst < TOLERANCE else f"all exact groups at once miss the bound: {worst:.1e}"
    row["problem"] = groups.problem or unsound or ("" if row["exact"] else "no exact group")
    try:
        outcome = api.outcome("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")
    except UsageError as error:
        return row | {"problem": row["problem"] or f"cannot be halved: {_first(error)}"}
    half, cost = outcome.resized, CostModel(model, groups, x)
    row |= costs(model, groups, cost)
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


def costs(model: nn.Module, groups: Groups, cost: CostModel) -> Row:
    """How many resizes cost what was predicted from the widths: one channel of each block, and two
    draws of random widths.

    Returns:
        ``resizes``, and ``differences``: what torch counts otherwise.
    """
    certified = groups.select("all")
    row: Row = {"resizes": 0, "differences": []}
    for seed in (None, 0, 1):
        draw = random.Random(seed)
        plan, widths = {}, {}
        for name, group in certified.items():
            size = group.channels // group.blocks
            left = 1 if seed is None else draw.randint(1, size)
            widths[name] = left * group.blocks
            plan[name] = keep([b * size + i for b in range(group.blocks) for i in range(left)])
        row["resizes"] += 1
        try:
            cost.counted(resize(model, certified, plan), widths)
        except CostError as error:
            row["differences"].append(_first(error))
        except Exception as error:  # weights of one number cannot be standardised
            row["differences"].append(f"cannot be counted, as it does not run: {_first(error)}")
    return row


def _first(error: BaseException) -> str:
    return shorten(
        (str(error).strip().splitlines() or [type(error).__name__])[0], 160, placeholder=" …"
    )


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _forwards(half: nn.Module, x: Inputs) -> bool:
    with torch.no_grad():
        return all(bool(torch.isfinite(t).all()) for t in _tensors(x.run(half.eval())))


def _backwards(half: nn.Module, x: Inputs) -> bool:
    """In training mode: finite gradients, and not for none of its parameters."""
    half.train()
    try:
        two = x.batch(lambda t: torch.cat([t, t.flip(-1)]))
        torch.stack([t.square().mean() for t in _tensors(two.run(half))]).sum().backward()
    finally:
        half.eval()
    slopes = [p.grad for p in half.parameters() if p.grad is not None]
    half.zero_grad(set_to_none=True)
    return bool(slopes) and all(bool(torch.isfinite(g).all()) for g in slopes)


def _reloads(half: nn.Module, x: Inputs) -> bool:
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
            torch.equal(a, b)
            for a, b in zip(_tensors(x.run(half)), _tensors(x.run(other)), strict=True)
        )


def survey_alone(name: str) -> Row:
    """What Torch-Pruning's own pruner makes of a network at 50 % of its channels by L1 norm, for
    comparison.

    Returns:
        ``alone``: what is wrong with its half, or "as masked" where it computes what the whole
        network does with the removed inputs at zero, else "not as masked" ("runs" where that was
        not looked at); ``share``: of the MACs.
    """
    model, x = built(name, apart=False)
    model, x = model.double(), x.map(lambda t: t.double() if t.is_floating_point() else t)
    with torch.no_grad():
        shapes, macs = [t.shape for t in _tensors(x.run(model))], count_macs(model, x)
    whole = copy.deepcopy(model)
    begin = time.perf_counter()
    try:
        pruner = pruner_alone(model, x)
        _prune(model, whole, pruner)
    except Exception as error:
        return {"alone": f"raises {type(error).__name__}: {_first(error)}"}
    row: Row = {"alone s": round(time.perf_counter() - begin, 2)}
    try:
        with torch.no_grad():
            half, masked = _tensors(x.run(model)), _tensors(x.run(whole))
        if [t.shape for t in half] != shapes:
            return row | {"alone": "half of it gives something of another shape"}
        row["share"] = round(count_macs(model, x) / max(macs, 1), 4)
        if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
            return row | {"alone": "runs"}  # its inputs have no columns of their own to close
    except Exception as error:
        return row | {"alone": f"half of it does not run: {_first(error)}"}
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(half, masked, strict=True)
    )
    return row | {"alone": "as masked" if error < ALIKE else "not as masked"}


def _prune(model: nn.Module, whole: nn.Module, pruner: Any) -> None:
    """Prune in place, and put what reads the removed channels in the other network to zero."""
    twins = dict(zip(model.modules(), whole.modules(), strict=True))
    left: dict[nn.Module, Tensor] = {}  # positions of the whole layer's inputs, by layer
    for group in pruner.step(interactive=True):
        for dep, index in group:
            layer, what = dep.target.module, dep.handler.__name__
            if what == "prune_in_channels" and layer in twins and hasattr(layer, "weight"):
                weight: Any = twins[layer].weight
                across = 0 if getattr(layer, "transposed", False) else 1
                at = left.setdefault(layer, torch.arange(weight.shape[across]))
                gone = at[torch.tensor(index)]
                weight.data.index_fill_(across, gone, 0.0)
                left[layer] = at[~torch.isin(at, gone)]
        group.prune()
    for attention in model.modules():  # as its example for timm's transformers does
        heads = getattr(pruner, "num_heads", {}).get(getattr(attention, "qkv", None))
        if heads:
            attention.num_heads = heads  # type: ignore[assignment]
            width = attention.qkv.out_features // 3  # type: ignore
            attention.head_dim = width // heads  # type: ignore[assignment]
            if hasattr(attention, "attn_dim"):
                attention.attn_dim = width  # type: ignore[assignment]


def built(name: str, *, apart: bool = True) -> tuple[nn.Module, Inputs]:
    """A network, untrained, in eval mode, and what it takes.

    timm's have the input size that they were published with, or 224 px where that is above 400, and
    1000 classes where they were published without any. ``nn.MultiheadAttention`` is separated if
    ``apart``, as ``widthbench.apply`` does.
    """
    torch.manual_seed(0)
    kind, _, own = name.partition(":")
    if kind == "structure":
        model, example = STRUCTURES[own]()
    elif kind == "torchvision":
        options = {"init_weights": False} if own in ("googlenet", "inception_v3") else {}
        if own in torchvision.models.list_models(module=torchvision.models.segmentation):
            options["weights_backbone"] = None
        px = 299 if own == "inception_v3" else 224
        model, example = torchvision.models.get_model(own, **options), torch.randn(1, 3, px, px)
    else:
        channels, height, width, classes = models.native(name)
        if max(height, width) > LARGE:
            height = width = 224
        model = models.create(name, classes=classes or 1000, channels=channels, size=height)
        example = torch.randn(1, channels, height, width)
    model.eval()
    return separated(model) if apart else model, Inputs.of(example)


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


def both(name: str, *, limit_s: float, threads: int = 1) -> Row:
    """A network's row: ours and Torch-Pruning's, each in a process of its own that may take so many
    seconds; Torch-Pruning at most 120 of them.
    """
    row = {"model": name, "code": code_digest("width"), **apart(survey, name, threads, limit_s)}
    other = apart(survey_alone, name, threads, min(limit_s, 120))
    return row | ({"alone": other["problem"]} if "problem" in other else other)


def passed(row: Row) -> bool:
    """Whether a network loads, has an exact group, and half of it runs, trains and comes back."""
    return not row.get("problem")


def _left(row: Row) -> float:
    """The share of the MACs that one channel per group leaves."""
    return float(row["down to"].split()[0]) / 100 if "down to" in row else 1.0


def _why(row: Row) -> str:
    """Why so much is left of a network."""
    reasons = [f"{n} groups: {_general(r)}" for r, n in row.get("reasons", {}).items()]
    if not reasons and row.get("least blocks", 1) > 1:
        reasons = [f"channels come in up to {row['least blocks']} blocks of equal counts"]
    return row.get("problem") or "; ".join(reasons[:3]) or "nothing is frozen in it"


def page(rows: Sequence[Row], of: int) -> str:
    """The survey as a page of markdown.

    Args:
        rows: One for each network.
        of: How many networks there are.
    """
    good = [r for r in rows if passed(r)]
    timms = [r for r in rows if ":" not in r["model"]]
    shares = sorted(map(_left, timms)) or [1.0]
    split, removal = (
        max((float(r[k]) for r in rows if k in r), default=0.0)
        for k in ("split error", "gates vs removal")
    )
    far = sorted((r for r in rows if _left(r) > REACH), key=_left, reverse=True)
    said = Counter(_verdict(r) for r in rows)
    table = [
        {
            "network": f"`{r['model']}`",
            "input": r.get("input", ""),
            "MACs": r.get("MACs", ""),
            "left": r.get("down to", ""),
            "exact": r.get("exact", ""),
            "heads": r.get("heads", ""),
            "coupled": r.get("coupled", ""),
            "frozen": r.get("frozen", ""),
            "first call": (
                f"{r['discovery s'] + r['certification s']:.1f} s" if "discovery s" in r else ""
            ),
            "half": "runs" if passed(r) else "**no**",
            "MACs of half": _percent(r.get("half MACs")),
            "Torch-Pruning": _verdict(r),
            "MACs of its half": _percent(r.get("share")),
        }
        for r in sorted(rows, key=lambda r: r["model"])
    ]
    wrong = [f"`{r['model']}`: {d}" for r in rows for d in r.get("differences", ())]
    resizes = sum(r.get("resizes", 0) for r in rows)
    why: Counter[str] = Counter()
    for r in rows:
        for reason, n in r.get("reasons", {}).items():
            why[_general(reason)] += n
    failed = [f"- `{r['model']}`: {r['problem']}" for r in rows if not passed(r)]
    others = [
        f"- `{r['model']}`: {r['alone']}" for r in rows if _verdict(r) in ("raises", "breaks")
    ]
    reasons = [f"- {n} groups: {reason}" for reason, n in why.most_common(25)]
    return f"""{TITLE}

{len(rows)} of {of} networks: timm's architectures up to {HEAVY / 1e6:.0f} M parameters
({len(timms)} of them, the smallest of each family first), torchvision's, and small networks with
one structure of the field each. They are untrained, at the input size that they were published
with, or at 224 px where that is above {LARGE} px.

**Reach.** One channel per group leaves {100 * statistics.median(shares):.1f} % of the MACs of
timm's architectures in the median, {100 * _quantile(shares, 0.9):.1f} % at the 90th percentile.
More than {100 * REACH:.0f} % stay in {len(far)} of all {len(rows)}, for these reasons:

{_list(f"`{r['model']}`: {r.get('down to', 'all')}; {_why(r)}" for r in far)}

**Soundness.** {len(good)} of {len(rows)} load, have at least one exact group, and survive a
50 % L1 resize of all certified groups forwards, backwards (in training mode) and through saved
weights. Largest errors over all exact groups of all of them, all groups of a network at once:
splitting {split:.1e}, removal against gates {removal:.1e} (relative, float64; the bound is
1e-9). MACs and parameters predicted from widths (one channel of each group, and two random
draws) are what torch counts on the resized network in
{resizes - len(wrong)} of {resizes} resizes.

**Torch-Pruning** {tp.__version__}, its own pruner at 50 % of the channels by L1 norm, without
our groups and certificates. Its half computes what the whole network does with the removed
inputs at zero in {said["as masked"]} of {len(rows)}; something else in
{said["not as masked"]} (norms across channels do that, and so do wrong indices); it runs and was
not compared in {said["runs"]} (``nn.MultiheadAttention``); it does not run,
or has another shape, in {said["breaks"]}; the pruner raises, or takes too long, in
{said["raises"]}.

"exact" groups may be resized, heads among them; "coupled" ones with scope="all" only; "left" is
the share of the MACs with one channel per group; "first call" is in seconds of one core (process
time), discovery and certification together. Written by `python bench/studies/coverage.py`.

<details><summary>All networks</summary>

{tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True)}

</details>

Those that do not pass:

{_list(line[2:] for line in failed)}

Costs that differ, or cannot be counted:

{_list(wrong)}

<details><summary>What Torch-Pruning says, or leaves, where its half does not run</summary>

{_list(line[2:] for line in others)}

</details>

Why groups are frozen, most frequent first:

{_list(line[2:] for line in reasons)}

{where()}, timm {timm.__version__}
"""


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none"


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The least entry that is no less than this share of them."""
    return ordered[max(0, -(-int(1000 * share * len(ordered)) // 1000) - 1)]


def _verdict(row: Row) -> str:
    """Torch-Pruning's, in a word."""
    said = str(row.get("alone", ""))
    if said in ("as masked", "not as masked", "runs", ""):
        return said
    return "breaks" if said.startswith("half of it") else "raises"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _general(reason: str) -> str:
    """A reason without the numbers and names of one network."""
    for mark in (": ", " by "):
        head, found, _ = reason.partition(mark)
        if found and head.startswith(("a resized network", "splitting its", "removing channels")):
            return head
    return shorten(reason, 100, placeholder=" …")


def write(rows: Sequence[Row], of: int, folder: Path) -> list[Path]:
    """Write ``coverage.md`` and ``coverage.jsonl``."""
    files = [folder / "coverage.jsonl", folder / "coverage.md"]
    write_atomic(files[0], "".join(json.dumps(r) + "\n" for r in rows))
    write_atomic(files[1], page(rows, of))
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="networks, families (default: all)"
    )
    parser.add_argument("--hours", type=float, default=12, metavar="H", help="of all (12)")
    parser.add_argument(
        "--limit", type=float, default=300, metavar="S", help="seconds for one network (300)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where coverage.md goes (results)",
    )
    options = parser.parse_args()
    end = time.monotonic() + 3600 * options.hours
    file, code, rows = options.results / "coverage.jsonl", code_digest("width"), []
    if not options.names and file.is_file():
        kept = map(json.loads, file.read_text().splitlines())
        rows = [r for r in kept if r.get("code") == code]
    wanted = names(options.names)
    for name in wanted:
        if any(r["model"] == name for r in rows):
            continue
        if time.monotonic() > end:
            break
        rows.append(both(name, limit_s=options.limit))
        print(
            f"{name}: {rows[-1].get('problem') or 'passes'}, {rows[-1].get('down to', 'all')} left,"
            f" Torch-Pruning {_verdict(rows[-1])}",
            file=sys.stderr,
            flush=True,
        )
        if not options.names and len(rows) % 10 == 0:
            write(rows, len(wanted), options.results)
    if options.names:  # a part of them is no page
        keys = ("model", "exact", "coupled", "frozen", "down to", "problem", "alone")
        print(tabulate([{k: r.get(k, "") for k in keys} for r in rows], headers="keys"))
    else:
        print("\n".join(map(str, write(rows, len(wanted), options.results))))
    return 0 if sum(map(passed, rows)) >= 0.9 * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
