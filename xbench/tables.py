"""From stored rows to tables: one row per image, one row per cell."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from .captions import Captions, captions
from .captions import from_json as captions_from_json
from .captions import to_json as captions_to_json
from .errors import UsageError
from .plan import Cell, Group, Plan
from .probe import needs_of
from .statistics import Floats, bca_intervals, four_digits
from .store import Group as StoredGroup
from .store import Store
from .suite import Choice, canonical

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
    "flags",
)
CALIBRATION_BINS = 15
"""Equal bins of [0, 1] for the calibration error, as in Guo et al. 2017, arXiv:1706.04599."""


@dataclass(frozen=True)
class ModelCard:
    """How good and how sure a model is on the images of a run; all but the count in [0, 1].

    Args:
        images: whose prediction is stored.
        labelled: how many of them have a label; accuracy and calibration are theirs.
        accuracy: share whose predicted class is the label; NaN without labels.
        confidence: mean softmax probability of the predicted class; NaN where it is not known.
        calibration_error: see :func:`calibration_error`; NaN without labels or confidence.
    """

    images: int = 0
    labelled: int = 0
    accuracy: float = math.nan
    confidence: float = math.nan
    calibration_error: float = math.nan


@dataclass(frozen=True, eq=False)
class Results:
    """What a plan's cells came to.

    Args:
        captions: what tables say of methods and metrics, and in which order.
        per_image: one row per cell and image that is stored.
        table: one row per cell, :data:`TABLE_COLUMNS`, sorted. ``ci_low`` and ``ci_high`` are the
            ends of the 95 % bootstrap interval of the mean over images (bias-corrected and
            accelerated, 2,000 samples, seeded from the images' keys); empty for a single image.
        notices: damaged parts, mixed conditions.
        cards: by the labels of data set and model.
        mixed: a sentence for each group whose rows were made by different versions.
        plan: what was asked for; None where results were read from files.
        by: metric or family that leaderboards are ordered by; empty for faithfulness.
    """

    captions: Captions
    per_image: pd.DataFrame
    table: pd.DataFrame
    notices: tuple[str, ...]
    cards: Mapping[tuple[str, str], ModelCard]
    mixed: tuple[str, ...] = ()
    plan: Plan | None = None
    by: str = ""

    @property
    def planned(self) -> Plan:
        """The plan of results that were read from a store.

        Raises:
            UsageError: if they were read from a run's files.
        """
        if self.plan is None:
            raise UsageError("this view needs the suite itself: name it instead of a folder")
        return self.plan

    @property
    def failing(self) -> int:
        """Rows that failed, and cells that are not there."""
        words = self.per_image["status"].str.split(":").str[0]
        return int(words.isin(FAILING).sum()) + int((self.table["status"] == "missing").sum())

    def scores(
        self, dataset: str, model: str, methods: Sequence[str], metrics: Sequence[str]
    ) -> tuple[list[str], Floats]:
        """Image keys, sorted, and the scores (N, M, K) of these; NaN where there is none."""
        rows = self.of(dataset, model)
        keys = sorted(rows["image"].unique())
        scored = rows[rows["status"].isin(SCORED)]
        values = np.full((len(keys), len(methods), len(metrics)), np.nan)
        at = [
            pd.Index(labels).get_indexer(pd.Index(scored[column]))
            for labels, column in ((keys, "image"), (methods, "method"), (metrics, "metric"))
        ]
        asked = (at[1] >= 0) & (at[2] >= 0)
        values[tuple(where[asked] for where in at)] = scored["value"].to_numpy()[asked]
        return keys, values

    def of(self, dataset: str, model: str) -> pd.DataFrame:
        """Rows per image of one data set and model."""
        rows = self.per_image
        return rows[(rows["dataset"] == dataset) & (rows["model"] == model)]

    def facts(self) -> dict[str, Any]:
        """What :func:`from_files` needs beside the two tables, as JSON can hold it."""
        cards = [
            {"dataset": dataset, "model": model, **card_facts(card)}
            for (dataset, model), card in self.cards.items()
        ]
        return {
            "captions": captions_to_json(self.captions),
            "cards": cards,
            "mixed": list(self.mixed),
        }


def collect(plan: Plan, store: Store) -> Results:
    """Reads what the store holds of a plan.

    Raises:
        StoreError: if parts contradict one another.
    """
    frames, rows, notices, cards, mixed = [], [], [], {}, []
    for group in plan.groups:
        stored = store.group(*group.folder)
        frame = stored.rows()
        notices += stored.damaged
        name = f"{group.dataset.label} x {group.model.label}"
        if stored.mixed:
            notices.append(
                f"{name}: parts from different conditions "
                "differ within rounding; the first by file name counts"
            )
        keys = sorted(key for _, key in group.images)
        by_id = {cell.id: cell for cell in group.cells}
        frame = frame[frame["cell"].isin(by_id) & frame["image"].isin(keys)]
        mixed += [f"{name}: {words}" for words in _mixture(stored, by_id, keys)]
        grouped = dict(tuple(frame.groupby("cell")))
        values = _values(frame, keys, list(by_id))
        ends = bca_intervals(values, keys) if keys else np.full((2, len(by_id)), np.nan)
        interval = dict(zip(by_id, zip(*ends, strict=True), strict=True))
        scores = dict(zip(by_id, values.T, strict=True))
        flags = flags_of(group.cells, scores, keys)
        rows += [
            _row(group, cell, grouped.get(cell.id))
            | dict(zip(("ci_low", "ci_high"), interval[cell.id], strict=True))
            | {"flags": ";".join(sorted(flags[cell.id]))}
            for cell in group.cells
        ]
        cards[group.dataset.label, group.model.label] = _card(
            frame, _confidences(stored), plan.suite.target
        )
        names = pd.DataFrame(
            [
                (c.id, c.dataset.label, c.model.label, c.method.label, c.metric.label)
                for c in group.cells
            ],
            columns=["cell", "dataset", "model", "method", "metric"],
        )
        frames.append(names.merge(frame, on="cell", how="inner"))
    keys = ["dataset", "model", "method", "metric", "image"]
    table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
    return Results(
        captions(plan),
        pd.concat(frames, ignore_index=True).sort_values(keys, ignore_index=True),
        table.sort_values(["dataset", "model", "method", "metric", "cell"], ignore_index=True),
        tuple(notices),
        cards,
        tuple(mixed),
        plan,
    )


def from_files(
    table: pd.DataFrame, per_image: pd.DataFrame, provenance: Mapping[str, Any]
) -> Results:
    """Results again, from the files of a run.

    Means and deviations are taken from the rows per image, since a table of text has six decimals.

    Args:
        table: as read from ``table.csv``, all text.
        per_image: as read from ``per_image.parquet``.
        provenance: of the run, with :meth:`Results.facts` in it.

    Raises:
        KeyError, TypeError, ValueError: if one of them is not such.
    """
    table = table.copy()
    for column in ("images", "degenerate", "failed"):
        table[column] = table[column].astype(int)
    for column in ("mean", "std", "ci_low", "ci_high"):
        table[column] = pd.to_numeric(table[column])
    scored = per_image[per_image["status"].isin(SCORED)]
    found = {cell: _numbers(values) for cell, values in scored.groupby("cell")["value"]}
    for at, cell in enumerate(table["cell"]):
        for column, value in found.get(cell, {}).items():
            table.loc[at, column] = value
    cards = {}
    for card in provenance["cards"]:
        values: dict[str, Any] = {key: card[key] for key in asdict(ModelCard())}
        values = {key: math.nan if value is None else value for key, value in values.items()}
        cards[card["dataset"], card["model"]] = ModelCard(**values)
    return Results(
        captions_from_json(provenance["captions"]),
        per_image,
        table,
        (),
        cards,
        tuple(provenance["mixed"]),
    )


def _values(frame: pd.DataFrame, keys: Sequence[str], cells: Sequence[str]) -> Floats:
    """Scores by image and cell; NaN where there is none."""
    scored = frame[frame["status"].isin(SCORED)]
    values = np.full((len(keys), len(cells)), np.nan)
    places = [
        pd.Index(labels).get_indexer(pd.Index(scored[column]))
        for labels, column in ((keys, "image"), (cells, "cell"))
    ]
    values[tuple(places)] = scored["value"]
    return values


def _mixture(stored: StoredGroup, cells: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Packages of which the rows of these cells and images were made with several versions."""
    by_versions: dict[str, list[Any]] = {}
    for part in stored.parts():
        versions = part.facts.get("provenance", {}).get("versions", {})
        by_versions.setdefault(json.dumps(versions, sort_keys=True), []).append(part)
    if len(by_versions) < 2:
        return []
    cells, keys = set(cells), set(keys)
    used = []
    for versions, parts in by_versions.items():
        rows = pd.concat([p.rows.select(["cell", "image"]).to_pandas() for p in parts])
        if (rows["cell"].isin(cells) & rows["image"].isin(keys)).any():
            used.append(json.loads(versions))
    found = {
        package: sorted({str(versions.get(package)) for versions in used})
        for package in sorted({package for versions in used for package in versions})
    }
    return [f"{package} {' and '.join(many)}" for package, many in found.items() if len(many) > 1]


def _row(group: Group, cell: Cell, rows: pd.DataFrame | None) -> dict[str, Any]:
    metric = cell.metric.make()
    alone = group.outlay([cell])
    bound = "<=" if alone.is_bound else ""
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
        "forwards": f"{bound}{alone.passes.forward}" if known else "unknown",
        "backwards": f"{bound}{alone.passes.backward}" if known else "unknown",
    }
    return row | _summary(cell, rows, len(group.images))


