"""Oxford-IIIT Pet in its authors' layout."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from ..downloads import Download
from ..errors import UsageError
from ..registry import dataset
from ..types import Source
from .listing import Picture, existing_root, read_table
from .pictures import BACKGROUND, OBJECT, UNKNOWN, File, Mask, Pixels, Resize, Transform, must_fit
from .sources import PictureSource


@dataset("oxford_pet")
class OxfordPet:
    """Oxford-IIIT Pet: 37 breeds of cats and dogs, with trimaps.

    ``<root>/annotations/<split>.txt`` lists ``name class species breed``, classes from 1; pictures
    are ``<root>/images/<name>.jpg``, trimaps ``<root>/annotations/trimaps/<name>.png``: 1 is the
    animal, 2 the background and 3 the border between them, which counts as unknown.

    Args:
        root: the folder, relative to the data directory, or absolute.
        split: ``test`` has 3,669 pictures, ``trainval`` 3,680.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. Masks take the nearest pixel.
        crop: side of the square cut from the centre; None keeps all.

    Source: Parkhi et al., Cats and Dogs, CVPR 2012.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("root",)  # content is in the keys
    root: str = "oxford-iiit-pet"
    split: Literal["test", "trainval"] = "test"
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if the folder or the list is missing, or a line is not as above.
        """
        root = existing_root(
            "oxford_pet",
            self.root,
            data,
            "'xbench fetch' can download it",
        )
        list_file = root / "annotations" / f"{self.split}.txt"
        names: dict[int, str] = {}
        pictures = []
        for line, (name, number, _, _) in read_table(list_file, columns=4):
            breed = name.rpartition("_")[0]
            if not number.isdecimal() or not 1 <= int(number) <= 37:
                raise UsageError(
                    f"line {line} of {list_file} has the class {number!r}, which is not 1 to 37"
                )
            label = int(number) - 1
            if names.setdefault(label, breed) != breed:
                raise UsageError(
                    f"line {line} of {list_file} gives class {number} to {breed!r}, an earlier one "
                    f"to {names[label]!r}"
                )
            trimap = File(f"{name}.png", (root / "annotations" / "trimaps").resolve())
            pictures.append(
                Picture(
                    File(f"{name}.jpg", (root / "images").resolve()), trimap, label, trimap_object
                )
            )
        classes = tuple(names.get(label, f"class {label + 1}") for label in range(37))
        return PictureSource.of(list_file, pictures, classes, Transform(self.resize, self.crop))

    def downloads(self) -> tuple[Download, ...]:
        host = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
        images, annotations = "5c4f3ee8e5d25df40f4fd59a7f44e54c", "95a8c909bbe2e81eed6a22bccdf3f68f"
        return (
            Download(f"{host}/images.tar.gz", images, self.root, "images"),
            Download(f"{host}/annotations.tar.gz", annotations, self.root, "annotations"),
        )


def trimap_object(trimap: Image.Image) -> Mask:
    """1 is the object, 2 the background, 3 the border, where nothing is known."""
    if trimap.mode not in ("L", "P"):
        raise ValueError(f"a trimap has one channel of 8 bits, not {trimap.mode}")
    values = np.asarray(trimap)
    if not np.isin(values, (1, 2, 3)).all():
        raise ValueError("a trimap holds 1, 2 and 3 alone")
    return np.select([values == 1, values == 2], [OBJECT, BACKGROUND], UNKNOWN).astype(np.uint8)
