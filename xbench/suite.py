"""From a YAML file to a suite: all names and parameters resolved, no weight touched."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import registry
from .document import Document, parse
from .errors import SuiteError, UsageError

FACTS = ("degenerate_maps", "tied_pixels", "mean_mass")
"""Metrics of every suite: facts about maps, without which its other scores are easily misread."""
MAX_CELLS = 1_000_000
MAX_LABEL = 100
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

Count = Annotated[int, Field(ge=1)]


class RunOptions(BaseModel):
    """How to run: nothing here changes the score of an image beyond rounding.

    Args:
        images: of every data set, in the fixed order of selection; None takes what each entry says.
        device: "auto" is all GPUs if there are any, else the CPU; "cuda" is all, "cuda:1" one.
        batch_size: rows of every forward; "auto" is 32 on a CPU, 128 on a GPU, at most ``slice``.
        workers: processes; "auto" is one per CPU core or GPU, at most one per unit of work.
        slice: images of a unit of work, which is what a kill can cost at most.
        keep: what to store of every image beside its scores: "curves" of the metrics that have
            any, "maps" of the methods, with pictures and masks.
        examples: the first images, of which all of that is stored anyway; a few, for a page.
        save_maps: a folder for all maps as safetensors files.
        offline: whether network access is refused.
    """

    model_config = _STRICT

    images: Count | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    batch_size: Count | Literal["auto"] = "auto"
    workers: Count | Literal["auto"] = "auto"
    slice: Count = 64
    keep: list[Literal["curves", "maps"]] = []
    examples: Annotated[int, Field(ge=0)] = 4
    save_maps: Annotated[str, Field(min_length=1)] | None = None
    offline: bool = False


class _Exclude(BaseModel):
    model_config = _STRICT
    dataset: str = "*"
    model: str = "*"
    method: str = "*"
    metric: str = "*"


class _File(BaseModel):
    model_config = _STRICT
    version: Annotated[int, Field(ge=1, le=1)]
    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    ]
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    target: Literal["predicted", "label"] = "predicted"
    datasets: Annotated[list[Any], Field(min_length=1)]
    models: Annotated[list[Any], Field(min_length=1)]
    methods: Annotated[list[Any], Field(min_length=1)]
    metrics: Annotated[list[Any], Field(min_length=1)]
    exclude: list[_Exclude] = []
    run: RunOptions = RunOptions()


class Selection(BaseModel):
    """Which images of a data set are taken: the first in an order that more of them continue.

    It is no part of what a score is known by, since scores are per image; the table states it.

    Args:
        images: how many; None takes all.
        stratified: whether the classes' shares among the first images are those among all.
        images_seed: another seed draws other images.
        only: the candidates, as a list of ids (or of positions in the sorted ids), or the path of a
            text or ``.npy`` file of them, relative to the data directory or the working directory;
            None takes all as candidates.
        min_confidence: least probability of the label under the model of the run.
        correct: whether the model's prediction must be the label.
    """

    model_config = _STRICT

    images: Count | None = None
    stratified: bool = True
    images_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    only: str | tuple[str | int, ...] | None = None
    min_confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    correct: bool = False

    @property
    def needs_model(self) -> bool:
        return self.correct or self.min_confidence is not None

    def rule(self) -> str:
        """What an image must satisfy, in words; empty if nothing."""
        words = ["correct"] if self.correct else []
        if self.min_confidence is not None:
            words.append(f"confidence of the label >= {self.min_confidence:g}")
        return ", ".join(words)

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, and how many images."""
        return {"images": self.images, **self.model_dump(exclude_defaults=True)}


class Replicate(BaseModel):
    """Which of several trainings a network is, so that arms can be compared over pairs of networks.

    It is no part of what a score is known by.

    Args:
        arm: what was done in training, such as "baseline" or "cosine"; the first one in the suite
            is what others are compared with.
        pair: networks of one pair differ in their arm alone; the seed of their training is a good
            number.
    """

    model_config = _STRICT

    arm: Annotated[str, Field(pattern=r"^\P{C}{1,40}$")]
    pair: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Choice:
    """One entry of a suite, as plain data: hashable, and cheap to send to a worker.

    Args:
        kind: "datasets", "models", "methods" or "metrics".
        name: registered name.
        params: resolved hyper-parameters, sorted.
        label: what tables call it; not part of its identity.
        selection: of a data set, which images.
        replicate: of a model, which of several trainings it is.
        beside: label of the metric that must not stand alone, where that is why this one is there.
    """

    kind: str
    name: str
    params: tuple[tuple[str, Any], ...]
    label: str
    selection: Selection = field(default_factory=Selection)
    replicate: Replicate | None = field(default=None, compare=False)
    beside: str = field(default="", compare=False)

    def make(self) -> Any:
        """The entry itself."""
        return registry.make(self.kind, self.name, dict(self.params))

    def identity(self) -> dict[str, Any]:
        return registry.identity(self.make())

    def matches(self, pattern: str) -> bool:
        return bool(registry.matching((self.name, self.label), (pattern,)))


