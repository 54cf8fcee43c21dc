"""The leaderboard: methods against metrics, best first, as a terminal table or Markdown."""

from __future__ import annotations

import io
import math
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
from .tables import Results, to_csv, to_json

Format = Literal["terminal", "md", "csv", "json"]
ARROW = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclass(frozen=True)
class Leaderboard:
    """Methods against metrics on one data set and model.

    Args:
        title: data set, model, number of images, accuracy.
        methods: labels, best first; those without a rank are control maps, listed apart.
        metrics: labels; a metric that was skipped for all methods is only in ``marks``.
        means: by method and metric; NaN where there is no score.
        ranks: mean rank over ``ranked_by``; a missing score, or one over fewer
            images than another, has the worst rank.
        ranked_by: symbols of the faithfulness metrics, or of all that have a direction where there
            are none.
        headings: metric label to heading, with arrow and baseline.
        better: metric label to "higher", "lower" or "neither".
        passes: method label to its own passes per image.
        marks: why a cell lacks images.
    """

    title: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    means: Mapping[tuple[str, str], float]
    ranks: Mapping[str, float]
    ranked_by: tuple[str, ...]
    headings: Mapping[str, str]
    better: Mapping[str, str]
    passes: Mapping[str, str]
    marks: Mapping[tuple[str, str], str]


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
    return Leaderboard(
        title=_title(results, group),
        methods=(*order, *(name for name in controls if name not in ranks)),
        metrics=tuple(shown or metrics),
        means=means,
        ranks=ranks,
        ranked_by=tuple(getattr(metric, "symbol", name) for name, metric in deciding.items()),
        headings={label: _heading(group, label) for label in metrics},
        better={label: metric.better for label, metric in metrics.items()},
        passes={label: _method_passes(group, choice) for label, choice in methods.items()},
        marks={
            (row["method"], row["metric"]): row["reason"] or row["status"]
            for row in rows
            if row["status"] != "ok"
        },
    )


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
    rows = results.per_image
    rows = rows[(rows["dataset"] == group.dataset.label) & (rows["model"] == group.model.label)]
    known = rows[(rows["label"] >= 0) & (rows["predicted"] >= 0)].drop_duplicates("image")
    title = f"{group.dataset.label} x {group.model.label}, {len(group.images)} images"
    if group.chosen is not None and group.images:
        mean = group.chosen.confidence
        title += f" ({group.dataset.selection.rule()}, mean confidence {mean:.4f})"
    if len(known):
        title += f", accuracy {100 * (known['label'] == known['predicted']).mean():.1f} %"
    return f"{title}, target {results.plan.suite.target}"


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
        console.print(board.title, markup=False, soft_wrap=True)
        for table in _fitting(board, console):
            console.print(table)
        for note in _footnotes(board):
            console.print(note, markup=False, soft_wrap=True)
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _number(value: float, largest: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if largest > 1.5 else f"{value:.4f}"


def _lines(board: Leaderboard) -> list[tuple[str, str, list[tuple[str, bool]], str]]:
    """(place, method, [(number, is best)], passes) of each row."""
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
        scored = any(not math.isnan(board.means.get((method, m), math.nan)) for m in board.metrics)
        is_ranked = board.ranked_by and method in board.ranks and scored
        rank = f"{board.ranks[method]:.2f}" if is_ranked else ""
        numbers = [(rank or ("-" if method in board.ranks else ""), False)]
        for metric in board.metrics:
            value = board.means.get((method, metric), math.nan)
            mark = "*" if (method, metric) in board.marks else ""
            text = _number(value, largest[metric]) + mark
            numbers.append((text, bool(rank) and value == best[metric]))
        lines.append((str(at + 1) if rank else "", method, numbers, board.passes[method]))
    return lines


def _fitting(board: Leaderboard, console: Console) -> Iterator[Table]:
    """The leaderboard in as many tables as it takes to show every number whole."""
    waiting = board.metrics
    while waiting:
        count = len(waiting)
        while count > 1 and _width(board, waiting[:count], console) > console.width:
            count -= 1
        yield _terminal(board, waiting[:count])
        waiting = waiting[count:]


def _width(board: Leaderboard, metrics: Sequence[str], console: Console) -> int:
    unlimited = console.options.update(max_width=10_000)
    return Measurement.get(console, unlimited, _terminal(board, metrics)).maximum


def _terminal(board: Leaderboard, metrics: Sequence[str]) -> Table:
    """A table of some metrics; the first one has ranks and passes."""
    first = metrics[0] == board.metrics[0]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    headings = ["#", "method", *_headings(board, metrics)]
    if first:
        headings = [*headings[:2], "mean\nrank", *headings[2:], "passes\nfwd+bwd"]
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading == "method" else "right"
        table.add_column(Text(heading), justify=justify, no_wrap=True)
    shown = [1 + board.metrics.index(metric) for metric in metrics]
    lines = _lines(board)
    for at, (place, method, numbers, passes) in enumerate(lines):
        chosen = [numbers[column] for column in ([0, *shown] if first else shown)]
        texts = [Text(text, style="bold green" if best else "") for text, best in chosen]
        last = bool(place) and at + 1 < len(lines) and not lines[at + 1][0]
        more = (passes,) if first else ()
        style = "" if place else "dim"
        table.add_row(place, Text(method), *texts, *more, end_section=last, style=style)
    return table


def _headings(board: Leaderboard, metrics: Sequence[str]) -> list[str]:
    return [board.headings[metric] for metric in metrics]


def _footnotes(board: Leaderboard) -> list[str]:
    words = f"Ordered by the mean rank over {', '.join(board.ranked_by)}."
    if not board.ranked_by:
        words = "Not ordered: no metric here says which is better."
    if len(board.ranks) < len(board.methods):
        words += " Below the line: control maps, which explain nothing."
    reasons: dict[str, list[str]] = {}
    for (method, metric), reason in board.marks.items():
        reasons.setdefault(reason, []).append(f"{method}/{metric}")
    notes = [words]
    for reason, cells in reasons.items():
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        notes.append(f"* {', '.join(cells[:3])}{more}: {reason}")
    return notes


def _markdown(board: Leaderboard) -> str:
    headings = [words.replace("\n", " ") for words in _headings(board, board.metrics)]
    rows = [f"**{board.title}**", ""]
    rows.append("| " + " | ".join(["#", "method", "mean rank", *headings, "passes"]) + " |")
    rows.append("|" + "--:|:--|" + "--:|" * (len(headings) + 2))
    for place, method, numbers, passes in _lines(board):
        texts = [f"**{text}**" if best else text for text, best in numbers]
        cells = [place, f"`{method}`", *texts, passes]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [note.replace("*", "\\*", 1) for note in _footnotes(board)]
    return "\n\n".join(["\n".join(rows), *notes]) + "\n"
