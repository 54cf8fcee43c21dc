"""Other views of results: pairs of methods, pairs of models, agreement of metrics, variants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd

from .captions import GroupCaption, MetricCaption
from .leaderboard import (
    Leaderboard,
    Line,
    heading_of,
    leaderboards,
    lines_of,
    notes_of,
    ranked_methods,
)
from .sheets import Cell, Sheet
from .statistics import (
    LEVEL,
    Floats,
    agreement_of_metrics,
    bca_intervals,
    column_means,
    four_digits,
    holm,
    krippendorff_alpha,
    mean_ranks,
    pair_tests,
    sign_flip_test,
)
from .tables import Results

View = Literal[
    "leaderboard", "pivot", "pairs", "between-models", "agreement", "sensitivity", "published"
]
TRIANGLE = "▲ better, ▼ worse: paired sign-flip test, Holm over {tests:,} tests, 5 %."


def sheets(results: Results, view: View) -> list[Sheet]:
    """All sheets of a view; none where a run has nothing to compare."""
    if view == "leaderboard":
        return [_board(board) for board in leaderboards(results)]
    if view == "pivot":
        return list(_pivots(results))
    if view == "between-models":
        return list(_between_models(results))
    make = {"pairs": _pairs, "agreement": _agreement, "sensitivity": _sensitivities}[view]
    return [sheet for group in results.captions for sheet in make(results, group)]


LACKING: Mapping[View, str] = {
    "between-models": "no data set of it has two models",
    "sensitivity": "no metric of it has two variants, such as deletion with two baselines",
    "pairs": "it has no two methods with scores",
    "agreement": "it has no two metrics with a direction, or no two methods",
}
"""Why a view may be empty."""


# --- leaderboards ---------------------------------------------------------------------------------


def _board(board: Leaderboard) -> Sheet:
    lines = lines_of(board)
    return Sheet(
        title=f"{board.title}: {board.card}" if board.card else board.title,
        headings=(
            "#", "method", "mean rank", "its 95 %", "level with",
            *(heading_of(board, metric) for metric in board.metrics), "passes",
        ),
        rows=tuple(
            (Cell(line.place), Cell(line.method), Cell(line.rank), Cell(line.interval),
             Cell(line.group), *_numbers(line, board.metrics), Cell(line.passes))
            for line in lines
        ),
        stub=2,
        notes=("Bold: best; underlined: second best.", *notes_of(board)),
        records=(),
        rules=frozenset(len(board.ranks) for _ in [0] if len(board.ranks) < len(lines)),
    )  # fmt: skip


def _numbers(line: Line, metrics: Sequence[str]) -> Iterator[Cell]:
    for metric in metrics:
        style: Literal["", "best", "second"] = ""
        if metric in line.best or metric in line.second:
            style = "best" if metric in line.best else "second"
        number, mark = line.numbers[metric]
        yield Cell(number, mark, style)


def _pivots(results: Results) -> Iterator[Sheet]:
    """Per data set, methods x models against metrics, as papers print them."""
    boards = dict(zip(((g.dataset, g.model) for g in results.captions), leaderboards(results),
                      strict=True))  # fmt: skip
    for dataset, groups in groupby(results.captions, lambda group: group.dataset):
        shown = {group.model: boards[dataset, group.model] for group in groups}
        lines = {
            model: dict(zip(board.methods, lines_of(board), strict=True))
            for model, board in shown.items()
        }
        methods = dict.fromkeys(m for board in shown.values() for m in board.methods)
        controls = {m for board in shown.values() for m in board.methods if m not in board.ranks}
        metrics = dict.fromkeys(m for board in shown.values() for m in board.metrics)
        headings = {m: heading_of(board, m) for board in shown.values() for m in board.metrics}
        rows: list[tuple[str, str, list[Cell]]] = []
        records: list[dict[str, Any]] = []
        rules: set[int] = set()
        for method in sorted(methods, key=controls.__contains__):
            if rows and (len(shown) > 1 or (method in controls) != (rows[-1][0] in controls)):
                rules.add(len(rows))
            for model, board in shown.items():
                line = lines[model].get(method)
                if line is None:
                    continue
                known = [m for m in metrics if m in line.numbers]
                cells = dict(zip(known, _numbers(line, known), strict=True))
                rows.append((method, model, [cells.get(m, Cell("-")) for m in metrics]))
                records.append(
                    {"dataset": dataset, "method": method, "model": model}
                    | {m: board.means.get((method, m), math.nan) for m in metrics}
                )
        yield Sheet(
            f"{dataset}, methods x models",
            ("method", "model", *(headings[m] for m in metrics)),
            tuple((Cell(method), Cell(model), *cells) for method, model, cells in rows),
            2,
            (
                *(f"{model}: {board.card}" for model, board in shown.items() if board.card),
                "Bold: best of its model; underlined: second best.",
                *_level_note(shown.values()),
            ),
            tuple(records),
            frozenset(rules),
        )


def _level_note(boards: Any) -> Iterator[str]:
    if any(board.level for board in boards):
        yield "= not separable from the best of its model (paired sign-flip test, Holm, 5 %)."


# --- pairs ----------------------------------------------------------------------------------------


def _pairs(results: Results, group: GroupCaption) -> Iterator[Sheet]:
    """Differences of all pairs of methods on the same images, metric by metric."""
    methods = ranked_methods(group)
    metrics = [metric for metric in group.metrics if metric.better != "neither"]
    keys, values = results.scores(
        group.dataset, group.model, methods, [metric.label for metric in metrics]
    )
    if not keys or len(methods) < 2 or not metrics:
        return
    first, second = np.triu_indices(len(methods), 1)
    p = pair_tests(values, keys)
    adjusted = holm(p.ravel()).reshape(p.shape)
    rows, records = [], []
    for at, metric in enumerate(metrics):
        moved = values[:, first, at] - values[:, second, at]
        found = zip(
            first, second, column_means(moved), *bca_intervals(moved, keys), adjusted[at],
            (~np.isnan(moved)).sum(0), strict=True,
        )  # fmt: skip
        for one, other, mean, low, high, sure, count in found:
            rows.append(
                (Cell(metric.symbol), Cell(methods[one]), Cell(methods[other]),
                 _difference(mean, low, high, sure, metric.better), Cell(_p(sure)))
            )  # fmt: skip
            records.append(
                {"dataset": group.dataset, "model": group.model, "metric": metric.label,
                 "better": metric.better, "method": methods[one], "other": methods[other],
                 "images": int(count), "difference": mean, "ci_low": low, "ci_high": high,
                 "p_holm": sure}
            )  # fmt: skip
    yield Sheet(
        f"{group.title}: differences of methods on the same images",
        ("metric", "method", "other", "method - other\n[95 %]", "p"),
        tuple(rows),
        3,
        (TRIANGLE.format(tests=int((~np.isnan(p)).sum())),),
        tuple(records),
    )


def _difference(mean: float, low: float, high: float, p: float, better: str) -> Cell:
    if math.isnan(mean):
        return Cell("-")
    mark = ""
    if p < 1 - LEVEL and better != "neither":
        mark = "▲" if (mean > 0) == (better == "higher") else "▼"
    return Cell(f"{mean:+.3g}\n[{low:+.3g}, {high:+.3g}]", mark, "best" if mark == "▲" else "")


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<1e-4" if p < 1e-4 else f"{p:.2g}"


# --- models ---------------------------------------------------------------------------------------


def _between_models(results: Results) -> Iterator[Sheet]:
    """Every further model of a data set against the first one, on all images and where both are
    right.
    """
    for _, of in groupby(results.captions, lambda group: group.dataset):
        base, *others = of
        for other in others:
            yield from _two_models(results, base, other)


def _two_models(results: Results, base: GroupCaption, other: GroupCaption) -> Iterator[Sheet]:
    theirs = {metric.label for metric in other.metrics}
    metrics = [m for m in base.metrics if m.label in theirs]
    labels = set(ranked_methods(other))
    methods = [label for label in ranked_methods(base) if label in labels]
    asked = methods, [metric.label for metric in metrics]
    sides = [results.scores(group.dataset, group.model, *asked) for group in (base, other)]
    right = [_right(results.of(group.dataset, group.model)) for group in (base, other)]
    shared = sorted(set(sides[0][0]) & set(sides[1][0]))
    both = sorted(set(shared) & right[0] & right[1])
    for words, keys in (("all images", shared), ("images that both classify correctly", both)):
        if not keys or not methods or not metrics:
            continue
        before, after = (
            values[pd.Index(known).get_indexer(pd.Index(keys))] for known, values in sides
        )
        yield _moved(base, other, words, keys, before, after, methods, metrics)


def _right(rows: pd.DataFrame) -> set[str]:
    """Images whose predicted class is their label."""
    return set(rows.loc[(rows["label"] >= 0) & (rows["label"] == rows["predicted"]), "image"])


def _moved(
    base: GroupCaption,
    other: GroupCaption,
    words: str,
    keys: Sequence[str],
    before: Floats,
    after: Floats,
    methods: Sequence[str],
    metrics: Sequence[MetricCaption],
) -> Sheet:
    shape = len(methods), len(metrics)
    moved = (after - before).reshape(len(keys), -1)
    paired = ~np.isnan(moved)
    means = [
        column_means(np.where(paired, side.reshape(len(keys), -1), np.nan)).reshape(shape)
        for side in (before, after)
    ]
    low, high = (end.reshape(shape) for end in bca_intervals(moved, keys))
    p = holm(sign_flip_test(moved, keys)).reshape(shape)
    difference = column_means(moved).reshape(shape)
    count = paired.sum(0).reshape(shape)
    return Sheet(
        f"{base.dataset}: {other.model} minus {base.model}, {len(keys)} {words}",
        ("method", *(metric.heading for metric in metrics)),
        tuple(
            (Cell(method), *(
                _difference(difference[at, k], low[at, k], high[at, k], p[at, k], metric.better)
                for k, metric in enumerate(metrics)))
            for at, method in enumerate(methods)
        ),
        1,
        (
            "Mean difference on the same images with its 95 % bootstrap interval.",
            TRIANGLE.format(tests=int((~np.isnan(p)).sum())),
        ),
        tuple(
            {"dataset": base.dataset, "base": base.model, "model": other.model, "images_are": words,
             "method": method, "metric": metric.label, "better": metric.better,
             "images": int(count[at, k]), "base_mean": means[0][at, k],
             "mean": means[1][at, k], "difference": difference[at, k], "ci_low": low[at, k],
             "ci_high": high[at, k], "p_holm": p[at, k]}
            for at, method in enumerate(methods) for k, metric in enumerate(metrics)
        ),
    )  # fmt: skip


# --- metrics --------------------------------------------------------------------------------------


def _agreement(results: Results, group: GroupCaption) -> Iterator[Sheet]:
    """Kendall's tau between metrics, and Krippendorff's alpha between images."""
    methods = ranked_methods(group)
    metrics = [metric for metric in group.metrics if metric.better != "neither"]
    keys, values = results.scores(
        group.dataset, group.model, methods, [metric.label for metric in metrics]
    )
    if not keys or len(methods) < 2 or len(metrics) < 2:
        return
    tau, low, high = agreement_of_metrics(values, [metric.better for metric in metrics], keys)
    alpha = [krippendorff_alpha(four_digits(values[:, :, at])) for at in range(len(metrics))]
    here = {"dataset": group.dataset, "model": group.model}
    records = [
        here | {"statistic": "kendall_tau", "metric": one.label, "other": other.label,
                "value": tau[at, to], "ci_low": low[at, to], "ci_high": high[at, to]}
        for at, one in enumerate(metrics) for to, other in enumerate(metrics[:at])
    ]  # fmt: skip
    records += [
        here | {"statistic": "krippendorff_alpha", "metric": one.label, "other": "",
                "value": alpha[at], "ci_low": math.nan, "ci_high": math.nan}
        for at, one in enumerate(metrics)
    ]  # fmt: skip
    yield Sheet(
        f"{group.title}: agreement of metrics about {len(methods)} methods",
        ("metric", "alpha", *(metric.symbol for metric in metrics[:-1])),
        tuple(
            (Cell(metric.symbol), Cell(_signed(alpha[at])),
             *(_tau(tau[at, to], low[at, to], high[at, to]) if to < at else Cell("")
               for to in range(len(metrics) - 1)))
            for at, metric in enumerate(metrics)
        ),
        1,
        (
            "Kendall's tau between the orders of methods, with its 95 % bootstrap interval over "
            "images; 1: the same order, 0: unrelated.",
            "alpha: Krippendorff's, of the ranks on each image; 1: all images order the methods "
            "alike, 0: no more alike than chance.",
        ),
        tuple(records),
    )  # fmt: skip


def _tau(tau: float, low: float, high: float) -> Cell:
    return Cell("-" if math.isnan(tau) else f"{tau:.2f}\n[{low:.2f}, {high:.2f}]")


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _sensitivities(results: Results, group: GroupCaption) -> Iterator[Sheet]:
    """How ranks move where one metric has several baselines, presets or steps."""
    for name in dict.fromkeys(metric.name for metric in group.metrics):
        variants = [m for m in group.metrics if m.name == name and m.better != "neither"]
        if len(variants) > 1:
            yield from _sensitivity(results, group, variants)


def _sensitivity(
    results: Results, group: GroupCaption, variants: Sequence[MetricCaption]
) -> Iterator[Sheet]:
    methods = ranked_methods(group)
    keys, values = results.scores(
        group.dataset, group.model, methods, [metric.label for metric in variants]
    )
    if not keys or len(methods) < 2:
        return
    better = [metric.better for metric in variants]
    count = (~np.isnan(values)).sum(0)
    means = four_digits(column_means(np.where(count < count.max(0), np.nan, values)))
    ranks = np.stack(
        [mean_ranks(means[:, [at]], [word]) for at, word in enumerate(better)], 1
    )  # (M, K)
    tau, low, high = agreement_of_metrics(values, better, keys)
    order = np.argsort(ranks[:, 0], kind="stable")
    rows = [
        (Cell(methods[at]), Cell(f"{np.ptp(ranks[at]):g}"), *(Cell(f"{r:g}") for r in ranks[at]))
        for at in order
    ]
    rows += [
        (Cell(f"tau with {one.symbol}"), Cell(""),
         *(_tau(tau[at, to], low[at, to], high[at, to]) if to != at else Cell("")
           for to in range(len(variants))))
        for at, one in enumerate(variants)
    ]  # fmt: skip
    here = {"dataset": group.dataset, "model": group.model}
    records: list[dict[str, Any]] = [
        here | {"statistic": "rank", "metric": metric.label, "of": methods[at],
                "value": float(ranks[at, to]), "ci_low": math.nan, "ci_high": math.nan}
        for at in order for to, metric in enumerate(variants)
    ]  # fmt: skip
    records += [
        here | {"statistic": "kendall_tau", "metric": one.label, "of": other.label,
                "value": tau[at, to], "ci_low": low[at, to], "ci_high": high[at, to]}
        for at, one in enumerate(variants) for to, other in enumerate(variants) if to > at
    ]  # fmt: skip
    yield Sheet(
        f"{group.title}: ranks under {len(variants)} variants of {variants[0].name}",
        ("method", "moves\nby", *(metric.heading for metric in variants)),
        tuple(rows),
        1,
        ("Kendall's tau between the orders of two variants, with its 95 % bootstrap interval.",),
        tuple(records),
        frozenset({len(methods)}),
    )
