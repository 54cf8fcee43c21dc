"""From stored rows to tables: one row per image, one row per cell, and the leaderboard."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import registry
from .plan import Cell, Group, Plan
from .probe import closure, cost, needs_of
from .store import Store
from .suite import Choice, canonical

Format = Literal["terminal", "md", "csv", "json"]

SCORED = ("ok", "degenerate")
FAILING = ("failed", "error")
"""First words of the statuses that make a run end with exit status 3."""

TABLE_COLUMNS = (
    "cell",
    "dataset",
    "model",
    "method",
    "method_params",
    "metric",
    "metric_params",
    "better",
    "images",
    "degenerate",
    "failed",
    "mean",
    "std",
    "ci_low",
    "ci_high",
    "forwards",
    "backwards",
    "status",
    "reason",
)
ARROW = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Results:
    """What a plan's cells came to.

    Args:
        plan: what was asked for.
        per_image: one row per cell and image that is stored.
        table: one row per cell, :data:`TABLE_COLUMNS`, sorted.
        notices: damaged parts, mixed conditions.
    """

    plan: Plan
    per_image: pd.DataFrame
    table: pd.DataFrame
    notices: tuple[str, ...]

    @property
    def failing(self) -> int:
        """Rows that failed, and cells that are not there."""
        words = self.per_image["status"].str.split(":").str[0]
        return int(words.isin(FAILING).sum()) + int((self.table["status"] == "missing").sum())


def collect(plan: Plan, store: Store) -> Results:
    """Reads what the store holds of a plan.

    Raises:
        StoreError: if parts contradict one another.
    """
    frames, rows, notices = [], [], []
    for group in plan.groups:
        stored = store.group(*group.folder)
        frame = stored.rows()
        notices += stored.damaged
        if stored.mixed:
            notices.append(
                f"{group.dataset.label} x {group.model.label}: parts from different conditions "
                "differ within rounding; the first by file name counts"
            )
        order = {key: at for at, (_, key) in enumerate(group.images)}
        by_id = {cell.id: cell for cell in group.cells}
        frame = frame[frame["cell"].isin(by_id) & frame["image"].isin(order)]
        grouped = dict(tuple(frame.groupby("cell")))
        rows += [_row(group, cell, grouped.get(cell.id)) for cell in group.cells]
        names = pd.DataFrame(
            [
                (c.id, c.dataset.label, c.model.label, c.method.label, c.metric.label)
                for c in group.cells
            ],
            columns=["cell", "dataset", "model", "method", "metric"],
        )
        frames.append(names.merge(frame, on="cell", how="inner"))
    per_image = pd.concat(frames, ignore_index=True)
    keys = ["dataset", "model", "method", "metric", "image"]
    table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
    return Results(
        plan,
        per_image.sort_values(keys, ignore_index=True),
        table.sort_values(["dataset", "model", "method", "metric", "cell"], ignore_index=True),
        tuple(notices),
    )


def _row(group: Group, cell: Cell, rows: pd.DataFrame | None) -> dict[str, Any]:
    metric = cell.metric.make()
    alone = group.outlay([cell])
    known = alone.unknown == 0
    row: dict[str, Any] = {
        "cell": cell.id,
        "dataset": cell.dataset.label,
        "model": cell.model.label,
        "method": cell.method.label,
        "method_params": canonical(dict(cell.method.params)),
        "metric": cell.metric.label,
        "metric_params": canonical(dict(cell.metric.params)),
        "better": metric.better,
        "forwards": str(alone.passes.forward) if known else "unknown",
        "backwards": str(alone.passes.backward) if known else "unknown",
    }
    return row | _summary(cell, rows, len(group.images))


def _summary(cell: Cell, rows: pd.DataFrame | None, asked: int) -> dict[str, Any]:
    if rows is None:
        status, reason = (
            ("skipped", cell.skipped) if cell.skipped else ("missing", "not computed yet")
        )
        return _numbers(pd.Series(dtype=float)) | {
            "images": 0, "degenerate": 0, "failed": 0, "status": status, "reason": reason,
        }  # fmt: skip
    scored = rows["status"].isin(SCORED)
    others = rows.loc[~scored, "status"].value_counts().sort_index()
    reason = "; ".join(f"{count} x {words}" for words, count in others.items())
    lacking = asked - len(rows)
    if lacking:
        reason = "; ".join(filter(None, (reason, f"{lacking} not computed yet")))
    words = set(rows.loc[~scored, "status"].str.split(":").str[0])
    if scored.any():
        status = "partial" if words or lacking else "ok"
    else:
        status = min(words) if words else "missing"
    return _numbers(rows.loc[scored, "value"]) | {
        "images": int(scored.sum()),
        "degenerate": int((rows["status"] == "degenerate").sum()),
        "failed": int((~scored).sum()),
        "status": status,
        "reason": reason,
    }


def _numbers(values: pd.Series[float]) -> dict[str, float]:
    """Mean, standard deviation (n - 1) and the normal 95 % interval of the mean."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan  # fsum: no order, no rounding
    std = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
        if count > 1
        else math.nan
    )
    half = 1.96 * std / math.sqrt(count) if count > 1 else math.nan
    return {"mean": mean, "std": std, "ci_low": mean - half, "ci_high": mean + half}


