"""The leaderboard: methods against metrics, best first, as a terminal table or Markdown."""

from __future__ import annotations

import io
import math
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import registry
from .plan import Group
from .probe import MapOf, closure, method_cost, stops_early
from .suite import Choice
from .tables import CALIBRATION_BINS, ModelCard, Results, to_csv, to_json

Format = Literal["terminal", "md", "csv", "json"]
ARROW = {"higher": " ↑", "lower": " ↓", "neither": ""}
FAMILIES = ("faithfulness", "localisation", "robustness", "complexity", "sanity")
"""Order of the columns; other families follow, and facts about maps come last."""
FACTS = "diagnostics"
LETTERS = {"loses_to_random": "r", "loses_to_inverted": "i"}
"""Behind a number."""
LONG = 22
"""Characters of a method's label that a narrow terminal has room for."""
_MARKS = " *" + string.ascii_lowercase


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
        ranked_by: names of the faithfulness metrics, or of all that have a direction where there
            are none.
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
    """

    title: str
    card: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    means: Mapping[tuple[str, str], float]
    ranks: Mapping[str, float]
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


def leaderboards(results: Results) -> list[Leaderboard]:
    """One leaderboard per data set and model."""
    return [_leaderboard(results, group) for group in results.plan.groups if group.cells]


def _leaderboard(results: Results, group: Group) -> Leaderboard:
    here = (results.table["dataset"] == group.dataset.label) & (
        results.table["model"] == group.model.label
    )
    rows = results.table[here].to_dict("records")
    methods = {cell.method.label: cell.method for cell in group.cells}
    metrics = {cell.metric.label: cell.metric.make() for cell in group.cells}
    means = {(row["method"], row["metric"]): float(row["mean"]) for row in rows}
    controls = [name for name, m in methods.items() if getattr(m.make(), "control", False)]
    ranked = [name for name in methods if name not in controls] or controls
    faithful = [name for name, m in metrics.items() if getattr(m, "family", "") == "faithfulness"]
    directed = [name for name, metric in metrics.items() if metric.better != "neither"]
    deciding = {name: metrics[name] for name in faithful or directed}
    images = {(row["method"], row["metric"]): int(row["images"]) for row in rows}
    ranks = _mean_ranks(ranked, deciding, means, images)
    order = sorted(ranked, key=ranks.__getitem__)
    shown = [n for n in metrics if any(r["status"] != "skipped" for r in rows if r["metric"] == n)]
    families = {label: _family(metric) for label, metric in metrics.items()}
    names = _names(group)
    return Leaderboard(
        title=_title(results, group),
        card=_card(results.cards[group.dataset.label, group.model.label]),
        methods=(*order, *(name for name in controls if name not in ranks)),
        metrics=tuple(sorted(shown or metrics, key=lambda label: _place(families[label]))),
        means=means,
        ranks=ranks,
        ranked_by=tuple(names[label] for label in deciding),
        names=names,
        headings={label: _heading(group, label) for label in metrics},
        better={label: metric.better for label, metric in metrics.items()},
        families=families,
        gates=frozenset(n for n, metric in metrics.items() if hasattr(metric, "gate")),
        passes={label: _method_passes(group, choice) for label, choice in methods.items()},
        marks={
            (row["method"], row["metric"]): row["reason"] or row["status"]
            for row in rows
            if row["status"] != "ok"
        },
        flags={
            (r["method"], r["metric"]): tuple(filter(None, r["flags"].split(";"))) for r in rows
        },
        has_random=any(method.name == "random" for method in methods.values()),
        added={c.metric.label: c.metric.beside for c in group.cells if c.metric.beside},
    )


def _family(metric: Any) -> str:
    return str(getattr(metric, "family", "")) or "other"


def _place(family: str) -> tuple[int, str]:
    last = len(FAMILIES) + (family == FACTS)
    return (FAMILIES.index(family) if family in FAMILIES else last, family)


def _mean_ranks(
    methods: Sequence[str],
    metrics: Mapping[str, Any],
    means: Mapping[tuple[str, str], float],
    images: Mapping[tuple[str, str], int],
) -> dict[str, float]:
    """1 is best; means that agree to four digits share the average of their places.

    Beyond that, maps that are equal but for float32 rounding would be ranked by it.

    A mean over fewer images than another method's is behind all others, as is no mean: a failed
    image never improves a rank.
    """
    total = dict.fromkeys(methods, 0.0)
    for name, metric in metrics.items():
        most = max(images.get((method, name), 0) for method in methods)
        column = pd.Series(
            [
                float(f"{means[method, name]:.4g}")
                if images.get((method, name)) == most
                else math.nan
                for method in methods
            ]
        )
        places = column.rank(ascending=metric.better == "lower", na_option="bottom")
        for method, place in zip(methods, places.tolist(), strict=True):
            total[method] += place / len(metrics)
    return total


def _title(results: Results, group: Group) -> str:
    title = f"{group.dataset.label} x {group.model.label}, {len(group.images)} images"
    if group.chosen is not None and group.images:
        mean = group.chosen.confidence
        title += f" ({group.dataset.selection.rule()}, mean confidence {mean:.4f})"
    return f"{title}, target {results.plan.suite.target}"


def _card(card: ModelCard) -> str:
    shares = {
        "accuracy {} %": card.accuracy,
        "mean confidence {} %": card.confidence,
        f"calibration error {{}} % (ECE, {CALIBRATION_BINS} bins)": card.calibration_error,
    }
    known = {words: share for words, share in shares.items() if not math.isnan(share)}
    return ", ".join(words.format(f"{100 * share:.1f}") for words, share in known.items())


def _names(group: Group) -> dict[str, str]:
    """What sentences call each metric: its symbol, and where two have one, what sets them apart."""
    headings = {c.metric.label: _heading(group, c.metric.label) for c in group.cells}
    symbols = {label: text.split("\n")[0].rstrip(" ↑↓") for label, text in headings.items()}
    shared = Counter(symbols.values())
    return {
        label: " ".join([symbol, *headings[label].split("\n")[1:]])
        if shared[symbol] > 1
        else symbol
        for label, symbol in symbols.items()
    }


def _heading(group: Group, label: str) -> str:
    """Symbol and arrow; beneath, the baseline and whatever else is not default."""
    metric = next(cell.metric for cell in group.cells if cell.metric.label == label).make()
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


def _method_passes(group: Group, choice: Choice) -> str:
    method = choice.make()
    passes = method_cost(method, group.sketch)
    bound = "<=" if stops_early(closure([MapOf(method)])) else ""
    return "?" if passes is None else f"{bound}{passes.forward}+{passes.backward}"


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
            console.print(f"\n{', '.join(_by_family(board, metrics))}", markup=False)
            console.print(table)
        for note in _footnotes(board):
            console.print(note, markup=False)
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _number(value: float, largest: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if largest > 1.5 else f"{value:.4f}"


@dataclass(frozen=True)
class _Line:
    """A row: texts, with marks, by what they are about.

    Args:
        place: among the ranked; empty for a control.
        method: its label, marked where it fails a gate.
        rank: mean rank, "-" where a ranked method has no score, empty for a control.
        numbers: by metric.
        best: metrics that it is the best in.
        passes: of the method.
    """

    place: str
    method: str
    rank: str
    numbers: Mapping[str, str]
    best: frozenset[str]
    passes: str


def _lines(board: Leaderboard) -> list[_Line]:
    best, largest = {}, {}
    for metric in board.metrics:
        column = [board.means.get((method, metric), math.nan) for method in board.methods]
        known = [value for value in column[: len(board.ranks)] if not math.isnan(value)]
        pick = max if board.better[metric] == "higher" else min
        best[metric] = (
            math.nan if board.better[metric] == "neither" else pick(known, default=math.nan)
        )
        largest[metric] = max((abs(v) for v in column if not math.isnan(v)), default=0.0)
    lines = []
    for at, method in enumerate(board.methods):
        means = {metric: board.means.get((method, metric), math.nan) for metric in board.metrics}
        is_scored = not all(map(math.isnan, means.values()))
        is_ranked = bool(board.ranked_by) and method in board.ranks and is_scored
        rank = f"{board.ranks[method]:.2f}" if is_ranked else ""
        fails = method in board.ranks and method in board.failing
        lines.append(
            _Line(
                str(at + 1) if rank else "",
                f"{method} (fails)" if fails else method,
                rank or ("-" if method in board.ranks else ""),
                {m: _number(v, largest[m]) + _mark(board, method, m) for m, v in means.items()},
                frozenset(m for m, value in means.items() if rank and value == best[m]),
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
    return letters + star + verdict


def _fitting(board: Leaderboard, console: Console) -> Iterator[tuple[Sequence[str], Table]]:
    """The metrics in as many tables as it takes to show every number whole, by family if it can."""
    unlimited = console.options.update(max_width=10_000)

    def fits(table: Table) -> bool:
        return Measurement.get(console, unlimited, table).maximum <= console.width

    def narrow(*metrics: str) -> Table:
        return _terminal(board, metrics, is_narrow=True)

    whole = _terminal(board, board.metrics, is_narrow=False)
    if fits(whole):
        yield board.metrics, whole
        return
    part: list[str] = []
    for family in _by_family(board, board.metrics).values():
        if part and not fits(narrow(*part, *family)):
            yield part, narrow(*part)
            part = []
        for metric in family:
            if part and not fits(narrow(*part, metric)):
                yield part, narrow(*part)
                part = []
            part.append(metric)
    yield part, narrow(*part)


def _by_family(board: Leaderboard, metrics: Sequence[str]) -> dict[str, list[str]]:
    """Shown metrics by what tables call their family."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        family = board.families[metric]
        found.setdefault("facts about maps" if family == FACTS else family, []).append(metric)
    return found


