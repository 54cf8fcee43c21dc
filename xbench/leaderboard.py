"""The leaderboard: methods against metrics, best first, as a terminal table or Markdown."""

from __future__ import annotations

import io
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .captions import Captions, GroupCaption, MetricCaption
from .errors import UsageError
from .registry import suggestion
from .sheets import code, markdown, markdown_row
from .statistics import (
    LEVEL,
    Floats,
    column_means,
    four_digits,
    friedman,
    holm,
    inseparable_groups,
    pair_tests,
    ranking,
)
from .tables import CALIBRATION_BINS, ModelCard, Results, to_csv, to_json

Format = Literal["terminal", "md", "csv", "json"]
FAMILIES = ("faithfulness", "localisation", "robustness", "complexity", "sanity")
"""Order of the columns; other families follow, and facts about maps come last."""
FACTS = "diagnostics"
LETTERS = {"loses_to_random": "r", "loses_to_inverted": "i"}
"""Behind a number."""
LONG = 22
"""Characters of a method's label that a narrow terminal has room for."""
FEWEST = 10
"""Images for Friedman's test, whose limit is that of many."""


@dataclass(frozen=True)
class Leaderboard:
    """Methods against metrics on one data set and model.

    Args:
        title: data set, model, number of images, target.
        card: how good and how sure the model is on them; empty where nothing is known.
        methods: labels, best first; those without a rank are control maps, listed apart.
        metrics: labels, family by family; a metric that was skipped for all methods is only in
            ``marks``.
        means: by method and metric; NaN where there is no score.
        ranks: mean rank over ``ranked_by``; a missing score, or one over fewer
            images than another, has the worst rank.
        intervals: 95 % bootstrap intervals of the mean ranks, over images.
        groups: letters of the ranked methods; the order of two that share one is not sure.
        best: cells of the best mean of their column, to four digits; no mean over fewer images
            than another is.
        second: likewise, of the second best.
        level: cells that are not separable from the best of their column, with that one; of no
            column whose best is separable from all others, or where nothing is.
        ranked_by: names of the metrics that were asked for, or of the faithfulness metrics, or of
            all that have a direction where there are none.
        names: metric label to a short name.
        headings: metric label to heading, with arrow and baseline.
        better: metric label to "higher", "lower" or "neither".
        families: metric label to family.
        gates: labels of the metrics that have a gate.
        passes: method label to its own passes per image.
        marks: why a cell lacks images.
        flags: warnings by cell, as in the table's column.
        has_random: whether the suite has the control that methods must not lose to.
        added: metrics that the suite did not name, each with the one that must not stand alone.
        tests: how many pairs of methods were tested, over all columns.
        told: how many of them differ.
        omnibus: what Friedman's test and Nemenyi's critical difference say, or empty.
    """

    title: str
    card: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    means: Mapping[tuple[str, str], float]
    ranks: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    groups: Mapping[str, str]
    best: frozenset[tuple[str, str]]
    second: frozenset[tuple[str, str]]
    level: frozenset[tuple[str, str]]
    ranked_by: tuple[str, ...]
    names: Mapping[str, str]
    headings: Mapping[str, str]
    better: Mapping[str, str]
    families: Mapping[str, str]
    gates: frozenset[str]
    passes: Mapping[str, str]
    marks: Mapping[tuple[str, str], str]
    flags: Mapping[tuple[str, str], tuple[str, ...]]
    has_random: bool
    added: Mapping[str, str]
    tests: int
    told: int
    omnibus: str

    @property
    def failing(self) -> dict[str, list[str]]:
        """Methods that fail gates, and which."""
        found: dict[str, list[str]] = {}
        for (method, metric), words in self.flags.items():
            if "fails_gate" in words:
                found.setdefault(method, []).append(metric)
        return found

    def won(self, metric: str) -> list[str]:
        """Controls that know nothing and have won it."""
        words = self.flags.get((self.methods[0], metric), ())
        return [word.removeprefix("won_by_") for word in words if word.startswith("won_by_")]


@lru_cache(maxsize=1)  # a run writes and prints them
def leaderboards(results: Results) -> list[Leaderboard]:
    """One leaderboard per data set and model.

    Raises:
        UsageError: if there is nothing of the name that they are to be ordered by.
    """
    check_order(results.captions, results.by)
    return [_leaderboard(results, group) for group in results.captions]


