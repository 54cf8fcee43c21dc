"""CIFAR-10 and CIFAR-100 in their authors' own files, read without running what they contain."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch

from ..downloads import Download
from ..errors import BadImage, UsageError
from ..registry import dataset
from ..types import Sample, Source

T = TypeVar("T")

MAX_BYTES = 2**29
MD5 = {
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
"""Of the official files, as torchvision checks them."""


class Form(NamedTuple):
    """How one of the two data sets is written.

    Args:
        name: of the data set.
        folder: in the data directory.
        classes: how many there are.
        labels: key of the labels.
        meta, names: file and key of the class names.
    """

    name: str
    folder: str
    classes: int
    labels: str
    meta: str
    names: str


_HOST = "https://www.cs.toronto.edu/~kriz"
CIFAR10 = Form("cifar10", "cifar-10-batches-py", 10, "labels", "batches.meta", "label_names")
CIFAR100 = Form("cifar100", "cifar-100-python", 100, "fine_labels", "meta", "fine_label_names")


@dataset("cifar10")
class Cifar10:
    """CIFAR-10: 32 x 32 pictures of 10 classes, read from ``<data>/cifar-10-batches-py``.

    As :class:`Cifar100` in all other respects.

    Args:
        split: ``test`` has 10,000 images, ``train`` 50,000.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    version: ClassVar[int] = 1
    split: Literal["test", "train"] = "test"

    def open(self, data: Path | None) -> Source:
        """All images of the split, in the order of its files.

        Raises:
            UsageError: if a file is missing, asks for anything but numpy arrays, or does not hold
                what CIFAR-10 holds.
        """
        train = tuple(f"data_batch_{number}" for number in range(1, 6))
        return _opened(CIFAR10, train if self.split == "train" else ("test_batch",), data)

    def downloads(self) -> tuple[Download, ...]:
        url, md5 = f"{_HOST}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
        return (Download(url, md5, ".", CIFAR10.folder),)


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
        return _opened(CIFAR100, (self.split,), data)

    def downloads(self) -> tuple[Download, ...]:
        url, md5 = f"{_HOST}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
        return (Download(url, md5, ".", CIFAR100.folder),)


def _opened(form: Form, names: Sequence[str], data: Path | None) -> CifarSource:
    if data is None:
        raise UsageError(
            f"data set {form.name!r} looks for {form.folder!r} in the data directory, and none is "
            f"given; name it with --data DIR or XBENCH_DATA, or let 'xbench fetch' download it"
        )
    folder = data / form.folder
    contents = {folder / name: _read(folder / name, form) for name in names}
    meta = folder / form.meta
    classes = _class_names(_unpickle(_read(meta, form), meta, form), meta, form)
    tables = {file: _unpickle(content, file, form) for file, content in contents.items()}
    ids = [name for file, table in tables.items() for name in _ids(table, classes, file, form)]
    if len(set(ids)) < len(ids):
        raise UsageError(f"{' and '.join(map(str, contents))} hold a file name twice in one class")
    notices = []
    for file, content in contents.items():
        official = MD5[f"{form.folder}/{file.name}"]
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != official:
            notices.append(f"{file} is not the official file: its md5 is {md5}, not {official}")
    return CifarSource(
        ids=tuple(ids),
        classes=classes,
        revision=hashlib.sha256(b"".join(contents.values())).hexdigest()[:12],
        notice="; ".join(notices) or None,
        pixels=np.concatenate([table["data"] for table in tables.values()]),
        labels=tuple(label for table in tables.values() for label in table[form.labels]),
    )


@dataclass(frozen=True, eq=False)
class CifarSource:
    """An opened :class:`Cifar10` or :class:`Cifar100`.

    Args:
        notice: what the user should know of the files; None for the official ones.
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


def _read(file: Path, form: Form) -> bytes:
    if not file.is_file():
        raise UsageError(
            f"data set {form.name!r} looks for the file {file}, which is not there; --data DIR or "
            f"XBENCH_DATA names the directory that holds {form.folder!r}; 'xbench fetch' can "
            f"download it"
        )
    if file.stat().st_size > MAX_BYTES:
        raise UsageError(f"{file} has more than {MAX_BYTES} bytes, so it is not of {form.name!r}")
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


def _unpickle(content: bytes, file: Path, form: Form) -> dict[str, Any]:
    try:
        table = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(
            f"{file} cannot be read as a file of {form.name!r}: "
            f"{str(error) or type(error).__name__}"
        ) from None
    if not isinstance(table, dict):
        raise UsageError(
            f"{file} holds a {type(table).__name__}, where {form.name!r} has a dictionary"
        )
    return table


def _class_names(meta: Mapping[str, Any], file: Path, form: Form) -> tuple[str, ...]:
    names = meta.get(form.names)
    if not _is_list_of(names, str) or len(names) != form.classes or len(set(names)) != form.classes:
        raise UsageError(f"{file} does not hold {form.classes} {form.names!r}")
    return tuple(names)


def _ids(table: Mapping[str, Any], classes: Sequence[str], file: Path, form: Form) -> list[str]:
    """``class/filename`` of each image, once the table has the form it should have."""
    data, labels, files = (table.get(key) for key in ("data", form.labels, "filenames"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise UsageError(f"'data' of {file} is not an array of bytes with 3072 columns")
    if not _is_list_of(labels, int) or not all(0 <= label < len(classes) for label in labels):
        raise UsageError(f"{form.labels!r} of {file} are not numbers from 0 to {len(classes) - 1}")
    if not _is_list_of(files, str) or not len(data) == len(labels) == len(files) > 0:
        raise UsageError(f"{file} does not hold as many 'filenames' and {form.labels!r} as images")
    return [f"{classes[label]}/{name}" for label, name in zip(labels, files, strict=True)]


def _is_list_of(value: Any, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)
