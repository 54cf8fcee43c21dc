"""Harmonic means of several properties of a map, and those parts that no other metric has.

A composite hides trade-offs, so it stands in a column of its own, beside its parts. A map that
ignores the image, such as a control, is perfectly coherent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..baselines import BaselineName
from ..maps import Sign, is_constant, with_sign
from ..masking import (
    CleanScores,
    Imputation,
    MapMask,
    MaskedMap,
    MaskedScores,
    Shown,
    exactly,
    reading_of,
    shown,
)
from ..probe import Explanation, Need
from ..registry import metric

SMALLEST = 1e-6
"""Below this probability a ratio to it says nothing: the score is undefined, and counted."""

Epsilon = Annotated[float, Field(ge=0, le=0.01)]
Levels = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]


class OfMap:
    """What all share: the map as a soft mask, and the method's map of the masked image."""

    sign: Sign
    baseline: BaselineName
    range_epsilon: float
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def mask(self) -> MapMask:
        return MapMask(self.sign, range_epsilon=self.range_epsilon)

    @property
    def again(self) -> MaskedMap:
        return MaskedMap(self.baseline, self.sign, self.range_epsilon)

    def complexity(self, explanation: Explanation) -> Tensor:
        return explanation[self.mask].flatten(1).double().mean(1)

    def coherency(self, explanation: Explanation) -> Tensor:
        maps = with_sign(explanation.saliency, self.sign)
        return (correlation(maps, with_sign(explanation[self.again], self.sign)) + 1) / 2


def correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Pearson's, of (N, H, W) twice to (N,) float64; 0 where one of the two is constant."""
    flat = []
    for each in (maps, others):
        pixels = each.flatten(1).double()
        pixels = pixels / pixels.abs().amax(1, keepdim=True).clamp_min(1e-300)
        flat.append(pixels - pixels.mean(1, keepdim=True))
    one, other = flat
    found = (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()
    return found.clamp(-1, 1).masked_fill(is_constant(maps) | is_constant(others), 0)


def harmonic_mean(*parts: Tensor) -> Tensor:
    """(N,) of parts that are not negative; 0 where any of them is."""
    return len(parts) / torch.stack([1 / part for part in parts]).sum(0)


@metric("coherency")
class Coherency(OfMap):
    """Coherency: (1 + r) / 2 of the map and that of the masked image, (N,); higher is better.

    r is Pearson's correlation of both maps, as the metric reads them; 0 where one is constant. The
    method runs again on the image times its map, for the same class and with the same noise, and
    costs what it costs alone. Undefined where that map is not finite.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it is scaled to [0, 1] per image.
        range_epsilon: added to the map's range; 0, as a constant map becomes zeros.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: Poppi et al. 2021, arXiv:2104.10252.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "Coh"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "robustness"
    needs_method: ClassVar[bool] = True
    undefined: ClassVar[str] = "undefined: the map of the masked image is not finite"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adcc-2021": {"baseline": "mean", "sign": "signed"},
        "arcc-2026": {"baseline": "mean", "sign": "positive", "range_epsilon": 1e-7},
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.again,)

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.coherency(explanation)


@metric("complexity")
class Complexity(OfMap):
    """Complexity: mean of the map once it is scaled to [0, 1], (N,); lower is better.

    The mass of the mask that average drop multiplies by, as a part of ADCC: there less is better. A
    constant map has 0.

    Args:
        sign: how a signed map is read before it is scaled per image.
        range_epsilon: added to the map's range; 0, as a constant map becomes zeros.

    Source: Poppi et al. 2021, arXiv:2104.10252.
    """

    sign: Sign = "magnitude"
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "Com"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "complexity"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adcc-2021": {"sign": "signed"},
        "arcc-2026": {"sign": "positive", "range_epsilon": 1e-7},
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.mask,)

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.complexity(explanation)


@metric("adcc")
class ADCC(OfMap):
    """ADCC: harmonic mean of coherency, 1 - complexity, 1 - average drop, (N,); higher is better.

    Average drop is the share max(0, p - o) / p here, so that all lie in [0, 1]; a part of 0 makes
    it 0. Per image, then averaged. Undefined where p < 1e-6.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it is scaled to [0, 1] per image.
        range_epsilon: added to the map's range; 0, as a constant map becomes zeros.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: Poppi et al. 2021, arXiv:2104.10252; its code multiplies the normalised image, which
    blends into the mean colour.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "ADCC"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "faithfulness"
    needs_method: ClassVar[bool] = True
    undefined: ClassVar[str] = "undefined: p < 1e-6, or the map of the masked image is not finite"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adcc-2021": {"baseline": "mean", "sign": "signed"}
    }

    @property
    def masked(self) -> MaskedScores:
        return MaskedScores(self.baseline, self.sign, range_epsilon=self.range_epsilon)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (CleanScores(), self.masked, self.again)

    def __call__(self, explanation: Explanation) -> Tensor:
        scores = explanation[CleanScores()], explanation[self.masked]
        clean, masked = (reading_of(score, "probability") for score in scores)
        drop = (clean - masked).clamp_min(0) / clean.where(clean >= SMALLEST, float("nan"))
        return harmonic_mean(
            self.coherency(explanation), 1 - self.complexity(explanation), 1 - drop
        )


@metric("arcc")
class ARCC(OfMap):
    """ARCC: harmonic mean of coherency, 1 - complexity and ROAD, (N,); higher is better.

    ROAD is doubled and clipped to [0, 1]; a part of 0 makes the mean 0. Per image, then averaged.

    Args:
        levels: of ROAD, shares of the pixels that go; as in pytorch-grad-cam.
        baseline: of coherency, what the map's zeros blend into.
        sign: how a signed map is read, for all three.
        noise, space: of ROAD's imputation.
        epsilon: added to each part; 1e-8 in pytorch-grad-cam.
        range_epsilon: added to the map's range; 0, as a constant map becomes zeros.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: arXiv:2605.14641, by pytorch-grad-cam 1.5, whose docstring says geometric mean and whose
    code computes the harmonic one. What ROAD reads there is left to the caller; for the range that
    the code expects, it is the probability.
    """

    levels: Levels = (0.2, 0.4, 0.6, 0.8)
    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    noise: Annotated[float, Field(ge=0, le=1)] = 0.01
    space: Literal["pixels", "normalised"] = "pixels"
    epsilon: Epsilon = 0.0
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "ARCC"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "faithfulness"
    needs_method: ClassVar[bool] = True
    undefined: ClassVar[str] = "undefined: the map of the masked image is not finite"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "arcc-2026": {
            "baseline": "mean",
            "sign": "positive",
            "space": "normalised",
            "epsilon": 1e-8,
            "range_epsilon": 1e-7,
        }
    }

    def points(self, keep: Literal["salient", "rest"]) -> tuple[Shown, ...]:
        fill = Imputation(self.noise, self.space)
        return tuple(Shown(keep, 1 - exactly(level), fill, self.sign) for level in self.levels)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (*self.points("rest"), *self.points("salient"), self.again)

    def __call__(self, explanation: Explanation) -> Tensor:
        morf, lerf = (
            reading_of(shown(explanation, self.points(keep)), "probability").mean(1)
            for keep in ("rest", "salient")
        )
        parts = (
            self.coherency(explanation),
            1 - self.complexity(explanation),
            (lerf - morf).clamp(0, 1),  # ROAD is half of this difference
        )
        return harmonic_mean(*(part + self.epsilon for part in parts))
