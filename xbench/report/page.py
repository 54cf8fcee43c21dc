"""What a page shows, as plain data for its template."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from .. import gallery, leaderboard, plot, published, registry, statistics
from ..captions import ARROW
from ..leaderboard import Leaderboard, notes_of
from ..plan import Group
from ..provenance import provenance
from ..store import Store
from ..tables import CALIBRATION_BINS, SCORED, ModelCard, Results
from . import pictures
from .intervals import intervals
from .svg import Drawn

HERE = Path(__file__).parent
LINES = 7
"""Methods in a figure of curves: as many as there are colours that are told apart."""
POINTS = 200
"""Images of a scatter, and of a curve: more are not told apart, and each costs bytes."""
DRAWS = 500
"""Bootstrap samples of the agreement of metrics, whose ends are shown with two digits."""
SHADES = 5
PAIRED = 5
"""Methods that stand side by side for several models."""
_MASKED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def html(
    results: Results,
    store: Store,
    facts: Mapping[str, Any] | None = None,
    examples: int = pictures.PICTURES,
) -> str:
    """One HTML file with everything in it.

    Args:
        results: of a plan.
        store: where they were read, with the curves, maps and pictures kept beside them.
        facts: of the run, as in ``run.json``.
        examples: pictures in the gallery; 0 for a page that shows none.
    """
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters["breakable"] = _breakable
    plan = results.plan
    if plan is None:
        raise ValueError("results that were read from files have no curves, maps or pictures")
    kept = pictures.read(plan, store, examples)
    boards = [group for group in plan.groups if group.cells]
    sections = [
        _section(number, results, group, board, kept, plan.suite.target)
        for number, (group, board) in enumerate(
            zip(boards, leaderboard.leaderboards(results), strict=True)
        )
    ]
    drawn = Drawn()
    curves = gallery.curves(plan, store, POINTS)
    origin = provenance(plan, store)
    context = {
        "style": Markup(style),  # noqa: S704  # our own files
        "script": Markup(script),  # noqa: S704
        "policy": _policy(style, script),
        "suite": plan.suite,
        "sections": sections,
        "overview": _overview(sections),
        "figures": {s.id: _figures(results, s, drawn) for s in sections},
        "curves": {s.id: _curves(curves, s, drawn) for s in sections},
        "agreement": {s.id: _agreement(results, s) for s in sections},
        "published": published.sheets(results) if plan.suite.name in published.tables() else None,
        "pairs": _pairs(results, boards, sections, kept),
        "scatter": [_scatter(results, s) for s in sections],
        "points": POINTS,
        "infinity": math.inf,
        "notices": [*results.notices, *results.mixed, *plan.notices],
        "facts": _run_facts(facts or {}),
        "versions": origin["versions"],
        "provenance": json.dumps(origin, indent=1, sort_keys=True, default=registry.plain),
        "csv": base64.b64encode(_spreadsheet(results.table).encode()).decode(),
    }
    return environment.get_template("page.html.jinja").render(context)


def _harmless(value: Any) -> Any:
    """Text without characters that steer a display; jinja2 escapes the rest."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _MASKED.sub("\N{REPLACEMENT CHARACTER}", value)


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line behind each of its parts."""
    parts = re.split(r"(?<=[_/(,])", _harmless(name))
    return Markup("<wbr>").join(parts)  # which escapes the parts


def _policy(style: str, script: str) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _spreadsheet(table: pd.DataFrame) -> str:
    """The table, with texts that a spreadsheet would take for a formula kept as texts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.itertuples(index=False):
        writer.writerow(
            f"'{value}"
            if isinstance(value, str) and value.startswith(_FORMULA)
            else ("" if math.isnan(value) else f"{value:.6f}")
            if isinstance(value, float)
            else value
            for value in row
        )
    return out.getvalue()


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A cell of a ranking table.

    Args:
        id: of the cell, for links.
        text: the mean, or the status where there is none.
        ends: the interval, or empty.
        order: what to sort by; empty where there is no mean.
        shade: 1 is the best fifth of the ranked methods, 0 without a rank.
        place: among the ranked methods by this metric, from 1.
        marks: words about the cell, each with the sign that stands for it.
        note: number of the reason beneath the table, from 1; 0 without one.
    """

    id: str
    text: str
    ends: str
    order: str
    shade: int
    place: str
    marks: tuple[tuple[str, str], ...]
    note: int


@dataclass(frozen=True)
class Line:
    """A row of a ranking table."""

    place: int
    method: str
    rank: str
    ends: str
    group: str
    fails: str
    passes: str
    cost: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Column:
    """A column of a ranking table."""

    metric: str
    symbol: str
    details: str
    family: str
    better: str
    warning: str


@dataclass(frozen=True)
class Section:
    """One data set and model."""

    id: str
    group: Group
    board: Leaderboard
    card: ModelCard
    columns: tuple[Column, ...]
    ranked: tuple[Line, ...]
    controls: tuple[Line, ...]
    reasons: tuple[str, ...]
    footnotes: tuple[str, ...]
    gallery: tuple[pictures.Row, ...]
    card_facts: tuple[tuple[str, str], ...]


MARKS = {
    "loses_to_random": ("r", "worse than random maps"),
    "loses_to_inverted": ("i", "worse than the same map upside down"),
    "fails_gate": ("gate", "fails this gate"),
}


def _section(
    number: int,
    results: Results,
    group: Group,
    board: Leaderboard,
    kept: pictures.Kept,
    target: str,
) -> Section:
    here = (group.dataset.label, group.model.label)
    table = results.table
    rows = table[(table["dataset"] == here[0]) & (table["model"] == here[1])]
    by_name: dict[tuple[str, str], Any] = {
        (row["method"], row["metric"]): row for row in rows.to_dict("records")
    }
    reasons: list[str] = []
    places = {metric: _places(board, metric) for metric in board.metrics}
    lines = []
    for at, method in enumerate(board.methods):
        entries = []
        for metric in board.metrics:
            row = by_name.get((method, metric))
            entries.append(_entry(board, metric, row, places[metric].get(method), reasons))
        means = [board.means.get((method, metric), math.nan) for metric in board.metrics]
        is_ranked = method in board.ranks and not all(map(math.isnan, means))
        failing = [board.names[metric] for metric in board.failing.get(method, ())]
        lines.append(
            Line(
                at + 1 if is_ranked else 0,
                method,
                f"{board.ranks[method]:.2f}" if is_ranked and board.ranked_by else "",
                "{:.1f} to {:.1f}".format(*board.intervals[method]) if is_ranked else "",
                board.groups.get(method, "") if is_ranked else "",
                ", ".join(failing) if is_ranked else "",
                board.passes[method],
                _cost(board.passes[method]),
                tuple(entries),
            )
        )
    card = results.cards[here]
    ranked = tuple(line for line in lines if line.method in board.ranks)
    return Section(
        f"group-{number}",
        group,
        board,
        card,
        tuple(_column(board, metric) for metric in board.metrics),
        ranked,
        tuple(line for line in lines if line.method not in board.ranks),
        tuple(reasons),
        tuple(note for note in notes_of(board) if not note.startswith("*")),
        tuple(pictures.rows(kept, group, board.methods, partial(_said, results))),
        _card(card, target),
    )


def _column(board: Leaderboard, metric: str) -> Column:
    symbol, _, details = board.headings[metric].partition("\n")
    family = board.families[metric]
    return Column(
        metric,
        symbol,
        details,
        "facts about maps" if family == leaderboard.FACTS else family,
        {"higher": "higher is better", "lower": "lower is better"}.get(board.better[metric], ""),
        ", ".join(board.won(metric)),
    )


def _places(board: Leaderboard, metric: str) -> dict[str, tuple[int, int]]:
    """Place of each ranked method by one metric, from 1, and how many are placed.

    Means that agree to four digits share the better place.
    """
    if board.better[metric] == "neither":
        return {}
    sign = -1 if board.better[metric] == "higher" else 1
    means = {method: board.means.get((method, metric), math.nan) for method in board.ranks}
    known = {m: sign * float(f"{mean:.4g}") for m, mean in means.items() if not math.isnan(mean)}
    return {
        method: (1 + sum(other < mean for other in known.values()), len(known))
        for method, mean in known.items()
    }


def _entry(
    board: Leaderboard,
    metric: str,
    row: Mapping[str, Any] | None,
    place: tuple[int, int] | None,
    reasons: list[str],
) -> Entry:
    if row is None:
        return Entry("", "not asked for", "", "", 0, "", (), 0)
    mean = float(row["mean"])
    note = 0
    if row["status"] != "ok":
        reason = row["reason"] or row["status"]
        if reason not in reasons:
            reasons.append(reason)
        note = reasons.index(reason) + 1
    flags = [flag for flag in row["flags"].split(";") if flag in MARKS]
    marks = [MARKS[flag] for flag in flags]
    if (row["method"], metric) in board.level:
        marks.insert(0, ("=", "not separable from the best"))
    largest = max(
        (abs(v) for (_, name), v in board.means.items() if name == metric and not math.isnan(v)),
        default=0.0,
    )
    shade = 0
    if place:
        at, count = place
        shade = 1 + min(SHADES - 1, (at - 1) * SHADES // count)
    low, high = float(row["ci_low"]), float(row["ci_high"])
    return Entry(
        f"cell-{row['cell']}",
        row["status"] if math.isnan(mean) else _number(mean, largest),
        ""
        if math.isnan(low) or board.better[metric] == "neither"
        else f"{_number(low, largest)} to {_number(high, largest)}",
        "" if math.isnan(mean) else repr(mean),
        shade,
        f"{place[0]} of {place[1]}" if place else "",
        tuple(marks),
        note,
    )


def _number(value: float, largest: float) -> str:
    """As in the terminal's table."""
    text = f"{value:.2f}" if largest > 1.5 else f"{value:.4f}"
    text = text if float(text) else text.removeprefix("-")
    return text.replace("-", "\N{MINUS SIGN}")


