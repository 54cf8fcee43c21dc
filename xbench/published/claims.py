"""Whether what a paper claims holds, by its own numbers and by measured ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ..statistics import LEVEL, Floats, bca_intervals, holm, sign_flip_test
from ..tables import Results
from .measured import Block, Cell, Numbers, Place, blocks_of, ratios_of
from .printed import Claim, Key, Table, better_of, row_of, table_of, tables


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds.

    Args:
        words: the claim.
        printed: "holds", "fails" or "undecided" by the printed numbers, ties being undecided; "-"
            where they are not printed.
        measured: likewise by what is measured, where it takes evidence: every comparison must be
            significant for "holds", one to the contrary is enough for "fails" (paired sign-flip
            tests over images, Holm over the comparisons of the claim, 5 %; an interval for ratios
            and margins). Where a metric has several readings, the suite's first counts.
        printed_counts, measured_counts: comparisons for the claim, against it, and open.
        against_printed, against_measured: the comparisons that contradict it.
        missing: comparisons that are not measured.
    """

    words: str
    printed: str
    measured: str
    printed_counts: tuple[int, int, int]
    measured_counts: tuple[int, int, int]
    against_printed: tuple[str, ...]
    against_measured: tuple[str, ...]
    missing: int


@dataclass(frozen=True)
class _Comparison:
    """One cell that is claimed better than another (None: than 1), with the metric's direction."""

    better: Key
    worse: Key | None

    def words(self, of: str) -> str:
        dataset, model, method, metric = self.better
        first = model if of == "model" else method
        where = method if of == "model" else dataset
        other = "" if self.worse is None else self.worse[1 if of == "model" else 2]
        return f"{first} against {other or 1} in {metric}" + (f", {where}" if where else "")


def verdicts(results: Results) -> list[Verdict]:
    """Of every claim of the suite's table, by what is printed and by what is measured.

    Raises:
        UsageError: if no printed table has the suite's name.
    """
    table = table_of(results.plan.suite)
    blocks = {(block.dataset, block.model): block for block in blocks_of(results)}
    ratios = {place: ratios_of(table, block) for place, block in blocks.items() if table.ratios}
    return [_verdict(table, claim, blocks, ratios) for claim in table.claims]


def printed_verdicts(name: str) -> list[Verdict]:
    """Whether a printed table satisfies what its own paper claims of it.

    Args:
        name: of the table's suite.
    """
    return [_verdict(tables()[name], claim, {}, {}) for claim in tables()[name].claims]


def _verdict(
    table: Table,
    claim: Claim,
    blocks: Mapping[Place, Block],
    ratios: Mapping[Place, Mapping[Cell, Numbers]],
) -> Verdict:
    comparisons = list(_comparisons(table, claim))
    printed = [_sign(_printed_gain(table, comparison, claim.within)) for comparison in comparisons]
    if claim.improves:
        measured = [_measured_ratio(c.better, ratios.get(c.better[:2], {})) for c in comparisons]
    elif claim.within is not None:
        measured = [_measured_margin(c, claim.within, blocks) for c in comparisons]
    else:
        measured = _measured_order(comparisons, blocks)

    def against(signs: Sequence[int | None]) -> tuple[str, ...]:
        pairs = zip(comparisons, signs, strict=True)
        return tuple(comparison.words(claim.of) for comparison, sign in pairs if sign == -1)

    return Verdict(
        claim.words,
        _judged(printed, claim.share),
        _judged(measured, claim.share),
        _counts(printed),
        _counts(measured),
        against(printed),
        against(measured),
        measured.count(None),
    )


def _comparisons(table: Table, claim: Claim) -> Iterator[_Comparison]:
    """In every block of the table where both sides are printed."""
    keys = table.printed
    places = dict.fromkeys((d, m, x) for d, m, x, _ in keys)
    if claim.improves:
        for row in claim.improves:
            for dataset, model in dict.fromkeys((d, m) for d, m, _ in places):
                for metric in claim.metrics:
                    if not claim.datasets or dataset in claim.datasets:
                        yield _Comparison((dataset, model, row, metric), None)
        return
    at = 1 if claim.of == "model" else 2
    for better, worse in claim.pairs():
        for place in places:
            if place[at] != better or (claim.datasets and place[0] not in claim.datasets):
                continue
            other = (*place[:at], worse, *place[at + 1 :])
            for metric in claim.metrics:
                pair = _Comparison((*place, metric), (other[0], other[1], other[2], metric))
                if pair.better in keys and pair.worse in keys:
                    yield pair


