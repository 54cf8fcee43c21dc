"""Pictures with labels and masks as a data set; they are opened when they are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ..errors import BadImage, UsageError
from ..types import Sample
from .listing import SUFFIXES, Picture
from .pictures import Encoded, Transform, load_image, load_mask

THREADS = 4


@dataclass(frozen=True, eq=False)
class PictureSource:
    """An opened data set of pictures; ids are paths relative to its root, in sorted order."""

    place: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    transform: Transform
    revision: ClassVar[str] = "1"  # the content is in the keys
    _keys: dict[int, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        place: Path,
        pictures: Iterable[Picture],
        classes: tuple[str, ...],
        transform: Transform,
    ) -> PictureSource:
        """Of pictures in any order.

        Raises:
            UsageError: if ``place``, where they were looked for, has none.
        """
        ordered = tuple(sorted(pictures, key=lambda picture: picture.image.name))
        if not ordered:
            raise UsageError(f"{place} has no pictures ({', '.join(SUFFIXES)})")
        return cls(place, ordered, classes, transform)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(picture.label for picture in self.pictures)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(picture.image.name for picture in self.pictures)

    @cached_property
    def has_masks(self) -> bool:
        return any(picture.mask is not None for picture in self.pictures)

    @cached_property
    def size(self) -> tuple[int, int]:
        if self.transform.size is not None:
            return self.transform.size
        for picture in self.pictures:
            try:
                image, _ = load_image(picture.image, self.transform)
            except BadImage:
                continue
            return image.shape[1], image.shape[2]
        raise UsageError(f"none of the {len(self.pictures)} pictures in {self.place} can be read")

    def key(self, index: int) -> str:
        """Id and a hash of image, mask and label, or ``unreadable`` where no image can be read."""
        if index not in self._keys:
            picture = self.pictures[index]
            self._keys[index] = f"{picture.image.name}@{_content(picture)}"
        return self._keys[index]

    def load(self, indices: Sequence[int]) -> list[Sample | BadImage]:
        size = self.size
        with ThreadPoolExecutor(THREADS) as pool:  # PIL lets other threads run while it decodes
            return list(pool.map(lambda index: self._load(self.pictures[index], size), indices))

    def _load(self, picture: Picture, size: tuple[int, int]) -> Sample | BadImage:
        try:
            image, original = load_image(picture.image, self.transform)
        except BadImage as error:
            return error
        if image.shape[1:] != size:
            return BadImage(
                f"picture {picture.image.name!r} has (height, width) {tuple(image.shape[1:])}, but "
                f"the first readable one {size}; resize and crop can give all one size"
            )
        mask = None
        if self.has_masks:
            mask = load_mask(picture.mask, original, self.transform, picture.read_mask)
        return Sample(image, picture.label, mask)


def _content(picture: Picture) -> str:
    try:
        content = _digest(picture.image)
    except BadImage:
        return "unreadable"
    if picture.mask is not None:
        with suppress(BadImage):
            content += _digest(picture.mask)
    return hashlib.sha256(content + str(picture.label).encode()).hexdigest()[:12]


def _digest(file: Encoded) -> bytes:
    return hashlib.sha256(file.read()).digest()
