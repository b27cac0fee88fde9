"""Each technique from a network to the resized one, on 256 random images: milliseconds, and MiB
above what is held before.
"""

import itertools

from .measuring import TECHNIQUES, Item, Measured, applicable, fewer, measured, number


class Technique:
    """``widthbench.apply`` with parameters that keep the training short
    (``measuring.TECHNIQUES``).
    """

    version = "1"
    timeout = 900
    params = [list(TECHNIQUES), fewer(["test_resnet", "lenet5"]), ["macs:0.5"], ["cpu", "cuda"]]
    param_names = ["technique", "model", "budget", "device"]

    def item(self, *at) -> Item:
        return Item("technique", **dict(zip(self.param_names, at, strict=True)))

    def setup_cache(self) -> Measured:
        return measured([self.item(*at) for at in itertools.product(*self.params)])

    setup_cache.timeout = 900

    def setup(self, found: Measured, *at) -> None:
        applicable(found, self.item(*at))

    def track_ms(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "ms")

    def track_peak_mib(self, found: Measured, *at) -> float:
        return number(found, self.item(*at), "peak")

    track_ms.unit = "ms"
    track_peak_mib.unit = "MiB"
