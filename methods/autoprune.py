"""AutoPrune: learn which channels to keep, by an auxiliary parameter on each of them that descends
the validation loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

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
from widthbench.width.gates import gated, sums_over_consumers
from widthbench.width.groups import Groups
from widthbench.width.resize import keep

Estimator = Literal["softplus", "leaky_relu", "linear"]
Decoupling = Literal["sgn", "unit", "none"]
PerGroup = dict[str, Tensor]  # [N] per group

START = 1.0  # of all auxiliary parameters: open, and all alike
LEAK = 0.1  # slope of the leaky ReLU where m is not above 0
MEMORY = 0.99  # of the running mean square of the sensitivities
RECENT = 0.9  # of the running mean of each channel's sensitivity
EVERY = 10  # steps between two choices of μ
CLOSED = 25  # steps that a channel must have been closed for its return to count as a recovery
POINTS = 40  # of the trajectory
KEPT = ("m", "drift", "open", "step", "drawn", "mu", "price", "square")
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


def updated(m: Tensor, s: Tensor, mu: float, eta: float, estimator: Estimator) -> Tensor:
    """One step of auxiliary parameters ``m [N]`` with sensitivities ``s [N]``: ``m - η (s + μ)
    ĥ'(m)``.
    """
    return m - eta * (s + mu) * derivative(m, estimator)


def sensitivities(
    model: nn.Module, groups: Groups, slopes: Mapping[str, Tensor], decoupling: Decoupling = "sgn"
) -> PerGroup:
    """What the loss says of each channel's gate.

    Args:
        model: The network.
        groups: The gated groups.
        slopes: ``∂L/∂t`` by consumer, of the shape of its weight; ``t = w · h``.
        decoupling: "sgn" ``Σ ∂L/∂t · sgn(w)``; "none" ``Σ ∂L/∂t · w``; "unit" that over ``‖w‖``;
            sums are over the channel's weights in all consumers.

    Returns:
        ``[N]`` per group.
    """
    layers: dict[str, Any] = {layer: model.get_submodule(layer) for layer in slopes}
    weights = {n: layer._parameters["weight"].detach() for n, layer in layers.items()}

    def total(factor: Callable[[Tensor, Tensor], Tensor]) -> PerGroup:
        made = {layer: factor(slope, weights[layer]) for layer, slope in slopes.items()}
        return sums_over_consumers(model, groups, made)

    if decoupling == "sgn":
        return total(lambda slope, w: slope * w.sign())
    gradient = total(lambda slope, w: slope * w)
    if decoupling == "none":
        return gradient
    squares = total(lambda slope, w: w.square())
    return {n: g / squares[n].sqrt().clamp_min(1e-12) for n, g in gradient.items()}


def opened(m: Tensor, blocks: int) -> Tensor:
    """Gates h(m) as 0 and 1, ``[N]``: 1 where m > 0, and for the largest m of a block in which none
    is.
    """
    table = m.view(blocks, -1)
    best = torch.zeros_like(table).scatter(1, table.argmax(dim=1, keepdim=True), 1.0)
    above = (table > 0).to(m)
    return torch.where(above.any(dim=1, keepdim=True), above, best).flatten()


class Gates:
    """Auxiliary parameters and gates of one run, and what is told of it.

    Attributes:
        m: Auxiliary parameters, ``[N]`` per group.
        open: The gates h(m), 0 or 1, ``[N]`` per group; changed in place.
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
        self.m = {n: START * like.new_ones(g.channels) for n, g in task.groups.items()}
        self.open = {n: torch.ones_like(m) for n, m in self.m.items()}
        self.drift = {n: torch.zeros_like(m) for n, m in self.m.items()}  # recent means of s/ρ
        self.products: dict[str, list[Tensor]] = {}
        self.trajectory = Trajectory(task)
        self.trajectory.note("freeze", self.last)
        self.step = self.drawn = 0  # steps, and batches of val
        self.mu = method.mu or 0.0
        self.price = dict.fromkeys(self.m, 1.0)
        self.square = like * 0  # the running mean square
        self.since = Since(like, ("loss", "val_loss"), ("cosine",))
        self.returns = Returns(self.m, CLOSED)
        self.val = Passes(task.val, recipe.batch_size, task.seed)
        task.widths(self.m, "global")  # a budget below the floor is refused before any work

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        notes = {name: getattr(self, name).state_dict() for name in NOTES}
        return {name: getattr(self, name) for name in KEPT} | {"notes": notes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; gates change in place."""
        gates, notes = state.pop("open"), state.pop("notes")
        for name, value in state.items():
            setattr(self, name, value)
        for name, gate in self.open.items():
            gate.copy_(gates[name])
        for some in (self.m, self.drift):
            some.update({k: t.to(self.task.device) for k, t in some.items()})
        self.square = self.square.to(self.task.device)
        for name in NOTES:
            getattr(self, name).load_state_dict(notes[name])

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """A step of the auxiliary parameters, and the training loss for a step of the weights."""
        self._forget()
        if self.step < self.last:
            self._learn(model)
        elif self.step == self.last:
            for name, gate in self.frozen().items():
                self.open[name].copy_(gate)
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
        s = sensitivities(model, self.task.groups, slopes, self.method.decoupling)
        gradient = sensitivities(model, self.task.groups, slopes, "none")
        slope_of = {n: derivative(m, self.method.estimator) for n, m in self.m.items()}
        update, gradient_step = (
            torch.cat([some[n] * slope_of[n] for n in self.m]) for some in (s, gradient)
        )
        self.since.add("cosine", F.cosine_similarity(update, gradient_step, dim=0))
        self.since.add("val_loss", loss)
        square = torch.cat(list(s.values())).square().mean()
        if not torch.isfinite(loss + square):
            raise UsageError(
                f"autoprune diverged: the val loss is {loss.item()}, the mean square of its slopes"
                f" {float(square)} at step {self.step + 1}; lower lr = {self.recipe.lr:g}"
            )
        self.drawn += 1
        self.square = MEMORY * self.square + (1 - MEMORY) * square
        scale = (self.square / (1 - MEMORY**self.drawn)).sqrt().clamp_min(1e-30)
        eta, estimator = self.method.eta, self.method.estimator
        for name, m in self.m.items():
            self.drift[name] = RECENT * self.drift[name] + (1 - RECENT) * s[name] / scale
            mu = self.mu * self.price[name]
            self.m[name] = updated(m, s[name] / scale, mu, eta, estimator)
            self.open[name].copy_(opened(self.m[name], self.task.groups[name].blocks))
            self.returns.note(name, self.open[name])

    def _needed(self) -> float:
        """The least μ that keeps the open channels on the line to the budget for the steps to
        come.
        """
        budget = self.task.budget
        share = min(1.0, (self.step + EVERY) / self.ramp)
        line = Budget(budget.kind, 1 - (1 - budget.fraction) * share, budget.rounding)
        # m - EVERY η (s/ρ + μ price) ĥ'(m) is at most 0 from this μ on, if s stays what it has been
        steps, seen = EVERY * self.method.eta, max(1e-9, 1 - RECENT**self.drawn)
        mu_to_close = {}
        for n, m in self.m.items():
            unpriced = m / (steps * derivative(m, self.method.estimator)) - self.drift[n] / seen
            mu_to_close[n] = (unpriced / self.price[n]).cpu()
        widths = global_widths(
            mu_to_close, self.task.groups, line, self.task.cost, self.task.reference
        )
        cut = [(r, widths[n]) for n, r in mu_to_close.items() if widths[n] < len(r)]
        return max([0.0, *(float(r.sort(descending=True).values[w]) for r, w in cut)])

    def _prices(self) -> dict[str, float]:
        """What a channel of each group adds to what the budget counts, over the mean of all open
        channels.
        """
        if self.method.penalty == "channels":
            return dict.fromkeys(self.m, 1.0)
        widths, groups = self.widths(), self.task.groups
        each = {
            n: self.task.price(widths, n, 1 if w == groups[n].blocks else -1)
            for n, w in widths.items()
        }
        mean = sum(each[n] * w for n, w in widths.items()) / sum(widths.values())
        return {n: price / mean for n, price in each.items()}

    def widths(self) -> dict[str, int]:
        """Open channels per group, equally many per block."""
        blocks = {n: g.blocks for n, g in self.task.groups.items()}
        each = {n: gate.view(blocks[n], -1).sum(dim=1) for n, gate in self.open.items()}
        return {n: blocks[n] * int(count.min()) for n, count in each.items()}

    def frozen(self) -> PerGroup:
        """The gates to end with: those with the largest m that the budget allows, or, with a fixed
        μ, that are open.
        """
        scores = {n: m.cpu() for n, m in self.m.items()}
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
        point: dict[str, Any] = self.since.taken() | self.returns.counts(self.open)
        point["mu"] = self.mu if point["val_loss"] is not None else None
        if self.task.curves:
            point["val_top1"] = accuracy(model, self.task.val).top1
            model.train()
        point["open"] = sum(int(gate.sum()) for gate in self.open.values())
        self.trajectory.point(self.step, self.widths(), **point)
