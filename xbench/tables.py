"""From stored rows to tables: one row per image, one row per cell."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .plan import Cell, Group, Plan
from .store import Store
from .suite import canonical

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