def _numbers(lines: Sequence[_Line], metric: str, heading: str) -> list[Text]:
    """A column to the right, digits below digits: the widest mark has room behind each number."""
    texts = [line.numbers[metric] for line in lines]
    digits = [text.rstrip(_MARKS) for text in texts]
    wide = max(len(text) - len(number) for text, number in zip(texts, digits, strict=True))
    before = max(*map(len, digits), *(len(part) - wide for part in heading.splitlines()))
    return [
        Text(
            " " * (before - len(number)) + text,
            style="bold green" if metric in line.best else "",
            justify="left",
        )
        for text, number, line in zip(texts, digits, lines, strict=True)
    ]


def _terminal(board: Leaderboard, metrics: Sequence[str], is_narrow: bool) -> Table:
    """A table of some metrics; the first one has ranks and passes.

    Where room is short, the parameters in a long name get a line of their own.
    """
    lines = _lines(board)
    columns: list[tuple[str, list[Text]]] = []
    for family in _by_family(board, metrics).values():
        gap = [("", [Text("")] * len(lines))] if columns else []
        headings = {metric: _heading_of(board, metric) for metric in family}
        columns += gap + [(text, _numbers(lines, m, text)) for m, text in headings.items()]
    if metrics[0] == board.metrics[0]:
        columns.insert(0, ("mean\nrank", [Text(line.rank) for line in lines]))
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


