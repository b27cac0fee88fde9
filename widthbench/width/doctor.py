"""What can be resized in a network: counts of grades, reachable MACs, and the errors of the two
proofs on request.
"""

from __future__ import annotations

from collections import Counter
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from widthbench.width.cost import CostModel
from widthbench.width.groups import Groups
from widthbench.width.inputs import Example
from widthbench.width.proofs import errors_of_all


def diagnose(
    model: nn.Module, groups: Groups, example_input: Example, *, verify: bool = False
) -> dict[str, Any]:
    """One row of ``widthbench doctor``.

    Args:
        model: The network.
        groups: Its graded groups.
        example_input: ``[B, ...]``, or whatever the network takes (``Inputs``).
        verify: Measure, on a randomised float64 copy, the errors of splitting all exact groups at
            once and of removal against gates at 0 (relative to the largest output).

    Returns:
        Counts by grade, the number of inner groups, the least share of the MACs that exact and
        coupled groups can be brought down to, the errors if asked for, and the most frequent
        reasons.
    """
    count = Counter(g.grade for g in groups.values())
    reachable = {n: g.blocks for n, g in groups.items() if g.grade in ("exact", "coupled")}
    with torch.no_grad():
        cost = CostModel(model, groups, example_input)
    least = cost(reachable).macs / max(1, cost.original.macs)
    reasons = Counter(g.reason for g in groups.values() if g.grade == "frozen")
    row: dict[str, Any] = {
        "exact": count["exact"],
        "coupled": count["coupled"],
        "frozen": count["frozen"],
        "inner": sum(g.inner for g in groups.values() if g.grade == "exact"),
        "MACs": f"{cost.original.macs / 1e6:.1f} M",
        "down to": f"{100 * least:.1f} %",
    }
    if verify:
        split, removal = errors_of_all(model, groups, example_input)
        row |= {"split error": f"{split:.1e}", "gates vs removal": f"{removal:.1e}"}
    why = [f"{n}x {shorten(reason, 90, placeholder=' …')}" for reason, n in reasons.most_common(2)]
    row["frozen because"] = "; ".join(why) or groups.problem
    return row
