"""Places365 in torchvision's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..downloads import Download
from ..errors import UsageError
from ..registry import dataset
from ..types import Source
from .listing import Picture, existing_root, read_table
from .pictures import File, Pixels, Resize, Transform, must_fit
from .sources import PictureSource

_LISTS = {"val": "places365_val.txt", "train-standard": "places365_train_standard.txt"}
_FOLDERS = {
    ("val", True): "val_256",
    ("val", False): "val_large",
    ("train-standard", True): "data_256_standard",
    ("train-standard", False): "data_large_standard",
}

_HOST = "http://data.csail.mit.edu/places/places365"
_ARCHIVES = {
    ("val", True): ("val_256.tar", "e27b17d8d44f4af9a78502beb927f808"),
    ("val", False): ("val_large.tar", "9b71c4993ad89d2d8bcbdc4aef38042f"),
    ("train-standard", True): (
        "train_256_places365standard.tar",
        "53ca1c756c3d1e7809517cc47c5561c5",
    ),
    ("train-standard", False): (
        "train_large_places365standard.tar",
        "67e186b496a84c929568076ed01a8aa1",
    ),
}
"""With their MD5, as torchvision has them."""


@dataset("places365")
class Places365:
    """Places365-Standard: 365 kinds of scenes; ``val`` has 36,500 pictures.

    ``<root>/categories_places365.txt`` (``/a/airfield 0``) numbers the classes,
    ``<root>/places365_val.txt`` (``Places365_val_00000001.jpg 165``) gives the labels, and the
    pictures lie in ``<root>/val_256``, as torchvision's Places365 unpacks them.

    Args:
        root: the folder, relative to the data directory, or absolute.
        split: ``val`` or ``train-standard``.
        small: the pictures of 256 x 256 pixels rather than the large ones.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. 256 x 256 is the authors', whatever the shape was.
        crop: side of the square cut from the centre; None keeps all.

    Preset ``gag-2024``: the centre of the small pictures as they are, without a resize.

    Source: Zhou et al., Places: A 10 Million Image Database for Scene Recognition, TPAMI 2018.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("root",)  # content is in the keys
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gag-2024": {"resize": None}}
    root: str = "places365"
    split: Literal["val", "train-standard"] = "val"
    small: bool = True
    resize: Resize = (256, 256)
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if the folder or a list is missing, or a list is not as above.
        """
        root = existing_root(
            "places365",
            self.root,
            data,
            "'xbench fetch' can download it",
        )
        numbers = read_table(root / "categories_places365.txt", columns=2)
        names = _numbered(numbers, root / "categories_places365.txt")
        folder = (root / _FOLDERS[self.split, self.small]).resolve()
        if not folder.is_dir():
            raise UsageError(
                f"data set 'places365' looks for its pictures in {folder}, which is not there"
            )
        list_file = root / _LISTS[self.split]
        pictures = []
        for line, (image, label) in read_table(list_file, columns=2):
            if not label.isdecimal() or int(label) >= len(names):
                raise UsageError(
                    f"line {line} of {list_file} has the label {label!r}, which is not 0 to "
                    f"{len(names) - 1}"
                )
            pictures.append(Picture(File(image.lstrip("/"), folder), None, int(label)))
        return PictureSource.of(folder, pictures, names, Transform(self.resize, self.crop))

    def downloads(self) -> tuple[Download, ...]:
        archive, md5 = _ARCHIVES[self.split, self.small]
        lists = f"{_HOST}/filelist_places365-standard.tar"
        return (
            Download(lists, "35a0585fee1fa656440f3ab298f8479c", self.root, _LISTS[self.split]),
            Download(f"{_HOST}/{archive}", md5, self.root, _FOLDERS[self.split, self.small]),
        )


def _numbered(rows: list[tuple[int, list[str]]], file: Path) -> tuple[str, ...]:
    """Class names by number, without the leading letter: ``/a/airfield`` is ``airfield``."""
    numbers = [number for _, (_, number) in rows]
    if numbers != [str(at) for at in range(len(rows))]:
        raise UsageError(f"{file} does not number its classes from 0 in order")
    return tuple(name[3:] for _, (name, _) in rows)
