"""Pictures in folders: one per class, all in one, or listed by a CSV file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ..errors import BadImage, UsageError
from ..registry import dataset
from ..types import Sample, Source
from .listing import SUFFIXES, Picture, existing_root, in_folders, in_index, read_classes
from .pictures import File, Transform, load_image, load_mask

THREADS = 4

_Pixels = Annotated[int, Field(ge=1)]


@dataset("folder")
class Folder:
    """Folder: JPEG, PNG, WebP and BMP pictures from disk.

    There are three layouts. With ``index``, a CSV file lists the pictures. Otherwise, if ``root``
    has subfolders, each is a class and is searched to any depth. Otherwise the pictures lie in
    ``root`` itself and have no label (-1), as for runs that explain the predicted class. Hidden
    files and folders are left out, links to folders refused.

    Args:
        root: the folder, relative to the data directory, or absolute. ``classes``, ``index`` and
            ``masks`` are relative to ``root``, so ``../classes.csv`` lies beside it.
        classes: CSV file that numbers the classes. Its first column other than ``index`` names the
            class folder; the label is the column ``index`` (0 to K - 1, each once) or else the
            row's place; a column ``name`` gives the displayed name. A folder with few of the
            classes keeps their labels among all. None numbers the class folders in sorted order.
        index: CSV file with a row per picture: ``image`` and, optionally, ``mask`` are paths
            relative to ``root``; an empty mask is an unknown one.
        label_column: column of ``index`` that holds the label: a whole number, a folder name from
            ``classes``, or nothing (-1). None if there are no labels.
        masks: for pictures without ``index``: folder whose ``<class>/<stem>.png`` is the mask of
            ``<class>/<stem>.jpg``.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size.
        crop: side of the square cut from the centre; None keeps all. Without one size for all,
            pictures that differ from the first readable one fail.

    Source: 256 and 224 are torchvision's ImageNet preprocessing.
    """

    version: ClassVar[int] = 1
    root: str
    classes: str | None = None
    index: str | None = None
    label_column: str | None = "label"
    masks: str | None = None
    resize: _Pixels | tuple[_Pixels, _Pixels] | None = 256
    crop: _Pixels | None = 224

    def __post_init__(self) -> None:
        if self.index is not None and self.masks is not None:
            raise ValueError("masks cannot be combined with index, whose column 'mask' names them")
        if self.crop is not None and self.resize is not None:
            short = self.resize if isinstance(self.resize, int) else min(self.resize)
            if self.crop > short:
                raise ValueError(
                    f"crop: {self.crop} does not fit into resize: {self.resize}; "
                    f"'crop: null' keeps the whole picture"
                )

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if a folder, a CSV file or one of its columns is missing, or a label is
                unknown. A single picture that is missing or damaged fails on loading.
        """
        root = existing_root(self.root, data)
        numbering = None if self.classes is None else read_classes(root / self.classes)
        if self.index is None:
            masks = None if self.masks is None else (root / self.masks).resolve()
            pictures, names = in_folders(root, masks, numbering)
        else:
            pictures = in_index(root, root / self.index, self.label_column, numbering)
            names = ()
        if not pictures:
            raise UsageError(f"{root / (self.index or '')} has no pictures ({', '.join(SUFFIXES)})")
        return FolderSource(
            root=root,
            pictures=tuple(sorted(pictures, key=lambda picture: picture.image.name)),
            classes=names if numbering is None else numbering.names,
            transform=Transform(self.resize, self.crop),
        )


@dataclass(frozen=True, eq=False)
class FolderSource:
    """An opened :class:`Folder`; ids are paths relative to its root, in sorted order."""

    root: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    transform: Transform
    revision: ClassVar[str] = "1"  # the content is in the keys
    _keys: dict[int, str] = field(default_factory=dict, repr=False)

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
        raise UsageError(f"none of the {len(self.pictures)} pictures in {self.root} can be read")

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
        mask = load_mask(picture.mask, original, self.transform) if self.has_masks else None
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


def _digest(file: File) -> bytes:
    return hashlib.sha256(file.read()).digest()
