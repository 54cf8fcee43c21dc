"""Other views of results: pairs of methods, pairs of models, agreement of metrics, variants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd

from .captions import ARROW, GroupCaption, MetricCaption
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
    student_intervals,
)
from .tables import Results

View = Literal[
    "leaderboard", "pivot", "pairs", "between-models", "effect", "agreement", "sensitivity",
    "published",
]  # fmt: skip
ALL = "all images"
TRIANGLE = "▲ better, ▼ worse: paired sign-flip test, Holm over {tests:,} tests, 5 %."


def sheets(results: Results, view: View) -> list[Sheet]:
    """All sheets of a view; none where a run has nothing to compare."""
    if view == "leaderboard":
        return [_board(board) for board in leaderboards(results)]
    if view == "pivot":
        return list(_pivots(results))
    if view == "between-models":
        return list(_between_models(results))
    if view == "effect":
        return list(_effects(results))
    make = {"pairs": _pairs, "agreement": _agreement, "sensitivity": _sensitivities}[view]
    return [sheet for group in results.captions for sheet in make(results, group)]


LACKING: Mapping[View, str] = {
    "between-models": "no data set of it has two models",
    "effect": "no pair of its networks is whole: name each one's 'arm' and 'pair' in the suite",
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
        headings = {
            m: max((heading_of(b, m) for b in shown.values() if m in b.metrics), key=len)
            for m in metrics
        }
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
                *_legends(shown),
            ),
            tuple(records),
            frozenset(rules),
        )


def _legends(boards: Mapping[str, Leaderboard]) -> Iterator[str]:
    """Of the signs behind numbers and headings."""
    if any(board.level for board in boards.values()):
        yield "= not separable from the best of its model (paired sign-flip test, Holm, 5 %)."
    lines = {model: notes_of(board) for model, board in boards.items()}
    yield from dict.fromkeys(x for own in lines.values() for x in own if x[:2] in ("r ", "i "))
    for model, own in lines.items():
        yield from (f"{x[:2]}{model}: {x[2:]}" for x in own if x[:2] == "! ")


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
        heading = f"{metric.symbol}{ARROW[metric.better]}"
        moved = values[:, first, at] - values[:, second, at]
        found = zip(
            first, second, column_means(moved), *bca_intervals(moved, keys), adjusted[at],
            (~np.isnan(moved)).sum(0), strict=True,
        )  # fmt: skip
        for one, other, mean, low, high, sure, count in found:
            rows.append(
                (Cell(heading), Cell(methods[one]), Cell(methods[other]),
                 *_apart(mean, low, high, sure, metric.better), Cell(_p(sure)))
            )  # fmt: skip
            records.append(
                {"dataset": group.dataset, "model": group.model, "metric": metric.label,
                 "better": metric.better, "method": methods[one], "other": methods[other],
                 "images": int(count), "difference": mean, "ci_low": low, "ci_high": high,
                 "p_holm": sure}
            )  # fmt: skip
    yield Sheet(
        f"{group.title}: method minus other on the same images",
        ("metric", "method", "other", "difference", "95 %\ninterval", "p,\nHolm"),
        tuple(rows),
        3,
        (TRIANGLE.format(tests=int((~np.isnan(p)).sum())),),
        tuple(records),
        frozenset(range(len(first), len(rows), len(first))),
    )


def _difference(mean: float, low: float, high: float, p: float, better: str) -> Cell:
    """With its interval on a second line."""
    moved, interval = _apart(mean, low, high, p, better)
    return Cell("\n".join(filter(None, (moved.text, interval.text))), moved.mark, moved.style)


def _apart(mean: float, low: float, high: float, p: float, better: str) -> tuple[Cell, Cell]:
    mark = ""
    if p < 1 - LEVEL and better != "neither":
        mark = "▲" if (mean > 0) == (better == "higher") else "▼"
    interval = "" if math.isnan(low) else f"[{_plus(low)}, {_plus(high)}]"
    return Cell(_plus(mean), mark, "best" if mark == "▲" else ""), Cell(interval)


def _plus(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3g}" if value else "0"


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<1e-4" if p < 1e-4 else f"{p:.2g}"


# --- models ---------------------------------------------------------------------------------------


def _between_models(results: Results) -> Iterator[Sheet]:
    """Every further model of a data set against the first one, or the first arm's of its pair."""
    for _, of in groupby(results.captions, lambda group: group.dataset):
        groups = list(of)
        arms = _arms(groups)
        for other in groups:
            base: GroupCaption | None = groups[0]
            if other.pair is not None:
                base = next(iter(arms.values())).get(other.pair)
            if base is not None and base != other:
                yield from _two_models(results, base, other)