def _oriented(gain: float, metric: str) -> float:
    return gain if better_of(metric) == "higher" else -gain


def _sign(gain: float) -> int | None:
    return None if math.isnan(gain) else int(gain > 0) - int(gain < 0)


def _printed_gain(table: Table, comparison: _Comparison, within: float | None) -> float:
    """By how much the printed numbers are for the comparison; NaN where they are not printed."""
    key, other = comparison.better, comparison.worse
    if key not in table.printed:
        return math.nan
    base = 1.0 if other is None else table.value(other)
    gain = round(table.value(key) - base, table.digits(key) + 2)  # decimals have no exact binary
    if within is None:
        return _oriented(gain, key[3])
    return 1.0 if abs(gain) <= within else -1.0


def _differences(comparison: _Comparison, blocks: Mapping[Place, Block]) -> pd.Series[float] | None:
    """Better minus worse, image by image, on those that both have scores of."""
    assert comparison.worse is not None
    sides = []
    for key in (comparison.better, comparison.worse):
        block = blocks.get(key[:2])
        sides.append(None if block is None else block.series(*key[2:]))
    ours, theirs = sides
    if ours is None or theirs is None:
        return None
    both = (ours - theirs).dropna().sort_index()
    return both if len(both) else None


def _as_column(differences: pd.Series[float]) -> tuple[Floats, list[str]]:
    column: Floats = np.array(differences, dtype=np.float64)[:, None]
    return column, [str(key) for key in differences.index]


def _measured_order(
    comparisons: Sequence[_Comparison], blocks: Mapping[Place, Block]
) -> list[int | None]:
    """1 where the better one surely is, -1 where it surely is not, 0 if open, None if missing."""
    gains = [_differences(comparison, blocks) for comparison in comparisons]
    p = np.array(
        [math.nan if gain is None else sign_flip_test(*_as_column(gain))[0] for gain in gains],
        dtype=np.float64,
    )
    adjusted: Floats = holm(p)
    return [
        None
        if gain is None
        else _sign(_oriented(float(gain.mean()), c.better[3]))
        if sure <= 1 - LEVEL
        else 0
        for c, gain, sure in zip(comparisons, gains, adjusted.tolist(), strict=True)
    ]


def _measured_margin(
    comparison: _Comparison, within: float, blocks: Mapping[Place, Block]
) -> int | None:
    gain = _differences(comparison, blocks)
    if gain is None:
        return None
    low, high = (float(end[0]) for end in bca_intervals(*_as_column(gain)))
    if -within <= low and high <= within:
        return 1
    return -1 if low > within or high < -within else 0


def _measured_ratio(key: Key, ratios: Mapping[Cell, Numbers]) -> int | None:
    """Where the interval of a ratio lies, against 1; of the first reading of its metric."""
    found = [n for (row, metric), n in ratios.items() if (row, row_of(metric)) == key[2:]]
    if not found:
        return None
    _, low, high, _ = found[0]
    ends = sorted((_oriented(low - 1, key[3]), _oriented(high - 1, key[3])))
    return 1 if ends[0] > 0 else -1 if ends[1] < 0 else 0


def _counts(signs: Sequence[int | None]) -> tuple[int, int, int]:
    return signs.count(1), signs.count(-1), signs.count(0)


def _judged(signs: Sequence[int | None], share: Literal["all", "most"]) -> str:
    """The verdict from those of all comparisons; what is missing leaves it open."""
    known = [sign for sign in signs if sign is not None]
    if not known:
        return "-"
    wins, losses, total = known.count(1), known.count(-1), len(signs)
    if share == "most":
        return "holds" if 2 * wins > total else "fails" if 2 * losses >= total else "undecided"
    return "fails" if losses else "holds" if wins == total else "undecided"
