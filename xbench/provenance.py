"""Where numbers come from: what a table must carry so that it can be compared with another."""

from __future__ import annotations

import hashlib
import math
import platform
from typing import Any

from .plan import Group, Plan
from .runner import versions
from .store import Store
from .suite import Choice


def provenance(plan: Plan, store: Store) -> dict[str, Any]:
    """Everything that numbers hang on and nothing that varies between equal runs.

    No seconds, host or folder: equal runs on one kind of machine have equal provenance.
    """
    return {
        "suite": {key: value for key, value in plan.suite.resolved().items() if key != "run"},
        "groups": [_group(group, store) for group in plan.groups],
        "methods": {choice.label: choice.identity() for choice in _chosen(plan, "method")},
        "metrics": {
            choice.label: {
                **choice.identity(),
                "better": choice.make().better,
                "tolerance": tolerance(choice.make()),
            }
            for choice in _chosen(plan, "metric")
        },
        "versions": versions(),
        "platform": {
            "device": plan.device,
            "machine": platform.machine(),
            "system": platform.system(),
        },
    }


def _chosen(plan: Plan, kind: str) -> list[Choice]:
    return list(dict.fromkeys(getattr(cell, kind) for cell in plan.cells))


def _group(group: Group, store: Store) -> dict[str, Any]:
    keys = "\n".join(key for _, key in group.images)
    return {
        "dataset": group.dataset.label,
        "model": group.model.label,
        "identity": dict(group.identity),
        "images": len(group.images),
        "selection": hashlib.sha256(keys.encode()).hexdigest()[:16],
        **_rule(group),
        "conditions": dict(store.group(*group.folder).pinned() or {}),
    }


def _rule(group: Group) -> dict[str, Any]:
    """What the network was asked of candidates, if it was, and how sure it is of the images."""
    if group.chosen is None:
        return {}
    mean = group.chosen.confidence if group.images else None
    return {"rule": group.dataset.selection.rule(), "mean_confidence": mean}


def tolerance(metric: Any) -> float:
    """A change of a mean below this is of no interest however sure it is.

    A class's own ``tolerance``, else a thousandth of the width of its range; 0 where that has no
    end.
    """
    low, high = getattr(metric, "range", (-math.inf, math.inf))
    width = high - low
    return float(getattr(metric, "tolerance", width / 1000 if math.isfinite(width) else 0.0))