def _cost(passes: str) -> float:
    """Forwards and backwards of a method, as a number; infinite where they are unknown."""
    numbers = re.findall(r"\d+", passes)
    return float(sum(map(int, numbers))) if numbers else math.inf


def _card(card: ModelCard, target: str) -> tuple[tuple[str, str], ...]:
    def percent(share: float) -> str:
        return "unknown" if math.isnan(share) else f"{100 * share:.1f} %"

    return (
        ("images", f"{card.images:,}, {card.labelled:,} with a label"),
        ("explained class", target),
        ("accuracy", percent(card.accuracy)),
        ("mean confidence", percent(card.confidence)),
        (f"calibration error ({CALIBRATION_BINS} bins)", percent(card.calibration_error)),
    )


def _overview(sections: Sequence[Section]) -> dict[str, Any] | None:
    """Mean rank of each method in each section, where there are several."""
    if len(sections) < 2:
        return None
    known = [{line.method: s.board.ranks[line.method] for line in s.ranked if line.rank}
             for s in sections]  # fmt: skip
    rows = []
    for method in dict.fromkeys(line.method for s in sections for line in s.ranked):
        ranks = [of.get(method, math.nan) for of in known]
        rows.append((method, ranks, float(np.mean(ranks))))
    rows.sort(key=lambda row: (math.isnan(row[2]), row[2], row[0]))
    return {
        "titles": [f"{s.group.dataset.label} x {s.group.model.label}" for s in sections],
        "rows": [
            (method, ["" if math.isnan(r) else f"{r:.2f}" for r in [*ranks, mean]])
            for method, ranks, mean in rows
        ],
    }