def to_csv(table: pd.DataFrame) -> str:
    """The table as committed: LF, six decimals, empty where there is no number."""
    return table.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def to_json(results: Results) -> str:
    """The table as a JSON list, null where there is no number."""
    return json.dumps(
        [
            {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}
            for row in results.table.to_dict("records")
        ],
        indent=1,
        allow_nan=False,
    )


# --- the leaderboard ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaderboard:
    """Methods against metrics on one data set and model.

    Args:
        title: data set, model, number of images, accuracy.
        methods: labels, best first; those without a rank are control maps, listed apart.
        metrics: labels; a metric that was skipped for all methods is only in ``marks``.
        means: by method and metric; NaN where there is no score.
        ranks: mean rank over the faithfulness metrics; a missing score has the worst rank.
        headings: metric label to heading, with arrow and baseline.
        better: metric label to "higher" or "lower".
        passes: method label to its own passes per image.
        marks: why a cell lacks images.
    """

    title: str
    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    means: Mapping[tuple[str, str], float]
    ranks: Mapping[str, float]
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
    ranks = _mean_ranks(ranked, {name: metrics[name] for name in faithful or metrics}, means)
    order = sorted(ranked, key=ranks.__getitem__)
    shown = [n for n in metrics if any(r["status"] != "skipped" for r in rows if r["metric"] == n)]
    return Leaderboard(
        title=_title(results, group),
        methods=(*order, *(name for name in controls if name not in ranks)),
        metrics=tuple(shown or metrics),
        means=means,
        ranks=ranks,
        headings={label: _heading(group, label) for label in metrics},
        better={label: metric.better for label, metric in metrics.items()},
        passes={label: _method_passes(group, choice) for label, choice in methods.items()},
        marks={
            (row["method"], row["metric"]): f"{row['status']}: {row['reason']}"
            for row in rows
            if row["status"] != "ok"
        },
    )


