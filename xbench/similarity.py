"""How alike two maps of one image are, whatever the scale of either.

All take maps (N, H, W) twice and give (N,) float64 of at most 1, which equal maps have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .maps import is_constant, unit_range

SimilarityName = Literal["spearman", "ssim", "ssim_second_moment"]
"""Correlation of ranks; structural similarity of maps scaled to [0, 1]; the same of maps divided by
the root of their mean square."""

WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window, in pixels."""


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of ranks in [-1, 1]; equal values share the mean of their ranks.

    A constant map ranks nothing: 0 beside any other, and 1 if both are constant.
    """
    one, other = (_mean_ranks(each.flatten(1)) for each in (maps, others))
    one, other = (ranks - ranks.mean(1, keepdim=True) for ranks in (one, other))
    spread = (one.square().sum(1) * other.square().sum(1)).sqrt()
    found = ((one * other).sum(1) / spread.where(spread > 0, 1)).clamp(-1, 1)
    return found.masked_fill(is_constant(maps) & is_constant(others), 1)


def _mean_ranks(values: Tensor) -> Tensor:
    ascending = values.sort(dim=1).values
    below = torch.searchsorted(ascending, values.contiguous())
    up_to = torch.searchsorted(ascending, values.contiguous(), right=True)
    return (below + up_to).double() / 2


def ssim(maps: Tensor, others: Tensor) -> Tensor:
    """SSIM of maps scaled to [0, 1] each, in [-1, 1]; a constant map becomes zeros.

    Maps that are nearly everywhere low look alike to it.
    """
    return structural_similarity(unit_range(maps.double()), unit_range(others.double()), 1.0)


def ssim_second_moment(maps: Tensor, others: Tensor) -> Tensor:
    """SSIM of maps whose mean square is 1 each, in [-1, 1]; zeros stay zeros.

    One very high pixel does not flatten the rest, as it does where maps are scaled to their range.
    The range of values that SSIM asks for is that of both maps together.

    Source: Binder et al. 2022, arXiv:2211.12486.
    """
    one, other = _of_mean_square_1(maps), _of_mean_square_1(others)
    both = torch.cat((one, other), dim=1).flatten(1)
    span = both.amax(1) - both.amin(1)
    return structural_similarity(one, other, span.where(span > 0, 1)[:, None, None])


def _of_mean_square_1(maps: Tensor) -> Tensor:
    pixels = maps.double()
    largest = pixels.abs().flatten(1).amax(1)[:, None, None]
    pixels = pixels / largest.where(largest > 0, 1)  # squares stay within float64
    root = pixels.square().mean((1, 2), keepdim=True).sqrt()
    return pixels / root.where(root > 0, 1)


SIMILARITIES: Mapping[SimilarityName, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman,
    "ssim": ssim,
    "ssim_second_moment": ssim_second_moment,
}


def similarities(maps: Tensor, others: Tensor) -> Tensor:
    """(N, 3) all of them, in the order of :data:`SIMILARITIES`."""
    return torch.stack([measure(maps, others) for measure in SIMILARITIES.values()], dim=1)


def structural_similarity(maps: Tensor, others: Tensor, span: Tensor | float) -> Tensor:
    """SSIM, (N,): its mean over all windows that lie within the image.

    Gaussian windows of 11 x 11, sigma 1.5, constants 0.01 and 0.03, as published; a window is cut
    to the image where that is smaller.

    Args:
        maps, others: (N, H, W) float64.
        span: range of values that are possible, (N, 1, 1) or a number.

    Source: Wang et al. 2004, Image quality assessment, IEEE TIP 13(4).
    """
    stack = torch.stack((maps, others, maps * maps, others * others, maps * others), dim=1)
    seen = stack.flatten(0, 1)[:, None]
    for axis in (2, 3):
        side = min(WINDOW, seen.shape[axis])
        place = torch.arange(side, dtype=seen.dtype, device=seen.device) - (side - 1) / 2
        weight = torch.exp(-place.square() / (2 * SIGMA**2))
        kernel = (weight / weight.sum()).view(1, 1, *((side, 1) if axis == 2 else (1, side)))
        seen = functional.conv2d(seen, kernel)
    mean, other, square, other_square, product = seen.view(-1, 5, *seen.shape[-2:]).unbind(1)
    light, contrast = (0.01 * span) ** 2, (0.03 * span) ** 2
    alike = (2 * mean * other + light) * (2 * (product - mean * other) + contrast)
    sizes = mean.square() + other.square()
    apart = (sizes + light) * (square + other_square - sizes + contrast)
    return (alike / apart).mean((1, 2)).clamp(-1, 1)