@dataclass(frozen=True)
class Suite:
    """A product of data sets, models, methods and metrics, and how to run it."""

    name: str
    seed: int
    target: Literal["predicted", "label"]
    datasets: tuple[Choice, ...]
    models: tuple[Choice, ...]
    methods: tuple[Choice, ...]
    metrics: tuple[Choice, ...]
    exclude: tuple[Mapping[str, str], ...] = ()
    run: RunOptions = field(default_factory=RunOptions)

    def excludes(self, dataset: Choice, model: Choice, method: Choice, metric: Choice) -> bool:
        """Whether a rule names this cell, or each that its metric must not stand without."""

        def named(metric: Choice) -> bool:
            chosen = {"dataset": dataset, "model": model, "method": method, "metric": metric}
            return any(
                all(chosen[kind].matches(pattern) for kind, pattern in rule.items())
                for rule in self.exclude
            )

        beside = self._beside.get(metric, []) if self.exclude else []
        return named(metric) or (len(beside) > 0 and all(map(named, beside)))

    def pairs(self, dataset: Choice, model: Choice) -> bool:
        """Whether any cell has this data set and this model."""
        return not any(
            dataset.matches(rule["dataset"]) and model.matches(rule["model"])
            for rule in self.exclude
            if rule["method"] == rule["metric"] == "*"
        )

    @cached_property
    def _beside(self) -> dict[Choice, list[Choice]]:
        """Of each metric that must not stand alone, those that stand beside it."""
        kin: dict[Any, list[Choice]] = {}
        for choice in self.metrics:
            kin.setdefault(_kin(choice.make()), []).append(choice)
        return {
            metric: [choice for entry in _companions(metric) for choice in kin.get(_kin(entry), ())]
            for metric in self.metrics
        }

    def narrowed(self, **patterns: Sequence[str]) -> Suite:
        """Only the entries of a kind that a shell pattern matches, by name or label.

        To metrics belongs what must stand beside them: see :func:`complete`.

        Raises:
            UsageError: if a pattern matches nothing.
        """
        kept: dict[str, Any] = {}
        for kind, wanted in patterns.items():
            choices: tuple[Choice, ...] = getattr(self, kind)
            for pattern in wanted:
                if not any(choice.matches(pattern) for choice in choices):
                    known = {choice.name for choice in choices}
                    raise UsageError(
                        f"--{kind} {pattern!r} matches nothing in suite {self.name!r}"
                        f"{registry.suggestion(pattern, known)}"
                    )
            if wanted:
                kept[kind] = tuple(c for c in choices if any(c.matches(p) for p in wanted))
        if "metrics" in kept:
            kept["metrics"] = complete(kept["metrics"], self.metrics)
        return replace(self, **kept)

    def resolved(self) -> dict[str, Any]:
        """Everything that was decided, as JSON can hold it."""

        def plain(choice: Choice) -> dict[str, Any]:
            more = choice.selection.given() if choice.kind == "datasets" else {}
            more |= choice.replicate.model_dump() if choice.replicate else {}
            written = registry.Nested(choice.kind, choice.name, choice.params).plain()
            return {"label": choice.label, **more, **written}

        kinds = ("datasets", "models", "methods", "metrics")
        return {
            "version": 1,
            "name": self.name,
            "seed": self.seed,
            "target": self.target,
            **{kind: [plain(choice) for choice in getattr(self, kind)] for kind in kinds},
            "exclude": [dict(rule) for rule in self.exclude],
            "run": self.run.model_dump(),
        }


def complete(metrics: Sequence[Choice], known: Sequence[Choice] = ()) -> tuple[Choice, ...]:
    """These metrics, behind each what must stand beside it, and at the end the facts about maps.

    A metric class lists in ``beside`` what it would mislead without, as entries; a variant of the
    same name and needs does as well.

    Args:
        known: where to look for what is lacking, before it is taken as the class lists it.
    """
    present = {_kin(choice.make()) for choice in metrics}
    fitting = {_kin(choice.make()): choice for choice in reversed(known)}
    found: list[Choice] = []
    for metric in metrics:
        found.append(metric)
        for entry in _companions(metric):
            if _kin(entry) not in present:
                present.add(_kin(entry))
                chosen = fitting.get(_kin(entry)) or _choice("metrics", entry)
                found.append(replace(chosen, beside=metric.label))
    lacking = [fact for fact in FACTS if all(choice.name != fact for choice in metrics)]
    facts = (registry.make("metrics", fact) for fact in lacking)
    return (*found, *(_choice("metrics", fact) for fact in facts))


