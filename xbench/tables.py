"""From stored rows to tables: one row per image, one row per cell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from .plan import Cell, Group, Plan
from .probe import needs_of
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


@dataclass(frozen=True)
class Results:
    """What a plan's cells came to.

    Args:
        plan: what was asked for.
        per_image: one row per cell and image that is stored.
        table: one row per cell, :data:`TABLE_COLUMNS`, sorted.
        notices: damaged parts, mixed conditions.
        cards: by the labels of data set and model.
    """

    plan: Plan
    per_image: pd.DataFrame
    table: pd.DataFrame
    notices: tuple[str, ...]
    cards: Mapping[tuple[str, str], ModelCard]

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
    frames, rows, notices, cards = [], [], [], {}
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
        flags = flags_of(group.cells, {str(cell): _scores(of) for cell, of in grouped.items()})
        rows += [
            _row(group, cell, grouped.get(cell.id)) | {"flags": ";".join(sorted(flags[cell.id]))}
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
    per_image = pd.concat(frames, ignore_index=True)
    keys = ["dataset", "model", "method", "metric", "image"]
    table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
    return Results(
        plan,
        per_image.sort_values(keys, ignore_index=True),
        table.sort_values(["dataset", "model", "method", "metric", "cell"], ignore_index=True),
        tuple(notices),
        cards,
    )


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
        "failed": int((~scored & ~rows["status"].str.startswith("skipped")).sum()),
        "status": status,
        "reason": reason,
    }


def _numbers(values: pd.Series[float] | Gains) -> dict[str, float]:
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


# --- warnings -------------------------------------------------------------------------------------


def flags_of(cells: Sequence[Cell], scores: Mapping[str, pd.Series[float]]) -> dict[str, list[str]]:
    """Warnings about the cells of one data set and model, as stable words.

    * ``loses_to_random``: the method is worse than the control ``random`` on the images that both
      have scores of: the 95 % interval of the mean paired difference lies on its side. This is said
      of a method, so it takes evidence.
    * ``loses_to_inverted``: likewise than its own map upside down, the control ``inverted``.
    * ``won_by_NAME``, on all cells of the metric: a control that sees neither the network nor the
      object has a better mean than every method. This is what the column shows, as it shows it.
    * ``fails_gate``: the mean is not better than the ``gate`` of a metric of sanity.

    Means that agree to four digits are equal, as in ranks. Controls are not warned of, except at
    gates.

    Args:
        cells: of one data set and model.
        scores: by cell, then by image; an image without a score is absent.
    """
    flags: dict[str, list[str]] = {cell.id: [] for cell in cells}
    by_metric: dict[Choice, list[Cell]] = {}
    for cell in cells:
        by_metric.setdefault(cell.metric, []).append(cell)
    methods = {choice: choice.make() for choice in dict.fromkeys(cell.method for cell in cells)}
    for metric, column in by_metric.items():
        entry = metric.make()
        known = [cell for cell in column if cell.id in scores and len(scores[cell.id])]
        wide = pd.DataFrame({cell.id: scores[cell.id] for cell in known})
        values = {cell.id: wide[cell.id].to_numpy() for cell in known}
        for cell in known:
            if not passes(entry, _numbers(scores[cell.id])["mean"]):
                flags[cell.id].append("fails_gate")
        if entry.better == "neither":
            continue
        own = [cell for cell in known if not _is_control(methods[cell.method])]
        for rival in known:
            gains = {c.id: _gains(values[rival.id], values[c.id], entry.better) for c in own}
            for cell in own:
                if (
                    _must_beat(cell.method, methods[rival.method])
                    and getattr(entry, "family", "") != "robustness"
                    and _surely(gains[cell.id])
                ):
                    flags[cell.id].append(f"loses_to_{rival.method.name}")
            if own and _is_blind(methods[rival.method]) and all(map(_on_average, gains.values())):
                for cell in column:
                    flags[cell.id].append(f"won_by_{rival.method.name}")
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


Gains = npt.NDArray[np.float64]


def _gains(ours: Gains, theirs: Gains, better: str) -> Gains:
    """By how much the first is better, image by image, on those that both have scores of.

    Of no image where the means agree to four digits.
    """
    both = ~(np.isnan(ours) | np.isnan(theirs))
    ours, theirs = ours[both], theirs[both]
    if not len(ours) or f"{ours.mean():.4g}" == f"{theirs.mean():.4g}":
        return ours[:0]
    return ours - theirs if better == "higher" else theirs - ours


def _on_average(gains: Gains) -> bool:
    return _numbers(gains)["mean"] > 0


def _surely(gains: Gains) -> bool:
    return _numbers(gains)["ci_low"] > 0


def _scores(rows: pd.DataFrame) -> pd.Series[float]:
    """Of one cell, by image."""
    scored = rows[rows["status"].isin(SCORED)]
    return scored.set_index("image")["value"].rename(None)


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
