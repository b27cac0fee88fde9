"""AutoPrune: learn which channels to keep, by an auxiliary parameter on each of them that descends the validation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widthbench.budget import Budget, asked, global_widths, top_channels, used
from widthbench.errors import UsageError
from widthbench.measure import accuracy
from widthbench.recipe import Recipe
from widthbench.task import Task
from widthbench.technique import Outcome, Technique
from widthbench.training import steps_of
from widthbench.width.gates import gated, sums_by_channel
from widthbench.width.groups import Groups
from widthbench.width.resize import keep

Estimator = Literal["softplus", "leaky_relu", "linear"]
Decoupling = Literal["sgn", "unit", "none"]
PerGroup = dict[str, Tensor]  # [N] per group

START = 1.0  # of all auxiliary parameters: open, and all alike
LEAK = 0.1  # slope of the leaky ReLU where m is not above 0
MEMORY = 0.99  # of the running mean square of the sensitivities
EVERY = 10  # steps between two choices of μ
POINTS = 40  # of the trajectory


class AutoPrune(Technique):
    """Channels with trainable gates (Xiao, Wang and Rajasekaran, "AutoPrune", NeurIPS 2019).

    Channel c has an auxiliary parameter m. The network uses ``t = w · h(m)`` for its consumers' incoming weights w, with h(m) = 1
    where m > 0, else 0. Steps alternate: the weights descend the training loss with weight decay, the auxiliary parameters take

        ``m ← m - η (s / ρ + μ) ĥ'(m)``,   ``s = Σ ∂L_val/∂t · sgn(w)``  over the channel's weights

    on a batch of val. ĥ' is a straight-through estimator of h'. A closed channel recovers when m rises above 0 again. ρ, the
    running root mean square of s over all channels and steps, makes η and μ numbers without a unit. Every ten steps μ is set as
    high as the open channels need to keep on a straight line from everything to the budget; then m orders all channels, the best
    are frozen open within the budget, and the weights are trained on as they will be cut.

    Args:
        estimator: ĥ'(m): "softplus" ``σ(m)``, "leaky_relu" 1 where m > 0, else 0.1, "linear" 1.
        decoupling: "sgn" as above (the paper's sensitivity decoupling); "none" ``Σ ∂L/∂t · w``, the gradient; "unit" the gradient
            over ‖w‖. Summed over a channel, the angle between "sgn" and the gradient need not be acute.
        start: "trained", or "fresh" to prune while training from scratch.
        epochs: Of alternating steps, the frozen ones included; other settings are those of the task's recipe.
        weight_decay: In place of the recipe's.
        lr: Of the weights, in place of the recipe's.
        eta: η.
        mu: A fixed μ, for which the channels that end open are kept, if the budget allows; None: as above.
        penalty: What μ is the price of: "cost", what a channel adds to what the budget counts (MACs, parameters; channels alike);
            "channels", all channels alike, as in the paper. By the latter, small channels close before dear ones.
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

    def __init__(
        self,
        *,
        estimator: Estimator = "softplus",
        decoupling: Decoupling = "sgn",
        start: Literal["trained", "fresh"] = "trained",
        epochs: float = 4,
        weight_decay: float | None = None,
        lr: float | None = None,
        eta: float = 0.1,
        mu: float | None = None,
        penalty: Literal["cost", "channels"] = "cost",
        ramp: float = 0.5,
        freeze: float = 0.75,
    ) -> None:
        self.estimator: Estimator = estimator
        self.decoupling: Decoupling = decoupling
        self.start = start
        self.epochs = epochs
        self.weight_decay = weight_decay
        self.lr = lr
        self.eta = eta
        self.mu = mu
        self.penalty = penalty
        self.ramp = ramp
        self.freeze = freeze
        if not 0 < ramp <= freeze <= 1:
            raise ValueError(f"ramp and freeze must be shares with 0 < ramp <= freeze <= 1, not {ramp} and {freeze}")
        for name in ("epochs", "eta", "lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if mu is not None and not mu >= 0:
            raise ValueError(f"mu must be at least 0, not {mu}")

    def decide(self, task: Task, state: PerGroup) -> Outcome:
        """Train weights and gates in turn, freeze, and cut what is closed."""
        assert task.fit is not None  # the declared access includes it
        model = copy.deepcopy(task.model)
        changed = {"epochs": self.epochs, "weight_decay": self.weight_decay, "lr": self.lr}
        recipe = (task.recipe or Recipe(epochs=1, batch_size=64, lr=0.01)).model_copy(
            update={k: v for k, v in changed.items() if v is not None}
        )
        gates = Gates(self, task, recipe)
        with gated(model, task.groups, gates.open, on="weight", products=gates.products):
            task.fit(model, task.train, recipe, losses=gates.losses, state=gates, desc=f"{self.id} {task.budget}")
        rows = {n: gate.nonzero().flatten().cpu() for n, gate in gates.frozen().items()}
        return Outcome({n: keep(r) for n, r in rows.items()}, model=model, series=gates.series)


def derivative(m: Tensor, estimator: Estimator) -> Tensor:
    """Straight-through estimate ĥ'(m) of the step function's derivative, of the shape of ``m``."""
    if estimator == "softplus":
        return m.sigmoid()
    return torch.ones_like(m) if estimator == "linear" else (m > 0).to(m) * (1 - LEAK) + LEAK


def updated(m: Tensor, s: Tensor, mu: float, eta: float, estimator: Estimator) -> Tensor:
    """One step of auxiliary parameters ``m [N]`` with sensitivities ``s [N]``: ``m - η (s + μ) ĥ'(m)``."""
    return m - eta * (s + mu) * derivative(m, estimator)


def sensitivities(
    model: nn.Module, groups: Groups, slopes: Mapping[str, Tensor], decoupling: Decoupling = "sgn"
) -> PerGroup:  # fmt: skip
    """What the loss says of each channel's gate.

    Args:
        model: The network.
        groups: The gated groups.
        slopes: ``∂L/∂t`` by consumer, of the shape of its weight; ``t = w · h``.
        decoupling: "sgn" ``Σ ∂L/∂t · sgn(w)``; "none" ``Σ ∂L/∂t · w``; "unit" that over ``‖w‖``; sums are over the channel's
            weights in all consumers.

    Returns:
        ``[N]`` per group.
    """

    def total(factor: Callable[[Tensor, Tensor], Tensor]) -> PerGroup:
        found: PerGroup = {}
        for layer, slope in slopes.items():
            module: Any = model.get_submodule(layer)
            parts = sums_by_channel(module, groups.axes[layer, "in"], factor(slope, module._parameters["weight"].detach()))
            for name in parts.keys() & groups.keys():
                found[name] = found[name] + parts[name] if name in found else parts[name]
        return found

    if decoupling == "sgn":
        return total(lambda slope, w: slope * w.sign())
    gradient = total(lambda slope, w: slope * w)
    if decoupling == "none":
        return gradient
    squares = total(lambda slope, w: w.square())
    return {n: g / squares[n].sqrt().clamp_min(1e-12) for n, g in gradient.items()}


def opened(m: Tensor, blocks: int) -> Tensor:
    """Gates h(m) as 0 and 1, ``[N]``: 1 where m > 0, and for the largest m of a block in which none is."""
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
        series: The trajectory.
    """

    def __init__(self, method: AutoPrune, task: Task, recipe: Recipe) -> None:
        if not task.groups:
            raise UsageError("autoprune has no channel groups to gate here: widthbench doctor says why")
        self.method, self.task, self.recipe = method, task, recipe
        self.total = steps_of(recipe, len(task.train))[1]
        self.ramp, self.last = max(1, round(method.ramp * self.total)), max(1, round(method.freeze * self.total))
        like = task.example_input.new_ones(())
        self.m = {n: START * like.new_ones(g.channels) for n, g in task.groups.items()}
        self.open = {n: torch.ones_like(m) for n, m in self.m.items()}
        self.products: dict[str, list[Tensor]] = {}
        self.series: dict[str, list[Any]] = {}
        self.step = self.drawn = 0  # steps, and batches of val
        self.mu = method.mu or 0.0
        self.price = dict.fromkeys(self.m, 1.0)
        self.square = self.recoveries = like * 0  # the running mean square, and channels that returned
        self.cosine = like.clone()  # the least since the last point
        self._val: Iterator[tuple[Tensor, Tensor]] = iter(())
        if method.mu is None:
            task.widths(self.m, "global")  # a budget below the floor is refused before any work

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        names = ("m", "open", "series", "step", "drawn", "mu", "price", "square", "recoveries", "cosine")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back; gates change in place."""
        gates = state.pop("open")
        for name, value in state.items():
            setattr(self, name, value)
        for name, gate in self.open.items():
            gate.copy_(gates[name])
            self.m[name] = self.m[name].to(gate)
        self.square, self.recoveries, self.cosine = (t.to(self.task.device) for t in (self.square, self.recoveries, self.cosine))

    def losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """A step of the auxiliary parameters, and the training loss for a step of the weights."""
        val_loss = None
        self._forget()
        if self.step < self.last:
            val_loss = self._learn(model)
        elif self.step == self.last:
            for name, gate in self.frozen().items():
                self.open[name].copy_(gate)
        loss = F.cross_entropy(model(x), y, label_smoothing=self.recipe.label_smoothing)
        yield loss
        self.step += 1
        if self.step % max(1, self.total // POINTS) == 0 or self.step == self.total:
            self._point(model, loss.detach(), val_loss)

    def _forget(self) -> None:
        for found in self.products.values():
            found.clear()

    def _learn(self, model: nn.Module) -> Tensor:
        """One step of the auxiliary parameters on a batch of val; gives its loss."""
        if self.step % EVERY == 0:
            self.price = self._prices()
            if self.method.mu is None:
                self.mu = self._needed()
        x, y = self._drawn()
        loss = F.cross_entropy(model(x), y)
        if not torch.isfinite(loss):
            raise UsageError(
                f"autoprune diverged: the val loss is {float(loss.detach())} at step {self.step + 1}; lower lr = {self.recipe.lr:g}"
            )
        used_by = [(layer, t) for layer, found in self.products.items() for t in found]
        slopes: dict[str, Tensor] = {}
        for (layer, _), slope in zip(used_by, torch.autograd.grad(loss, [t for _, t in used_by]), strict=True):
            slopes[layer] = slopes[layer] + slope if layer in slopes else slope
        s = sensitivities(model, self.task.groups, slopes, self.method.decoupling)
        gradient = s if self.method.decoupling == "none" else sensitivities(model, self.task.groups, slopes, "none")
        slope_of = {n: derivative(m, self.method.estimator) for n, m in self.m.items()}
        rule, true = (torch.cat([some[n] * slope_of[n] for n in self.m]) for some in (s, gradient))
        self.cosine = torch.minimum(self.cosine, F.cosine_similarity(rule, true, dim=0))
        square = torch.cat(list(s.values())).square().mean()
        self.drawn += 1
        self.square = MEMORY * self.square + (1 - MEMORY) * square
        scale = (self.square / (1 - MEMORY**self.drawn)).sqrt().clamp_min(1e-30)
        for name, m in self.m.items():
            new = updated(m, s[name] / scale, self.mu * self.price[name], self.method.eta, self.method.estimator)
            self.recoveries = self.recoveries + ((m <= 0) & (new > 0)).sum()
            self.m[name] = new
            self.open[name].copy_(opened(new, self.task.groups[name].blocks))
        return loss.detach()

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """The next batch of val, shuffled anew in each pass."""
        per_pass = max(1, len(self.task.val) // self.recipe.batch_size)
        size = min(self.recipe.batch_size, len(self.task.val))
        batch = next(self._val, None)
        if batch is None or self.drawn % per_pass == 0:  # partial batches at a pass's end are left out
            order = torch.Generator().manual_seed(self.task.seed + self.drawn // per_pass)
            self._val = self.task.val.batches(size, generator=order)
            for _ in range(self.drawn % per_pass + 1):
                batch = next(self._val)
        assert batch is not None
        return batch

    def _needed(self) -> float:
        """The least μ that keeps the open channels on the line to the budget for the steps to come."""
        budget = self.task.budget
        share = min(1.0, (self.step + EVERY) / self.ramp)
        line = Budget(budget.kind, 1 - (1 - budget.fraction) * share, budget.rounding)
        # s aside, a step with μ takes η μ ĥ'(m) off m: channels with the least m / ĥ'(m) close first
        reach = {n: (m / derivative(m, self.method.estimator)).cpu() / self.price[n] for n, m in self.m.items()}
        widths = global_widths(reach, self.task.groups, line, self.task.cost, self.task.reference)
        closing = [r.sort(descending=True).values[widths[n]] for n, r in reach.items() if widths[n] < len(r)]
        return max([0.0, *map(float, closing)]) / (EVERY * self.method.eta)

    def _prices(self) -> dict[str, float]:
        """What a channel of each group adds to what the budget counts, over the mean of all open channels."""
        if self.method.penalty == "channels":
            return dict.fromkeys(self.m, 1.0)
        widths, groups = self.widths(), self.task.groups
        there = self._kept(widths)
        each = {
            n: abs(there - self._kept(widths | {n: w + groups[n].blocks * (1 if w == groups[n].blocks else -1)})) / groups[n].blocks
            for n, w in widths.items()
        }
        mean = sum(each[n] * w for n, w in widths.items()) / sum(widths.values())
        return {n: price / mean for n, price in each.items()}

    def widths(self) -> dict[str, int]:
        """Open channels per group, equally many per block."""
        found = {}
        for name, gate in self.open.items():
            blocks = self.task.groups[name].blocks
            found[name] = blocks * int(gate.view(blocks, -1).sum(dim=1).min())
        return found

    def frozen(self) -> PerGroup:
        """The gates to end with: those with the largest m that the budget allows, or, with a fixed μ, that are open."""
        scores = {n: m.cpu() for n, m in self.m.items()}
        widths = self.widths()
        if self.method.mu is None or self._kept(widths) > asked(self.task.budget, self.task.groups):
            widths = self.task.widths(scores, "global")
        found = {}
        for name, score in scores.items():
            rows = top_channels(score, widths[name], self.task.groups[name].blocks)
            found[name] = torch.zeros_like(score).index_fill(0, rows, 1.0)
        return found

    def _kept(self, widths: Mapping[str, int]) -> float:
        """The fraction of the reference that some widths keep, in the budget's own terms."""
        task = self.task
        return used(task.budget, widths, task.groups, task.cost(widths), task.reference)

    def _point(self, model: nn.Module, loss: Tensor, val_loss: Tensor | None) -> None:
        """Note where the run is."""
        widths = self.widths()
        cost = self.task.cost(widths)
        point: dict[str, Any] = {
            "step": self.step,
            "open": sum(int(gate.sum()) for gate in self.open.values()),
            "macs": cost.macs / self.task.reference.macs,
            "params": cost.params / self.task.reference.params,
            "mu": self.mu if self.step <= self.last else None,
            "loss": float(loss),
            "val_loss": None if val_loss is None else float(val_loss),
            "recoveries": int(self.recoveries),
            "cosine": float(self.cosine) if self.step <= self.last else None,
        }
        if self.task.curves:
            point["val_top1"] = accuracy(model, self.task.val).top1
            model.train()
        for name, value in point.items():
            rounded = float(f"{value:.6g}") if isinstance(value, float) else value
            self.series.setdefault(f"trajectory.{name}", []).append(rounded)
        self.cosine = torch.ones_like(self.cosine)