def _arms(groups: Sequence[GroupCaption]) -> dict[str, dict[int, GroupCaption]]:
    """Networks by arm and pair."""
    arms: dict[str, dict[int, GroupCaption]] = {}
    for group in groups:
        if group.pair is not None:
            arms.setdefault(group.arm, {})[group.pair] = group
    return arms


def _common(groups: Sequence[GroupCaption]) -> tuple[list[str], list[MetricCaption]]:
    """Labels of the ranked methods, and the metrics, that all of these have."""
    methods = [set(ranked_methods(group)) for group in groups]
    metrics = [{metric.label for metric in group.metrics} for group in groups]
    return (
        [label for label in ranked_methods(groups[0]) if all(label in own for own in methods)],
        [metric for metric in groups[0].metrics if all(metric.label in own for own in metrics)],
    )


def _sides(
    results: Results,
    base: GroupCaption,
    other: GroupCaption,
    methods: Sequence[str],
    metrics: Sequence[MetricCaption],
) -> Iterator[tuple[str, list[str], Floats, Floats]]:
    """Of two models, which images are taken, their keys, and both models' scores of them."""
    asked = methods, [metric.label for metric in metrics]
    sides = [results.scores(group.dataset, group.model, *asked) for group in (base, other)]
    right = [_right(results.of(group.dataset, group.model)) for group in (base, other)]
    shared = sorted(set(sides[0][0]) & set(sides[1][0]))
    both = sorted(set(shared) & right[0] & right[1])
    for words, keys in ((ALL, shared), ("images that both classify correctly", both)):
        before, after = (
            values[pd.Index(known).get_indexer(pd.Index(keys))] for known, values in sides
        )
        yield words, keys, before, after


def _two_models(results: Results, base: GroupCaption, other: GroupCaption) -> Iterator[Sheet]:
    methods, metrics = _common([base, other])
    shown: list[str] = []  # where both classify every image correctly, one sheet is enough
    for words, keys, before, after in _sides(results, base, other, methods, metrics):
        if keys and keys != shown and methods and metrics:
            yield _moved(base, other, words, keys, before, after, methods, metrics)
            shown = keys


def _right(rows: pd.DataFrame) -> set[str]:
    """Images whose predicted class is their label."""
    return set(rows.loc[(rows["label"] >= 0) & (rows["label"] == rows["predicted"]), "image"])


def _images(counts: Sequence[int], words: str) -> str:
    """How many, least to most, in front of "images", which may follow "all"."""
    number = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    before, _, after = words.partition("images")
    return f"{before}{number} images{after}"


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
        f"{base.dataset}: {other.model} minus {base.model}, {_images([len(keys)], words)}",
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


# --- effects over pairs of networks ---------------------------------------------------------------


def _effects(results: Results) -> Iterator[Sheet]:
    """Every further arm of a data set against the first one, over pairs of networks."""
    for _, of in groupby(results.captions, lambda group: group.dataset):
        arms = _arms(list(of))
        for arm in list(arms)[1:]:
            yield from _effect(results, *(arms[name] for name in (next(iter(arms)), arm)))


