"""Training steps, forward passes, discovery, certification, resizing: milliseconds, and MiB above
what is held before.
"""

import itertools

from .measuring import Item, Measured, applicable, fewer, measured, number

DEVICES = ["cpu", "cuda"]
NETWORKS = fewer(["resnet20_cifar", "vit_tiny_patch16_224", "resnet50"])
SMALL = fewer(["test_resnet", "test_vit"])
TIMEOUT = 600


class _Operation:
    """Reads what ``setup_cache`` measured, in a process for all."""

    version = "1"
    timeout = TIMEOUT
    kind = ""
    params: list[list] = [NETWORKS, DEVICES]
    param_names = ["model", "device"]

    def item(self, *at) -> Item:
        return Item(self.kind, **dict(zip(self.param_names, at, strict=True)))

    def items(self) -> list[Item]:
        return [self.item(*at) for at in itertools.product(*self.params)]

    def setup(self, found: Measured, *at) -> None:
        applicable(found, self.item(*at))

    def track_ms(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "ms")

    def track_peak_mib(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "peak")

    track_ms.unit = "ms"
    track_peak_mib.unit = "MiB"


class _Batched(_Operation):
    """In batches, as many images as the device suits."""

    places = ["cpu, 1 image", "cpu, 8 images", "cuda, 1 image", "cuda, 256 images"]
    params = [NETWORKS, places]
    param_names = ["model", "where"]

    def item(self, *at) -> Item:
        model, where, *budget = at
        device, count = where.split(", ")
        return Item(
            self.kind, model, device=device, batch=int(count.split()[0]), budget="".join(budget)
        )


class TrainingStep(_Batched):
    """A step of ``training.fit``: forward, backward, SGD; bfloat16 autocast on CUDA."""

    kind = "training step"
    params = [NETWORKS, _Batched.places[1::2]]

    def setup_cache(self) -> Measured:
        return measured(self.items())

    setup_cache.timeout = TIMEOUT

    def track_held_mib(self, found: Measured, *at) -> float:
        """Before the steps: weights and the batch on CUDA; on a CPU the whole process."""
        return number(found, self.item(*at), "held")

    track_held_mib.unit = "MiB"


class Inference(_Batched):
    """A forward pass of the whole network, and of what L1 leaves of it at a budget of MACs."""

    kind = "inference"
    params = [*_Batched.params, ["", "macs:0.5", "macs:0.25"]]
    param_names = [*_Batched.param_names, "budget"]

    def setup_cache(self) -> Measured:
        return measured(self.items())

    setup_cache.timeout = TIMEOUT


class Discovery(_Operation):
    """Channel groups from one forward pass, not graded."""

    kind = "discovery"

    def setup_cache(self) -> Measured:
        return measured(self.items())

    setup_cache.timeout = TIMEOUT


class Certification(_Operation):
    """Grades by float64 probes."""

    kind = "certification"
    params = [SMALL, DEVICES]

    def setup_cache(self) -> Measured:
        return measured(self.items())

    setup_cache.timeout = TIMEOUT


class Resizing(_Operation):
    """Half of the channels of every group, by L1's plan."""

    kind = "resize"

    def setup_cache(self) -> Measured:
        return measured(self.items())

    setup_cache.timeout = TIMEOUT
