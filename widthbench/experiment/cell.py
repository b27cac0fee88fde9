"""One decision of the comparison: everything that its result depends on."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

from widthbench.errors import visible
from widthbench.recipe import Recipe
from widthbench.technique.budget import written


class ControlEntry(NamedTuple):
    """What is known of a control where torch is not wanted.

    Attributes:
        note: What the legend of a leaderboard says of it; ``{longest}`` stands for the suite's
            limit.
        sourced: Whether it is about a technique, as "scratch:l1-norm" is.
    """

    note: str
    sourced: bool = False


# each has a class of its name in ``experiment.controls``
CONTROLS = {
    "base": ControlEntry(""),
    "uniform-width": ControlEntry(
        "`uniform-width` is the base scaled down uniformly and trained by the base's recipe"
    ),
    "scratch": ControlEntry(
        "`scratch:X` trains the shape that X found from fresh weights for as many epochs as base,"
        " decision and fine-tuning took",
        sourced=True,
    ),
    "scratch-budget": ControlEntry("`scratch-budget:X` for as many MACs{longest}", sourced=True),
    "l1-budget": ControlEntry(
        "`l1-budget:X` prunes the base by L1 norm to X's budget and fine-tunes it until it has cost"
        " as much as X in all{longest}; where base and fine-tuning together cost more than that,"
        " both are shortened alike",
        sourced=True,
    ),
}


class Frozen(BaseModel):
    """Plain data that nobody changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


WrittenBudget = Annotated[
    str, Field(pattern=r"^[a-z]+:[0-9.eE+-]*[0-9](:[a-z]+)?$"), AfterValidator(written)
]


class Cell(Frozen):
    """One decision of the comparison: everything that its result depends on, and nothing else.

    Attributes:
        dataset: Name of the data set.
        model: Name of the network.
        model_args: Further arguments of its constructor.
        size: Input height and width in pixels.
        technique: A registered technique, or a control (``CONTROLS``).
        params: The technique's parameters; for scratch controls those of the technique whose shape
            they train.
        trials: How many settings of the technique were tried before these were chosen.
        of: For scratch controls, the technique whose shape they train.
        variant: Tells networks apart that are trained by different recipes.
        budget: What is kept, ``kind:fraction``, however it is given, in one way
            (``budget.written``); None for base.
        seed: Of the split, the base network, the decision and the adaptation.
        scope: Which groups may be resized.
        include: Patterns on group names.
        base: Recipe of the base network.
        checkpoint: Weights file of the base network, which is then not trained.
        sha256: What that file's digest must begin with.
        pretrained: Take the weights that timm publishes.
        bases: "published" takes the base network that is published with the results, where there is
            one of these settings, and trains it otherwise; "trained" always trains it.
        mean: Per-channel mean to normalise with; that of the training images (or of the pretrained
            network) if empty.
        std: Per-channel standard deviation likewise.
        finetune: Recipe after the resize.
        calibration: Training samples for batch-norm recalibration.
        val: Fraction of the training part that is held out for choices.
        longest: The most epochs that a ``scratch-budget`` or ``l1-budget`` control of X trains for,
            as a multiple of X's.
        floor: Run a budget below the feasible floor at the floor, and say so, instead of skipping
            it.
        threads: CPU threads.
        device: "auto" takes a GPU where there is one.
        deterministic: Ask torch for deterministic algorithms.
        curves: Replay the technique's path of plans, and have it record what makes pictures.
    """

    dataset: str
    model: str
    model_args: dict[str, Any] = Field(default_factory=dict)
    variant: str = ""
    size: int
    technique: str
    params: dict[str, Any] = Field(default_factory=dict)
    trials: int = Field(default=1, ge=1)
    of: str | None = None
    budget: WrittenBudget | None = None
    seed: int = 0
    scope: Literal["inner", "all"] = "inner"
    include: tuple[str, ...] = ()
    base: Recipe
    checkpoint: str | None = None
    sha256: str | None = None
    pretrained: bool = False
    bases: Literal["trained", "published"] = "trained"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    finetune: Recipe
    calibration: int = 1024
    val: float = 0.2
    longest: float | None = None
    floor: bool = False
    threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    curves: bool = False

    @property
    def trains_base(self) -> bool:
        """Whether the base network is trained here, not loaded."""
        return not (self.checkpoint or self.pretrained)

    @property
    def label(self) -> str:
        """The row's name on a leaderboard: technique, its parameters where they were set, and a
        control's source.
        """
        inside = ",".join(f"{k}={v}" for k, v in sorted(self.params.items()))
        name = (self.of or self.technique) + (f"({inside})" if inside else "")
        return visible(f"{self.technique}:{name}" if self.of else name)

    @property
    def network(self) -> str:
        """The network's name, with the arguments and the variant that the suite gives it:
        ``vgg16_cifar(act_layer=tanh)``.
        """
        inside = ",".join(f"{k}={v}" for k, v in sorted(self.model_args.items()))
        return visible(
            self.model
            + (f"({inside})" if inside else "")
            + (f", {self.variant}" if self.variant else "")
        )

    @property
    def id(self) -> str:
        """A readable name, unique within a suite."""
        parts = [self.dataset, self.network, self.label, self.budget or "", f"s{self.seed}"]
        return "-".join(p for p in parts if p)

    @property
    def identity(self) -> str:
        """All of it as text, the same however its parameters are ordered; less the device, which a
        key leaves out, too.
        """
        given = (self.params, self.model_args)
        if all(
            len(d) < 2 and not any(isinstance(v, dict | list | tuple) for v in d.values())
            for d in given
        ):
            return self.model_dump_json(exclude={"device"})  # nothing whose order could differ
        ordered = {
            k: json.loads(json.dumps(getattr(self, k), sort_keys=True))
            for k in ("params", "model_args")
        }
        return self.model_copy(update=ordered).model_dump_json(exclude={"device"})

    @property
    def group(self) -> str:
        """Cells of one group share a base network, so one worker runs them."""
        return f"{self.dataset}-{self.network}-s{self.seed}"
