"""CUB-200-2011 in its authors' layout."""

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
from .pictures import File, Mask, Pixels, Resize, Transform, must_fit
from .sources import PictureSource


@dataset("cub200")
class Cub200:
    """CUB-200-2011: 200 species of birds, with segmentations.

    ``<root>/images.txt``, ``classes.txt``, ``image_class_labels.txt`` and ``train_test_split.txt``
    list pictures, classes, labels and splits by number, from 1; pictures lie in ``<root>/images``.
    Segmentations, a download of their own, lie in ``<root>/segmentations`` or beside ``root``; the
    object is where more than half of the annotators, whose share is the grey value, marked it.
    Without that folder there are no masks.

    Args:
        root: the folder, relative to the data directory, or absolute.
        split: ``test`` has 5,794 pictures, ``train`` 5,994.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. Masks take the nearest pixel.
        crop: side of the square cut from the centre; None keeps all. The published networks take
            448 out of (512, 512) or (600, 600).

    Source: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("root",)  # content is in the keys
    root: str = "CUB_200_2011"
    split: Literal["test", "train"] = "test"
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if the folder or a list is missing, or the lists contradict one another.
        """
        root = existing_root(
            "cub200",
            self.root,
            data,
            "'xbench fetch' can download it; or unpack CUB_200_2011.tgz of "
            "data.caltech.edu/records/65de6-vp158 and, for the masks, segmentations.tgz of "
            "data.caltech.edu/records/w9d68-gec53 side by side",
        )
        names = _by_number(root / "classes.txt")
        labels = _by_number(root / "image_class_labels.txt")
        is_training = _by_number(root / "train_test_split.txt")
        homes = (root / "segmentations", root.parent / "segmentations")
        masks = next((home for home in homes if home.is_dir()), None)
        wanted = "1" if self.split == "train" else "0"
        images = _by_number(root / "images.txt")
        if not images.keys() == labels.keys() == is_training.keys():
            raise UsageError(f"the lists in {root} do not have the same pictures; unpack it anew")
        at = {number: label for label, number in enumerate(names)}
        pictures = []
        for number, image in images.items():
            if labels[number] not in names:
                raise UsageError(
                    f"picture {number} in {root / 'image_class_labels.txt'} has the class "
                    f"{labels[number]!r}, which {root / 'classes.txt'} does not list"
                )
            if is_training[number] == wanted:
                label = at[labels[number]]
                name = str(Path(image).with_suffix(".png"))
                mask = None if masks is None else File(name, masks.resolve())
                pictures.append(
                    Picture(File(image, (root / "images").resolve()), mask, label, by_majority)
                )
        shown = tuple(name.partition(".")[2].replace("_", " ") for name in names.values())
        return PictureSource.of(root, pictures, shown, Transform(self.resize, self.crop))

    def downloads(self) -> tuple[Download, ...]:
        """Pictures and segmentations, as their archives unpack; none for a folder renamed."""
        folder = Path(self.root)
        if folder.name != "CUB_200_2011":
            return ()
        into, host = str(folder.parent), "https://data.caltech.edu/records"
        return (
            Download(
                f"{host}/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
                into,
                folder.name,
            ),
            Download(
                f"{host}/w9d68-gec53/files/segmentations.tgz",
                "4d47ba1228eae64f2fa547c47bc65255",
                into,
                "segmentations",
            ),
        )


def _by_number(file: Path) -> dict[str, str]:
    return {number: value for _, (number, value) in read_table(file, columns=2)}


def by_majority(mask: Image.Image) -> Mask:
    """The object where more than half of the annotators marked it."""
    if mask.mode not in ("L", "LA", "P"):
        raise ValueError(f"a segmentation is grey, not {mask.mode}")
    return (np.asarray(mask.convert("L")) > 127).astype(np.uint8)