def _effect(
    results: Results, bases: Mapping[int, GroupCaption], others: Mapping[int, GroupCaption]
) -> Iterator[Sheet]:
    pairs = [pair for pair in bases if pair in others]
    if not pairs:
        return
    methods, metrics = _common([arm[pair] for pair in pairs for arm in (bases, others)])
    metrics = [metric for metric in metrics if metric.better != "neither"]
    names = [(metric, method) for metric in metrics for method in methods]
    by_words: dict[str, list[tuple[int, Floats, Floats]]] = {}
    for pair in pairs:
        base, other = bases[pair], others[pair]
        for words, keys, *sides in _sides(results, base, other, methods, metrics):
            before, after = (
                side.transpose(0, 2, 1).reshape(len(keys), len(names)) for side in sides
            )
            lacks = np.isnan(before) | np.isnan(after)
            means = [column_means(np.where(lacks, np.nan, side)) for side in (before, after)]
            if words == ALL:
                means = [
                    np.append(mean, _accuracy(results.of(group.dataset, group.model), keys))
                    for mean, group in zip(means, (base, other), strict=True)
                ]
            by_words.setdefault(words, []).append((len(keys), means[0], means[1]))
    first, second = bases[pairs[0]], others[pairs[0]]
    shown = [0] * len(pairs)
    for words, found in by_words.items():
        counts = [count for count, _, _ in found]
        if any(counts) and counts != shown:
            yield _effect_sheet(first, second, words, pairs, names, found)
            shown = counts


def _accuracy(rows: pd.DataFrame, keys: Sequence[str]) -> float:
    """In percent of the images with a label; NaN without any."""
    known = rows[rows["image"].isin(keys) & (rows["label"] >= 0) & (rows["predicted"] >= 0)]
    known = known.drop_duplicates("image")
    return float(100 * (known["label"] == known["predicted"]).mean())


def _effect_sheet(
    base: GroupCaption,
    other: GroupCaption,
    words: str,
    pairs: Sequence[int],
    names: Sequence[tuple[MetricCaption, str]],
    found: Sequence[tuple[int, Floats, Floats]],
) -> Sheet:
    before, after = (np.stack([row[at] for row in found]) for at in (1, 2))  # (pairs, cells)
    moved = after - before
    effect, (low, high, p) = column_means(moved), student_intervals(moved)
    means = [column_means(np.where(np.isnan(moved), np.nan, side)) for side in (before, after)]
    adjusted = holm(p)
    columns = [(m.label, f"{m.symbol}{ARROW[m.better]}", m.better, method) for m, method in names]
    columns += [("accuracy", "acc., %", "higher", "")] * (len(effect) - len(names))
    rows: list[tuple[Cell, ...]] = []
    records: list[dict[str, Any]] = []
    rules: set[int] = set()
    for at, (label, heading, better, method) in enumerate(columns):
        if np.isnan(effect[at]):
            continue
        if records and records[-1]["metric"] != label:
            rules.add(len(rows))
        each = moved[:, at]
        rows.append(
            (Cell(heading), Cell(method), *(Cell(f"{mean[at]:.4g}") for mean in means),
             *_apart(effect[at], low[at], high[at], adjusted[at], better),
             Cell(_p(p[at])), Cell(_p(adjusted[at])), *(Cell(_plus(gap)) for gap in each))
        )  # fmt: skip
        records.append(
            {"dataset": base.dataset, "base": base.arm, "arm": other.arm, "images_are": words,
             "method": method, "metric": label, "better": better,
             "pairs": int((~np.isnan(each)).sum()), "base_mean": means[0][at],
             "mean": means[1][at], "difference": effect[at], "ci_low": low[at],
             "ci_high": high[at], "p": p[at], "p_holm": adjusted[at]}
            | {f"pair_{pair}": gap for pair, gap in zip(pairs, each.tolist(), strict=True)}
        )  # fmt: skip
    counts = sorted({count for count, _, _ in found})
    tests = int((~np.isnan(p)).sum())
    is_one = len(pairs) == 1
    return Sheet(
        f"{base.dataset}: {other.arm} minus {base.arm}, {len(pairs)} "
        f"pair{'' if is_one else 's'} of networks, {_images(counts, words)}",
        ("metric", "method", f"{base.arm}\nmean", f"{other.arm}\nmean",
         "effect", "95 %\ninterval", "p", "p,\nHolm", *(f"pair {pair}" for pair in pairs)),
        tuple(rows),
        2,
        (
            "One pair of networks says nothing of the next one: without an interval."
            if is_one else
            f"The network is the unit, however many images: each pair's mean difference on the "
            f"same images is one of {len(pairs)} values, with Student's 95 % interval and t test.",
            *([f"▲ better, ▼ worse: t test, Holm over {tests:,} tests, 5 %."] if tests else []),
        ),
        tuple(records),
        frozenset(rules),
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
