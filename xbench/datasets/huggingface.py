"""Image classification data sets of the Hugging Face hub, where its library is installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import BadImage, UsageError
from ..registry import provide_under
from ..types import Source
from .listing import UNLABELLED, Picture
from .pictures import Pixels, Resize, Transform, must_fit
from .sources import PictureSource


@dataclass(frozen=True)
class HuggingFace:
    """Hugging Face: a data set by its path on the hub.

    The library ``datasets`` downloads it into its own cache; no code from the hub is run. Pictures
    are decoded by xbench itself, and an image is known by its row and its content.

    Args:
        path: on the hub, such as ``frgfm/imagenette``, or a local folder that the library reads.
        config: of the data set, if it has several.
        split: of the data set.
        hub_revision: commit or tag on the hub; None takes the newest.
        image_column: holds the pictures.
        label_column: holds whole numbers; None if there are no labels.
        resize: short side in pixels, bilinear and antialiased, or exactly (height, width); None
            keeps the size.
        crop: side of the square cut from the centre; None keeps all.
    """

    version: ClassVar[int] = 1
    path: str
    config: str | None = None
    split: str = "test"
    hub_revision: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    resize: Resize = 256
    crop: Pixels | None = 224

    def __post_init__(self) -> None:
        must_fit(self.resize, self.crop)

    def open(self, data: Path | None) -> Source:
        """The rows of the split; the library keeps them where it keeps all, not in ``data``.

        Raises:
            UsageError: if the library is not installed, cannot find the data set, or its columns
                are not pictures and whole numbers.
        """
        try:
            library: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise UsageError(
                f"data set 'huggingface/{self.path}' needs the library 'datasets' "
                f"(pip install datasets): {error}"
            ) from None
        try:
            table = library.load_dataset(
                self.path, self.config, split=self.split, revision=self.hub_revision
            )
        except Exception as error:  # the library raises its own, and those of the network
            raise UsageError(
                f"data set 'huggingface/{self.path}' cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from None
        columns = [self.image_column, *([self.label_column] if self.label_column else [])]
        for column in columns:
            if column not in table.features:
                raise UsageError(
                    f"data set 'huggingface/{self.path}' has no column {column!r}; it has "
                    f"{', '.join(table.features)}"
                )
        encoded = table.cast_column(self.image_column, library.Image(decode=False))
        labels, names = self._labels(table)
        pictures = [
            Picture(Row(f"{at:09d}", encoded, at, self.image_column), None, label)
            for at, label in enumerate(labels)
        ]
        return PictureSource.of(Path(self.path), pictures, names, Transform(self.resize, self.crop))

    def _labels(self, table: Any) -> tuple[list[int], tuple[str, ...]]:
        if self.label_column is None:
            return [UNLABELLED] * len(table), ()
        labels = list(table[self.label_column])
        wrong = next((at for at, label in enumerate(labels) if type(label) is not int), None)
        if wrong is not None:
            raise UsageError(
                f"row {wrong} of data set 'huggingface/{self.path}' has the label "
                f"{labels[wrong]!r} in {self.label_column!r}, which is not a whole number"
            )
        return labels, tuple(getattr(table.features[self.label_column], "names", None) or ())


class Row(NamedTuple):
    """The picture in a row of a table, as the library keeps it: encoded, or as a file's path."""

    name: str
    table: Any
    at: int
    column: str

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            BadImage: if the row has none.
        """
        cell = self.table[self.at][self.column] or {}
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        try:
            return Path(cell["path"]).read_bytes()
        except (KeyError, TypeError, OSError) as error:
            raise BadImage(f"row {self.name!r} has no picture: {error}") from None


provide_under("datasets", "huggingface/", HuggingFace, "path")
