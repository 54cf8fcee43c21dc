"""Pictures in folders: one per class, all in one, or listed by a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..registry import dataset
from ..types import Source
from .listing import existing_root, in_folders, in_index, read_classes
from .pictures import Pixels, Resize, Transform, must_fit
from .sources import PictureSource


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
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        if self.index is not None and self.masks is not None:
            raise ValueError("masks cannot be combined with index, whose column 'mask' names them")
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if a folder, a CSV file or one of its columns is missing, or a label is
                unknown. A single picture that is missing or damaged fails on loading.
        """
        root = existing_root("folder", self.root, data)
        numbering = None if self.classes is None else read_classes(root / self.classes)
        if self.index is None:
            masks = None if self.masks is None else (root / self.masks).resolve()
            pictures, names = in_folders(root, masks, numbering)
        else:
            pictures = in_index(root, root / self.index, self.label_column, numbering)
            names = ()
        return PictureSource.of(
            root / (self.index or ""),
            pictures,
            names if numbering is None else numbering.names,
            Transform(self.resize, self.crop),
        )
