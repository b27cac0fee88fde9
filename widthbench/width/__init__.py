"""Channel groups of a network: discovery, certification, gates, resizing and analytic cost."""

from widthbench.width.assembly import discover
from widthbench.width.attention import separated
from widthbench.width.certify import certify, find_groups
from widthbench.width.cost import Cost, CostModel
from widthbench.width.gates import gated
from widthbench.width.groups import Group, Groups
from widthbench.width.inputs import Inputs
from widthbench.width.resize import Plan, Resize, keep, resize

__all__ = [
    "Cost",
    "CostModel",
    "Group",
    "Groups",
    "Inputs",
    "Plan",
    "Resize",
    "certify",
    "discover",
    "find_groups",
    "gated",
    "keep",
    "resize",
    "separated",
]
