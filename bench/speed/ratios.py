"""Ours over a reference, both in one run, in turn: ratios that depend on the machine far less than
times do. Lower is better.
"""

import statistics

from .measuring import quick

TIMEOUT = 900
RATIOS = [
    "brute force / loop over neurons",
    "merging's decision / loop over pairs, torch scalars",
    "merging's decision / loop over pairs, NumPy scalars",
    "L1, vit_tiny / Torch-Pruning, seconds",
    "L1, vit_tiny / Torch-Pruning, peak memory",
    "batches in memory / DataLoader",
    "product with splitting matrices / backward pass",
    "splitting's eigenpairs / backward pass",
    "AutoPrune's gated step / plain step, lenet5",
    "AutoPrune's gated step / plain step, resnet20_cifar",
]


def _brute_force(pairs: int) -> dict[str, list[float]]:
    from . import neuron_removal

    found = [neuron_removal.first_layer(2000) for _ in range(pairs)]
    return {RATIOS[0]: [ours / loop for ours, loop in found]}


def _merging(pairs: int) -> dict[str, list[float]]:
    from . import neuron_merging as merging

    times, _ = merging.measure(pairs + 1)
    return {
        name: [
            a / b
            for a, b in zip(
                times[merging.DECISION][1:], times[f"{merging.LOOP}, {library}"][1:], strict=True
            )
        ]
        for name, library in zip(RATIOS[1:3], ("torch", "NumPy"), strict=True)
    }


def _l1(pairs: int) -> dict[str, list[float]]:
    from . import l1_torch_pruning as l1

    if quick():
        return {}  # a process for each, whose imports alone take longer than all the rest
    network = "vit_tiny_patch16_224"
    l1.apart(network, "ours", "seconds")  # certifies, once for each version of the code
    return {
        name: [
            l1.apart(network, "ours", what) / l1.apart(network, "theirs", what)
            for _ in range(count)
        ]
        for name, what, count in zip(
            RATIOS[3:5], ("seconds", "mib"), (pairs, 1), strict=True
        )  # memory does not vary
    }


def _pipeline(pairs: int) -> dict[str, list[float]]:
    from widthbench.data import splits
    from widthbench.recipe import Recipe

    from . import pipeline

    samples, recipe = (
        splits.load("digits", 28, val=0).train,
        Recipe(epochs=1, lr=0.1, crop=4, flip=True),
    )
    found = [pipeline.speeds_of(samples, recipe, seed) for seed in range(pairs)]
    return {
        RATIOS[5]: [theirs / ours for ours, theirs in found]
    }  # of images per second: upside down


def _splitting(pairs: int) -> dict[str, list[float]]:
    from . import splitting

    found = splitting.costs("lenet5", pairs)
    return {
        name: [r[part] / r["backward"] for r in found]
        for name, part in zip(RATIOS[6:8], ("product", "all"), strict=True)
    }


def _gated(pairs: int) -> dict[str, list[float]]:
    from . import autoprune

    networks = ("lenet5", "resnet20_cifar")
    return {
        name: [r["gated"] / r["plain"] for r in autoprune.pairs(network, pairs)]
        for name, network in zip(RATIOS[8:10], networks, strict=True)
    }


def ratio(found: dict[str, float | str], name: str) -> float:
    """One of them.

    Raises:
        RuntimeError: If it could not be measured, with the reason.
    """
    value = found[name]
    if isinstance(value, str):
        raise RuntimeError(value)
    return value


class Ratio:
    """Medians of pairs."""

    version = "1"
    timeout = TIMEOUT
    params = [RATIOS]
    param_names = ["what"]

    def setup_cache(self) -> dict[str, float | str]:
        import torch

        torch.set_num_threads(1)
        found: dict[str, float | str] = {}
        expected = iter(
            (RATIOS[:1], RATIOS[1:3], RATIOS[3:5], RATIOS[5:6], RATIOS[6:8], RATIOS[8:10])
        )
        for measure in (_brute_force, _merging, _l1, _pipeline, _splitting, _gated):
            names = next(expected)
            try:
                found |= {
                    n: statistics.median(some) for n, some in measure(1 if quick() else 3).items()
                }
            except Exception as error:  # the others go on
                found |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
        return found

    setup_cache.timeout = TIMEOUT

    def setup(self, found: dict[str, float | str], what: str) -> None:
        if what not in found:
            raise NotImplementedError("left out of --quick")

    def track_over_reference(self, found: dict[str, float | str], what: str) -> float:
        return ratio(found, what)

    track_over_reference.unit = "ours / reference"
