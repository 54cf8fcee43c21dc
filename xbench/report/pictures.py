"""Maps over pictures as small images within a page, the scale of each beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import gallery, plot
from ..plan import Group, Plan
from ..store import Store

SIDE = 128
"""Pixels of a panel: small pictures are enlarged by a whole number to at least this, large ones are
reduced to it."""
PANELS = 160
"""Of a page, about: at some 6 kB each they stay below a third of its limit."""
PICTURES = 4

Array = NDArray[Any]


@dataclass(frozen=True)
class Panel:
    """A small image.

    Args:
        title: method, or what it shows.
        link: the image as a data URL.
        side: width and height in pixels.
        alt: what it shows, in words.
        colours: class of its bar, empty for pictures.
        low, high: the values at the bar's ends.
        note: beneath it.
    """

    title: str
    link: str
    side: tuple[int, int]
    alt: str
    colours: str = ""
    low: str = ""
    high: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A picture and its maps.

    Args:
        title: what the network said of it.
        picture: as the network sees it.
        maps: in order.
        beside: how many of them stand together, as those of two models do.
    """

    title: str
    picture: Panel
    maps: tuple[Panel, ...]
    beside: int = 1


@dataclass(frozen=True)
class Kept:
    """What is kept of the first pictures: by data set, model, method (map) or name, and image."""

    maps: Mapping[tuple[str, str, str, str], Array]
    pictures: Mapping[tuple[str, str, str, str], Array]
    keys: Mapping[tuple[str, str], tuple[str, ...]]
    """Images that have a picture, in their order, by data set and model."""


def read(plan: Plan, store: Store, wanted: int) -> Kept:
    """The first pictures of each group, fewer where there are many methods."""
    panels = sum(len({cell.method for cell in group.cells}) + 1 for group in plan.groups)
    count = max(1, min(wanted, PANELS // max(panels, 1))) if wanted else 0
    pictures = {
        (one.dataset, one.model, one.name, one.image): one.array
        for one in gallery.pictures(plan, store, count)
    }
    maps = {
        (one.dataset, one.model, one.method, one.image): one.array
        for one in gallery.maps(plan, store, count)
    }
    keys = {}
    for group in plan.groups:
        here = (group.dataset.label, group.model.label)
        keys[here] = tuple(
            key for _, key in group.images[:count] if (*here, "picture", key) in pictures
        )
    return Kept(maps, pictures, keys)


def rows(
    kept: Kept, group: Group, methods: Sequence[str], said: Callable[[Group, str], str]
) -> list[Row]:
    """A row for each picture: itself, then the map of each method that is kept.

    Args:
        kept: see :func:`read`.
        group: data set and model.
        methods: labels, in order.
        said: what the network said of an image, in words.
    """
    here = (group.dataset.label, group.model.label)
    found = []
    for number, key in enumerate(kept.keys[here], 1):
        title = f"{key}: {said(group, key)}"
        panels = [
            _map(kept, here, key, kept.maps[*here, method, key], method, f"picture {number}")
            for method in methods
            if (*here, method, key) in kept.maps
        ]
        found.append(Row(title, _picture(kept, here, key, f"picture {number}"), tuple(panels)))
    return found


def pairs(
    kept: Kept, groups: Sequence[Group], methods: Sequence[str], said: Callable[[Group, str], str]
) -> list[Row]:
    """Two models or more on the same pictures: map beside map, each pair on one scale.

    Args:
        kept: see :func:`read`.
        groups: of one data set.
        methods: labels, in order.
        said: what a network said of an image, in words.
    """
    places = [(group.dataset.label, group.model.label) for group in groups]
    common = [key for key in kept.keys[places[0]] if all(key in kept.keys[p] for p in places)]
    found = []
    for number, key in enumerate(common, 1):
        panels: list[Panel] = []
        for method in methods:
            maps = [kept.maps.get((*place, method, key)) for place in places]
            known = [values for values in maps if values is not None]
            if len(known) < len(places):
                continue
            over = np.stack(known).astype(np.float64)
            panels += [
                _map(kept, place, key, values, method, f"picture {number}", over, place[1])
                for place, values in zip(places, known, strict=True)
            ]
        told = "; ".join(f"{group.model.label}: {said(group, key)}" for group in groups)
        picture = _picture(kept, places[0], key, f"picture {number}")
        found.append(Row(f"{key}: {told}", picture, tuple(panels), len(places)))
    return found


def _picture(kept: Kept, here: tuple[str, str], key: str, title: str) -> Panel:
    pixels = _enlarged(kept.pictures[*here, "picture", key])
    mask = kept.pictures.get((*here, "mask", key))
    return _panel(title, _outlined(pixels, mask), f"{title}, as the network sees it")


def _map(
    kept: Kept,
    here: tuple[str, str],
    key: str,
    values: Array,
    method: str,
    which: str,
    over: Array | None = None,
    note: str = "",
) -> Panel:
    picture = kept.pictures[*here, "picture", key].astype(np.float64) / 255
    pixels, (colours, low, high) = plot.blend(picture, values.astype(np.float64), over)
    mask = kept.pictures.get((*here, "mask", key))
    alt = f"{method} of {which}" + (f", {note}" if note else "")
    return _panel(
        method,
        _outlined(_enlarged(pixels), mask),
        f"{alt}: from {low:.2g} to {high:.2g}",
        colours={plot.SIGNED: "signed", plot.UNSIGNED: "unsigned"}[colours],
        low=f"{low:.2g}",
        high=f"{high:.2g}",
        note=note,
    )


def _enlarged(pixels: Array) -> Array:
    """Each pixel a square, for pictures smaller than a panel; others as they are."""
    times = -(-SIDE // max(pixels.shape[:2]))
    return pixels.repeat(times, 0).repeat(times, 1)


def _outlined(pixels: Array, mask: Array | None) -> Array:
    """With the object's outline in white on black, at the size of a panel."""
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (round(width * scale), round(height * scale))
    shown = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX)).copy()
    if mask is None or not np.isfinite(mask).all():
        return shown
    grown = Image.fromarray((mask > 0.5).astype(np.uint8) * 255)
    inside = np.asarray(grown.resize(size, Image.Resampling.NEAREST)) > 127
    edge = inside & ~_eroded(inside)
    shown[~inside & ~_eroded(~inside)] = 0
    shown[edge] = 255
    return shown


def _eroded(inside: Array) -> Array:
    """Pixels whose four neighbours are inside too; beyond the border is inside."""
    padded = np.pad(inside, 1, constant_values=True)
    eroded: Array = (
        padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & inside
    )
    return eroded


def _panel(title: str, pixels: Array, alt: str, **more: str) -> Panel:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="WEBP", quality=80, method=4)
    link = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
    return Panel(title, link, (pixels.shape[1], pixels.shape[0]), alt, **more)
