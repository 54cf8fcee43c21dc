"""What is done to any saliency map: the one place for channels, sign, upsampling, range and rank.

Methods name these parts as parameters, hence in their identity; the defaults are one for all:

* an attribution of every colour channel becomes a map by ``channels="absolute_sum"``;
* a class activation map keeps its positive part, ``sign="positive"``, as published;
* small maps grow by ``upsampling="bilinear"`` on pixel centres;
* nothing is scaled, ``scaling="none"``: methods return raw maps, and each metric says how it reads
  them (:data:`Sign`).

Every reduction keeps the image axis, so that a map depends on its own image only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Sign = Literal["magnitude", "positive", "signed"]
"""How a metric reads a signed map: |map|, its positive part, or as it is."""


Channels = Literal["absolute_sum", "sum", "max"]
"""How colour channels become one map: sum of absolutes (Guided AbsoluteGrad; the default), signed
sum (the raw signed map), or largest absolute (Simonyan et al. 2014)."""

CamSign = Literal["positive", "signed"]
"""What a class activation map keeps: its positive part (as published; the default), or all of it.
"""

Upsampling = Literal["bilinear", "corners", "nearest"]
"""How a small map grows: bilinear on pixel centres (the default), bilinear with aligned corners, or
nearest neighbour."""

Scaling = Literal["none", "pgc"]
"""Scaling inside a method: none (the default), or to [0, 1] at the layer's resolution and again
after upsampling, each time with 1e-7 added to the largest value, as pytorch-grad-cam does."""

PGC_EPSILON = 1e-7
"""What pytorch-grad-cam adds to each range that it divides by."""


def channel_sum(attribution: Tensor) -> Tensor:
    """Sum of absolutes over the colour channels: (N, C, H, W) to (N, H, W)."""
    return attribution.abs().sum(1)


def reduced(attribution: Tensor, channels: Channels) -> Tensor:
    """Colour channels as one map: (N, C, H, W) to (N, H, W)."""
    if channels == "absolute_sum":
        return channel_sum(attribution)
    return attribution.sum(1) if channels == "sum" else attribution.abs().amax(1)


def cam_map(
    small: Tensor,
    like: Tensor,
    sign: CamSign = "positive",
    upsampling: Upsampling = "bilinear",
    scaling: Scaling = "none",
) -> Tensor:
    """A class activation map at a layer's resolution (N, h, w) at the H x W of ``like``."""
    kept = small.relu() if sign == "positive" else small
    if scaling == "none":
        return upsample(kept, like, upsampling)
    return unit_range(upsample(unit_range(kept, PGC_EPSILON), like, upsampling), PGC_EPSILON)


@dataclass(frozen=True)
class CamParts:
    """The parameters that class activation maps share.

    Args:
        layer: role or module path.
        sign: "positive" keeps the positive part, as published; "signed" keeps all.
        upsampling: how the layer's h x w grow to H x W.
        scaling: "none" returns raw maps; "pgc" scales twice, as pytorch-grad-cam does.
    """

    layer: str = "last_conv"
    sign: CamSign = "positive"
    upsampling: Upsampling = "bilinear"
    scaling: Scaling = "none"

    def grown(self, small: Tensor, like: Tensor) -> Tensor:
        """(N, h, w) to the (N, H, W) of ``like``."""
        return cam_map(small, like, self.sign, self.upsampling, self.scaling)


def weighted_sum(weight: Tensor, activation: Tensor) -> Tensor:
    """Feature maps (N, C, h, w) added up with one weight (N, C) each: (N, h, w)."""
    return levelled(torch.einsum("nc,nchw->nhw", weight, activation), activation)


def levelled(total: Tensor, features: Tensor) -> Tensor:
    """A sum (N, h, w) of feature maps (N, C, h, w), exactly constant where each of them is.

    Positions may be added up in different orders, and min-max would blow that up to a map of noise.
    """
    positions = features.flatten(2)
    constant = (positions.amax(2) == positions.amin(2)).all(1)
    return total.where(~constant[:, None, None], total[:, :1, :1])


def upsample(maps: Tensor, like: Tensor, upsampling: Upsampling = "bilinear") -> Tensor:
    """(N, h, w) to the H x W of ``like``; a constant map stays exactly constant."""
    size, small = like.shape[-2:], maps[:, None]
    if upsampling == "nearest":
        return functional.interpolate(small, size, mode="nearest")[:, 0]
    corners = upsampling == "corners"
    large = functional.interpolate(small, size, mode="bilinear", align_corners=corners)[:, 0]
    # the weights add up to 1 but for rounding, which min-max would blow up to a map of noise
    return large.where(~is_constant(maps)[:, None, None], maps[:, :1, :1])


def with_sign(maps: Tensor, sign: Sign) -> Tensor:
    """The input rule of a metric, applied to (N, H, W)."""
    if sign == "magnitude":
        return maps.abs()
    return maps.clamp_min(0) if sign == "positive" else maps


def is_constant(maps: Tensor) -> Tensor:
    """(N,) bool: whether all pixels of a map are equal."""
    flat = maps.flatten(1)
    return flat.amax(1) == flat.amin(1)


def unit_range(maps: Tensor, epsilon: float = 0.0) -> Tensor:
    """Per image (map - min) / (max - min + epsilon), (N, H, W) in [0, 1]; a constant map: zeros.

    A map that holds NaN becomes NaN everywhere.
    """
    flat = maps.flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    span = high - low
    return (maps - low) / (span.where(span != 0, 1) + epsilon)


def quantile(values: Tensor, share: float) -> Tensor:
    """Quantile along the last axis, which it drops; linear between order statistics.

    ``torch.quantile`` gives the same but refuses more than 2**24 elements.
    """
    place = share * (values.shape[-1] - 1)
    below = int(place)
    low = values.kthvalue(below + 1).values
    if place == below:
        return low
    high = values.kthvalue(below + 2).values
    return low + (place - below) * (high - low)


def ranks(maps: Tensor, permutation: Tensor) -> Tensor:
    """Rank of each pixel, (N, H, W) int32: 0 for the most salient.

    Equal values are ordered by ``permutation`` (N, H * W), which is drawn per image and is the same
    for all methods: raster order would favour the upper left corner of every map with a flat part.
    """
    shuffled = maps.flatten(1).gather(1, permutation)
    order = permutation.gather(1, stable_argsort(shuffled, descending=True))
    places = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
    return places.new_empty(order.shape).scatter_(1, order, places).view(maps.shape)


def stable_argsort(values: Tensor, descending: bool = False) -> Tensor:
    """Order along the last axis, (N, K) int64, as torch's; 0.0 and -0.0 are equal.

    A stable sort of torch takes as long on a CPU as two forwards of a small network. There, for
    float32, value and place become one whole number, none of which is equal to another, and NumPy
    sorts those ten times as fast.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.argsort(dim=1, descending=descending, stable=True)
    bits = (values + 0.0).view(torch.int32)  # and -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers fall as their bits rise
    keys = (~rising if descending else rising).long() << 32
    keys |= torch.arange(values.shape[1])
    keys.numpy().sort(axis=1)
    return keys & 0xFFFFFFFF


def ascending(values: Tensor) -> Tensor:
    """Values (N, K) in ascending order along the last axis, by NumPy on a CPU: 30 times as fast."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def all_finite(values: Tensor) -> Tensor:
    """(N,) bool: whether all numbers of an image or map (N, ...) are finite."""
    rest = tuple(range(1, values.ndim))  # flatten() would copy what is not contiguous
    return values.amax(rest).isfinite() & values.amin(rest).isfinite()