# --- figures --------------------------------------------------------------------------------------


def _figures(results: Results, section: Section, drawn: Drawn) -> dict[str, Any]:
    """Scores with their intervals, and cost against the mean rank."""
    group, board = section.group, section.board
    table = results.table
    rows = table[
        (table["dataset"] == group.dataset.label) & (table["model"] == group.model.label)
    ].set_index(["method", "metric"])
    shown = []
    for metric in board.metrics:
        if board.better[metric] == "neither":
            continue
        means = []
        for method in board.methods:
            if (method, metric) not in rows.index:
                continue
            mean, low, high = (
                float(str(rows.at[(method, metric), key])) for key in ("mean", "ci_low", "ci_high")
            )
            ends = (mean, mean) if math.isnan(low) else (low, high)
            if math.isfinite(mean):
                means.append((method, method not in board.ranks, mean, *ends))
        if means:
            shown.append(intervals(board.names[metric] + ARROW[board.better[metric]], means))
    cost = None
    if board.ranked_by and len(board.ranks) > 1:
        frame = pd.DataFrame(
            {
                "method": [_harmless(line.method) for line in section.ranked],
                "passes": [line.cost for line in section.ranked],
                "value": [round(board.ranks[line.method], 6) for line in section.ranked],
            }
        )
        frame = frame[[bool(line.rank) for line in section.ranked]]
        frame = frame[(frame["passes"] > 0) & np.isfinite(frame["passes"])]
        if len(frame):
            draw = partial(plot.cost, frame, better="lower", title="mean rank \N{DOWNWARDS ARROW}")
            cost = drawn(draw, "Mean rank of methods against their passes per image")
    return {"intervals": shown, "cost": cost}