def _companions(metric: Choice) -> tuple[Any, ...]:
    return tuple(getattr(metric.make(), "beside", ()))


def _kin(entry: Any) -> tuple[Any, ...]:
    """Variants that differ only in what they make of the same needs are of one kin."""
    return (entry.name, *getattr(entry, "needs", ()))


def _choice(
    kind: str,
    entry: Any,
    label: str = "",
    selection: Selection | None = None,
    replicate: Replicate | None = None,
) -> Choice:
    params = tuple(sorted(registry.parameters(entry).items()))
    shown = label or registry.label(entry)
    return Choice(kind, entry.name, params, shown, selection or Selection(), replicate)


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=registry.plain
    )


# --- where suites come from -----------------------------------------------------------------------


def builtin_suites() -> dict[str, Path]:
    """The suites that ship with xbench, by name: ``quick``, ``guided-absolutegrad/table2``."""
    here = Path(__file__).parent
    homes = (here / "benchmarks", here.parent / "benchmarks")  # installed; in a source tree
    home = next((folder for folder in homes if folder.is_dir()), homes[0])
    found = (*home.glob("*.yaml"), *home.glob("*/table*.yaml"), *home.glob("*/seeds.yaml"))
    named = {path.relative_to(home).with_suffix("").as_posix(): path for path in found}
    return dict(sorted(named.items()))


