"""Average drop, gain and increase: what masking an image by its map does to the probability.

All read the same masked forward. A map of ones scores perfectly in drop, so none of them ranks
methods alone. p is the probability on the image, o on the masked image; both come from one forward
shape, so equal images tie exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from ..maps import Sign
from ..masking import BaselineName, MaskedProbability
from ..probe import Explanation, Need
from ..registry import metric

SMALLEST = 1e-6
"""Below this probability a ratio to it says nothing: the score is undefined, and counted."""


class Masked:
    """What the three share: the masked forward."""

    baseline: BaselineName
    sign: Sign
    family: ClassVar[str] = "faithfulness"
    range: ClassVar[tuple[float, float]] = (0.0, 100.0)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (MaskedProbability(self.baseline, self.sign),)

    def probabilities(self, explanation: Explanation) -> tuple[Tensor, Tensor]:
        """p and o, each (N,) float64."""
        masked = explanation[MaskedProbability(self.baseline, self.sign)]
        return explanation.probe.probability, masked


@metric("average_drop")
class AverageDrop(Masked):
    """Average drop: 100 max(0, p - o) / p per image, in percent, (N,); lower is better.

    Undefined (NaN) where p < 1e-6.

    Args:
        baseline: what the map's zeros blend into; black as in the Interpretable Gradients paper.
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equation 14 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "AD"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    undefined: ClassVar[str] = "undefined: p < 1e-6"

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.probabilities(explanation)
        return 100 * (clean - masked).clamp_min(0) / clean.where(clean >= SMALLEST, float("nan"))


@metric("average_gain")
class AverageGain(Masked):
    """Average gain: 100 max(0, o - p) / (1 - p) per image, in percent, (N,); higher is better.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it is scaled to [0, 1] per image.
        denominator: "headroom" divides by 1 - p (Opti-CAM; 0 at p = 1) and stays within 100;
            "confidence" divides by p, as equation 16 is printed: unbounded, undefined where p <
            1e-6.

    Source: Zhang et al. 2023, Opti-CAM, arXiv:2301.07002; equation 16 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    denominator: Literal["headroom", "confidence"] = "headroom"
    symbol: ClassVar[str] = "AG"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    undefined: ClassVar[str] = "undefined: p < 1e-6"

    @property
    def range(self) -> tuple[float, float]:  # type: ignore[override]
        return (0.0, 100.0 if self.denominator == "headroom" else float("inf"))

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.probabilities(explanation)
        gain = (masked - clean).clamp_min(0)
        if self.denominator == "confidence":
            return 100 * gain / clean.where(clean >= SMALLEST, float("nan"))
        headroom = 1 - clean
        return 100 * gain / headroom.where(headroom > 0, 1)


@metric("average_increase")
class AverageIncrease(Masked):
    """Average increase: 100 where o > p, else 0, per image, in percent, (N,); higher is better.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equation 15 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "AI"
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.probabilities(explanation)
        return 100.0 * (masked > clean).double()