def check_order(given: Captions, by: str) -> None:
    """Whether anything can be ordered by that metric or family.

    Args:
        given: of all groups.
        by: family, or label, registered name or symbol of a metric; empty for faithfulness.

    Raises:
        UsageError: if there is no such, or no method is better than another by it.
    """
    metrics = [metric for group in given for metric in group.metrics]
    if not by or any(metric.better != "neither" for metric in metrics if _is_by(metric, by)):
        return
    if any(_is_by(metric, by) for metric in metrics):
        raise UsageError(f"--by {by}: neither high nor low is better, so that it orders nothing")
    known = {name for m in metrics if m.better != "neither" for name in (m.name, m.family)}
    raise UsageError(
        f"--by {by!r} is no metric and no family of metrics here{suggestion(by, known)}"
    )


def _is_by(metric: MetricCaption, by: str) -> bool:
    return by in (metric.family, metric.label, metric.name, metric.symbol)


def ranked_methods(group: GroupCaption) -> list[str]:
    """Labels of those that are no control maps; of all where there is nothing else."""
    labels = [method.label for method in group.methods if not method.is_control]
    return labels or [method.label for method in group.methods]


def _leaderboard(results: Results, group: GroupCaption) -> Leaderboard:
    here = (results.table["dataset"] == group.dataset) & (results.table["model"] == group.model)
    rows = results.table[here].to_dict("records")
    metrics = {metric.label: metric for metric in group.metrics}
    ranked = ranked_methods(group)
    directed = [metric for metric in group.metrics if metric.better != "neither"]
    faithful = [metric for metric in directed if metric.family == "faithfulness"] or directed
    deciding = [metric for metric in directed if _is_by(metric, results.by)] or faithful
    keys, values = results.scores(
        group.dataset, group.model, ranked, [metric.label for metric in directed]
    )
    p = pair_tests(values, keys)
    by = [directed.index(metric) for metric in deciding]
    found = ranking(values[:, :, by], [metric.better for metric in deciding], keys)
    places = np.argsort(np.round(found.ranks, 9), kind="stable").tolist()
    columns = _columns(values, holm(p.ravel()).reshape(p.shape), [m.better for m in directed])
    best, second, level = (
        frozenset(
            (ranked[m], directed[at].label)
            for at, column in enumerate(columns)
            for m in column[kind]
        )
        for kind in range(3)
    )
    shown = [n for n in metrics if any(r["status"] != "skipped" for r in rows if r["metric"] == n)]
    families = {label: metric.family for label, metric in metrics.items()}
    return Leaderboard(
        title=group.title,
        card=_card(results.cards[group.dataset, group.model]),
        methods=(
            *(ranked[at] for at in places),
            *(m.label for m in group.methods if m.label not in ranked),
        ),
        metrics=tuple(sorted(shown or metrics, key=lambda label: _place(families[label]))),
        means={(row["method"], row["metric"]): float(row["mean"]) for row in rows},
        ranks=dict(zip(ranked, found.ranks.tolist(), strict=True)),
        intervals=dict(
            zip(ranked, zip(found.low.tolist(), found.high.tolist(), strict=True), strict=True)
        ),
        groups=_letters(ranked, inseparable_groups(places, found.separable)),
        best=best,
        second=second,
        level=level,
        ranked_by=tuple(metric.symbol for metric in deciding),
        names={label: metric.symbol for label, metric in metrics.items()},
        headings={label: metric.heading for label, metric in metrics.items()},
        better={label: metric.better for label, metric in metrics.items()},
        families=families,
        gates=frozenset(label for label, metric in metrics.items() if metric.is_gate),
        passes={method.label: method.passes for method in group.methods},
        marks={
            (row["method"], row["metric"]): row["reason"] or row["status"]
            for row in rows
            if row["status"] != "ok"
        },
        flags={
            (r["method"], r["metric"]): tuple(filter(None, r["flags"].split(";"))) for r in rows
        },
        has_random=any(method.name == "random" for method in group.methods),
        added={metric.label: metric.beside for metric in group.metrics if metric.beside},
        tests=int((~np.isnan(p)).sum()),
        told=int((holm(p.ravel()) < 1 - LEVEL).sum()),
        omnibus=_omnibus(values[:, :, by], [(m.symbol, m.better) for m in deciding]),
    )


def _letters(methods: Sequence[str], runs: Sequence[Sequence[int]]) -> dict[str, str]:
    """A letter per run of methods; two after "z"."""
    alphabet = [
        *string.ascii_lowercase,
        *(f"{a}{b}" for a in "abc" for b in string.ascii_lowercase),
    ]
    letters = dict.fromkeys(methods, "")
    for letter, run in zip(alphabet, runs, strict=False):
        for at in run:
            letters[methods[at]] += letter
    return letters


