"""Random crops, flips and rotations of a whole batch, on its device, without interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import stream_keys, uniform
from .recipe import Augmentation


def augmented(
    images: Tensor, augmentation: Augmentation, seed: int, epoch: int, indices: Sequence[int]
) -> Tensor:
    """Images (N, C, H, W) as this epoch sees them, same shape and type.

    What happens to an image depends on (seed, epoch, its index) alone, not on its batch. As in a
    sequence of crop with padding, flip, and rotation about the centre with the nearest pixel, what
    lies outside is black (0).
    """
    if augmentation == Augmentation():
        return images
    height, width = images.shape[-2:]
    keys = [f"{epoch}/{index}" for index in indices]
    draws = uniform(stream_keys(seed, keys, "augmentation", device=images.device), 4)
    moves = (draws[:, :2] * (2 * augmentation.crop + 1)).long() - augmentation.crop
    down, right = moves[:, 0, None, None], moves[:, 1, None, None]
    is_flipped = (draws[:, 2, None, None] < 0.5) & augmentation.flip
    angle = (2 * draws[:, 3, None, None] - 1) * math.radians(augmentation.rotation)

    # from each pixel of the result back to where it comes from
    y = torch.arange(height, device=images.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=images.device).view(1, 1, -1) - (width - 1) / 2
    row = (y * angle.cos() - x * angle.sin() + (height - 1) / 2).round().long()
    column = (y * angle.sin() + x * angle.cos() + (width - 1) / 2).round().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    column = torch.where(is_flipped, width - 1 - column, column)
    row, column = row + down, column + right
    inside &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
    places = (row * width + column) * inside
    taken = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return taken.view_as(images) * inside[:, None]