def _summary(cell: Cell, rows: pd.DataFrame | None, asked: int) -> dict[str, Any]:
    if rows is None:
        status = "skipped" if cell.skipped else "missing"
        reason = f"skipped: {cell.skipped}" if cell.skipped else "not computed yet"
        return _numbers([]) | {
            "images": 0, "degenerate": 0, "failed": 0, "status": status, "reason": reason,
        }  # fmt: skip
    counts = Counter(rows["status"].tolist())
    others = sorted((words, count) for words, count in counts.items() if words not in SCORED)
    lacking = asked - len(rows)
    notes = [f"{count} x {words}" for words, count in others]
    if lacking:
        notes.append(f"{lacking} not computed yet")
    known = sum(counts[word] for word in SCORED)
    if known:
        status = "partial" if notes else "ok"
        values = rows["value"].to_numpy()[rows["status"].isin(SCORED).to_numpy()]
    else:
        status = min((words.split(":")[0] for words, _ in others), default="missing")
        values = np.empty(0)
    return _numbers(values.tolist()) | {
        "images": known,
        "degenerate": counts["degenerate"],
        "failed": sum(count for words, count in others if not words.startswith("skipped")),
        "status": status,
        "reason": "; ".join(notes),
    }


def _numbers(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1)."""
    known = list(values)
    count = len(known)
    mean = math.fsum(known) / count if count else math.nan  # fsum: no order, no rounding
    std = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (count - 1))
        if count > 1
        else math.nan
    )
    return {"mean": mean, "std": std}


# --- warnings -------------------------------------------------------------------------------------


def flags_of(
    cells: Sequence[Cell], scores: Mapping[str, Floats], keys: Sequence[str]
) -> dict[str, list[str]]:
    """Warnings about the cells of one data set and model, as stable words.

    * ``loses_to_random``: the method is worse than the control ``random`` on the images that both
      have scores of: the 95 % interval of the mean paired difference lies on its side. This is said
      of a method, so it takes evidence. Robustness is left out: nothing is steadier than a map that
      does not look.
    * ``loses_to_inverted``: likewise than its own map upside down, the control ``inverted``.
    * ``won_by_NAME``, on all cells of the metric: a control that sees neither the network nor the
      object has a better mean than every method. This is what the column shows, as it shows it.
    * ``fails_gate``: the mean is not better than the ``gate`` of a metric of sanity.

    Means that agree to four digits are equal, as in ranks. Controls are not warned of, except at
    gates.

    Args:
        cells: of one data set and model.
        scores: of each cell, by image, (N,); NaN for an image without a score.
        keys: of the N images; they seed the intervals.
    """
    flags: dict[str, list[str]] = {cell.id: [] for cell in cells}
    by_metric: dict[Choice, list[Cell]] = {}
    for cell in cells:
        by_metric.setdefault(cell.metric, []).append(cell)
    methods = {choice: choice.make() for choice in dict.fromkeys(cell.method for cell in cells)}
    duels: list[tuple[Cell, str, Floats]] = []
    for metric, column in by_metric.items():
        entry = metric.make()
        known = [c for c in column if c.id in scores and not np.isnan(scores[c.id]).all()]
        for cell in known:
            mean = _numbers(scores[cell.id][~np.isnan(scores[cell.id])])["mean"]
            if not passes(entry, mean):
                flags[cell.id].append("fails_gate")
        if entry.better == "neither":
            continue
        own = [cell for cell in known if not _is_control(methods[cell.method])]
        for rival in known:
            if not own or not _is_control(methods[rival.method]):
                continue
            theirs = scores[rival.id]
            if _is_blind(methods[rival.method]) and all(
                _gain(scores[cell.id], theirs, entry.better) > 0 for cell in own
            ):
                for cell in column:
                    flags[cell.id].append(f"won_by_{rival.method.name}")
            rivals = [cell for cell in own if _must_beat(cell.method, methods[rival.method])]
            if not rivals or getattr(entry, "family", "") == "robustness":
                continue
            sign = 1 if entry.better == "higher" else -1
            duels += [
                (cell, f"loses_to_{rival.method.name}", sign * (theirs - scores[cell.id]))
                for cell in rivals
                if _gain(scores[cell.id], theirs, entry.better) > 0
            ]
    if duels:
        low, _ = bca_intervals(np.stack([gains for _, _, gains in duels], 1), keys)
        for (cell, word, _), least in zip(duels, low, strict=True):
            if least > 0:
                flags[cell.id].append(word)
    return flags


def passes(metric: Any, mean: float) -> bool:
    """Whether a mean is better than the metric's gate; also where the metric has none."""
    gate = getattr(metric, "gate", None)
    return gate is None or bool(mean < gate if metric.better == "lower" else mean > gate)


