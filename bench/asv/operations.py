"""Training steps, forward passes, discovery, certification, resizing: milliseconds, and MiB above what is held before."""

from .measuring import Item, Measured, applicable, measured, number

DEVICES = ["cpu", "cuda"]
NETWORKS = ["resnet20_cifar", "vit_tiny_patch16_224", "resnet50"]
SMALL = ["test_resnet", "vit_tiny_patch16_224"]
BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}
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
        models, devices = self.params
        return [self.item(m, d) for d in devices for m in models]

    def setup(self, found: Measured, *at) -> None:
        applicable(found, self.item(*at))

    def track_ms(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "ms")

    def track_peak_mib(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "peak")

    def track_held_mib(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "held")

    track_ms.unit = "ms"
    track_peak_mib.unit = track_held_mib.unit = "MiB"


class _Batched(_Operation):
    """In batches, as many images as the device suits."""

    params = [NETWORKS, DEVICES, sorted({b for some in BATCHES.values() for b in some})]
    param_names = ["model", "device", "batch"]

    def items(self) -> list[Item]:
        return [self.item(m, d, b) for d, some in BATCHES.items() for m in NETWORKS for b in some]

    def setup(self, found: Measured, *at) -> None:
        item = self.item(*at)
        if item.batch not in BATCHES[item.device]:
            raise NotImplementedError(f"batches of {item.batch} are not for {item.device}")
        applicable(found, item)


class TrainingStep(_Batched):
    """A step of ``training.fit``: forward, backward, SGD; bfloat16 autocast on CUDA."""

    kind = "training step"

    def setup_cache(self) -> Measured:
        return measured([i for i in self.items() if i.batch > 1])

    setup_cache.timeout = TIMEOUT

    def setup(self, found: Measured, *at) -> None:
        if self.item(*at).batch == 1:
            raise NotImplementedError("batch norms need more than one image")
        super().setup(found, *at)


class Inference(_Batched):
    """A forward pass of the whole network, and of what L1 leaves of it at a budget of MACs."""

    kind = "inference"
    params = [*_Batched.params, ["", "macs:0.5", "macs:0.25"]]
    param_names = [*_Batched.param_names, "budget"]

    def items(self) -> list[Item]:
        return [
            self.item(m, d, b, budget) for d, some in BATCHES.items() for m in NETWORKS for b in some for budget in self.params[-1]
        ]

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
