"""The data that everything else passes around, frozen.

Axes have one letter each, everywhere: ``N`` images, ``C`` channels, ``H W`` pixels, ``h w`` layer
positions, ``K`` classes, ``S`` steps or samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import BadImage


class Passes(NamedTuple):
    """Forward and backward passes per image."""

    forward: int = 0
    backward: int = 0

    def plus(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> Passes:
        return Passes(self.forward * count, self.backward * count)

    def together(self, other: Passes) -> Passes:
        """Cost of two needs that share one ride: the larger of each."""
        return Passes(max(self.forward, other.forward), max(self.backward, other.backward))


@dataclass(frozen=True)
class Batch:
    """What a data set yields; it knows no model.

    Args:
        images: (N, 3, H, W), values in [0, 1].
        labels: (N,) int64.
        keys: one stable id per image; noise and resume hang on them.
        masks: (N, H, W), 1 on the object, 0 elsewhere, NaN where nothing is known; None without
            masks.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    masks: Tensor | None = None

    def part(self, chosen: slice) -> Batch:
        """Some of the images, with all that belongs to them."""
        masks = None if self.masks is None else self.masks[chosen]
        return Batch(self.images[chosen], self.labels[chosen], self.keys[chosen], masks)


@dataclass(frozen=True)
class Model:
    """A classifier, ready to be explained.

    Args:
        name: what tables call it.
        net: normalised images (N, 3, H, W) to logits (N, K); evaluation mode, frozen, no in-place
            ReLU.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        layers: role to module path, such as ``{"last_conv": "layer4"}``.
        size: (H, W) of the images, on which some costs depend; None where it is not known.
    """

    name: str
    net: nn.Module
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layers: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    def channel_constant(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to the network's input space, same shape."""
        return (images - self.channel_constant(self.mean, images)) / self.channel_constant(
            self.std, images
        )

    def pixels(self, inputs: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) back on the [0, 1] scale, same shape."""
        return inputs * self.channel_constant(self.std, inputs) + self.channel_constant(
            self.mean, inputs
        )

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, K) logits of normalised images (N, 3, H, W).

        On a CPU the channels are laid out last, where convolutions, and above all the gradients of
        depthwise ones, are faster. Whoever calls ``net`` itself gets the same logits up to
        rounding.
        """
        if inputs.device.type == "cpu":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(inputs)
        return logits

    def layer(self, name: str) -> str:
        """Module path of a role; a module path stands for itself."""
        return self.layers.get(name, name)


@dataclass(frozen=True)
class Network:
    """What a model entry says of itself before a weight is read: enough to plan a run.

    Args:
        build: makes the architecture with fresh weights; also called under
            ``torch.device("meta")``.
        weights: safetensors (or ``weights_only`` .pt) file for ``build()``; None keeps the fresh
            ones.
        mean, std: as in :class:`Model`.
        layers: roles that are known; ``last_conv`` is found by a dry run where it is missing.
        size: (H, W) of the images that the weights were made for; None where nobody says.
        sha256: of the weight file, or how it begins, where its source says so.
        fetch: what brings the weight file to its place, in words or as a command.
    """

    build: Callable[[], nn.Module]
    weights: Path | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layers: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    sha256: str = ""
    fetch: str = ""


class Line(NamedTuple):
    """One curve of a metric: (P,) shares of the pixels, and what was read there, (N, P)."""

    shares: Tensor
    values: Tensor


class Sample(NamedTuple):
    """An image (3, H, W) in [0, 1], its label, and a mask (H, W) as in :class:`Batch`."""

    image: Tensor
    label: int
    mask: Tensor | None = None


class Source(Protocol):
    """An opened data set. Opening reads an index, never all pictures.

    Where it knows its labels without loading, an attribute ``labels`` gives them by position, and
    a selection takes the classes by their shares.
    """

    @property
    def ids(self) -> Sequence[str]:
        """One short name per image, in a fixed order, without duplicates."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names by label; empty where there are none."""

    @property
    def revision(self) -> str:
        """Identity of what :meth:`key` does not cover, such as a data file's hash."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""

    @property
    def has_masks(self) -> bool: ...

    def key(self, index: int) -> str:
        """Stable key of one image: its id, with a content hash where nothing pins the content."""

    def load(self, indices: Sequence[int]) -> list[Sample | BadImage]:
        """The samples at these positions; a picture that cannot be read is its error."""
