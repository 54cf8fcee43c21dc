"""In which order a map puts its pixels, and what becomes of those that are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .maps import Sign, ascending, ranks, stable_argsort, unit_range, with_sign
from .probe import Explanation, Need, Probe


@dataclass(frozen=True)
class Permutation(Need[Tensor]):
    """(N, H * W), one permutation of the pixels per image, for all methods: breaks ties."""

    def compute(self, on: Probe) -> Tensor:
        # 24-bit numbers may repeat; the stable sort then keeps raster order among those few
        return stable_argsort(on.uniform("ties").flatten(1))


Ties = Literal["seeded", "first", "last", "above", "partition"]
"""The order of pixels whose values are equal.

* ``seeded``: one permutation per image, the same for all methods (the default everywhere);
* ``first``, ``last``: in raster order or against it, for presets whose source sorts an array;
* ``above``: none, as they come together: those above a quantile (Guided AbsoluteGrad's curves);
* ``partition``: likewise, or those of the largest value if the quantile is that (RCAP).

The last two compare maps scaled to [0, 1].
"""


@dataclass(frozen=True)
class Ranks(Need[Tensor]):
    """(N, H, W) place of each pixel in its map's order, 0 for the most salient.

    Args:
        sign: how the map is read before.
        ties: order of equal values.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    sign: Sign = "signed"
    ties: Literal["seeded", "first", "last"] = "seeded"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Permutation(),) if self.ties == "seeded" else ()

    def compute(self, on: Explanation) -> Tensor:
        maps = with_sign(on.saliency, self.sign)
        if self.ties == "seeded":
            return ranks(maps, on[Permutation()])
        raster = torch.arange(maps[0].numel(), device=maps.device).expand(maps.shape[0], -1)
        return ranks(maps, raster if self.ties == "first" else raster.flip(1))


@dataclass(frozen=True)
class SortedMap(Need[tuple[Tensor, Tensor]]):
    """A map scaled to [0, 1], (N, H, W), and its values in ascending order, (N, H * W)."""

    scope: ClassVar[Literal["batch", "map"]] = "map"
    sign: Sign

    def compute(self, on: Explanation) -> tuple[Tensor, Tensor]:
        maps = unit_range(with_sign(on.saliency, self.sign))
        return maps, ascending(maps.flatten(1))


def ordered(on: Explanation, order: Ranks | SortedMap) -> Tensor:
    """(N, H, W) numbers that put a map's pixels into an order."""
    return on[order] if isinstance(order, Ranks) else on[order][0]


@dataclass(frozen=True)
class Spread(Need[Tensor]):
    """(N, 3, H, W) the numbers of an order, for each channel and laid out as the network's images.

    Masks made from them fit the images, where one for all channels would be spread at each step.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    order: Ranks | SortedMap

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.order,)

    def compute(self, on: Explanation) -> Tensor:
        numbers, like = ordered(on, self.order)[:, None], on.probe.inputs
        if numbers[0].numel() <= 2**24:  # float32 holds these places exactly
            numbers = numbers.to(like.dtype)
        return on.probe.model.laid_out(numbers.expand(-1, like.shape[1], -1, -1))
