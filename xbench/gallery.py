"""What was kept beside the scores, by the names that a table has: for pages and notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .plan import Artefact, Group, Plan
from .store import Store

CURVE_COLUMNS = ("dataset", "model", "method", "metric", "curve", "image", "share", "value")


class Shown(NamedTuple):
    """An array that was kept.

    Args:
        dataset, model: labels.
        method: label; empty for pictures.
        metric: label; empty for maps and pictures.
        name: which of several: a curve of a metric, "picture" or "mask".
        image: key.
        array: a curve (2, P) of shares and values, a map (H, W) as the method gave it, a picture
            (H, W, 3) uint8, or a mask (H, W) with NaN where it is unknown.
    """

    dataset: str
    model: str
    method: str
    metric: str
    name: str
    image: str
    array: np.ndarray[Any, Any]


def curves(plan: Plan, store: Store, images: int | None = None) -> pd.DataFrame:
    """All points of all stored curves: columns :data:`CURVE_COLUMNS`, sorted by name and share.

    Args:
        plan: what a suite asks for.
        store: where it was stored.
        images: only of the first ones of each data set, in the order of its selection.
    """
    shown = list(_kept(plan, store, "curves", images))
    if not shown:
        return pd.DataFrame(columns=list(CURVE_COLUMNS))
    points = [one.array.shape[1] for one in shown]
    names = [(o.dataset, o.model, o.method, o.metric, o.name, o.image) for o in shown]
    columns = [
        np.repeat(np.array(column, dtype=object), points) for column in zip(*names, strict=True)
    ]
    columns += [np.concatenate([one.array[row] for one in shown]) for row in (0, 1)]
    frame = pd.DataFrame(dict(zip(CURVE_COLUMNS, columns, strict=True)))
    return frame.sort_values(list(CURVE_COLUMNS[:-1]), ignore_index=True)


def maps(plan: Plan, store: Store, images: int | None = None) -> Iterator[Shown]:
    """The stored maps, a few in memory at once; arguments as for :func:`curves`."""
    yield from _kept(plan, store, "maps", images)


def pictures(plan: Plan, store: Store, images: int | None = None) -> Iterator[Shown]:
    """The stored pictures and masks; arguments as for :func:`curves`."""
    yield from _kept(plan, store, "pictures", images)


def _kept(plan: Plan, store: Store, kind: str, images: int | None) -> Iterator[Shown]:
    for group in plan.groups:
        wanted = {
            artefact.id: artefact
            for artefact in group.artefacts
            if artefact.metric.kind == kind and artefact.metric.folder is None
        }
        keys = [key for _, key in group.images[:images]]
        found = store.group(*group.folder).kept.arrays(wanted, frozenset(keys))
        for name, image, part, array in found:
            yield _shown(group, wanted[name], part, image, array)


def _shown(
    group: Group, artefact: Artefact, name: str, image: str, array: np.ndarray[Any, Any]
) -> Shown:
    method, metric = artefact.method, artefact.metric.metric
    return Shown(
        group.dataset.label,
        group.model.label,
        method.label if method else "",
        metric.label if metric else "",
        name,
        image,
        array,
    )
