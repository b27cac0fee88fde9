"""Plain data about training: how it is done, and what it costs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Recipe(BaseModel):
    """How a network is trained.

    Attributes:
        epochs: Passes over the training samples; 0 for no training, where a suite fine-tunes
            nothing.
        batch_size: Samples per step, at least 2; a last batch of one sample is skipped (BatchNorm
            cannot normalise it).
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: Peak learning rate; needed where there are epochs.
        momentum: Of SGD.
        weight_decay: Not applied to vectors (biases, norm affines).
        warmup_epochs: Linear warm-up from a hundredth of ``lr``, then a cosine to ``min_lr``, both
            by step.
        min_lr: Where the cosine ends.
        label_smoothing: Of the cross-entropy.
        clip: The largest norm of a step's gradients, all parameters together; larger ones are
            scaled down to it. 0 for no limit.
        crop: Pixels of black padding on each side before a random crop of the old size.
        flip: Mirror every other image, left to right.
        cutout: Side in pixels of a black square at a random place.
        resized_crop: Least share of the area in a random resized crop (0.08 is usual on ImageNet;
            0: none), for sets of images that are read from files. Those in memory are small
            already.
        amp: Compute forward passes in bfloat16 where torch finds that safe (autocast); weights stay
            in float32.
        accumulate: Parts that a batch is computed in, one after another, gradients added up: less
            memory, the same step. BatchNorm sees the parts.
        ema: Decay of an average of the weights over steps, which the training ends with (timm's
            ``ModelEmaV3``); 0 for none.
        compile: Train the network through ``torch.compile``, where a step is a plain cross-entropy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: float = Field(ge=0, le=10_000)
    batch_size: int = Field(default=64, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup_epochs: float = Field(default=0, ge=0)
    min_lr: float = Field(default=0, ge=0)
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    clip: float = Field(default=0, ge=0)
    crop: int = Field(default=0, ge=0, le=64)
    flip: bool = False
    cutout: int = Field(default=0, ge=0, le=512)
    resized_crop: float = Field(default=0, ge=0, le=1)
    amp: bool = False
    accumulate: int = Field(default=1, ge=1)
    ema: float = Field(default=0, ge=0, lt=1)
    compile: bool = False

    @model_validator(mode="after")
    def _rate(self) -> Recipe:
        if self.epochs and "lr" not in self.model_fields_set:
            raise ValueError("lr: Field required, since there are epochs")
        return self

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return bool(self.crop or self.flip or self.cutout or self.resized_crop)


class Spent(BaseModel):
    """What a phase cost.

    Attributes:
        forward_macs: Multiply-accumulates in forward passes, over all samples.
        backward_macs: In backward passes, counted as twice the forward pass (gradients of weights
            and of inputs).
        epochs: Passes over the training samples, where it trained.
        seconds: Wall-clock time.
        halved: Training runs whose batches were computed in halves for want of memory.
    """

    model_config = ConfigDict(extra="forbid")

    forward_macs: int = 0
    backward_macs: int = 0
    epochs: float = 0
    seconds: float = 0
    halved: int = 0

    def add(self, other: Spent) -> Spent:
        """The sum of both."""
        return Spent(**{k: getattr(self, k) + getattr(other, k) for k in Spent.model_fields})