Places = list[int]


def _columns(
    values: Floats, p: Floats, better: Sequence[str]
) -> list[tuple[Places, Places, Places]]:
    """Of each metric, the places of the best, the second best, and of those level with the best.

    Args:
        values: (N, M, K).
        p: adjusted, (K, P), of all pairs of methods.
        better: of the K metrics.
    """
    methods = values.shape[1]
    pair = np.triu_indices(methods, 1)
    count = (~np.isnan(values)).sum(0)
    means = four_digits(column_means(np.where(count < count.max(0), np.nan, values)))
    columns = []
    for mean, tests, word in zip(means.T, p, better, strict=True):
        known = np.unique(mean[~np.isnan(mean)])[:: 1 if word == "lower" else -1]
        best, second = (
            [m for m in range(methods) if mean[m] in known[at : at + 1]] for at in (0, 1)
        )
        same = np.zeros((methods, methods), dtype=np.bool_)
        same[pair] = tests >= 1 - LEVEL
        others = [m for m in range(methods) if best and (same[m, best[0]] or same[best[0], m])]
        is_told = others and (p < 1 - LEVEL).any()
        columns.append((best, second, sorted({*best, *others}) if is_told else []))
    return columns


def _omnibus(values: Floats, metrics: Sequence[tuple[str, str]]) -> str:
    """Friedman's test of each metric, and how many pairs Nemenyi's difference tells apart."""
    images, methods, _ = values.shape
    if methods < 3 or images < FEWEST:
        return ""
    told = []
    tests = [friedman(values[:, :, at], better) for at, (_, better) in enumerate(metrics)]
    sure = holm(np.array([test.p for test in tests])) < 1 - LEVEL
    for (symbol, _), test, is_sure in zip(metrics, tests, sure, strict=True):
        ranks = test.mean_ranks
        apart = np.abs(ranks[:, None] - ranks) > test.critical_difference
        told.append(f"{symbol} {int(apart.sum()) // 2 if is_sure else 0}")
    pairs = methods * (methods - 1) // 2
    return (
        f"Friedman's test and Nemenyi's difference on the ranks of each image tell apart, of "
        f"{pairs} pairs of methods: {', '.join(told)}."
    )


def _place(family: str) -> tuple[int, str]:
    last = len(FAMILIES) + (family == FACTS)
    return (FAMILIES.index(family) if family in FAMILIES else last, family)


def _card(card: ModelCard) -> str:
    shares = {
        "accuracy {} %": card.accuracy,
        "mean confidence {} %": card.confidence,
        f"calibration error {{}} % (ECE, {CALIBRATION_BINS} bins)": card.calibration_error,
    }
    known = {words: share for words, share in shares.items() if not math.isnan(share)}
    return ", ".join(words.format(f"{100 * share:.1f}") for words, share in known.items())


