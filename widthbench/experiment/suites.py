"""Suites: a TOML file to the cells of a comparison. What a suite contains depends on that file
alone.
"""

from __future__ import annotations

import fnmatch
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from widthbench import plugins, toml
from widthbench.data import sources
from widthbench.errors import BudgetError, UsageError, did_you_mean, first_problem, visible
from widthbench.experiment import bases, recipes
from widthbench.experiment.cell import CONTROLS, Cell
from widthbench.experiment.limits import Limits
from widthbench.networks import models
from widthbench.paths import cache_dir, require_writable
from widthbench.recipe import Recipe
from widthbench.technique import registry
from widthbench.technique.base import Technique, build
from widthbench.technique.budget import Budget
from widthbench.width.certify import find_groups

MAX_CELLS = 100_000


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what comes back from JSON as something else."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"{value!r:.200} holds what JSON cannot say, such as nan, inf or a date")
    return value


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]


class Entry(_Strict):
    """A technique in a suite.

    Attributes:
        id: The technique's.
        params: Its parameters.
        trials: How many settings were tried before these were chosen, these included.
    """

    id: str
    params: Plain = Field(default_factory=dict)
    trials: int = Field(default=1, ge=1)


def _entries(value: Any) -> Any:
    return (
        [{"id": v} if isinstance(v, str) else v for v in value]
        if isinstance(value, list | tuple)
        else value
    )