def _curves(frame: pd.DataFrame, section: Section, drawn: Drawn) -> dict[str, Any]:
    """Kept curves of the first methods of the ranking, and of random maps."""
    group, board = section.group, section.board
    here = frame[(frame["dataset"] == group.dataset.label) & (frame["model"] == group.model.label)]
    shown, images = [], 0
    for metric in board.metrics:
        for name, of in here[here["metric"] == metric].groupby("curve", sort=False):
            with_curves = set(of["method"])
            ranked = [m for m in board.methods if m in with_curves and m in board.ranks]
            controls = [m for m in ("random",) if m in with_curves and m not in board.ranks]
            fractions, values = {}, {}
            for method in [*ranked[: LINES - len(controls)], *controls]:
                wide = of[of["method"] == method].pivot(
                    index="image", columns="share", values="value"
                )
                fractions[_harmless(method)] = wide.columns.to_numpy(dtype=float)
                values[_harmless(method)] = wide.to_numpy(dtype=float)
                images = max(images, len(wide))
            title = _harmless(
                " ".join(filter(None, (board.headings[metric].replace("\n", " "), str(name))))
            )
            ylabel = "probability of the target" if name != "saliency" else "share of saliency"
            draw = partial(plot.curves, fractions, values, title=title, ylabel=ylabel)
            shown.append(drawn(draw, f"Curves of {title} by method"))
    return {"shown": shown, "images": images, "of": len(group.images)}


