"""Named recipes: TOML files with where they come from and what they reach."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from widthbench import toml
from widthbench.errors import UsageError, did_you_mean, first_problem, visible
from widthbench.recipe import Recipe


class Named(BaseModel):
    """A recipe with its origin.

    Attributes:
        title: One line for people.
        models: Networks that it is for.
        datasets: Data sets that it is for.
        origin: Paper or measurement that it comes from.
        reaches: Test top-1 in % per data set that was measured here with all training data; absent
            where it was not run.
        recipe: The settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    origin: str = ""
    reaches: dict[str, float] = Field(default_factory=dict)
    recipe: Recipe


def names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in files("widthbench._recipes").iterdir()
        if p.name.endswith(".toml")
    )


def load(name: str) -> Named:
    """A recipe by name, or by path of a TOML file.

    Raises:
        UsageError: If it is unknown or malformed (file, key, what was expected).
    """
    if name.endswith(".toml"):
        content, where = toml.read(Path(name), "recipe"), name
    elif name in names():
        content, where = (
            toml.parse(
                (files("widthbench._recipes") / f"{name}.toml").read_text(encoding="utf-8"), name
            ),
            f"{name}.toml",
        )
    else:
        raise UsageError(
            f"unknown recipe '{name}'{did_you_mean(name, names())} (or give the path of a .toml"
            " file)"
        )
    try:
        return Named(**content)
    except ValidationError as error:
        first, (key, problem) = error.errors()[0], first_problem(error)
        if first["type"] == "extra_forbidden":
            known = Recipe.model_fields if "recipe" in first["loc"][:-1] else Named.model_fields
            problem = f"unknown key{did_you_mean(str(first['loc'][-1]), known)}"
        raise UsageError(visible(f"{where}: {key}: {problem}")) from error


def settings(value: Any) -> Any:
    """A recipe's settings from what a suite says: a name, a table, or a table whose ``recipe``
    names where it starts from.

    Raises:
        ValueError: If the named recipe does not work.
    """
    given = {"recipe": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or "recipe" not in given:
        return given
    try:
        start = load(str(given["recipe"])).recipe.model_dump()
    except UsageError as error:
        raise ValueError(str(error)) from error
    return {**start, **{k: v for k, v in given.items() if k != "recipe"}}