def _is_control(method: Any) -> bool:
    return bool(getattr(method, "control", False))


def _is_blind(method: Any) -> bool:
    """Whether it is a control that sees neither the network nor the object."""
    sees = needs_of(method) or getattr(method, "needs_masks", False)
    return _is_control(method) and not sees


def _must_beat(method: Choice, control: Any) -> bool:
    """Whether the control is noise, or this method's map upside down."""
    if control.name == "inverted":
        return (control.of.name, control.of.params) == (method.name, method.params)
    return bool(control.name == "random")


def _gain(ours: Floats, theirs: Floats, better: str) -> float:
    """By how much the mean of the second is better, over images that both have scores of.

    0 where the means agree to four digits, or no image is left.
    """
    both = ~(np.isnan(ours) | np.isnan(theirs))
    if not both.any():
        return 0.0
    first, second = ours[both].mean(), theirs[both].mean()
    if four_digits(first) == four_digits(second):
        return 0.0
    return float(second - first if better == "higher" else first - second)


# --- the model ------------------------------------------------------------------------------------


def calibration_error(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Expected calibration error, in [0, 1]; 0 is best; NaN of no images, or unknown confidence.

    sum over bins of n_b / N |share correct - mean confidence|, over :data:`CALIBRATION_BINS` bins
    of equal width, (k / 15, (k + 1) / 15], by the probability of the predicted class.

    Source: Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, whose number of bins it is.
    """
    if not len(confidence) or any(map(math.isnan, confidence)):
        return math.nan
    gaps: dict[int, list[float]] = {}
    for sure, right in zip(confidence, correct, strict=True):
        gaps.setdefault(math.ceil(sure * CALIBRATION_BINS), []).append(right - sure)
    return math.fsum(abs(math.fsum(gap)) for gap in gaps.values()) / len(confidence)


def _card(frame: pd.DataFrame, confidences: Mapping[str, float], target: str) -> ModelCard:
    """The card of a model whose rows these are."""
    known = frame[frame["predicted"] >= 0].drop_duplicates("image")
    if target == "predicted":
        sure = known["probability"]
    else:
        # a part of an earlier version does not say how sure the model was where it was wrong
        right = known["probability"].where(known["predicted"] == known["label"])
        sure = known["image"].map(confidences).astype(float).fillna(right)
    has_label = known["label"] >= 0
    correct = (known["label"] == known["predicted"])[has_label]
    return ModelCard(
        images=len(known),
        labelled=len(correct),
        accuracy=float(correct.mean()),
        confidence=_numbers(sure)["mean"],
        calibration_error=calibration_error(sure[has_label].tolist(), correct.tolist()),
    )


def _confidences(group: StoredGroup) -> dict[str, float]:
    """Probability of the predicted class by image, where parts say so beside the target's."""
    found: dict[str, float] = {}
    for part in group.parts():
        found.update(part.facts.get("confidence", {}))
    return found


# --- files ----------------------------------------------------------------------------------------


def to_csv(table: pd.DataFrame) -> str:
    """The table as committed: LF, six decimals, empty where there is no number."""
    return table.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def to_json(results: Results) -> str:
    """The table as a JSON list, null where there is no number; with the model's card in each row,
    as ``model_accuracy`` and so on.
    """
    rows = []
    for row in results.table.to_dict("records"):
        card = card_facts(results.cards[row["dataset"], row["model"]])
        facts = {f"model_{key}": value for key, value in card.items()}
        rows.append({key: _or_null(value) for key, value in row.items()} | facts)
    return json.dumps(rows, indent=1, allow_nan=False)


def card_facts(card: ModelCard) -> dict[str, Any]:
    """A card as JSON can hold it, with the number of bins."""
    facts = {key: _or_null(value) for key, value in asdict(card).items()}
    return facts | {"calibration_bins": CALIBRATION_BINS}


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