def _heading_of(board: Leaderboard, metric: str) -> str:
    """The heading, with a sign where a control has won."""
    symbol, newline, details = board.headings[metric].partition("\n")
    return symbol + ("!" if board.won(metric) else "") + newline + details


def _footnotes(board: Leaderboard) -> list[str]:
    words = f"Ordered by the mean rank over {', '.join(board.ranked_by)}."
    if not board.ranked_by:
        words = "Not ordered: no metric here says which is better."
    if len(board.ranks) < len(board.methods):
        words += " Below the line: control maps, which explain nothing."
    return [words, *_warnings(board), *_remarks(board)]


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
    headings = [_heading_of(board, metric).replace("\n", " ") for metric in board.metrics]
    rows = [f"**{board.title}**" + (f": {board.card}" if board.card else ""), ""]
    rows.append("| " + " | ".join(["#", "method", "mean rank", *headings, "passes"]) + " |")
    rows.append("|" + "--:|:--|" + "--:|" * (len(headings) + 2))
    for line in _lines(board):
        texts = [f"**{text}**" if m in line.best else text for m, text in line.numbers.items()]
        cells = [line.place, f"`{line.method}`", line.rank, *texts, line.passes]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    families = [
        f"{family} {', '.join(board.names[metric] for metric in metrics)}"
        for family, metrics in _by_family(board, board.metrics).items()
    ]
    notes = [f"Columns: {'; '.join(families)}."]
    notes += [note.replace("*", "\\*", 1) for note in _footnotes(board)]
    return "\n\n".join(["\n".join(rows), *notes]) + "\n"
