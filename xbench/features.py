"""Where a layer's output holds its channels and its grid of positions, told from shapes alone.

Convolutional networks return feature maps (N, C, h, w), Swin's blocks (N, h, w, C), and vision
transformers tokens (N, T, C): first prefix tokens (class, distillation, registers), then the grid
in raster order. Whoever reads a layer asks here, so that no user ever writes a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .errors import Unsupported

MOST_PREFIX = 10
"""Class token, distillation token and eight registers; published networks have no more."""


@dataclass(frozen=True)
class FeatureLayout:
    """How to read a layer's output as feature maps (N, C, h, w).

    Args:
        kind: "maps" for (N, C, h, w), "maps_last" for (N, h, w, C), "tokens" for (N, T, C).
        size: (h, w).
        prefix: tokens before the grid; 0 where there are maps.
    """

    kind: Literal["maps", "maps_last", "tokens"]
    size: tuple[int, int]
    prefix: int = 0

    @property
    def channel_axis(self) -> int:
        return 1 if self.kind == "maps" else -1

    @property
    def positions(self) -> int:
        return self.size[0] * self.size[1]

    def grid(self, values: Tensor) -> Tensor:
        """An output of this layout, or its gradient, as (N, C, h, w), without prefix tokens."""
        if self.kind == "maps":
            return values
        if self.kind == "maps_last":
            return values.permute(0, 3, 1, 2)
        tokens = values[:, self.prefix :]
        return tokens.mT.reshape(tokens.shape[0], -1, *self.size)

    @staticmethod
    def of(shape: Sequence[int], images: Sequence[int]) -> FeatureLayout:
        """The layout of an output of this shape, from images (N, 3, H, W).

        Four axes are (N, C, h, w), unless only (N, h, w, C) shrinks both sides of the image by one
        factor, up to the rounding of strides: 96 channels at 96 x 96 positions are read as the
        former. Three axes are tokens, as in :meth:`of_tokens`.

        Raises:
            Unsupported: if it holds no grid of positions; the message goes on from the layer's
                name.
        """
        if len(shape) not in (3, 4):
            raise Unsupported(
                f"returns {len(shape) - 1} axes per image; feature maps have 3 (channels, height, "
                "width), tokens 2"
            )
        if shape[0] != images[0]:
            raise Unsupported(
                f"returns {shape[0]} rows for {images[0]} images; attention within windows, for "
                "one, works on parts of images, so name the block around it"
            )
        if len(shape) == 3:
            return FeatureLayout.of_tokens(shape[1], images)
        first, second, third = shape[1:]
        if not _is_reduced((second, third), images) and _is_reduced((first, second), images):
            return FeatureLayout("maps_last", (first, second))
        return FeatureLayout("maps", (second, third))

    @staticmethod
    def of_tokens(tokens: int, images: Sequence[int]) -> FeatureLayout:
        """The layout of T tokens per image: the finest grid of square patches that T can hold.

        The patches tile the image exactly, there is more than one, and the prefix is short: at most
        :data:`MOST_PREFIX`, and less than twice the grid's longer side.

        Raises:
            Unsupported: if there is no such grid; the message goes on from the layer's name.
        """
        height, width = images[-2:]
        common = math.gcd(height, width)
        grids = ((height // p, width // p) for p in range(1, common + 1) if common % p == 0)
        size = next((grid for grid in grids if math.prod(grid) <= tokens), (1, 1))
        prefix = tokens - math.prod(size)
        if size == (1, 1) or prefix > MOST_PREFIX or prefix >= 2 * max(size):
            raise Unsupported(
                f"has {tokens} tokens per image, which no grid of square patches over "
                f"{height} x {width} pixels and a few prefix tokens explain"
            )
        return FeatureLayout("tokens", size, prefix)


def _is_reduced(size: tuple[int, int], images: Sequence[int]) -> bool:
    """Whether h x w positions may come from H x W pixels by one stride, each side rounded."""
    sides = list(zip(size, images[-2:], strict=True))
    least = max(pixels / (places + 1) for places, pixels in sides)
    most = min((pixels / (places - 1) for places, pixels in sides if places > 1), default=math.inf)
    return least < most
