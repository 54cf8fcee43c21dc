"""Numbers that papers printed, beside what is measured, and whether what they claim holds.

``tables.yaml`` says of each table where it is from and what its paper claims; the numbers are in a
CSV file each. A table is compared with the suite of the same name, by the labels of its entries.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from ..document import parse
from ..errors import UsageError
from ..statistics import LEVEL, Floats, bca_intervals, bootstrap_means, holm, sign_flip_test
from ..suite import Suite, load_suite, read_suite
from ..tables import SCORED, Results

HERE = Path(__file__).parent
ACCURACY = "ACC"
"""Column of the networks' accuracy in percent, in a row without a method."""
_STRICT = ConfigDict(extra="forbid", frozen=True)

Better = Literal["higher", "lower"]
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
        """In the unit of what is measured: decision of a metric, not of a paper."""
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


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
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
    cells: list[tuple[str, str]]
    scores: Floats

    def series(self, method: str, metric: str) -> pd.Series[float] | None:
        """Scores by image of a printed cell: the first, where a metric has several readings."""
        for at, (its, column) in enumerate(self.cells):
            if (row_of(its), row_of(column)) == (method, metric):
                return pd.Series(self.scores[:, at], index=self.images)
        return None


def _blocks(results: Results) -> list[_Block]:
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
        block = _Block(group.dataset.label, group.model.label, images, list(columns), scores)
        found.append(block)
    return found


