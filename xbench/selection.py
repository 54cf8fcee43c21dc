"""Which images of a data set a run takes, also where that depends on what the network says."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import UsageError
from .suite import Selection
from .types import Source

if TYPE_CHECKING:
    import pandas as pd

Image = tuple[int, str]
"""Position in the data set, and key."""


@dataclass(frozen=True)
class Chosen:
    """What a rule has taken so far.

    Args:
        images: that satisfy it, in the order of selection.
        judged: candidates that the network has seen.
        failed: of these, how many could not be judged: unreadable, without a label, or an error.
        confidence: mean probability of the label over ``images``; NaN without any.
        waiting: candidates to judge next; none once the selection is complete.
    """

    images: tuple[Image, ...]
    judged: int
    failed: int
    confidence: float
    waiting: tuple[Image, ...]


def candidates(
    source: Source, selection: Selection, name: str, data: Path | None
) -> tuple[int, ...]:
    """Positions in the order of selection: that of a hash of the ids, so nested for growing counts
    and the same for every model; stratified, each class spread evenly over it.

    Raises:
        UsageError: if there are fewer than asked for, or ``only`` names what is not there.
    """
    ids = source.ids
    listed = range(len(ids)) if selection.only is None else _listed(selection, ids, name, data)
    if selection.images is not None and selection.images > len(listed):
        which = "" if selection.only is None else " in 'only'"
        raise UsageError(
            f"data set {name!r} has {len(listed)} images{which}, but {selection.images} were "
            f"asked for"
        )
    salt = selection.images_seed.to_bytes(16, "little")

    def drawn(at: int) -> bytes:
        return hashlib.blake2b(ids[at].encode(), digest_size=8, salt=salt).digest()

    order = sorted(listed, key=drawn)
    labels = getattr(source, "labels", ())
    if not selection.stratified or not labels:
        return tuple(order)
    sizes = Counter(labels[at] for at in order)
    before: Counter[int] = Counter()
    places = {}
    for at in order:  # the middles of as many equal parts of [0, 1] as the class has images
        places[at] = (2 * before[labels[at]] + 1) / (2 * sizes[labels[at]])
        before[labels[at]] += 1
    return tuple(sorted(order, key=places.__getitem__))  # stable: equal places stay drawn


def select(
    source: Source, selection: Selection, name: str, data: Path | None = None
) -> tuple[Image, ...]:
    """The first images in the order of selection, whatever the network says of them."""
    order = candidates(source, selection, name, data)
    return tuple((at, source.key(at)) for at in order[: selection.images])


def judged(
    source: Source,
    selection: Selection,
    order: Sequence[int],
    rows: pd.DataFrame,
    *,
    at_once: int,
    tried: Container[str] = (),
) -> Chosen:
    """The first candidates that satisfy the rule, as far as stored rows tell.

    Args:
        source, selection: the data set and its rule.
        order: the candidates.
        rows: of the store: ``image``, ``label``, ``predicted``, ``probability`` (of the label) and
            ``status``, one per candidate that was looked at.
        at_once: least number of candidates to judge next.
        tried: keys whose error counts as a verdict; others are waiting still.
    """
    known = _seen(rows)
    wanted = math.inf if selection.images is None else selection.images
    images: list[Image] = []
    confidences: list[float] = []
    seen = failed = 0
    for place, at in enumerate(order):
        if len(images) == wanted:
            break
        key = source.key(at)
        row = known.get(key)
        if row is None or _is_open(row, key, tried):
            lacking = max(wanted - len(images), at_once)
            rest = order[place:] if lacking == math.inf else order[place : place + int(lacking)]
            waiting = [(other, source.key(other)) for other in rest]
            new = (image for image in waiting if _is_open(known.get(image[1]), image[1], tried))
            return Chosen(tuple(images), seen, failed, _mean(confidences), tuple(new))
        seen += 1
        if row.status.startswith(("failed", "error")):
            failed += 1
        elif (row.label == row.predicted or not selection.correct) and (
            row.probability >= (selection.min_confidence or 0)
        ):
            images.append((at, key))
            confidences.append(row.probability)
    return Chosen(tuple(images), seen, failed, _mean(confidences), ())


class _Seen(NamedTuple):
    """What the store says of a candidate."""

    label: int
    predicted: int
    probability: float
    status: str


def _seen(rows: pd.DataFrame) -> dict[str, _Seen]:
    columns = (rows[name].tolist() for name in ("image", *_Seen._fields))
    return {image: _Seen(*said) for image, *said in zip(*columns, strict=True)}


def _is_open(row: _Seen | None, key: str, tried: Container[str]) -> bool:
    """Whether a candidate has no verdict yet."""
    return row is None or (row.status.startswith("error") and key not in tried)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _listed(
    selection: Selection, ids: Sequence[str], name: str, data: Path | None
) -> tuple[int, ...]:
    """Positions of the candidates that ``only`` lists, by id or by position."""
    only = selection.only
    where = "'only'" if isinstance(only, tuple) else str(only)
    items = only if isinstance(only, tuple) else _read_list(Path(str(only)), data)
    positions = {text: at for at, text in enumerate(ids)}
    found: dict[int, str | int] = {}
    for item in items:
        is_number = isinstance(item, int) or item.isdecimal()
        at = positions.get(str(item), int(item) if is_number else -1)
        if not 0 <= at < len(ids):
            raise UsageError(
                f"{where} lists {item!r}, which is neither an id of data set {name!r} (such as "
                f"{ids[0]!r}) nor a position from 0 to {len(ids) - 1}"
            )
        if at in found:
            raise UsageError(f"{where} lists image {ids[at]!r} of data set {name!r} twice")
        found[at] = item
    return tuple(found)


def _read_list(file: Path, data: Path | None) -> list[str | int]:
    homes = [home / file for home in (data, Path()) if home is not None]
    path = next((path for path in homes if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"the list of images {str(file)!r} is not there; it is looked for in the data "
            f"directory (--data DIR or XBENCH_DATA), then in the working directory"
        )
    try:
        if path.suffix == ".npy":
            numbers = np.load(path, allow_pickle=False)
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
                raise ValueError(f"it holds {numbers.dtype} of shape {numbers.shape}")
            return [int(number) for number in numbers]
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"the list of images {path} cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
