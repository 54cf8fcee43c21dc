"""Recipes: a YAML file to everything that training needs, validated before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .. import registry
from ..document import Document, parse
from ..errors import SuiteError, UsageError
from .schedules import OneCycle, Schedule

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]


def _entry(kind: str) -> BeforeValidator:
    def checked(value: Any) -> dict[str, Any]:
        params = {"name": value} if isinstance(value, str) else value
        if not isinstance(params, dict) or not isinstance(params.get("name"), str):
            raise ValueError(f"write the name of a {kind[:-1]}, or a mapping with a key 'name'")
        params = dict(params)
        try:
            made = registry.make(kind, params.pop("name"), params)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if kind == "regularisers" and not hasattr(made, "weight"):
            raise ValueError(
                f"regulariser {made.name!r} has no field 'weight', its factor in the loss"
            )
        return {"name": made.name, **registry.parameters(made)}

    return BeforeValidator(checked)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Dataset = Annotated[dict[str, Any], _entry("datasets")]
Regulariser = Annotated[dict[str, Any], _entry("regularisers")]


class Augmentation(BaseModel):
    """What is drawn anew for each image in each epoch; 0 and false leave it as it is.

    Args:
        crop: pixels of black around the image, out of which its size is cut again.
        flip: mirror every other image, left to right.
        rotation: largest angle, in degrees, about the centre; nearest pixels, black outside.
    """

    model_config = _STRICT
    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0


class Recipe(BaseModel):
    """How a network is trained. Two runs of one recipe on one machine give the same bits.

    Args:
        name: of the output folder.
        description: one line for people.
        architecture: as the model ``checkpoint`` names it.
        train: data set to learn from, or a list of them, one after the other.
        test: data set on which the accuracy is read after each epoch. Nothing is chosen by it.
        mean, std: per channel, on the [0, 1] scale.
        regulariser: what is added to the loss; ``none``, or a mapping with its ``name``.
        variants: other regularisers of the same recipe by short names, to choose from.
        seed: of the weights, the order of images, the augmentation and dropout.
        epochs: times that each image is seen.
        batch_size: images of a step, of all processes together; an incomplete last batch of an
            epoch is left out, and since each epoch has its own order, others are each time.
        learning_rate: the highest.
        schedule: ``constant``, ``steps`` or ``one_cycle`` by ``name``.
        momentum, nesterov, weight_decay: of SGD; the decay acts on all parameters.
        label_smoothing: share of the target that is spread over all classes.
        precision: ``bf16`` runs the forward, and what goes back through it, under autocast; the
            loss, the weights and the gradient at the image are float32 in any case.
        channels_last: memory layout of images and weights.
        augmentation: see :class:`Augmentation`.
    """

    model_config = _STRICT
    version: Annotated[int, Field(ge=1, le=1)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    architecture: str
    train: Annotated[list[Dataset], BeforeValidator(_listed), Field(min_length=1)]
    test: Dataset
    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[Std], Field(min_length=3, max_length=3)]
    regulariser: Regulariser = {"name": "none"}
    variants: Annotated[dict[str, Regulariser], Field(exclude=True)] = {}
    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Count
    batch_size: Count = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    schedule: Schedule = OneCycle(name="one_cycle")
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    label_smoothing: Fraction = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    augmentation: Augmentation = Augmentation()

    def entry(self, kind: str, params: Mapping[str, Any]) -> Any:
        """A data set or regulariser of this recipe."""
        return registry.make(kind, params["name"], {k: v for k, v in params.items() if k != "name"})

    def variant(self, name: str) -> Recipe:
        """The same recipe under another of its regularisers.

        Raises:
            UsageError: if it has none of that name.
        """
        if name not in self.variants:
            known = registry.suggestion(name, self.variants) if self.variants else "; it has none"
            raise UsageError(f"recipe {self.name!r} has no variant {name!r}{known}")
        return self.model_copy(update={"regulariser": self.variants[name]})

    def rate(self, epoch: float) -> float:
        """Learning rate after that many epochs."""
        return self.learning_rate * self.schedule.factor(epoch, self.epochs)

    def plain(self) -> dict[str, Any]:
        """Everything that was decided, as JSON holds it."""
        return self.model_dump(mode="json")

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """``seed is 0, not 1`` for each key in which another recipe, in plain form, differs."""
        mine = self.plain()
        return [
            f"{key} is {mine.get(key)!r} here and {other.get(key)!r} there"
            for key in sorted({*mine, *other} - {"description"})
            if mine.get(key) != other.get(key)
        ]


def builtin_recipes() -> dict[str, Path]:
    """The recipes that ship with xbench, by name."""
    here = Path(__file__).parents[1]
    homes = (here / "benchmarks", here.parent / "benchmarks")  # installed; in a source tree
    home = next((folder for folder in homes if folder.is_dir()), homes[0])
    return {path.stem: path for path in sorted((home / "training").glob("*.yaml"))}


def read_recipe(name: str) -> Document:
    """A built-in recipe by name, or a file by path.

    Raises:
        UsageError: if there is neither, or the file cannot be read as YAML.
    """
    known = builtin_recipes()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise UsageError(
            f"there is no recipe {name!r}: neither a built-in name nor a file"
            f"{registry.suggestion(name, known)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None
    return parse(text, os.fspath(path) if name not in known else f"{name} (built in)")


def load_recipe(document: Document, settings: Iterable[tuple[str, Any, str]] = ()) -> Recipe:
    """The recipe in a document.

    Args:
        document: parsed YAML.
        settings: what overrides it: dotted key, value, and who says so, for messages.

    Raises:
        SuiteError: with every problem that was found, each with its place.
    """
    value = document.value
    if not isinstance(value, dict):
        raise SuiteError(
            [f"{document.source}: a recipe is a mapping with version, name, architecture, ..."]
        )
    for key, setting, who in settings:
        steps = key.split(".")
        value = _with(value, steps, setting)
        document = replace(document, given={**document.given, tuple(steps): who})
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise SuiteError([_sentence(document, value, e) for e in error.errors()]) from None


def _with(value: Any, path: list[str], setting: Any) -> Any:
    if not path:
        return setting
    inside = value if isinstance(value, dict) else {} if value is None else {"name": value}
    return {**inside, path[0]: _with(inside.get(path[0]), path[1:], setting)}


def _sentence(document: Document, value: Any, problem: Any) -> str:
    path: list[str | int] = []
    for step in problem["loc"]:  # the steps that lie in the document; a union adds names of types
        inside = isinstance(value, dict) and step in value
        if inside or (isinstance(value, list) and isinstance(step, int)):
            path.append(step)
            value = value[step]
    place = document.place(tuple(path))
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = Augmentation if path[0] == "augmentation" else Recipe
        return (
            f"{place}: unknown key {path[-1]!r}"
            f"{registry.suggestion(str(path[-1]), known.model_fields)}"
        )
    if problem["type"] == "missing":
        return f"{place}: key {problem['loc'][-1]!r} is missing"
    found = "" if problem["type"] == "value_error" else f", but found {problem['input']!r}"
    return f"{place}: {reason[:1].lower()}{reason[1:]}{found}"