def _wide(results: Results, section: Section, methods: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Scores by metric: images (rows) by methods (columns), NaN where there is none."""
    group, frame = section.group, results.per_image
    here = frame[
        (frame["dataset"] == group.dataset.label)
        & (frame["model"] == group.model.label)
        & frame["status"].isin(SCORED)
    ]
    keys = [key for _, key in group.images]
    return {
        str(metric): of.pivot(index="image", columns="method", values="value").reindex(
            index=keys, columns=list(methods)
        )
        for metric, of in here.groupby("metric")
    }


def _agreement(results: Results, section: Section) -> dict[str, Any] | None:
    """Kendall's tau between the rankings of each two metrics, with its interval."""
    board = section.board
    methods = list(board.ranks)
    metrics = [m for m in board.metrics if board.better[m] != "neither"]
    wide = _wide(results, section, methods)
    metrics = [metric for metric in metrics if metric in wide]
    keys = [key for _, key in section.group.images]
    if len(methods) < 3 or len(metrics) < 2 or len(keys) < 2:
        return None
    values = np.stack([wide[metric].to_numpy(dtype=float) for metric in metrics], axis=2)
    better = [board.better[metric] for metric in metrics]
    tau, low, high = statistics.agreement_of_metrics(values, better, keys, DRAWS)

    def cell(row: int, column: int) -> tuple[str, str, str]:
        value = tau[row, column]
        if math.isnan(value):
            return "", "", "none"
        ends = f"{_number(low[row, column], 2)} to {_number(high[row, column], 2)}"
        level = f"{'m' if value < 0 else 'p'}{min(4, int(abs(value) * 5))}"
        return _number(value, 2), ends if row != column else "", level

    names = [board.names[metric] for metric in metrics]
    return {
        "names": names,
        "rows": [
            (name, [cell(row, column) for column in range(len(names))])
            for row, name in enumerate(names)
        ],
    }


def _scatter(results: Results, section: Section) -> dict[str, Any]:
    """Scores per image for the script that draws two methods against one another."""
    board = section.board
    wide = _wide(results, section, board.methods)
    metrics = [metric for metric in board.metrics if metric in wide]

    def numbers(column: pd.Series[float]) -> list[float | None]:
        return [None if math.isnan(v) else float(f"{v:.4g}") for v in column[:POINTS]]

    return {
        "methods": [_harmless(method) for method in board.methods],
        "metrics": [_harmless(board.headings[m].replace("\n", " ")) for m in metrics],
        "images": [_harmless(key) for _, key in section.group.images[:POINTS]],
        "values": [
            [numbers(wide[metric][method]) for method in board.methods] for metric in metrics
        ],
    }


# --- pictures -------------------------------------------------------------------------------------


def _said(results: Results, group: Group, image: str) -> str:
    """Predicted class and probability of an image."""
    frame = results.per_image
    rows = frame[
        (frame["dataset"] == group.dataset.label)
        & (frame["model"] == group.model.label)
        & (frame["image"] == image)
        & (frame["predicted"] >= 0)
    ]
    if rows.empty:
        return "prediction unknown"
    row = rows.iloc[0]
    label, predicted = int(row["label"]), int(row["predicted"])
    words = f"predicted {_class(group, predicted)}"
    if not math.isnan(row["probability"]):
        words += f", probability of the explained class {row['probability']:.3f}"
    if label >= 0 and label != predicted:
        words += f", labelled {_class(group, label)}"
    return words


def _class(group: Group, number: int) -> str:
    names = group.source.classes
    return str(names[number]) if 0 <= number < len(names) else f"class {number}"


def _pairs(
    results: Results, groups: Sequence[Group], sections: Sequence[Section], kept: pictures.Kept
) -> list[tuple[str, list[pictures.Row]]]:
    """For each data set with several models: their maps side by side, gradients first."""
    found = []
    for dataset in dict.fromkeys(group.dataset.label for group in groups):
        here = [section for section in sections if section.group.dataset.label == dataset]
        if len(here) < 2:
            continue
        order = [m for m in here[0].board.methods if m in here[0].board.ranks]
        methods = sorted(order, key=lambda name: name != "gradient")[:PAIRED]
        rows = pictures.pairs(
            kept, [section.group for section in here], methods, partial(_said, results)
        )
        if any(row.maps for row in rows):
            found.append((dataset, rows))
    return found


# --- where it comes from --------------------------------------------------------------------------


def _run_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the run: what a reader asks first."""
    if not facts:
        return []
    hardware, git, passes = facts["hardware"], facts["git"], facts["passes"]
    commit = "no checkout"
    if git:
        commit = git["commit"] + ("" if git["clean"] else ", with changes")
    return [
        ("finished", "yes" if facts["finished"] else "no, it was interrupted"),
        ("seconds", f"{facts['seconds']:,.1f}"),
        ("passes in this run", f"{passes['forward']:,} forward, {passes['backward']:,} backward"),
        ("platform", f"{hardware['platform']}, {hardware['cores']} cores, {hardware['device']}"),
        ("commit of the working directory", commit),
    ]
