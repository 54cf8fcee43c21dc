"""ImageNet: its classes, by WordNet id, and its pictures in the layouts that are in use."""

from __future__ import annotations

import tarfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import UsageError
from ..registry import dataset
from ..types import Source
from .listing import Numbering, Picture, existing_root, in_folders, walk
from .pictures import File, Pixels, Resize, Transform, must_fit
from .sources import PictureSource

WNIDS = Path(__file__).with_name("imagenet_wnids.txt")
"""The 1,000 WordNet ids of ILSVRC 2012 in sorted order, one per line; the line is the label."""

DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@cache
def classes() -> Numbering:
    """Label by WordNet id among all 1,000, and torchvision's class names."""
    from torchvision.models import ResNet50_Weights

    wnids = WNIDS.read_text(encoding="ascii").split()
    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return Numbering({wnid: at for at, wnid in enumerate(wnids)}, tuple(names), WNIDS)


@dataset("imagenet")
class ImageNet:
    """ImageNet (ILSVRC 2012): 1,000 classes, labelled by WordNet id.

    Three layouts are understood: ``<root>/<split>/<wnid>/*.JPEG``; the class folders in ``root``
    itself; and the validation pictures in one folder ``<root>/val/ILSVRC2012_val_*.JPEG``, as their
    archive unpacks, with the development kit ``ILSVRC2012_devkit_t12`` (folder or ``.tar.gz``)
    beside it. In the first two the kit is not needed, and any number of classes may be missing: a
    label is a class's place among all 1,000.

    Args:
        root: the folder, relative to the data directory, or absolute.
        split: ``val`` has 50,000 pictures, ``train`` 1.28 million.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. 256 is torchvision's.
        crop: side of the square cut from the centre; None keeps all. 224 is torchvision's.

    Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("root",)  # content is in the keys
    root: str = "imagenet"
    split: Literal["val", "train"] = "val"
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if the folder is missing, or a class folder is not one of the 1,000.
        """
        root = existing_root(
            "imagenet",
            self.root,
            data,
            "ImageNet's terms forbid passing it on: request it from image-net.org, and put the "
            f"pictures into {self.root}/{self.split}/<wnid>/"
            + (
                f" or, as ILSVRC2012_img_val.tar unpacks, all into {self.root}/val/ with "
                f"{DEVKIT}.tar.gz in {self.root}"
                if self.split == "val"
                else ""
            ),
        )
        inside = (root / self.split).resolve() if (root / self.split).is_dir() else root
        _refuse_archives(root, inside)
        top, images = walk(inside)
        if images and not top:
            pictures = _flat(root, inside, images)
        else:
            pictures, _ = in_folders(inside, None, classes())
        transform = Transform(self.resize, self.crop)
        return PictureSource.of(inside, pictures, classes().names, transform)


def _refuse_archives(root: Path, inside: Path) -> None:
    archives = sorted(path.name for path in root.glob("ILSVRC2012_img_*.tar"))
    if inside == root and archives:
        raise UsageError(
            f"{root} holds the archive {archives[0]}, which has to be unpacked first; "
            f"torchvision.datasets.ImageNet({str(root)!r}, 'val') does that"
        )


def _flat(root: Path, inside: Path, images: list[str]) -> list[Picture]:
    """Validation pictures by the number in their names, which is their line in the kit."""
    labels = _validation_labels(root)
    pictures = []
    for image in images:
        number = image.removesuffix(".JPEG").removeprefix("ILSVRC2012_val_")
        if not number.isdecimal() or not 1 <= int(number) <= len(labels):
            raise UsageError(
                f"picture {inside / image} is not named ILSVRC2012_val_<number>.JPEG with a number "
                f"from 1 to {len(labels)}; pictures of other names belong in class folders, or "
                f"into the data set 'folder' with an index"
            )
        pictures.append(Picture(File(image, inside), None, labels[int(number) - 1]))
    return pictures


def _validation_labels(root: Path) -> list[int]:
    """Labels in the order of the validation pictures' numbers.

    The kit numbers the classes in an order of its own, and says which WordNet id has which number.
    """
    from scipy.io import loadmat

    truth, meta = _from_kit(root, _TRUTH), _from_kit(root, _META)
    numbering = classes().labels
    try:
        synsets = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        by_number = {int(s["ILSVRC2012_ID"]): numbering.get(str(s["WNID"])) for s in synsets}
        labels = [by_number[int(line)] for line in truth.decode().split()]
    except Exception as error:  # a damaged file raises nearly anything
        raise UsageError(
            f"the development kit {DEVKIT} in {root} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from None
    found = [label for label in labels if label is not None]
    if len(found) < len(labels):
        raise UsageError(f"{_TRUTH} of {DEVKIT} in {root} numbers classes that are not leaves")
    return found


def _from_kit(root: Path, name: str) -> bytes:
    """A file of the development kit, unpacked or not."""
    file, archive = root / DEVKIT / "data" / name, root / f"{DEVKIT}.tar.gz"
    try:
        if file.is_file():
            return file.read_bytes()
        if archive.is_file():
            with tarfile.open(archive) as packed:
                member = packed.extractfile(f"{DEVKIT}/data/{name}")
                return member.read() if member is not None else b""
    except (OSError, KeyError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"{name} of {archive} cannot be read: {error}") from None
    raise UsageError(
        f"the pictures in {root} lie in one folder, so their labels stand in the development kit: "
        f"put the folder {DEVKIT} or {archive.name} into {root}, or the pictures into folders "
        f"named by WordNet id"
    )
