"""Where cells run. Every engine calls the same ``run_cell``."""

from __future__ import annotations

from widthbench import data, models, registry
from widthbench.errors import UsageError, did_you_mean
from widthbench.suites import Suite
from widthbench.technique import build


def check(suite: Suite) -> None:
    """Name what a suite asks for and this installation does not have, before anything runs.

    Raises:
        UsageError: On an unknown technique or parameter, model or data set.
    """
    for entry in suite.techniques:
        build(registry.load(entry.id), entry.params)
    for network in suite.models:
        models.require(network.name)
    for name in suite.datasets:
        if name not in data.names():
            raise UsageError(f"suite {suite.name}: unknown dataset '{name}'{did_you_mean(name, data.names())}")