def render(results: Results, form: Format, width: int | None = None, colour: bool = False) -> str:
    """All leaderboards (terminal, md) or the table (csv, json) as text."""
    if form == "csv":
        return to_csv(results.table)
    if form == "json":
        return to_json(results) + "\n"
    if form == "md":
        return "\n".join(_markdown(board) for board in leaderboards(results))
    out = io.StringIO()
    console = Console(
        file=out, width=width or 200, force_terminal=colour, no_color=not colour, highlight=False
    )
    for board in leaderboards(results):
        for line in filter(None, (board.title, board.card)):
            console.print(line, markup=False)
        for metrics, table in _fitting(board, console):
            console.print(f"\n{', '.join(_by_family(board, metrics)) or 'ranks'}", markup=False)
            console.print(table)
        for note in notes_of(board):
            console.print(note, markup=False)
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _number(value: float, largest: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if largest > 1.5 else f"{value:.4f}"


@dataclass(frozen=True)
class Line:
    """A row: texts, with marks, by what they are about.

    Args:
        place: among the ranked; empty for a control.
        method: its label, marked where it fails a gate.
        rank: mean rank, "-" where a ranked method has no score, empty for a control.
        numbers: number and mark, by metric.
        interval: of the mean rank.
        group: letters of those whose order is not sure.
        best: metrics that it is the best in.
        second: metrics that it is the second best in.
        passes: of the method.
    """

    place: str
    method: str
    rank: str
    numbers: Mapping[str, tuple[str, str]]
    interval: str
    group: str
    best: frozenset[str]
    second: frozenset[str]
    passes: str


def lines_of(board: Leaderboard) -> list[Line]:
    """Rows as text, in the order of its methods."""
    largest = {
        metric: max(
            (abs(v) for (_, of), v in board.means.items() if of == metric and v == v), default=0.0
        )
        for metric in board.metrics
    }
    lines = []
    for at, method in enumerate(board.methods):
        means = {metric: board.means.get((method, metric), math.nan) for metric in board.metrics}
        is_scored = not all(map(math.isnan, means.values()))
        is_ranked = bool(board.ranked_by) and method in board.ranks and is_scored
        rank = f"{board.ranks[method]:.2f}" if is_ranked else ""
        fails = method in board.ranks and method in board.failing
        lines.append(
            Line(
                str(at + 1) if rank else "",
                f"{method} (fails)" if fails else method,
                rank or ("-" if method in board.ranks else ""),
                {m: (_number(v, largest[m]), _mark(board, method, m)) for m, v in means.items()},
                "{:.1f}-{:.1f}".format(*board.intervals[method]) if rank else "",
                board.groups.get(method, "") if rank else "",
                frozenset(m for m in means if rank and (method, m) in board.best),
                frozenset(m for m in means if rank and (method, m) in board.second),
                board.passes[method],
            )
        )
    return lines


def _mark(board: Leaderboard, method: str, metric: str) -> str:
    """What stands behind a number."""
    flags = board.flags.get((method, metric), ())
    letters = "".join(letter for flag, letter in LETTERS.items() if flag in flags)
    star = "*" if (method, metric) in board.marks else ""
    known = metric in board.gates and not math.isnan(board.means.get((method, metric), math.nan))
    verdict = (" failed" if "fails_gate" in flags else " passed") if known else ""
    level = "=" if (method, metric) in board.level else ""
    return level + letters + star + verdict


def _fitting(board: Leaderboard, console: Console) -> Iterator[tuple[Sequence[str], Table]]:
    """The metrics in as many tables as it takes to show every number whole, by family if it can.

    The first table has the ranks; where there is room for nothing else, only these.
    """
    unlimited = console.options.update(max_width=10_000)

    def fits(table: Table) -> bool:
        return Measurement.get(console, unlimited, table).maximum <= console.width

    whole = _terminal(board, board.metrics, is_first=True, is_narrow=False)
    if fits(whole):
        yield board.metrics, whole
        return
    part: list[str] = []
    is_first = True

    def narrow(*more: str) -> Table:
        return _terminal(board, [*part, *more], is_first=is_first, is_narrow=True)

    for family in _by_family(board, board.metrics).values():
        if part and not fits(narrow(*family)):
            yield part, narrow()
            part, is_first = [], False
        for metric in family:
            if (part or is_first) and not fits(narrow(metric)):
                yield part, narrow()
                part, is_first = [], False
            part.append(metric)
    yield part, narrow()


def _by_family(board: Leaderboard, metrics: Sequence[str]) -> dict[str, list[str]]:
    """Shown metrics by what tables call their family."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        family = board.families[metric]
        found.setdefault("facts about maps" if family == FACTS else family, []).append(metric)
    return found


def _numbers(lines: Sequence[Line], metric: str, heading: str) -> list[Text]:
    """A column to the right, digits below digits: the widest mark has room behind each number."""
    pairs = [line.numbers[metric] for line in lines]
    wide = max(len(mark) for _, mark in pairs)
    before = max(
        *(len(digits) for digits, _ in pairs), *(len(part) - wide for part in heading.splitlines())
    )
    return [
        Text(
            f"{digits:>{before}}{mark}",
            style="bold green" if metric in line.best else "",
            justify="left",
        )
        for (digits, mark), line in zip(pairs, lines, strict=True)
    ]


def _terminal(
    board: Leaderboard, metrics: Sequence[str], *, is_first: bool, is_narrow: bool
) -> Table:
    """A table of some metrics; the first one has ranks and passes.

    Where room is short, the parameters in a long name get a line of their own.
    """
    lines = lines_of(board)
    columns: list[tuple[str, list[Text]]] = []
    for family in _by_family(board, metrics).values():
        gap = [("", [Text("")] * len(lines))] if columns else []
        headings = {metric: heading_of(board, metric) for metric in family}
        columns += gap + [(text, _numbers(lines, m, text)) for m, text in headings.items()]
    if is_first:
        columns[:0] = [
            ("mean\nrank", [Text(line.rank) for line in lines]),
            ("its\n95 %", [Text(line.interval) for line in lines]),
            ("level\nwith", [Text(line.group, justify="left") for line in lines]),
        ]
        columns.append(("passes\nfwd+bwd", [Text(line.passes) for line in lines]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading, _ in columns:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for at, line in enumerate(lines):
        last = bool(line.place) and at + 1 < len(lines) and not lines[at + 1].place
        texts = [texts[at] for _, texts in columns]
        style = "" if line.place else "dim"
        is_long = is_narrow and len(line.method) > LONG
        method = line.method.replace("(", "\n  (", 1) if is_long else line.method
        table.add_row(line.place, Text(method), *texts, end_section=last, style=style)
    return table


def heading_of(board: Leaderboard, metric: str) -> str:
    """The heading, with a sign where a control has won."""
    symbol, newline, details = board.headings[metric].partition("\n")
    return symbol + ("!" if board.won(metric) else "") + newline + details


def notes_of(board: Leaderboard) -> list[str]:
    words = f"Ordered by the mean rank over {', '.join(board.ranked_by)}."
    if not board.ranked_by:
        words = "Not ordered: no metric here says which is better."
    if len(board.ranks) < len(board.methods):
        words += " Below the line: control maps, which explain nothing."
    return [words, *_separations(board), *_warnings(board), *_remarks(board)]


def _separations(board: Leaderboard) -> Iterator[str]:
    """What could be told apart, and how."""
    if any(board.groups.values()):
        yield (
            "level with: methods that share a letter; their order is not sure: other samples of "
            "images change it, or ranks on each image do not differ (sign-flip test, Holm, 5 %)."
        )
    if board.level:
        yield (
            "= not separable from the best of the column (paired sign-flip test, Holm over "
            f"{board.tests:,} tests, 5 %)."
        )
    elif board.tests and not board.told:
        yield "No two methods are separable in any column: images are too few, or methods alike."
    if board.omnibus:
        yield board.omnibus


def _warnings(board: Leaderboard) -> Iterator[str]:
    """Legends of the signs that this leaderboard has."""
    won = [
        f"{board.names[metric]} by {', '.join(board.won(metric))}"
        for metric in board.metrics
        if board.won(metric)
    ]
    if won:
        yield f"! won by a control that knows nothing of the network: {'; '.join(won)}."
    flags = {flag for words in board.flags.values() for flag in words}
    if "loses_to_random" in flags:
        yield "r worse than random maps on the same images (95 % interval of the difference)."
    if not board.has_random:
        yield "Nothing is marked as worse than random maps: the suite has no control 'random'."
    if "loses_to_inverted" in flags:
        yield "i worse than the same map upside down, likewise."
    failing = [m for m in board.methods if m in board.ranks and m in board.failing]
    if failing:
        gates = "; ".join(
            f"{method}: {', '.join(board.names[m] for m in board.failing[method])}"
            for method in failing
        )
        yield f"(fails) a gate, so that its ranks mean little: {gates}."


def _remarks(board: Leaderboard) -> Iterator[str]:
    for added, beside in board.added.items():
        yield f"{added} was added: {beside} is not shown without it."
    reasons: dict[str, list[str]] = {}
    for (method, metric), reason in board.marks.items():
        reasons.setdefault(reason, []).append(f"{method}/{metric}")
    for reason, cells in reasons.items():
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        yield f"* {', '.join(cells[:3])}{more}: {reason}"


def _markdown(board: Leaderboard) -> str:
    headings = [markdown(heading_of(board, m).replace("\n", " ")) for m in board.metrics]
    rows = [f"**{markdown(board.title)}**" + (f": {board.card}" if board.card else ""), ""]
    named = ("#", "method", "mean rank", "its 95 %", "level with")
    rows.append(markdown_row([*named, *headings, "passes"]))
    rows.append("|" + "--:|:--|" + "--:|" * (len(headings) + 4))
    for line in lines_of(board):
        texts = [
            f"**{''.join(t)}**" if m in line.best else "".join(t) for m, t in line.numbers.items()
        ]
        cells = [
            line.place,
            code(line.method),
            line.rank,
            line.interval,
            line.group,
            *texts,
            line.passes,
        ]
        rows.append(markdown_row(cells))
    families = [
        f"{family} {', '.join(board.names[metric] for metric in metrics)}"
        for family, metrics in _by_family(board, board.metrics).items()
    ]
    notes = [markdown(f"Columns: {'; '.join(families)}.")]
    notes += [markdown(note).replace("*", "\\*", 1) for note in notes_of(board)]
    return "\n\n".join(["\n".join(rows), *notes]) + "\n"