@dataclass(frozen=True)
class Value:
    """A printed number beside a measured one, both in the unit of the metric.

    Args:
        dataset, model, method, metric: printed names.
        published: NaN where the paper has no such number.
        measured: NaN where nothing is.
        low, high: 95 % interval of what is measured, over images.
        inside: whether the printed number, as far as its digits go, lies in that interval.
        images: that were scored.
        label: what the suite calls the measured cell, where that says more.
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
    blocks = {(block.dataset, block.model): block for block in _blocks(results)}
    measured = {}
    for place, block in blocks.items():
        measured[place] = _ratios(table, block) if table.ratios else _means(block)
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


_Numbers = tuple[float, float, float, int]


def _value(
    table: Table,
    key: Key,
    column: tuple[str, str],
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
        label=" / ".join(label for label in column if row_of(label) != label),
        doubts=tuple(doubt.words for doubt in table.doubts if doubt.is_about(key)),
        decimals=decimals,
    )


def _means(block: _Block) -> dict[tuple[str, str], _Numbers]:
    """Mean, interval and number of images of each cell."""
    low, high = bca_intervals(block.scores, block.images)
    found = {}
    for at, cell in enumerate(block.cells):
        own = block.scores[:, at]
        own = own[~np.isnan(own)]
        if len(own):
            found[cell] = (float(own.mean()), float(low[at]), float(high[at]), len(own))
    return found


def _ratios(table: Table, block: _Block) -> dict[tuple[str, str], _Numbers]:
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


# --- claims ---------------------------------------------------------------------------------------


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
            and margins).
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
    blocks = {(block.dataset, block.model): block for block in _blocks(results)}
    ratios = {place: _ratios(table, block) for place, block in blocks.items() if table.ratios}
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
    blocks: Mapping[tuple[str, str], _Block],
    ratios: Mapping[tuple[str, str], Mapping[tuple[str, str], _Numbers]],
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


def better_of(metric: str) -> Better:
    """Direction of a printed column."""
    return "lower" if metric in ("AD", "DEL", "LogCoshDice", "MAE", "DAUC") else "higher"


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


def _differences(
    comparison: _Comparison, blocks: Mapping[tuple[str, str], _Block]
) -> pd.Series[float] | None:
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
    comparisons: Sequence[_Comparison], blocks: Mapping[tuple[str, str], _Block]
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
    comparison: _Comparison, within: float, blocks: Mapping[tuple[str, str], _Block]
) -> int | None:
    gain = _differences(comparison, blocks)
    if gain is None:
        return None
    low, high = (float(end[0]) for end in bca_intervals(*_as_column(gain)))
    if -within <= low and high <= within:
        return 1
    return -1 if low > within or high < -within else 0


def _measured_ratio(key: Key, ratios: Mapping[tuple[str, str], _Numbers]) -> int | None:
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


# --- what differs from the table's own suite ------------------------------------------------------


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


# --- as text --------------------------------------------------------------------------------------


def render(
    results: Results,
    form: Literal["terminal", "md", "csv", "json"],
    width: int | None = None,
    colour: bool = False,
) -> str:
    """Printed beside measured, then the claims; CSV has the numbers alone.

    Raises:
        UsageError: if no printed table has the suite's name, or the form is none of these.
    """
    suite = results.plan.suite
    table = table_of(suite)
    numbers, claims, differs = values(results), verdicts(results), deviations(suite)
    if form == "csv":
        return _csv(numbers)
    if form == "json":
        return _json(table, numbers, claims, differs)
    if form not in ("terminal", "md"):
        raise UsageError(f"--published has no form {form!r}; terminal, md, csv and json are there")
    notes = list(dict.fromkeys(words for value in numbers for words in value.doubts))
    head = [f"{table.title}: printed and measured; 95 % intervals over images"]
    if differs:
        more = f"; and {len(differs) - 5} more" if len(differs) > 5 else ""
        head.append(f"Not the suite of the table: {'; '.join(differs[:5])}{more}.")
    first = _value_rows(numbers, notes)
    second = _claim_rows(claims)
    legend = [f"Doubt {at}: {words}." for at, words in enumerate(notes, 1)]
    if form == "md":
        parts = [f"**{head[0]}**", *head[1:], _markdown(VALUES, first), *legend]
        return "\n\n".join([*parts, _markdown(CLAIMS, second), *_against(claims)]) + "\n"
    out = io.StringIO()
    console = Console(
        file=out, width=width or 200, force_terminal=colour, no_color=not colour, highlight=False
    )
    for line in head:
        console.print(line, markup=False)
    console.print(_grid(VALUES, first))
    for line in legend:
        console.print(line, markup=False)
    console.print(_grid(CLAIMS, second))
    for line in _against(claims):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


VALUES = (
    "data set", "model", "method", "metric", "published", "doubt", "measured", "difference",
    "interval", "inside", "images", "as",
)  # fmt: skip
CLAIMS = ("claim", "printed", "measured", "for, against, open", "not measured")


def _value_rows(numbers: Iterable[Value], notes: Sequence[str]) -> list[list[str]]:
    rows = []
    for value in numbers:
        marks = ", ".join(str(notes.index(words) + 1) for words in value.doubts)
        d = value.decimals
        is_measured = not math.isnan(value.measured)
        has_interval = not math.isnan(value.low)
        rows.append(
            [
                value.dataset,
                value.model,
                value.method,
                value.metric,
                f"{value.published:.{d}f}",
                marks,
                f"{value.measured:.{d}f}" if is_measured else "-",
                f"{value.difference:+.{d}f}" if is_measured else "-",
                f"{value.low:.{d}f} to {value.high:.{d}f}" if has_interval else "-",
                "-" if value.inside is None else "yes" if value.inside else "no",
                str(value.images) if value.images else "-",
                value.label,
            ]
        )
    return rows


def _claim_rows(claims: Iterable[Verdict]) -> list[list[str]]:
    return [
        [
            claim.words,
            claim.printed,
            claim.measured,
            ", ".join(map(str, claim.measured_counts)) if claim.measured != "-" else "-",
            str(claim.missing) if claim.missing else "",
        ]
        for claim in claims
    ]


def _against(claims: Iterable[Verdict]) -> Iterator[str]:
    for claim in claims:
        for which, found in (
            ("as printed", claim.against_printed),
            ("as measured", claim.against_measured),
        ):
            if found:
                more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
                yield f"{claim.words}; {which} against it: {'; '.join(found[:3])}{more}."


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Grid:
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        is_number = heading in ("published", "measured", "difference") and headings is VALUES
        grid.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + ":--|" * len(headings)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _facts(value: Value) -> dict[str, Any]:
    facts = asdict(value) | {"difference": value.difference, "doubts": list(value.doubts)}
    del facts["decimals"]
    is_nan = {key for key, fact in facts.items() if isinstance(fact, float) and math.isnan(fact)}
    return {key: None if key in is_nan else fact for key, fact in facts.items()}


def _csv(numbers: Sequence[Value]) -> str:
    rows = [_facts(value) | {"doubts": "; ".join(value.doubts)} for value in numbers]
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.6f", lineterminator="\n")


def _json(
    table: Table, numbers: Sequence[Value], claims: Sequence[Verdict], differs: Sequence[str]
) -> str:
    facts = {
        "title": table.title,
        "deviations": list(differs),
        "values": [_facts(value) for value in numbers],
        "claims": [asdict(claim) for claim in claims],
    }
    return json.dumps(facts, indent=1, allow_nan=False) + "\n"
