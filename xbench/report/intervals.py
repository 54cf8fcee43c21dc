"""Means with their intervals as rows of a page: names that wrap, bars as wide as the window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARTS = 4
"""Of an axis, about: its labels stay apart at 360 px."""


@dataclass(frozen=True)
class Bar:
    """A mean and its interval, in percent of the axis."""

    method: str
    is_control: bool
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """A figure.

    Args:
        title: metric with its arrow.
        bars: in the order to show.
        ticks: labels of the axis at equal distances, from one end to the other.
    """

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[str, ...]


def intervals(title: str, means: Sequence[tuple[str, bool, float, float, float]]) -> Intervals:
    """A figure of means.

    Args:
        title: metric with its arrow.
        means: method, whether it is a control map, mean, lower and upper end.
    """
    first, last, step = axis(min(m[3] for m in means), max(m[4] for m in means))

    def place(value: float) -> float:
        return round(100 * (value / step - first) / (last - first), 2)

    return Intervals(
        title,
        tuple(
            Bar(method, is_control, place(mean), place(low), place(high))
            for method, is_control, mean, low, high in means
        ),
        tuple(f"{at * step:.6g}".replace("-", "\N{MINUS SIGN}") for at in range(first, last + 1)),
    )


def axis(low: float, high: float) -> tuple[int, int, float]:
    """First and last multiple of a round step that hold all values between, and the step.

    No more than six parts, which is what the style sheet has lines for.
    """
    size = max(abs(low), abs(high))
    size = size if size > 1e-300 else 1.0
    span = high - low if high - low > 1e-9 * size else size
    power = 10.0 ** math.floor(math.log10(span / PARTS))
    step = next(round_ * power for round_ in (1, 2, 2.5, 5, 10) if round_ * power * PARTS >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first, max(last, first + 1), step
