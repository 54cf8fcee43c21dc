"""How concentrated a map is, and facts about maps that other scores lean on.

Complexity says nothing of whether a map is right: the shortest explanation points at one pixel, no
matter which. It is a family of its own, and never part of a rank of methods beside others.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..maps import Sign, is_constant, unit_range, with_sign
from ..probe import Explanation
from ..registry import metric

MassSign = Literal["magnitude", "positive"]


@metric("sparseness")
class Sparseness:
    """Gini index of a map's values, (N,) in [0, 1); higher is sparser, which is better.

    sum_k (2 k - K - 1) s_k / (K sum s) over the K values in ascending order: 0 where all are equal,
    1 - 1 / K where one pixel has it all. It does not change if the map is multiplied. The map is
    not scaled: zero is no attribution. A map of zeros singles nothing out: 0.

    Args:
        sign: magnitude, as published: attribution against the class is to be explained too.

    Source: Chalasani et al. 2020, arXiv:1810.06583; index of Hurley and Rickard, arXiv:0811.4706.
    """

    sign: MassSign = "magnitude"
    symbol: ClassVar[str] = "Gini"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "complexity"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency = with_sign(explanation.saliency, self.sign).flatten(1).double()
        pixels = saliency.shape[1]
        place = torch.arange(1, pixels + 1, device=saliency.device)
        ascending = saliency.sort(dim=1, stable=True).values
        total = ascending.sum(1)
        spread = (ascending * (2 * place - pixels - 1)).sum(1)
        return (spread / (pixels * total.where(total > 0, 1))).clamp_min(0)


@metric("entropy")
class Entropy:
    """Shannon entropy of a map, (N,) in [0, log K] for K pixels; lower is simpler, and better.

    Args:
        over: "mass" takes s / sum s as a probability for each pixel, and log K is a map without
            any preference; the map is not scaled; a map of zeros says no more: log K. "histogram"
            counts how many of the map's values fall into each of 256 equal bins from its least to
            its greatest: how many grey levels it has, wherever they are; 0 for a constant map.
        unit: "nat", natural logarithm, or "bit", base 2.
        sign: magnitude, as published: attribution against the class is to be explained too.

    Source: Bhatt et al. 2020, arXiv:2005.00631, over the mass. The histogram in bits is that of
    Guided AbsoluteGrad's code: preset ``gag-2024``.
    """

    over: Literal["mass", "histogram"] = "mass"
    unit: Literal["nat", "bit"] = "nat"
    sign: MassSign = "magnitude"
    symbol: ClassVar[str] = "Ent"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "complexity"
    range: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    presets: ClassVar[dict[str, dict[str, str]]] = {
        "gag-2024": {"over": "histogram", "unit": "bit"}
    }

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency = with_sign(explanation.saliency, self.sign)
        parts = saliency.flatten(1).double() if self.over == "mass" else histogram(saliency)
        parts = parts.where(parts.sum(1, keepdim=True) > 0, 1)
        share = parts / parts.sum(1, keepdim=True)
        nats: Tensor = torch.special.entr(share).sum(1)
        return nats if self.unit == "nat" else nats / math.log(2)


def histogram(maps: Tensor, bins: int = 256) -> Tensor:
    """Number of values in each of equal bins over each map's own range, (N, bins) float64."""
    scaled = unit_range(maps).flatten(1).double()
    bin_of = (scaled * bins).long().clamp_max(bins - 1)  # the greatest value is in the last bin
    return scaled.new_zeros(len(scaled), bins).scatter_add_(1, bin_of, torch.ones_like(scaled))


@metric("effective_complexity")
class EffectiveComplexity:
    """Effective complexity: how many pixels matter, (N,), a count; lower is simpler, and better.

    Pixels above ``eps`` times the map's own greatest value; a map of zeros has none. The original
    asks how few features keep a prediction within a tolerance; this is its usual reading, which
    needs no model.

    Args:
        eps: 1e-5 of the maximum, as in Quantus; there the maximum is that of the whole batch, so
            that a map beside a larger one counts less.
        sign: magnitude: attribution against the class is to be explained too.

    Source: Nguyen and Martinez 2020, arXiv:2007.07584.
    """

    eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    sign: MassSign = "magnitude"
    symbol: ClassVar[str] = "EC"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "complexity"
    range: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency = with_sign(explanation.saliency, self.sign).flatten(1).double()
        return (saliency > self.eps * saliency.amax(1, keepdim=True)).sum(1).double()


# --- facts, of which more is neither better nor worse ---------------------------------------------


@metric("degenerate_maps")
class DegenerateMaps:
    """1 where all pixels of the map are equal, else 0, (N,).

    Neither better nor worse: a fact about the map, which then says nothing; its mean is the share
    of degenerate maps. Values are compared as they are, sign and all, and exactly. A map that is
    not finite is no map: it fails, here as in every metric.
    """

    symbol: ClassVar[str] = "flat"
    better: ClassVar[Literal["neither"]] = "neither"
    family: ClassVar[str] = "diagnostics"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, explanation: Explanation) -> Tensor:
        return is_constant(explanation.saliency).double()


@metric("tied_pixels")
class TiedPixels:
    """Share of pixels whose value another pixel of the map has too, (N,) in [0, 1].

    Neither better nor worse: a fact about the map, and how far rankings of it are the seeded
    permutation's. 0 where all values differ, 1 for a constant map; one pixel alone has no other.
    Values are compared as they are, sign and all, and exactly.
    """

    symbol: ClassVar[str] = "ties"
    better: ClassVar[Literal["neither"]] = "neither"
    family: ClassVar[str] = "diagnostics"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, explanation: Explanation) -> Tensor:
        ascending = explanation.saliency.flatten(1).sort(dim=1, stable=True).values
        equal = ascending[:, 1:] == ascending[:, :-1]
        alone = equal.new_zeros(len(equal), 1)
        return (torch.cat((alone, equal), 1) | torch.cat((equal, alone), 1)).double().mean(1)


@metric("mean_mass")
class MeanMass:
    """Mean of the map after scaling to [0, 1] per image, (N,) in [0, 1].

    Neither better nor worse: a fact about the map, and how much of the image stays visible where it
    is used as a mask, as in average drop, gain and increase. A constant map is zeros after scaling.

    Args:
        sign: magnitude, as average drop reads it.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "mass"
    better: ClassVar[Literal["neither"]] = "neither"
    family: ClassVar[str] = "diagnostics"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, explanation: Explanation) -> Tensor:
        return unit_range(with_sign(explanation.saliency, self.sign)).flatten(1).double().mean(1)
