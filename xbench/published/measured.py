"""Scores of a run in the shape of a printed table, and the printed numbers beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..statistics import LEVEL, Floats, bca_intervals, bootstrap_means
from ..tables import SCORED, Results
from .printed import ACCURACY, Key, Table, row_of, table_of

Numbers = tuple[float, float, float, int]
"""Mean or ratio, lower and upper end of its interval, number of images."""
Place = tuple[str, str]
"""Labels of data set and model."""
Cell = tuple[str, str]
"""Labels of method and metric."""


@dataclass(frozen=True)
class Block:
    """Scores of one data set and one network.

    Args:
        dataset, model: labels.
        images: keys.
        cells: labels of method and metric; accuracy has no method.
        scores: (images, cells), NaN where an image has none.
    """

    dataset: str
    model: str
    images: list[str]
    cells: list[Cell]
    scores: Floats

    def series(self, method: str, metric: str) -> pd.Series[float] | None:
        """Scores by image of a printed cell: the first, where a metric has several readings."""
        for at, (its, column) in enumerate(self.cells):
            if (row_of(its), row_of(column)) == (method, metric):
                return pd.Series(self.scores[:, at], index=self.images)
        return None


def blocks_of(results: Results) -> list[Block]:
    """By data set and network, in the suite's order."""
    suite = results.plan.suite
    rows = results.per_image
    found = []
    for group in results.plan.groups:
        own = rows[(rows["dataset"] == group.dataset.label) & (rows["model"] == group.model.label)]
        if own.empty:
            continue
        scored = own[own["status"].isin(SCORED)]
        wide = scored.pivot_table(
            index="image", columns=["method", "metric"], values="value", dropna=False
        )
        order = [(x.label, k.label) for x in suite.methods for k in suite.metrics]
        known = own[(own["predicted"] >= 0) & (own["label"] >= 0)].drop_duplicates("image")
        right = (known["predicted"] == known["label"]).set_axis(known["image"])
        columns: dict[tuple[str, str], Any] = {
            pair: wide[pair].dropna() for pair in order if pair in wide.columns
        }
        if len(right):
            columns["", ACCURACY] = 100.0 * right
        if not columns:
            continue
        frame = pd.DataFrame(columns).sort_index()
        images, scores = [str(image) for image in frame.index], frame.to_numpy(dtype=np.float64)
        block = Block(group.dataset.label, group.model.label, images, list(columns), scores)
        found.append(block)
    return found


@dataclass(frozen=True)
class Value:
    """A printed number beside a measured one, both in the unit of the metric.

    Args:
        dataset, model, method, metric: printed names.
        published: the printed number.
        measured: NaN where nothing is.
        low, high: 95 % interval of what is measured, over images.
        inside: whether the printed number, as far as its digits go, lies in that interval.
        images: that were scored.
        label: what the suite calls the measured cell, where that says more than the data set.
        doubts: what is known against the printed number.
        decimals: of the printed number.
    """

    dataset: str
    model: str
    method: str
    metric: str
    published: float
    measured: float
    low: float
    high: float
    inside: bool | None
    images: int
    label: str
    doubts: tuple[str, ...]
    decimals: int

    @property
    def difference(self) -> float:
        return self.measured - self.published


def values(results: Results) -> list[Value]:
    """Every printed number of the suite's table, beside what is measured of it.

    Raises:
        UsageError: if no printed table has the suite's name.
    """
    table = table_of(results.plan.suite)
    blocks = {(block.dataset, block.model): block for block in blocks_of(results)}
    measured = {}
    for place, block in blocks.items():
        measured[place] = ratios_of(table, block) if table.ratios else means_of(block)
    found = []
    for key in table.printed:
        cells = [
            (column, numbers)
            for column, numbers in measured.get(key[:2], {}).items()
            if (row_of(column[0]), row_of(column[1])) == key[2:]
        ]
        for column, numbers in cells or [(key[2:], (math.nan, math.nan, math.nan, 0))]:
            found.append(_value(table, key, column, *numbers))
    return found


def _value(
    table: Table,
    key: Key,
    column: Cell,
    mean: float,
    low: float,
    high: float,
    images: int,
) -> Value:
    published, decimals = table.value(key), table.digits(key)
    rounding = 0.5 * 10.0**-decimals
    return Value(
        *key,
        published=published,
        measured=mean,
        low=low,
        high=high,
        inside=None if math.isnan(low) else low - rounding <= published <= high + rounding,
        images=images,
        label=" / ".join(x for x in column if row_of(x) != x and key[0] not in x),
        doubts=tuple(doubt.words for doubt in table.doubts if doubt.is_about(key)),
        decimals=decimals,
    )


def means_of(block: Block) -> dict[Cell, Numbers]:
    """Mean, interval and number of images of each cell."""
    low, high = bca_intervals(block.scores, block.images)
    found = {}
    for at, cell in enumerate(block.cells):
        own = block.scores[:, at]
        own = own[~np.isnan(own)]
        if len(own):
            found[cell] = (float(own.mean()), float(low[at]), float(high[at]), len(own))
    return found


def ratios_of(table: Table, block: Block) -> dict[Cell, Numbers]:
    """Mean over pairs of (mean of the variant / mean of its base), with percentile intervals; the
    draws are images, the same for all.
    """
    scores = block.scores
    drawn = bootstrap_means(scores, block.images)
    means = pd.DataFrame(scores).mean().to_numpy(dtype=np.float64)
    found = {}
    for metric in dict.fromkeys(metric for _, metric in block.cells):
        cells = {row_of(x): at for at, (x, own) in enumerate(block.cells) if own == metric}
        for row, pairs in table.ratios.items():
            if not all(name in cells for pair in pairs for name in pair):
                continue
            above = [cells[variant] for variant, _ in pairs]
            below = [cells[base] for _, base in pairs]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = float((means[above] / means[below]).mean())
                draws = (drawn[:, above] / drawn[:, below]).mean(1)
            ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
            has_interval = len(scores) > 1 and bool(np.isfinite(draws).all())
            low, high = np.quantile(draws, ends).tolist() if has_interval else (math.nan, math.nan)
            images = int((~np.isnan(scores[:, above + below])).all(1).sum())
            found[row, metric] = (ratio, low, high, images)
    return found
