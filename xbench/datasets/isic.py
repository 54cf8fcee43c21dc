"""ISIC 2018 to 2020: dermoscopic pictures with diagnoses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UsageError
from ..registry import dataset
from ..types import Source
from .listing import Picture, existing_root, read_csv
from .pictures import File, Pixels, Resize, Transform, must_fit
from .sources import PictureSource

DIAGNOSES = ("AK", "BCC", "BKL", "DF", "SCC", "VASC", "melanoma", "nevus", "unknown")
"""In the order of the networks that won the challenge of 2020."""

_SAME = {
    "AKIEC": "AK",
    "MEL": "melanoma",
    "NV": "nevus",
    "UNK": "unknown",
    "seborrheic keratosis": "BKL",
    "lichenoid keratosis": "BKL",
    "solar lentigo": "BKL",
    "lentigo NOS": "BKL",
    "cafe-au-lait macule": "unknown",
    "atypical melanocytic proliferation": "unknown",
} | {name: name for name in DIAGNOSES}

_LAYOUTS = {
    2018: (
        "ISIC2018_Task3_Training_Input",
        "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv",
    ),
    2019: ("ISIC_2019_Training_Input", "ISIC_2019_Training_GroundTruth.csv"),
    2020: ("train", "ISIC_2020_Training_GroundTruth.csv"),
}

_ARCHIVES = {
    2018: "ISIC2018_Task3_Training_Input.zip and ISIC2018_Task3_Training_GroundTruth.zip",
    2019: "ISIC_2019_Training_Input.zip and ISIC_2019_Training_GroundTruth.csv",
    2020: "ISIC_2020_Training_JPEG.zip and ISIC_2020_Training_GroundTruth.csv",
}


@dataset("isic")
class Isic:
    """ISIC: the training pictures of the challenges of 2018, 2019 and 2020, by diagnosis.

    The archives are unpacked side by side in ``root``. The CSV file names a picture in its column
    ``image_name`` or ``image`` and its diagnosis in the column ``diagnosis``, or has a column for
    each diagnosis with a single 1 per row. All years have the same nine classes: AK, BCC, BKL, DF,
    SCC, VASC, melanoma, nevus, unknown, where actinic keratoses and intraepithelial carcinomas are
    AK; lichenoid and seborrheic keratoses and lentigines BKL; everything else of 2020 unknown.

    Args:
        year: of the challenge.
        root: the folder, relative to the data directory, or absolute.
        images: folder of ``<image>.jpg``, relative to ``root``; None is the year's own.
        table: the CSV file, relative to ``root``; None is the year's own.
        masks: folder of ``<image>_segmentation.png``, relative to ``root``, such as those of
            HAM10000 for 2018; None if there are none.
        classes: ``diagnosis``, or ``melanoma`` with two classes, of which 1 is melanoma.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size. Masks take the nearest pixel.
        crop: side of the square cut from the centre; None keeps all.

    Preset ``gag-2024``: squashed to 448 x 448, nothing cut off.

    Source: Rotemberg et al., A patient-centric dataset of images and metadata for identifying
    melanomas using clinical context, Scientific Data 2021; the order of classes is that of Ha et
    al., Identifying Melanoma Images using EfficientNet Ensemble, 2020.
    """

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = (
        "root",
        "images",
        "table",
        "masks",
    )  # content is in the keys
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gag-2024": {"resize": (448, 448), "crop": None},
    }
    year: Literal[2018, 2019, 2020] = 2020
    root: str = "isic"
    images: str | None = None
    table: str | None = None
    masks: str | None = None
    classes: Literal["diagnosis", "melanoma"] = "diagnosis"
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The listed pictures; none is opened.

        Raises:
            UsageError: if a folder or the CSV file is missing, or a row has no clear diagnosis.
        """
        folder, table = _LAYOUTS[self.year]
        root = existing_root(
            "isic",
            self.root,
            data,
            f"{_ARCHIVES[self.year]} are at challenge.isic-archive.com/data; unpack them side by "
            f"side in {self.root!r}",
        )
        images, file = root / (self.images or folder), root / (self.table or table)
        masks = None if self.masks is None else root / self.masks
        for place in (images, *([] if masks is None else [masks])):
            if not place.is_dir():
                raise UsageError(
                    f"data set 'isic' looks for the folder {place}, which is not there; 'images' "
                    f"and 'masks' name others"
                )
        pictures = []
        for line, cells in read_csv(file, ()):
            name = cells.get("image_name") or cells.get("image")
            if not name:
                raise UsageError(f"line {line} of {file} names no image in 'image_name' or 'image'")
            diagnosis = _diagnosis(cells, line, file)
            label = DIAGNOSES.index(diagnosis)
            pictures.append(
                Picture(
                    File(f"{name}.jpg", images.resolve()),
                    None if masks is None else File(f"{name}_segmentation.png", masks.resolve()),
                    int(diagnosis == "melanoma") if self.classes == "melanoma" else label,
                )
            )
        classes = ("other", "melanoma") if self.classes == "melanoma" else DIAGNOSES
        return PictureSource.of(file, pictures, classes, Transform(self.resize, self.crop))


def _diagnosis(cells: Mapping[str, str], line: int, file: Path) -> str:
    """One of :data:`DIAGNOSES`, from a column of words or from one column each."""
    if "diagnosis" in cells:
        found = [cells["diagnosis"]]
    else:
        found = [name for name, cell in cells.items() if name in _SAME and cell in ("1", "1.0")]
    if len(found) != 1:
        raise UsageError(
            f"line {line} of {file} has {len(found)} diagnoses, where one column of "
            f"{', '.join(DIAGNOSES)} (or AKIEC, MEL, NV, UNK) should be 1"
        )
    if found[0] not in _SAME:
        raise UsageError(
            f"line {line} of {file} has the diagnosis {found[0]!r}, which is none of "
            f"{', '.join(sorted(_SAME))}"
        )
    return _SAME[found[0]]
