"""ImageNet-S: ImageNet's validation pictures with semantic segmentations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from ..errors import UsageError
from ..registry import dataset
from ..types import Source
from .imagenet import classes
from .listing import existing_root, in_folders
from .pictures import BACKGROUND, OBJECT, UNKNOWN, Mask, Pixels, Resize, Transform, must_fit
from .sources import PictureSource

IGNORED = 1000


@dataset("imagenet_s")
class ImageNetS:
    """ImageNet-S: validation pictures of up to 919 ImageNet classes with object masks.

    Pictures are ``<root>/validation/<wnid>/<name>.JPEG``, masks
    ``<root>/validation-segmentation/<wnid>/<name>.png``, as the authors' preparation script makes
    them. The class of a mask's pixel is red + 256 green: 0 is everything else, 1000 is to be
    ignored, and i is the i-th of the variant's classes in sorted order. The mask of a picture is
    its own class; ignored pixels are unknown. A label is the class's place among all 1,000 of
    ImageNet, never its place among the folders.

    Args:
        variant: how many classes: 919, 300 or 50.
        root: the folder, relative to the data directory, or absolute; None is
            ``ImageNetS<variant>``.
        categories: text file with the variant's WordNet ids, one per line, relative to ``root``,
            such as the authors' ``ImageNetS_categories_im919.txt``. None takes the folders, all of
            which must then be there, since the ids in the masks count them.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. Masks take the nearest pixel.
        crop: side of the square cut from the centre; None keeps all.

    Preset ``gag-2024``: squashed to 256 x 256, nothing cut off.

    Source: Gao et al., Large-scale Unsupervised Semantic Segmentation, TPAMI 2023.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("root",)  # content is in the keys
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gag-2024": {"resize": (256, 256), "crop": None},
    }
    variant: Literal[919, 300, 50] = 919
    root: str | None = None
    categories: str | None = None
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if a folder is missing or is none of ImageNet's classes, or if the classes
                are not as many as the variant has.
        """
        root = existing_root(
            "imagenet_s",
            self.root or f"ImageNetS{self.variant}",
            data,
            "Its masks are at github.com/LUSSeg/ImageNet-S; its pictures are ImageNet's own, to be "
            "requested from image-net.org. The script data_preparation.sh there makes the folder "
            "with 'validation' and 'validation-segmentation' in it",
        )
        for name in ("validation", "validation-segmentation"):
            if not (root / name).is_dir():
                raise UsageError(
                    f"data set 'imagenet_s' looks for the folder {root / name}, which is not there"
                )
        validation = (root / "validation").resolve()
        masks = (root / "validation-segmentation").resolve()
        pictures, folders = in_folders(validation, masks, classes())
        listed = folders if self.categories is None else self._listed(root)
        ids = {classes().labels[wnid]: at for at, wnid in enumerate(sorted(listed), start=1)}
        for folder in folders:
            if folder not in listed:
                raise UsageError(f"{root / 'validation' / folder} is not in {self.categories}")
        if len(ids) != self.variant:
            where = f"{root / 'validation'} has folders of"
            raise UsageError(
                f"{where if self.categories is None else f'{root / self.categories} lists'} "
                f"{len(ids)} classes, not the {self.variant} of this variant, and the ids in the "
                f"masks count them all; 'categories' names the authors' list where folders are "
                f"missing, 'variant' is 919, 300 or 50"
            )
        return PictureSource.of(
            validation,
            [p._replace(read_mask=partial(of_class, number=ids[p.label])) for p in pictures],
            classes().names,
            Transform(self.resize, self.crop),
        )

    def _listed(self, root: Path) -> tuple[str, ...]:
        file = root / str(self.categories)
        try:
            listed = tuple(file.read_text(encoding="utf-8").split())
        except (OSError, ValueError) as error:
            raise UsageError(f"the list of categories {file} cannot be read: {error}") from None
        for wnid in listed:
            if wnid not in classes().labels:
                raise UsageError(f"{file} lists {wnid!r}, which is not a class of ImageNet")
        return listed


def of_class(mask: Image.Image, number: int) -> Mask:
    """Where a segmentation, red + 256 green, holds one class, and where it is to be ignored."""
    if mask.mode not in ("RGB", "RGBA"):
        raise ValueError(f"a segmentation has three channels of 8 bits, not {mask.mode}")
    channels = np.asarray(mask).astype(np.uint16)
    ids = channels[..., 0] + 256 * channels[..., 1]
    known = np.where(ids == number, OBJECT, BACKGROUND)
    return np.where(ids == IGNORED, UNKNOWN, known).astype(np.uint8)