def _mean_ranks(
    methods: Sequence[str], metrics: Mapping[str, Any], means: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """1 is best; equal means share the average of their places; no mean is behind all others."""
    total = dict.fromkeys(methods, 0.0)
    for name, metric in metrics.items():
        column = pd.Series([means.get((method, name), math.nan) for method in methods])
        places = column.rank(ascending=metric.better == "lower", na_option="bottom")
        for method, place in zip(methods, places.tolist(), strict=True):
            total[method] += place / len(metrics)
    return total


def _title(results: Results, group: Group) -> str:
    rows = results.per_image
    rows = rows[(rows["dataset"] == group.dataset.label) & (rows["model"] == group.model.label)]
    images = rows.drop_duplicates("image")
    known = images[(images["label"] >= 0) & (images["predicted"] >= 0)]
    title = f"{group.dataset.label} x {group.model.label}, {len(group.images)} images"
    if len(known):
        title += f", accuracy {100 * (known['label'] == known['predicted']).mean():.1f} %"
    return f"{title}, target {results.plan.suite.target}"


def _heading(group: Group, label: str) -> str:
    """Symbol and arrow; beneath, the baseline and whatever else is not default."""
    metric = next(cell.metric for cell in group.cells if cell.metric.label == label).make()
    if label != registry.label(metric):
        return f"{label} {ARROW[metric.better]}"  # the suite's own words
    baseline = getattr(metric, "baseline", None)
    changed = [
        f"{k}={v}" for k, v in registry.changed_parameters(metric).items() if k != "baseline"
    ]
    details = ", ".join([*([baseline] if baseline else []), *changed])
    return f"{getattr(metric, 'symbol', metric.name)} {ARROW[metric.better]}" + (
        f"\n{details}" if details else ""
    )


def _method_passes(group: Group, choice: Choice) -> str:
    method = choice.make()
    own = getattr(method, "passes", None)
    if own is None and not hasattr(method, "needs"):
        return "?"
    total = cost(closure(needs_of(method)), group.sketch)
    if own is not None:
        total = total.plus(own(group.sketch))
    return f"{total.forward}+{total.backward}"


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
        console.print(_terminal(board))
        _footnotes(board, console)
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
        best[metric] = pick(known, default=math.nan)
        largest[metric] = max((abs(v) for v in column if not math.isnan(v)), default=0.0)
    lines = []
    for at, method in enumerate(board.methods):
        rank = f"{board.ranks[method]:.2f}" if method in board.ranks else ""
        numbers = [(rank, False)]
        for metric in board.metrics:
            value = board.means.get((method, metric), math.nan)
            mark = "*" if (method, metric) in board.marks else ""
            text = _number(value, largest[metric]) + mark
            numbers.append((text, bool(rank) and value == best[metric]))
        lines.append((str(at + 1) if rank else "", method, numbers, board.passes[method]))
    return lines


def _terminal(board: Leaderboard) -> Table:
    table = Table(title=board.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("method", no_wrap=True)
    table.add_column("mean rank\nfaithfulness", justify="right")
    for metric in board.metrics:
        table.add_column(board.headings[metric], justify="right")
    table.add_column("passes\nfwd+bwd", justify="right")
    lines = _lines(board)
    for at, (place, method, numbers, passes) in enumerate(lines):
        texts = [Text(text, style="bold green" if best else "") for text, best in numbers]
        last = bool(place) and at + 1 < len(lines) and not lines[at + 1][0]
        style = "" if place else "dim"
        table.add_row(place, method, *texts, passes, end_section=last, style=style)
    return table


def _footnotes(board: Leaderboard, console: Console) -> None:
    if len(board.ranks) < len(board.methods):
        console.print(
            "Below the line: control maps that know nothing of the network. A metric that they win "
            "measures something else."
        )
    reasons: dict[str, list[str]] = {}
    for (method, metric), reason in board.marks.items():
        reasons.setdefault(reason, []).append(f"{method}/{metric}")
    for reason, cells in reasons.items():
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        console.print(f"* {', '.join(cells[:3])}{more}: {reason}", markup=False)
    console.print()


def _markdown(board: Leaderboard) -> str:
    headings = [board.headings[metric].replace("\n", " ") for metric in board.metrics]
    rows = [f"**{board.title}**", ""]
    rows.append("| " + " | ".join(["#", "method", "mean rank", *headings, "passes"]) + " |")
    rows.append("|" + "--:|:--|" + "--:|" * (len(headings) + 2))
    for place, method, numbers, passes in _lines(board):
        texts = [f"**{text}**" if best else text for text, best in numbers]
        cells = [place, f"`{method}`", *texts, passes]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"