class Network(_Strict):
    """A network in a suite; what it does not set, the suite's own settings give.

    Attributes:
        name: Any timm model name; or, as ``factory``, a class or function of your own,
            ``"mynets.py:MyNet"`` (a file beside the suite's) or ``"mynets:MyNet"`` (a module).
        size: Input height and width in pixels.
        args: Further arguments of its constructor.
        variant: Printed behind its name; tells entries apart that differ in their recipes only.
        datasets: Overrides the suite's.
        techniques: Overrides the suite's.
        budgets: Overrides the suite's.
        seeds: Overrides the suite's.
        controls: Overrides the suite's.
        base: A recipe's name, or single settings that override the suite's base recipe.
        finetune: Likewise for the fine-tuning recipe; ``{ epochs = 0 }`` fine-tunes nothing.
        include: Patterns on group names.
        checkpoint: Weights file of the base network (a name in ``WIDTHBENCH_WEIGHTS``, or a path),
            which is then not trained.
        sha256: What its digest must begin with.
        pretrained: Take the weights that timm publishes under the network's name.
        mean: Per-channel mean to normalise with; empty: that of the training images, or of the
            pretrained network.
        std: Per-channel standard deviation likewise.
    """

    name: str
    size: int = Field(ge=4, le=4096)
    args: Plain = Field(default_factory=dict)
    variant: str = Field(default="", pattern=r"^[A-Za-z0-9_. -]*$", max_length=100)
    datasets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    techniques: tuple[Entry, ...] | None = None
    budgets: tuple[str, ...] | None = None
    seeds: Seeds | None = None
    controls: tuple[str, ...] | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)
    include: tuple[str, ...] = ()
    checkpoint: str | None = Field(default=None, min_length=1)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{8,64}$")
    pretrained: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[Annotated[float, Field(gt=0)], ...] = ()

    _settings = field_validator("base", "finetune", mode="before")(recipes.settings)
    _named = field_validator("techniques", mode="before")(_entries)

    @model_validator(mode="after")
    def _consistent(self) -> Network:
        if self.checkpoint and self.pretrained:
            raise ValueError("checkpoint and pretrained exclude each other")
        if self.sha256 and not self.checkpoint:
            raise ValueError("sha256 needs a checkpoint")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std need equally many numbers, not {len(self.mean)} and {len(self.std)}"
            )
        return self

    @field_validator("args")
    @classmethod
    def _free(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = (
            "name",
            "classes",
            "channels",
            "size",
            "seed",
            "pretrained",
            "num_classes",
            "in_chans",
            "img_size",
            "model_name",
        )
        if taken := [key for key in value if key in ours]:
            raise ValueError(f"'{taken[0]}' is set by the suite: leave it out of args")
        files = (
            "checkpoint_path",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "cache_dir",
        )  # timm's, whose contents no key would know
        if taken := [key for key in value if key in files]:
            raise ValueError(
                f"'{taken[0]}' would load weights unseen: use checkpoint or pretrained instead of"
                " args"
            )
        return value


class Suite(_Strict):
    """A comparison.

    Attributes:
        name: Its name, and its folder under ``results/``.
        title: One line for people.
        citable: False puts "not for citation" on the leaderboard.
        datasets: Data sets.
        seeds: Each gives its own split, base network and decision.
        budgets: What is kept.
        techniques: Ids, or ``{ id = ..., params = {...} }``.
        controls: As ``widthbench list controls`` has them.
        models: The networks.
        base: Recipe of the base networks: a name (``widthbench list recipes``), or settings, or
            both.
        finetune: Recipe after the resize, likewise.
        calibration: Training samples for batch-norm recalibration.
        val: Fraction of the training part held out for choices; 0 holds nothing out.
        longest: The most epochs that ``scratch-budget:X`` and ``l1-budget:X`` train for, as a
            multiple of X's in all: a network of 1/32 of the MACs would otherwise train 32 times as
            long. Its train cost on the leaderboard says what it used.
        bases: "published" starts from the base networks that are published with the results, where
            there are some of these settings, and gives a control the published record of its
            technique, whatever machine that is of; "trained" trains and computes both.
        references: Labels (as in the leaderboard) that every technique is held against.
        scope: "inner" or "all" groups.
        threads: CPU threads per cell.
        device: "auto", "cpu" or "cuda".
        deterministic: Ask torch for deterministic algorithms.
        curves: Replay each technique's path of plans on val and test, and have techniques record
            what makes pictures; takes time.
        time_limit: Seconds that a cell may take, with its base network where it is the one that
            trains it; no limit if not set. One that takes longer is ended, and its record says so.
        memory_limit: MiB of main memory that a cell's process may take, likewise.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    title: str = ""
    citable: bool = False
    datasets: tuple[str, ...] = Field(min_length=1)
    seeds: Seeds
    budgets: tuple[str, ...] = ()
    techniques: tuple[Entry, ...] = ()
    controls: tuple[str, ...] = ("base",)
    models: tuple[Network, ...] = Field(min_length=1)
    base: Recipe
    finetune: Recipe
    calibration: int = Field(default=1024, ge=2)
    val: float = Field(default=0.2, ge=0, lt=1)
    longest: float | None = Field(default=None, ge=1)
    bases: Literal["trained", "published"] = "trained"
    references: tuple[str, ...] = ("l1-norm", "uniform-width")
    scope: Literal["inner", "all"] = "inner"
    threads: int = Field(default=1, ge=1, le=256)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    curves: bool = False
    time_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    memory_limit: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    _settings = field_validator("base", "finetune", mode="before")(recipes.settings)
    _named = field_validator("techniques", mode="before")(_entries)
    _made: tuple[int, list[Cell]] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        for at, network in enumerate(self.models):
            for budget in network.budgets if network.budgets is not None else self.budgets:
                try:
                    Budget.parse(budget, grows=True)
                except BudgetError as error:
                    raise ValueError(f"models[{at}] ({network.name}): {error}") from error
            self.recipes(network)
        for network in self.models:
            known = [e.id for e in self.entries(network)]
            for control in self.controls if network.controls is None else network.controls:
                name, _, source = control.partition(":")
                if name not in CONTROLS:
                    raise ValueError(f"unknown control '{name}'{did_you_mean(name, CONTROLS)}")
                if CONTROLS[name].sourced and source not in known:
                    raise ValueError(
                        f"control '{control}' of {network.name} must name one of the suite's"
                        f" techniques, as in '{name}:l1-norm'"
                    )
                if source and not CONTROLS[name].sourced:
                    raise ValueError(f"control '{name}' takes no technique")
        if (count := self._count()) > MAX_CELLS:
            raise ValueError(
                f"{count} cells are more than {MAX_CELLS}: name fewer seeds, budgets, techniques,"
                " networks or data sets"
            )
        if len({c.id for c in self.cells()}) < count:
            raise ValueError(
                "two cells have the same name: a dataset, model, technique, budget or seed is"
                " listed twice"
            )
        return self

    @property
    def all_datasets(self) -> tuple[str, ...]:
        """The suite's data sets, then those that only some of its networks name."""
        return tuple(
            dict.fromkeys([*self.datasets, *(d for n in self.models for d in n.datasets or ())])
        )

    def entries(self, network: Network) -> tuple[Entry, ...]:
        """The techniques that run on one of the suite's networks."""
        return self.techniques if network.techniques is None else network.techniques

    def recipes(self, network: Network) -> tuple[Recipe, Recipe]:
        """(base, fine-tuning) recipe of one of the suite's networks."""
        pairs = []
        for name in ("base", "finetune"):
            try:
                pairs.append(
                    Recipe(
                        **{
                            **getattr(self, name).model_dump(exclude_unset=True),
                            **getattr(network, name),
                        }
                    )
                )
            except ValidationError as error:
                key, problem = first_problem(error)
                where = f"{name}.{key}" if key else name
                raise ValueError(f"model {network.name}: {where}: {problem}") from error
        if not pairs[0].epochs and not (network.checkpoint or network.pretrained):
            raise ValueError(
                f"model {network.name}: base.epochs = 0 trains nothing: name a checkpoint, or set"
                " pretrained = true"
            )
        return pairs[0], pairs[1]

    def cells(self) -> list[Cell]:
        """All cells, those of one base network next to each other, sources before the controls that
        need them.
        """
        if self._made is None or self._made[0] != id(
            self
        ):  # a copy with other settings has other cells
            self._made = id(self), self._cells()
        return list(self._made[1])

    def _count(self) -> int:
        """How many cells there are, without making them."""
        count = 0
        for network in self.models:
            controls = self.controls if network.controls is None else network.controls
            budgets = self.budgets if network.budgets is None else network.budgets
            rows = ("base" in controls) + len(budgets) * (
                len(self.entries(network)) + sum(c != "base" for c in controls)
            )
            seeds = self.seeds if network.seeds is None else network.seeds
            count += (
                sum(d in (network.datasets or self.datasets) for d in self.all_datasets)
                * len(seeds)
                * rows
            )
        return count

    def _cells(self) -> list[Cell]:
        cells = []
        for dataset in self.all_datasets:
            for network in self.models:
                if dataset not in (network.datasets or self.datasets):
                    continue
                base, finetune = self.recipes(network)
                for seed in self.seeds if network.seeds is None else network.seeds:
                    # a setting that a suite or its network shares with a cell has one name
                    shared = {k: v for k, v in (*self, *network) if k in Cell.model_fields}
                    shared |= {
                        "dataset": dataset,
                        "model": network.name,
                        "model_args": network.args,
                        "seed": seed,
                        "base": base,
                        "finetune": finetune,
                        "floor": self.citable,
                    }
                    cells += [Cell(**shared, **row) for row in self._rows(network)]
        return cells

    def _rows(self, network: Network) -> list[dict[str, Any]]:
        budgets = self.budgets if network.budgets is None else network.budgets
        rows: list[dict[str, Any]] = []
        controls = self.controls if network.controls is None else network.controls
        if "base" in controls:
            rows.append({"technique": "base"})
        for budget in budgets:
            rows += [
                {"technique": e.id, "params": e.params, "trials": e.trials, "budget": budget}
                for e in self.entries(network)
            ]
        for control in controls:
            name, _, source = control.partition(":")
            for budget in budgets if name != "base" else ():
                row: dict[str, Any] = {"technique": name, "budget": budget}
                if source:
                    entry = next(e for e in self.entries(network) if e.id == source)
                    row |= {"of": source, "params": entry.params, "trials": entry.trials}
                rows.append(row)
        return rows


def matches(name: str, only: Sequence[str]) -> bool:
    """Whether a cell's name is like one of some patterns (``*`` and ``?``), or holds one of some
    texts; all are where there are none.
    """
    return not only or any(
        fnmatch.fnmatchcase(name, p) if set("*?") & set(p) else p in name for p in only
    )


def limits(chosen: Iterable[Suite]) -> dict[str, Limits]:
    """What each cell of some suites may take, by its identity; of a cell that several have, what
    suits them all.
    """
    limits_of: dict[str, Limits] = {}
    for suite in chosen:
        mine = Limits(suite.time_limit, suite.memory_limit)
        for cell in suite.cells():
            limits_of[cell.identity] = mine.roomier(limits_of.get(cell.identity, mine))
    return limits_of


def names() -> list[str]:
    """Names of the built-in suites."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in files("widthbench._suites").iterdir()
        if p.name.endswith(".toml")
    )


def load(name: str) -> Suite:
    """A suite by name, or by path of a TOML file.

    Raises:
        UsageError: If it is unknown, malformed (file, key, what was expected) or inconsistent.
    """
    if name.endswith(".toml"):
        return _suite(toml.read(Path(name), "suite"), name, Path(name).parent)
    if name not in names():
        raise UsageError(
            f"unknown suite '{name}'{did_you_mean(name, names())} (or give the path of a .toml"
            " file)"
        )
    return parse(
        (files("widthbench._suites") / f"{name}.toml").read_text(encoding="utf-8"), f"{name}.toml"
    )


def load_all(names: Iterable[str]) -> list[Suite]:
    """Suites by name or path, each once.

    Raises:
        UsageError: As ``load``, or if two different ones have the same name, and so the same folder
            of results.
    """
    by_name: dict[str, Suite] = {}
    for given in names:
        suite = load(given)
        if by_name.setdefault(suite.name, suite).model_dump() != suite.model_dump():
            raise UsageError(
                f"two different suites are named '{suite.name}', the second in {given}: give one"
                " another name"
            )
    return list(by_name.values())


def parse(text: str, where: str) -> Suite:
    """A suite from TOML text.

    Args:
        text: The TOML.
        where: The file's name, for errors.

    Raises:
        UsageError: If it is malformed.
    """
    return _suite(toml.parse(text, where), where)


def made(content: Mapping[str, Any], where: str = "suite") -> Suite:
    """A suite from what its TOML would hold.

    Raises:
        UsageError: If it is malformed.
    """
    return _suite(dict(content), where, Path())


def _suite(content: dict[str, Any], where: str, folder: Path | None = None) -> Suite:
    content = _own(content, folder)
    try:
        return Suite(**content)
    except ValidationError as error:
        found = error.errors()
        # a misspelt key explains the one that is missing
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        key, problem = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        problem = problem.replace("a valid tuple", "a list").replace(
            "a valid dictionary or instance of Entry",
            'a name or a table { id = "...", params = {...} }',
        )
        if first["type"] == "extra_forbidden":
            problem = (
                f"unknown key{did_you_mean(str(first['loc'][-1]), _field_names(first['loc']))}"
            )
        given = (
            ""
            if first["type"] in ("missing", "extra_forbidden", "value_error")
            else f" (found {first['input']!r:.200})"
        )
        raise UsageError(
            visible(f"{where}: {key + ': ' if key else ''}{problem}{given}")
        ) from error


def _own(content: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """A suite's content after its own files have become known: ``plugins = [...]``, and networks by
    ``factory = "mynets.py:MyNet"``.
    """
    content = dict(content)
    if isinstance(content.get("techniques"), list | tuple):
        content["techniques"] = [_by_name(t) for t in content["techniques"]]
    given = content.pop("plugins", [])
    if not (isinstance(given, list | tuple) and all(isinstance(p, str) for p in given)):
        raise UsageError(f"plugins must be a list of files, not {given!r:.100}")
    plugins.use((folder or Path()) / Path(p).expanduser() for p in given)
    networks = content.get("models")
    if not isinstance(networks, list | tuple):
        return content
    content["models"] = mine = []
    for network in networks:
        if isinstance(network, dict):
            network = dict(network)
            name = network.pop("factory", network.get("name"))
            if isinstance(name, str):
                network["name"] = models.named(name, folder)
        mine.append(network)
    return content


def _by_name(entry: Any) -> Any:
    """A technique's class as its id, its file made known."""
    if not (isinstance(entry, type) and issubclass(entry, Technique)):
        return entry
    if not registry.built_in(entry.id):
        file = inspect.getsourcefile(entry)
        if file is None or entry.__module__ == "__main__":
            raise UsageError(
                f"technique '{entry.id}': workers import it by its file: define it in one, and"
                " import it from there"
            )
        plugins.use([file])
    return entry.id


def check(suite: Suite, chosen: Sequence[Cell] | None = None) -> None:
    """Name what does not work before anything runs: every network is built, its groups are
    certified, its data are split.

    Args:
        suite: The suite.
        chosen: Check only what these of its cells need; all if None.

    Raises:
        UsageError: On an unknown or refused technique, parameter, model, setting or data set, a
            budget out of a technique's range, an input size that does not fit, a network without a
            group to resize, a missing GPU.
    """
    require_writable(cache_dir())
    entries = [*suite.techniques, *(e for n in suite.models for e in n.techniques or ())]
    registry.try_out([(entry.id, entry.params) for entry in entries])
    classes = {entry.id: registry.load(entry.id) for entry in entries}
    for entry in entries:
        try:
            build(classes[entry.id], entry.params)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # a plug-in may raise anything
            what = (
                f"technique '{entry.id}' of {registry.owner(entry.id)} cannot be made with"
                f" {entry.params}"
            )
            raise UsageError(
                f"suite {suite.name}: {what}: {type(error).__name__}: {error}"
            ) from error
    cells = suite.cells() if chosen is None else chosen
    try:
        for dataset in suite.all_datasets:
            for network in suite.models:
                mine = (dataset, network.name, network.args)
                cell = next((c for c in cells if (c.dataset, c.model, c.model_args) == mine), None)
                if cell is None:
                    continue
                model = bases.fresh_model(cell, 0)
                if not cell.trains_base:
                    bases.load_weights(cell, model)
                bases.load_data(cell)
                groups = find_groups(model, bases.example_input(cell))
                groups.select(cell.scope, cell.include or None)
                _require_outputs(cell, groups.output_shapes)
                for budget in suite.budgets if network.budgets is None else network.budgets:
                    for entry in suite.entries(network):
                        Budget.parse(budget, grows=classes[entry.id].grows)
    except UsageError as error:
        raise type(error)(f"suite {suite.name}: {error}") from error


def _require_outputs(cell: Cell, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuse a network that does not give a number for each class of its data set."""
    classes = sources.load(cell.dataset).classes
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < classes:
        given = " and ".join(" x ".join(map(str, s)) for s in shapes) or "no tensor"
        raise UsageError(
            f"network {cell.network} gives {given} for one image, but {cell.dataset} has"
            f" {classes} classes: it must give 1 x {classes} (a factory is told so by its argument"
            " num_classes)"
        )


def _field_names(location: tuple[Any, ...]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    for name, model in (
        ("models", Network),
        ("techniques", Entry),
        ("base", Recipe),
        ("finetune", Recipe),
    ):
        if name in location[:-1]:
            return [*model.model_fields, *(["factory"] if model is Network else [])]
    return [*Suite.model_fields, "plugins"]
