"""Channel groups of networks."""

from __future__ import annotations

import argparse
from typing import Any

from widthbench.cli.common import as_json, own_files, positive, show
from widthbench.errors import UsageError


def add(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = verbs.add_parser(
        "doctor",
        help="channel groups of networks and their grades",
        description=(
            "Discover and certify the channel groups of networks: exact groups may be resized,"
            " coupled ones only with scope='all', frozen ones never. 'inner' counts the exact"
            " groups outside residual streams, 'down to' is the share of the MACs that one channel"
            " per group would leave. Exit code 1 if a network has no exact group."
        ),
    )
    verb.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=(
            "any timm model name; lenet_300_100, lenet5, mlp_sigmoid; one of your own, as in"
            " mynets.py:MyNet"
        ),
    )
    verb.add_argument(
        "--all-families", action="store_true", help=argparse.SUPPRESS
    )  # of earlier versions
    verb.add_argument(
        "--size",
        type=positive,
        metavar="PX",
        help="input height and width (default: as published)",
    )
    verb.add_argument(
        "--channels",
        type=positive,
        metavar="C",
        help="channels of the input (default: as published)",
    )
    verb.add_argument("--groups", action="store_true", help="list every group, not only the counts")
    verb.add_argument(
        "--verify",
        action="store_true",
        help="certify anew, and show the errors of resizing all groups at once",
    )
    own_files(verb)
    as_json(verb)
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; gives the exit code."""
    import torch

    from widthbench.networks import models
    from widthbench.width.certify import find_groups
    from widthbench.width.doctor import diagnose

    if args.all_families:
        raise UsageError(
            "doctor --all-families is a script of its own now: in a checkout, python"
            " bench/studies/coverage.py"
        )
    if not args.models:
        raise UsageError("name one model or more")
    names = [models.named(name) for name in args.models]
    for name in names:
        models.require(name)
    rows: list[dict[str, Any]] = []
    sound = True
    for name in names:
        channels, height, width, classes = models.native(name)
        height, width = args.size or height, args.size or width
        channels = args.channels or channels
        model = models.create(name, classes=classes, channels=channels, size=height)
        x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        groups = find_groups(model, x, cache=not args.verify)
        if args.groups:
            rows += [
                {
                    "model": name,
                    "group": g.name,
                    "channels": g.channels,
                    "blocks": g.blocks,
                    "inner": "yes" if g.inner else "no",
                    "grade": g.grade,
                    "consumers": len(g.consumers),
                    "reason": g.reason,
                }
                for g in groups.values()
            ]
        else:
            rows.append(
                {
                    "model": name,
                    "input": f"{channels} x {height} x {width}",
                    **diagnose(model, groups, x, verify=args.verify),
                }
            )
        sound = sound and any(g.grade == "exact" for g in groups.values())
    show(rows, args.json)
    return 0 if sound else 1
