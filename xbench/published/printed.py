"""Tables as papers printed them, and what the papers claim of them.

``tables.yaml`` says of each table where it is from, what is doubtful and what is claimed; the
numbers are in a CSV file each. A table belongs to the suite of the same name, by its labels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from ..document import parse
from ..errors import UsageError
from ..suite import Suite, load_suite, read_suite

HERE = Path(__file__).parent
ACCURACY = "ACC"
"""Column of the networks' accuracy in percent, in a row without a method."""
_STRICT = ConfigDict(extra="forbid", frozen=True)

Key = tuple[str, str, str, str]
"""Labels of data set, model, method and metric."""


class Doubt(BaseModel):
    """What is known against printed values, those that fit all patterns."""

    model_config = _STRICT
    dataset: str = "*"
    model: str = "*"
    method: str = "*"
    metric: str = "*"
    words: str

    def is_about(self, key: Key) -> bool:
        patterns = (self.dataset, self.model, self.method, self.metric)
        return all(map(fnmatchcase, key, patterns))


class Claim(BaseModel):
    """An ordering that a paper claims.

    Args:
        words: the claim.
        of: what is ordered, methods of one network or networks under one method.
        metrics: columns that it is claimed of.
        datasets: where; empty is everywhere.
        order: chains, each best first; every member of a step is better than each of the next.
        improves: rows of ratios that are better than 1, instead of an order.
        within: the values differ by no more than this, in the column's unit, either way.
        share: "most": more than half of the comparisons.
    """

    model_config = _STRICT
    words: str
    of: Literal["method", "model"] = "method"
    metrics: Annotated[list[str], Field(min_length=1)]
    datasets: list[str] = []
    order: list[list[str | list[str]]] = []
    improves: list[str] = []
    within: float | None = None
    share: Literal["all", "most"] = "all"

    def pairs(self) -> Iterator[tuple[str, str]]:
        """What is claimed better, and than what."""
        for chain in self.order:
            steps = [[step] if isinstance(step, str) else step for step in chain]
            for better, worse in itertools.pairwise(steps):
                yield from ((one, other) for one in better for other in worse)


class Table(BaseModel):
    """A printed table; see ``tables.yaml``."""

    model_config = _STRICT
    title: str
    values: str
    percent: list[str] = []
    ratios: dict[str, list[tuple[str, str]]] = {}
    doubts: list[Doubt] = []
    claims: list[Claim] = []

    @functools.cached_property
    def printed(self) -> dict[Key, str]:
        """The numbers, digits as printed."""
        rows = pd.read_csv(HERE / self.values, dtype=str, keep_default_na=False)
        names = ("dataset", "model", "method", "metric", "value")
        return {(d, m, x, k): v for d, m, x, k, v in zip(*(rows[n] for n in names), strict=True)}

    def value(self, key: Key) -> float:
        """In the unit of the metric that measures it."""
        return float(self.printed[key]) * self.unit(key[3])

    def unit(self, metric: str) -> float:
        return 0.01 if metric in self.percent else 1.0

    def digits(self, key: Key) -> int:
        """Decimals of the number in the unit of what is measured."""
        return len(self.printed[key].partition(".")[2]) + (2 if key[3] in self.percent else 0)


@functools.cache
def tables() -> Mapping[str, Table]:
    """All printed tables, by the name of their suite."""
    text = (HERE / "tables.yaml").read_text(encoding="utf-8")
    value = parse(text, "published/tables.yaml").value
    return {name: Table.model_validate(entry) for name, entry in value.items()}


def table_of(suite: Suite) -> Table:
    """The printed table that a suite is named like.

    Raises:
        UsageError: if there is none.
    """
    if suite.name not in tables():
        raise UsageError(
            f"no published numbers belong to suite {suite.name!r}; they do to "
            f"{', '.join(tables())}, and to a suite of your own with that name and its labels"
        )
    return tables()[suite.name]


def row_of(label: str) -> str:
    """The printed name in a label: what stands before a comma. Behind it are settings."""
    return label.partition(", ")[0]


def better_of(metric: str) -> Literal["higher", "lower"]:
    """Direction of a printed column."""
    return "lower" if metric in ("AD", "DEL", "LogCoshDice", "MAE", "DAUC") else "higher"


def deviations(suite: Suite) -> list[str]:
    """In what a suite differs from the built-in one of its name, entry by entry, in words."""
    own = load_suite(read_suite(suite.name))
    found = []
    for kind in ("datasets", "models", "methods", "metrics"):
        known = {choice.label: choice for choice in getattr(own, kind)}
        for choice in getattr(suite, kind):
            base = known.get(choice.label)
            if base is None or (base.name, base.params) == (choice.name, choice.params):
                continue
            changed = sorted(
                {key for key, _ in set(base.params) ^ set(choice.params)}
                if base.name == choice.name
                else ()
            )
            words = f"other {', '.join(changed)}" if changed else f"{choice.name}, not {base.name}"
            found.append(f"{choice.label} has {words}" if changed else f"{choice.label} is {words}")
    for choice in suite.datasets:
        base = next((other for other in own.datasets if other.label == choice.label), None)
        if base is not None and base.selection != choice.selection:
            found.append(f"{choice.label} has another selection of images")
    if suite.target != own.target:
        found.append(f"the {suite.target} class is explained, not the {own.target}")
    return found
