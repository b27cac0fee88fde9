"""AutoPrune: learn which channels to keep, by an auxiliary parameter on each of them that descends
the validation loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench import parallel
from widthbench.data.samples import Passes
from widthbench.errors import UsageError
from widthbench.recipe import Recipe
from widthbench.technique.base import Outcome, Technique
from widthbench.technique.budget import Budget, global_widths, top_channels
from widthbench.technique.parameters import NotNegative, Positive
from widthbench.technique.task import State, Task
from widthbench.technique.trajectory import Returns, Since, Trajectory
from widthbench.training.measuring import accuracy, laid_out
from widthbench.training.recalibration import norms_left_alone
from widthbench.training.state import steps_of
from widthbench.width.gates import Joined, gated, sums_over_consumers
from widthbench.width.groups import Groups
from widthbench.width.resize import keep

Estimator = Literal["softplus", "leaky_relu", "linear"]
Decoupling = Literal["sgn", "unit", "none"]
START = 1.0  # of all auxiliary parameters: open, and all alike
LEAK = 0.1  # slope of the leaky ReLU where m is not above 0
MEMORY = 0.99  # of the running mean square of the sensitivities
RECENT = 0.9  # of the running mean of each channel's sensitivity
EVERY = 10  # steps between two choices of μ
CLOSED = 25  # steps that a channel must have been closed for its return to count as a recovery
POINTS = 40  # of the trajectory
JOINED = ("m", "drift", "open")
KEPT = ("step", "drawn", "mu", "price", "square")
NOTES = ("trajectory", "since", "returns")


class AutoPrune(Technique):
    """Channels with trainable gates (Xiao, Wang and Rajasekaran, "AutoPrune", NeurIPS 2019).

    Channel c has an auxiliary parameter m. The network uses ``t = w · h(m)`` for its consumers'
    incoming weights w, with h(m) = 1 where m > 0, else 0. Steps alternate: the weights descend the
    training loss with weight decay, the auxiliary parameters take

        ``m ← m - η (s / ρ + μ p) ĥ'(m)``,  ``s = Σ ∂L_val/∂t · sgn(w)``  over a channel's weights

    on a batch of val (BatchNorm's running statistics stay those of training). ĥ' is a
    straight-through estimator of h', p the channel's price (``penalty``). A closed channel recovers
    when m rises above 0 again. ρ, the running root mean square of s over all channels and steps,
    makes η and μ numbers without a unit. Every ten steps μ is set as high as the open channels need
    to keep on a straight line from everything to the budget; then m orders all channels, the best
    that fit the budget are frozen open, and the weights are trained on as they will be cut.

    Args:
        estimator: ĥ'(m): "softplus" ``σ(m)``, "leaky_relu" 1 where m > 0, else 0.1, "linear" 1.
        decoupling: "sgn" as above (the paper's sensitivity decoupling); "none" ``Σ ∂L/∂t · w``, the
            gradient; "unit" the gradient over ‖w‖. Summed over a channel, the angle between "sgn"
            and the gradient need not be acute.
        start: "trained", or "fresh" to prune while training from scratch.
        epochs: Of alternating steps, the frozen ones included; other settings are those of the
            task's recipe.
        weight_decay: In place of the recipe's.
        lr: Of the weights, in place of the recipe's.
        eta: η.
        mu: A fixed μ, for which the channels that end open are kept, if the budget allows; None: as
            above.
        penalty: What μ is the price of: "cost", what a channel adds to what the budget counts
            (MACs, parameters; channels alike); "channels", all channels alike, as in the paper:
            cheap channels then close first.
        ramp: Share of the steps in which the budget is reached.
        freeze: Share of the steps after which gates are frozen.
    """

    id = "autoprune"
    access = "training"
    bibtex = """@inproceedings{xiao2019autoprune,
  title = {{AutoPrune}: Automatic Network Pruning by Regularizing Auxiliary Parameters},
  author = {Xiao, Xia and Wang, Zigeng and Rajasekaran, Sanguthevar},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""

    estimator: Estimator = "softplus"
    decoupling: Decoupling = "sgn"
    start: Literal["trained", "fresh"] = "trained"
    epochs: Positive = 4
    weight_decay: NotNegative | None = None
    lr: Positive | None = None
    eta: Positive = 0.1
    mu: NotNegative | None = None
    penalty: Literal["cost", "channels"] = "cost"
    ramp: Annotated[float, Field(gt=0, le=1)] = 0.5
    freeze: Annotated[float, Field(gt=0, le=1)] = 0.75

    def __post_init__(self) -> None:
        """Refuse gates that are frozen before the budget is reached."""
        if self.ramp > self.freeze:
            raise ValueError(f"ramp must not be above freeze, but {self.ramp} > {self.freeze}")

    def decide(self, task: Task, state: State) -> Outcome:
        """Train weights and gates in turn, freeze, and cut what is closed."""
        model = copy.deepcopy(task.model)
        changed = {"epochs": self.epochs, "weight_decay": self.weight_decay, "lr": self.lr}
        recipe = task.recipe.model_copy(update={k: v for k, v in changed.items() if v is not None})
        gates = Gates(self, task, recipe)
        with gated(model, task.groups, gates.open, on="weight", products=gates.products):
            task.fit(
                model,
                task.train,
                recipe,
                losses=gates.losses,
                state=gates,
                desc=f"{self.id} {task.budget}",
            )
        rows = {n: gate.nonzero().flatten().cpu() for n, gate in gates.frozen().items()}
        return Outcome(
            {n: keep(r) for n, r in rows.items()}, model=model, series=gates.trajectory.series
        )


def derivative(m: Tensor, estimator: Estimator) -> Tensor:
    """Straight-through estimate ĥ'(m) of the step function's derivative, of the shape of ``m``."""
    if estimator == "softplus":
        return m.sigmoid()
    return torch.ones_like(m) if estimator == "linear" else (m > 0).to(m) * (1 - LEAK) + LEAK


def updated(m: Tensor, s: Tensor, mu: float | Tensor, eta: float, estimator: Estimator) -> Tensor:
    """One step of auxiliary parameters ``m [N]`` with sensitivities ``s [N]``: ``m - η (s + μ)
    ĥ'(m)``.
    """
    return m - eta * (s + mu) * derivative(m, estimator)


def sensitivities(
    model: nn.Module, groups: Groups, slopes: Mapping[str, Tensor], *decouplings: Decoupling
) -> list[Tensor]:
    """What the loss says of each channel's gate.

    Args:
        model: The network.
        groups: The gated groups.
        slopes: ``∂L/∂t`` by consumer, of the shape of its weight; ``t = w · h``.
        decouplings: "sgn" ``Σ ∂L/∂t · sgn(w)``; "none" ``Σ ∂L/∂t · w``; "unit" that over ``‖w‖``;
            sums are over the channel's weights in all consumers.

    Returns:
        ``[ΣN]`` for each of them, groups one after another.
    """
    weights = [model.get_submodule(layer)._parameters["weight"] for layer in slopes]
    # all layers' in one vector: three products, however many layers there are
    w = torch.cat([cast("Tensor", some).detach().flatten() for some in weights])
    slope = torch.cat([some.flatten() for some in slopes.values()])
    terms = {"sgn": lambda: slope * w.sign(), "none": lambda: slope * w, "squares": w.square}
    needed = {n for d in decouplings for n in ({"unit": ("none", "squares")}.get(d, (d,)))}
    names = [n for n in terms if n in needed]
    made = torch.stack([terms[n]() for n in names])
    parts = made.split([some.numel() for some in slopes.values()], dim=1)
    sums = sums_over_consumers(
        model,
        groups,
        {n: p.view(-1, *slopes[n].shape) for n, p in zip(slopes, parts, strict=True)},
    )
    total = dict(zip(names, torch.cat([sums[n] for n in groups], dim=1), strict=True))
    return [
        total[d] if d != "unit" else total["none"] / total["squares"].sqrt().clamp_min(1e-12)
        for d in decouplings
    ]


def opened(m: Tensor, block: Tensor) -> Tensor:
    """Gates h(m) as 0 and 1, ``[N]``: 1 where m > 0, and for the largest m of a block in which none
    is.

    Args:
        m: ``[N]``.
        block: long ``[N]``, which block of channels each belongs to.
    """
    channel = torch.arange(len(m), device=m.device)
    best = m.new_full(m.shape, -math.inf).scatter_reduce(0, block, m, "amax")[block]
    place = torch.where(m == best, channel, len(m))
    first = torch.full_like(channel, len(m)).scatter_reduce(0, block, place, "amin")[block]
    return torch.where(best > 0, m > 0, channel == first).to(m)


class Gates:
    """Auxiliary parameters and gates of one run, and what is told of it.

    Attributes:
        m: Auxiliary parameters.
        open: The gates h(m), 0 or 1.
        drift: Recent means of s/ρ.
        products: The gated weights that the last pass used, by consumer.
        trajectory: At each point the step, open channels, shares of MACs and
            parameters, μ, mean losses since the last point, recoveries so far (channels that opened
            after at least 25 steps closed), channel-steps so far in which that could have happened
            ("shut"), channels open now that had once been closed so long ("returned"), and the
            least cosine since the last point. "freeze": the step from which on gates are frozen.
    """

    def __init__(self, method: AutoPrune, task: Task, recipe: Recipe) -> None:
        if not task.groups:
            raise UsageError(
                "autoprune has no channel groups to gate here: widthbench doctor says why"
            )
        self.method, self.task, self.recipe = method, task, recipe
        self.total = steps_of(recipe, len(task.train))[1]
        self.ramp = max(1, round(method.ramp * self.total))
        self.last = max(1, round(method.freeze * self.total))
        like = task.example_input.new_ones(())
        self.m, self.open = (Joined(task.groups, like, START) for _ in range(2))
        self.drift = Joined(task.groups, like)
        blocks = [g.channels // g.blocks for g in task.groups.values() for _ in range(g.blocks)]
        block = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
        self.block = block.to(like.device)
        self.products: dict[str, list[Tensor]] = {}
        self.trajectory = Trajectory(task)
        self.trajectory.note("freeze", self.last)
        self.step = self.drawn = 0  # steps, and batches of val
        self.mu = method.mu or 0.0
        self.price = torch.ones_like(self.m.all, dtype=torch.float64)
        self.square = like * 0  # the running mean square
        self.since = Since(like, ("loss", "val_loss"), ("cosine",))
        self.returns = Returns(self.open.all, CLOSED)
        self.val = Passes(task.val, recipe.batch_size, task.seed)
        task.widths(self.m, "global")  # a budget below the floor is refused before any work

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        state = {name: getattr(self, name).all for name in JOINED}
        state |= {name: getattr(self, name) for name in KEPT}
        return state | {"notes": {name: getattr(self, name).state_dict() for name in NOTES}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; gates change in place."""
        for name in JOINED:
            getattr(self, name).all.copy_(state[name])
        for name in KEPT:
            value = state[name]
            setattr(self, name, value.to(self.task.device) if isinstance(value, Tensor) else value)
        for name in NOTES:
            getattr(self, name).load_state_dict(state["notes"][name])

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """A step of the auxiliary parameters, and the training loss for a step of the weights."""
        self._forget()
        if self.step < self.last:
            self._learn(model)
        elif self.step == self.last:
            self.open.all.copy_(torch.cat(list(self.frozen().values())))
        loss = F.cross_entropy(model(x), y, label_smoothing=self.recipe.label_smoothing)
        yield loss
        self.since.add("loss", loss)
        self.step += 1
        if self.step % max(1, self.total // POINTS) == 0 or self.step == self.total:
            self._point(model)

    def _forget(self) -> None:
        for used in self.products.values():
            used.clear()

    def _learn(self, model: nn.Module) -> None:
        """One step of the auxiliary parameters on a batch of val."""
        if self.step % EVERY == 0:
            if self.method.penalty == "cost":
                self.price = self._prices()
            if self.method.mu is None:
                self.mu = self._needed()
        x, y = self.val.batch(self.drawn)
        with norms_left_alone(model), parallel.alike():
            loss = F.cross_entropy(model(laid_out(x, model)), y)
        layers, used = zip(
            *((n, t) for n, some in self.products.items() for t in some), strict=True
        )
        slopes: dict[str, Tensor] = {}
        for layer, slope in zip(layers, torch.autograd.grad(loss, used), strict=True):
            slopes[layer] = slopes[layer] + slope if layer in slopes else slope
        both = {self.method.decoupling: 0, "none": 0}
        found = sensitivities(model, self.task.groups, slopes, *both)
        s, slope_of = found[0], derivative(self.m.all, self.method.estimator)
        cosine = F.cosine_similarity(s * slope_of, found[-1] * slope_of, dim=0)
        self.since.add("cosine", cosine)
        self.since.add("val_loss", loss)
        square = s.square().mean()
        if not torch.isfinite(loss + square):
            raise UsageError(
                f"autoprune diverged: the val loss is {loss.item()}, the mean square of its slopes"
                f" {float(square)} at step {self.step + 1}; lower lr = {self.recipe.lr:g}"
            )
        self.drawn += 1
        self.square = MEMORY * self.square + (1 - MEMORY) * square
        scaled = s / (self.square / (1 - MEMORY**self.drawn)).sqrt().clamp_min(1e-30)
        self.drift.all.mul_(RECENT).add_((1 - RECENT) * scaled)
        eta, estimator = self.method.eta, self.method.estimator
        mu = (self.mu * self.price).to(scaled)
        self.m.all.copy_(updated(self.m.all, scaled, mu, eta, estimator))
        self.open.all.copy_(opened(self.m.all, self.block))
        self.returns.note(self.open.all)

    def _needed(self) -> float:
        """The least μ that keeps the open channels on the line to the budget for the steps to
        come.
        """
        budget = self.task.budget
        share = min(1.0, (self.step + EVERY) / self.ramp)
        line = Budget(budget.kind, 1 - (1 - budget.fraction) * share, budget.rounding)
        # m - EVERY η (s/ρ + μ price) ĥ'(m) is at most 0 from this μ on, if s stays what it has been
        steps, seen = EVERY * self.method.eta, max(1e-9, 1 - RECENT**self.drawn)
        per_step = derivative(self.m.all, self.method.estimator)
        unpriced = self.m.all / (steps * per_step) - self.drift.all / seen
        mu_to_close = self.m.parts((unpriced / self.price.to(unpriced)).cpu())
        widths = global_widths(
            mu_to_close, self.task.groups, line, self.task.cost, self.task.reference
        )
        cut = [(r, widths[n]) for n, r in mu_to_close.items() if widths[n] < len(r)]
        return max([0.0, *(float(r.sort(descending=True).values[w]) for r, w in cut)])

    def _prices(self) -> Tensor:
        """What a channel adds to what the budget counts, over the mean of all open channels,
        float64 ``[ΣN]``.
        """
        widths, groups = self.widths(), self.task.groups
        each = {
            n: self.task.price(widths, n, 1 if w == groups[n].blocks else -1)
            for n, w in widths.items()
        }
        mean = sum(each[n] * w for n, w in widths.items()) / sum(widths.values())
        spread = [each[n] / mean for n, m in self.m.items() for _ in m]
        return torch.tensor(spread, dtype=torch.float64).to(self.task.device)

    def widths(self) -> dict[str, int]:
        """Open channels per group, equally many per block."""
        blocks = {n: g.blocks for n, g in self.task.groups.items()}
        gates = self.open.parts(self.open.all.cpu())
        each = {n: gate.view(blocks[n], -1).sum(dim=1) for n, gate in gates.items()}
        return {n: blocks[n] * int(count.min()) for n, count in each.items()}

    def frozen(self) -> dict[str, Tensor]:
        """The gates to end with: those with the largest m that the budget allows, or, with a fixed
        μ, that are open.
        """
        scores = self.m.parts(self.m.all.cpu())
        widths = self.widths()
        if self.method.mu is None or not self.task.fits(widths):
            widths = self.task.filled(self.task.widths(scores, "global"), scores)
        gates = {}
        for name, score in scores.items():
            rows = top_channels(score, widths[name], self.task.groups[name].blocks)
            gates[name] = torch.zeros_like(score).index_fill(0, rows, 1.0)
        return gates

    def _point(self, model: nn.Module) -> None:
        """Note where the run is, and what happened since the last point."""
        point: dict[str, Any] = self.since.taken() | self.returns.counts(self.open.all)
        point["mu"] = self.mu if point["val_loss"] is not None else None
        if self.task.curves:
            point["val_top1"] = accuracy(model, self.task.val).top1
            model.train()
        point["open"] = int(self.open.all.sum())
        self.trajectory.point(self.step, self.widths(), **point)