def read_suite(name: str) -> Document:
    """A built-in suite by name, or a file by path.

    Raises:
        UsageError: if there is neither, or the file cannot be read.
        SuiteError: if it is not YAML.
    """
    known = builtin_suites()
    path = known.get(name, Path(name))
    try:
        is_there = path.is_file()
    except OSError:  # the name is too long for any file
        is_there = False
    if not is_there:
        raise UsageError(
            f"there is no suite {name!r}: neither a built-in name nor a file"
            f"{registry.suggestion(name, known)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"suite {path} cannot be read: {error}") from None
    return parse(text, os.fspath(path) if name not in known else f"{name} (built in)")


# --- from document to suite -----------------------------------------------------------------------


Settings = Iterable[tuple[str, Any, str]]
"""What overrides a document: dotted key, value, and who says so, for messages, such as
``("run.batch_size", 32, "--batch-size")``."""


def load_suite(document: Document, settings: Settings = ()) -> Suite:
    """The suite in a document, and what belongs to every suite: see :func:`complete`.

    Raises:
        SuiteError: with every problem that was found, each with its place.
    """
    written = suite_as_written(document, settings)
    suite = replace(written, metrics=complete(written.metrics))
    labels = Counter(choice.label for choice in suite.metrics)
    if twice := [label for label, count in labels.items() if count > 1]:
        sentence = "is the label of two metrics, one of which every suite has; choose another"
        raise SuiteError([f"{document.source}: {label!r} {sentence}" for label in twice])
    return suite


def suite_as_written(document: Document, settings: Settings = ()) -> Suite:
    """The suite in a document and nothing else.

    Raises:
        SuiteError: with every problem that was found, each with its place.
    """
    value = document.value
    if not isinstance(value, dict):
        raise SuiteError(
            [f"{document.source}: a suite is a mapping with version, name, datasets, ..."]
        )
    for key, setting, who in settings:
        value = _with(value, key.split("."), setting, key)
        steps = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
        document = replace(document, given={**document.given, steps: who})
    reader = _Reader(document)
    listed = {key: items for key, items in value.items() if key in registry.KINDS}
    chosen = {k: reader.choices(k, items) for k, items in listed.items() if isinstance(items, list)}
    if not reader.problems:
        reader.check_arms(chosen.get("models", ()))
    try:
        file = _File.model_validate(value)
    except ValidationError as error:
        found = _sentences(document, value, error.errors())
        raise SuiteError([*found, *reader.problems]) from None
    if reader.problems:
        raise SuiteError(reader.problems)
    cells = 1
    for choices in chosen.values():
        cells *= len(choices)
    if cells > MAX_CELLS:
        raise SuiteError([f"{document.source}: {cells:,} cells; at most {MAX_CELLS:,} are allowed"])
    if file.run.images is not None:
        chosen["datasets"] = tuple(
            replace(
                choice, selection=choice.selection.model_copy(update={"images": file.run.images})
            )
            for choice in chosen["datasets"]
        )
    return Suite(
        name=file.name,
        seed=file.seed,
        target=file.target,
        exclude=tuple(rule.model_dump() for rule in file.exclude),
        run=file.run,
        **chosen,
    )


def read_choices(kind: str, items: Sequence[str], option: str) -> tuple[Choice, ...]:
    """Entries that are named outside a suite, each a name or a YAML mapping with a key ``name``.

    Args:
        kind: "datasets", "models", "methods" or "metrics".
        items: such as ``smooth_grad`` or ``{name: smooth_grad, samples: 50}``.
        option: who names them, for messages.

    Raises:
        SuiteError: with every problem that was found.
    """
    value = {kind: [parse(item, option).value for item in items]}
    given: dict[tuple[str | int, ...], str] = {(kind, at): option for at in range(len(items))}
    reader = _Reader(Document(value, option, {}, given))
    chosen = reader.choices(kind, value[kind])
    if reader.problems:
        raise SuiteError(reader.problems)
    return chosen


def _with(value: Any, path: Sequence[str], setting: Any, key: str) -> Any:
    if not path:
        return setting
    step: Any = int(path[0]) if isinstance(value, list) and path[0].isdecimal() else path[0]
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        changed: Any = list(value)
        if isinstance(changed[step], str):
            changed[step] = {"name": changed[step]}
        changed[step] = _with(changed[step], path[1:], setting, key)
        return changed
    if isinstance(value, dict):
        return {**value, step: _with(value.get(step, {}), path[1:], setting, key)}
    raise UsageError(f"--set {key}: there is no such place in the suite")


def _sentences(document: Document, value: Any, problems: Iterable[Any]) -> list[str]:
    """One for each place: where one of two types is allowed, both say what they miss."""
    found: dict[tuple[str | int, ...], Any] = {}
    for problem in problems:
        is_there = problem["type"] != "missing"
        path = _path(value, problem["loc"]) if is_there else problem["loc"]
        if path in found:
            reasons = f"{found[path]['msg']}, or {problem['msg'].lower()}"
            found[path] = {**found[path], "msg": reasons}
        else:
            found[path] = problem
    return [_sentence(document, path, problem) for path, problem in found.items()]


def _path(value: Any, steps: Iterable[str | int]) -> tuple[str | int, ...]:
    """The steps that lie in the document; what follows names the types that were tried."""
    path: list[Any] = []
    for step in steps:
        inside = isinstance(value, dict) and step in value
        if not inside and not (isinstance(value, list) and isinstance(step, int)):
            break
        path.append(step)
        value = value[step]
    return tuple(path)


def _sentence(document: Document, path: tuple[str | int, ...], problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        model = RunOptions if path[0] == "run" else _Exclude if path[0] == "exclude" else _File
        hint = registry.suggestion(str(path[-1]), model.model_fields)
        return f"{document.place(path)}: unknown key {path[-1]!r}{hint}"
    if problem["type"] == "missing":
        return f"{document.place(path[:-1])}: key {path[-1]!r} is missing"
    reason = problem["msg"]
    return (
        f"{document.place(path)}: {reason[:1].lower()}{reason[1:]}, but found {problem['input']!r}"
    )


class _Reader:
    """Turns the items of a suite into choices and collects every problem on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[str] = []

    def choices(self, kind: str, items: Sequence[Any]) -> tuple[Choice, ...]:
        found: dict[str, Choice] = {}
        numbers: dict[tuple[str, Any], Choice] = {}
        for at, item in enumerate(items):
            for choice in self._item(kind, item, (kind, at)):
                same = numbers.setdefault((choice.name, choice.params), choice)
                twin = found.setdefault(choice.label, choice)
                if same is not choice:
                    self._problem((kind, at), f"{choice.label!r} is the same as {same.label!r}")
                elif twin is not choice:
                    self._problem((kind, at), f"{choice.label!r} is the label of two entries")
        return tuple(found.values())

    def _problem(self, path: tuple[str | int, ...], sentence: str) -> None:
        self.problems.append(f"{self.document.place(path)}: {sentence}")

    def _item(self, kind: str, item: Any, path: tuple[str | int, ...]) -> list[Choice]:
        params = {"name": item} if isinstance(item, str) else item
        if not isinstance(params, dict) or not isinstance(params.get("name"), str):
            self._problem(path, "write a name, or a mapping with a key 'name'")
            return []
        params = dict(params)
        name = params.pop("name")
        label = self._label(params, path)
        selection = self._selection(params, path) if kind == "datasets" else Selection()
        replicate = self._replicate(params, path) if kind == "models" else None
        try:
            cls = registry.find(kind, name)
        except UsageError as error:
            self._problem((*path, "name") if isinstance(item, dict) else path, str(error))
            return []
        axes = _axes(params, lambda key: registry.takes_a_list(cls, key))
        points = math.prod(len(axis) for axis in axes)
        if label and points > 1:
            self._problem(path, f"label {label!r} is given to a grid of {points:,} entries")
            return []
        if points > MAX_CELLS:
            self._problem(path, f"a grid of {points:,} entries; at most {MAX_CELLS:,} are allowed")
            return []
        made = []
        for values in itertools.product(*axes):
            point = dict(zip(params, values, strict=True))
            resolved = name
            try:
                resolved, point = registry.resolve(kind, name, point)
                entry = registry.find(kind, resolved)(**point)
            except UsageError as error:
                self._problem(path, str(error))
                return []
            except ValidationError as error:
                beside = Selection.model_fields if kind == "datasets" else ()
                for key, sentence in registry.parameter_problems(kind, resolved, error, beside):
                    self._problem((*path, key) if key else path, sentence)
                return []
            shown = registry.label(entry) if label is None else label
            if not shown or not shown.isprintable() or len(label or "") > MAX_LABEL:
                self._problem(
                    (*path, "label"),
                    f"a label is one line of 1 to {MAX_LABEL} printable characters, "
                    f"but found {shown!r}",
                )
                return []
            made.append(_choice(kind, entry, shown, selection, replicate))
        return made

    def _label(self, params: dict[str, Any], path: tuple[str | int, ...]) -> str | None:
        label = params.pop("label", None)
        if label is not None and not isinstance(label, str):
            self._problem((*path, "label"), f"label must be str, but found {label!r}")
            return None
        return label

    def _selection(self, params: dict[str, Any], path: tuple[str | int, ...]) -> Selection:
        given = {key: params.pop(key) for key in Selection.model_fields if key in params}
        try:
            return Selection.model_validate(registry.tuples(given))
        except ValidationError as error:
            for problem in error.errors():
                key = str(problem["loc"][0])
                reason = problem["msg"][:1].lower() + problem["msg"][1:]
                self._problem((*path, key), f"{key}: {reason}, but found {problem['input']!r}")
            return Selection()

    def _replicate(self, params: dict[str, Any], path: tuple[str | int, ...]) -> Replicate | None:
        given = {key: params.pop(key) for key in Replicate.model_fields if key in params}
        try:
            return Replicate.model_validate(given) if given else None
        except ValidationError as error:
            for problem in error.errors():
                key, reason = str(problem["loc"][0]), problem["msg"]
                if problem["type"] == "missing":
                    self._problem(path, f"{key!r} is missing: 'arm' and 'pair' belong together")
                elif key == "arm":
                    sentence = "arm is a name of 1 to 40 printable characters"
                    self._problem((*path, key), f"{sentence}, but found {problem['input']!r}")
                else:
                    sentence = f"{key}: {reason[:1].lower()}{reason[1:]}"
                    self._problem((*path, key), f"{sentence}, but found {problem['input']!r}")
            return None

    def check_arms(self, models: Iterable[Choice]) -> None:
        """Two arms or more, and every pair is one network of each."""
        pairs: dict[str, list[int]] = {}
        for choice in models:
            if choice.replicate is not None:
                pairs.setdefault(choice.replicate.arm, []).append(choice.replicate.pair)
        if not pairs:
            return
        (base, expected), *others = pairs.items()
        for arm, found in pairs.items():
            for pair in sorted(pair for pair, count in Counter(found).items() if count > 1):
                self._problem(("models",), f"arm {arm!r} has pair {pair} more than once")
        for arm, found in others:
            if set(found) != set(expected):
                numbers = [", ".join(map(str, sorted(set(own)))) for own in (found, expected)]
                self._problem(
                    ("models",),
                    f"arm {arm!r} has pairs {numbers[0]}, but arm {base!r} has {numbers[1]}; "
                    "every pair is one network of each arm",
                )
        if not others:
            self._problem(
                ("models",),
                f"there is no arm but {base!r}; an effect is that of one arm against another",
            )


def _axes(params: Mapping[str, Any], takes_a_list: Callable[[str], bool]) -> list[list[Any]]:
    """The values of each parameter: a list where a field takes one value is a grid, and so is a
    list of lists for a field of lists.
    """

    def values(key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            return [value]
        return value if not takes_a_list(key) or isinstance(value[0], list) else [value]

    return [values(key, value) for key, value in params.items()]
