"""CIFAR-100 in its authors' own files, read without running what a pickle may contain."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar

import numpy as np
import torch

from ..errors import BadImage, UsageError
from ..registry import dataset
from ..types import Sample, Source

T = TypeVar("T")

FOLDER = "cifar-100-python"
MAX_BYTES = 2**29
MD5 = {
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "train": "16019d7e3df5f24257cddd939b257f8d",
}
"""Of the official files, as torchvision checks them."""


@dataset("cifar100")
class Cifar100:
    """CIFAR-100: 32 x 32 pictures of 100 classes, read from ``<data>/cifar-100-python``.

    An image is known by class and file name, since one file name occurs in two classes. A file that
    is not the official one, such as one with its rows in another order, is accepted with a notice.

    Args:
        split: ``test`` has 10,000 images, ``train`` 50,000.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    version: ClassVar[int] = 1
    split: Literal["test", "train"] = "test"

    def open(self, data: Path | None) -> Source:
        """All images of the split, in the file's order.

        Raises:
            UsageError: if a file is missing, asks for anything but numpy arrays, or does not hold
                what CIFAR-100 holds.
        """
        if data is None:
            raise UsageError(
                f"data set 'cifar100' looks for {FOLDER!r} in the data directory, and none is "
                f"given; name it with --data DIR or XBENCH_DATA"
            )
        file = data / FOLDER / self.split
        content = _read(file)
        table = _unpickle(content, file)
        meta = data / FOLDER / "meta"
        classes = _class_names(_unpickle(_read(meta), meta), meta)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return CifarSource(
            ids=_image_ids(table, classes, file),
            classes=classes,
            revision=hashlib.sha256(content).hexdigest()[:12],
            notice=None
            if md5 == MD5[self.split]
            else f"{file} is not the official file: its md5 is {md5}, not {MD5[self.split]}",
            pixels=table["data"],
            labels=tuple(table["fine_labels"]),
        )


@dataclass(frozen=True, eq=False)
class CifarSource:
    """An opened :class:`Cifar100`.

    Args:
        notice: what the user should know of the file; None for the official one.
        pixels: (N, 3072) uint8, channels first.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    revision: str
    notice: str | None
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    labels: tuple[int, ...]
    size: ClassVar[tuple[int, int]] = (32, 32)
    has_masks: ClassVar[bool] = False

    def key(self, index: int) -> str:
        return self.ids[index]

    def load(self, indices: Sequence[int]) -> list[Sample | BadImage]:
        pixels = self.pixels[list(indices)].reshape(-1, 3, 32, 32)
        images = torch.from_numpy(pixels).to(torch.float32) / 255
        return [Sample(image, self.labels[i]) for image, i in zip(images, indices, strict=True)]


def _read(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(
            f"data set 'cifar100' looks for the file {file}, which is not there; --data DIR or "
            f"XBENCH_DATA names the directory that holds {FOLDER!r}"
        )
    if file.stat().st_size > MAX_BYTES:
        raise UsageError(f"{file} has more than {MAX_BYTES} bytes, so it is not of CIFAR-100")
    return file.read_bytes()


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the globals that numpy arrays need, by object, and imports nothing."""

    _reconstruct: ClassVar[Any] = np.empty(0).__reduce__()[0]
    known: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise UsageError(
                f"it asks for {module}.{name}, which is not part of an array"
            ) from None


def _unpickle(content: bytes, file: Path) -> dict[str, Any]:
    try:
        table = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(
            f"{file} cannot be read as a CIFAR-100 file: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(table, dict):
        raise UsageError(f"{file} holds a {type(table).__name__}, where CIFAR-100 has a dictionary")
    return table


def _class_names(meta: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    names = meta.get("fine_label_names")
    if not _is_list_of(names, str) or len(names) != 100 or len(set(names)) != 100:
        raise UsageError(f"{file} does not hold 100 'fine_label_names'")
    return tuple(names)


def _image_ids(table: Mapping[str, Any], classes: Sequence[str], file: Path) -> tuple[str, ...]:
    """``class/filename`` of each image, once the table has the form it should have."""
    data, labels, files = (table.get(key) for key in ("data", "fine_labels", "filenames"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise UsageError(f"'data' of {file} is not an array of bytes with 3072 columns")
    if not _is_list_of(labels, int) or not all(0 <= label < len(classes) for label in labels):
        raise UsageError(f"'fine_labels' of {file} are not numbers from 0 to {len(classes) - 1}")
    if not _is_list_of(files, str) or not len(data) == len(labels) == len(files) > 0:
        raise UsageError(f"{file} does not hold as many 'filenames' and 'fine_labels' as images")
    ids = tuple(f"{classes[label]}/{name}" for label, name in zip(labels, files, strict=True))
    if len(set(ids)) < len(ids):
        raise UsageError(f"{file} holds a file name twice in one class")
    return ids


def _is_list_of(value: Any, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)
