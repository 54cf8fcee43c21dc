"""What tables say of data sets, models, methods and metrics: plain words, kept with a run.

A table of a run is drawn from these and its rows, without the suite, its data or its plug-ins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from . import registry
from .plan import Group, Plan
from .probe import MapOf, closure, method_cost, stops_early
from .suite import Choice

ARROW = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclass(frozen=True)
class MethodCaption:
    """A method in a table.

    Args:
        label: in the table's rows.
        name: registered name.
        is_control: whether it is a control map.
        passes: its own passes per image, "forwards+backwards"; "?" where it declares none.
    """

    label: str
    name: str
    is_control: bool
    passes: str


@dataclass(frozen=True)
class MetricCaption:
    """A metric in a table.

    Args:
        label: in the table's rows.
        name: registered name.
        symbol: of one or two words for sentences, unlike that of any other metric of the group.
        heading: symbol and arrow; on a second line, baseline and what else is not default.
        family: "faithfulness" and so on.
        better: "higher", "lower" or "neither".
        is_gate: whether methods pass or fail it.
        beside: label of the metric that must not stand alone, where that is why this one is there.
    """

    label: str
    name: str
    symbol: str
    heading: str
    family: str
    better: Literal["higher", "lower", "neither"]
    is_gate: bool
    beside: str


@dataclass(frozen=True)
class GroupCaption:
    """A data set and a model with what was computed of them.

    Args:
        dataset: label.
        model: label.
        title: both, number and selection of images, target.
        methods: in the suite's order.
        metrics: likewise.
        arm: what was done in the model's training, if it is one of several; else empty.
        pair: which pair of trainings it is of.
    """

    dataset: str
    model: str
    title: str
    methods: tuple[MethodCaption, ...]
    metrics: tuple[MetricCaption, ...]
    arm: str = ""
    pair: int | None = None


Captions = tuple[GroupCaption, ...]
_CAPTIONS: TypeAdapter[Captions] = TypeAdapter(Captions)


def captions(plan: Plan) -> Captions:
    """Of all groups of a plan that have cells."""
    return tuple(_group(plan, group) for group in plan.groups if group.cells)


def from_json(value: object) -> Captions:
    """Captions again, from what JSON made of them.

    Raises:
        pydantic.ValidationError: if they are not such.
    """
    return _CAPTIONS.validate_python(value)


def to_json(given: Captions) -> Any:
    """Captions as JSON values."""
    return _CAPTIONS.dump_python(given, mode="json")


def _group(plan: Plan, group: Group) -> GroupCaption:
    methods = dict.fromkeys(cell.method for cell in group.cells)
    metrics = dict.fromkeys(cell.metric for cell in group.cells)
    replicate = group.model.replicate
    return GroupCaption(
        group.dataset.label,
        group.model.label,
        _title(plan, group),
        tuple(
            MethodCaption(
                choice.label,
                choice.name,
                bool(getattr(choice.make(), "control", False)),
                _passes(group, choice),
            )
            for choice in methods
        ),
        _metrics([(choice, choice.make()) for choice in metrics]),
        "" if replicate is None else replicate.arm,
        None if replicate is None else replicate.pair,
    )


def _title(plan: Plan, group: Group) -> str:
    title = f"{group.dataset.label} x {group.model.label}, {len(group.images)} images"
    if group.chosen is not None and group.images:
        mean = group.chosen.confidence
        title += f" ({group.dataset.selection.rule()}, mean confidence {mean:.4f})"
    return f"{title}, target {plan.suite.target}"


def _metrics(chosen: Sequence[tuple[Choice, Any]]) -> tuple[MetricCaption, ...]:
    headings = [_heading(choice.label, metric) for choice, metric in chosen]
    symbols = [heading.split("\n")[0].rstrip(" ↑↓") for heading in headings]
    shared = Counter(symbols)
    return tuple(
        MetricCaption(
            choice.label,
            choice.name,
            " ".join([symbol, *heading.split("\n")[1:]]) if shared[symbol] > 1 else symbol,
            heading,
            str(getattr(metric, "family", "")) or "other",
            metric.better,
            hasattr(metric, "gate"),
            choice.beside,
        )
        for (choice, metric), heading, symbol in zip(chosen, headings, symbols, strict=True)
    )


def _heading(label: str, metric: Any) -> str:
    if label != registry.label(metric):
        return f"{label}{ARROW[metric.better]}"  # the suite's own words
    baseline = getattr(metric, "baseline", None)
    changed = [
        f"{k}={v}" for k, v in registry.changed_parameters(metric).items() if k != "baseline"
    ]
    details = ", ".join([*([baseline] if baseline else []), *changed])
    return f"{getattr(metric, 'symbol', metric.name)}{ARROW[metric.better]}" + (
        f"\n{details}" if details else ""
    )


def _passes(group: Group, choice: Choice) -> str:
    method = choice.make()
    passes = method_cost(method, group.sketch)
    bound = "<=" if stops_early(closure([MapOf(method)])) else ""
    return "?" if passes is None else f"{bound}{passes.forward}+{passes.backward}"
