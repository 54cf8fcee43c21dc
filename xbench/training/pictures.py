"""The images of a recipe: held on the device where they fit, read batch by batch where not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BadImage, UsageError
from ..registry import make
from ..types import Source

CHUNK = 1000
"""Images read at once while a data set is taken into memory."""


class Pictures(Protocol):
    """Images by position."""

    @property
    def count(self) -> int: ...

    @property
    def classes(self) -> int:
        """Number of them."""

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), uint8 or float32 in [0, 1], and labels (N,), on the device."""


@dataclass(frozen=True)
class Held:
    """All images in the device's memory."""

    images: Tensor
    labels: Tensor
    classes: int

    @property
    def count(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices, device=self.labels.device)
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Read:
    """Images that are read when they are asked for."""

    sources: Sequence[Source]
    classes: int
    device: torch.device

    @property
    def count(self) -> int:
        return sum(len(source.ids) for source in self.sources)

    def take(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for index in indices:
            source, place = self._at(index)
            image, label = _loaded(source, [place])
            images.append(image)
            labels.append(label)
        return torch.cat(images).to(self.device), torch.cat(labels).to(self.device)

    def _at(self, index: int) -> tuple[Source, int]:
        for source in self.sources:
            if index < len(source.ids):
                return source, index
            index -= len(source.ids)
        raise IndexError(index)


def open_pictures(
    datasets: Sequence[dict[str, object]], data: Path | None, device: torch.device
) -> Pictures:
    """The images of one or several data sets, one after the other.

    Raises:
        UsageError: if they cannot be opened, differ in size or classes, or have no labels.
    """
    sources: list[Source] = []
    for params in datasets:
        params = dict(params)
        sources.append(make("datasets", str(params.pop("name")), params).open(data))
    first = sources[0]
    for source in sources[1:]:
        if source.size != first.size or source.classes != first.classes:
            raise UsageError(
                f"data sets of one recipe must agree in size and classes, but one has "
                f"{source.size} and {len(source.classes)} classes, the first {first.size} and "
                f"{len(first.classes)}"
            )
    classes = len(first.classes)
    if not classes:
        raise UsageError(f"data set {datasets[0]['name']!r} names no classes, so it has no labels")
    count = sum(len(source.ids) for source in sources)
    height, width = first.size
    if 4 * count * 3 * height * width > _free_bytes(device) // 2:
        return Read(tuple(sources), classes, device)
    parts, labels = [], []
    for source in sources:
        for start in range(0, len(source.ids), CHUNK):
            images, some = _loaded(source, range(start, min(start + CHUNK, len(source.ids))))
            parts.append(_bytes(images))
            labels.append(some)
    if any(part.dtype != torch.uint8 for part in parts):
        parts = [part / 255 if part.dtype == torch.uint8 else part for part in parts]
    return Held(torch.cat(parts).to(device), torch.cat(labels).to(device), classes)


def _loaded(source: Source, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    samples = source.load(indices)
    for index, sample in zip(indices, samples, strict=True):
        if isinstance(sample, BadImage):
            raise BadImage(f"image {source.ids[index]!r} cannot be learnt from: {sample}")
        if sample.label < 0:
            raise UsageError(f"image {source.ids[index]!r} has no label to learn")
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    labels = torch.tensor([sample.label for sample in good])
    return torch.stack([sample.image for sample in good]), labels


def _bytes(images: Tensor) -> Tensor:
    """A quarter of the memory, where nothing is lost."""
    whole = (images * 255).round()
    return whole.to(torch.uint8) if torch.equal(whole / 255, images) else images


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
