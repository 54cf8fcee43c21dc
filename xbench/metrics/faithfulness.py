"""Average drop, gain and increase: what masking an image by its map does to the probability.

All read the same masked forward. A map of ones scores perfectly in drop, so none of them ranks
methods alone. p is the probability on the image, o on the masked image; both come from one forward
shape, so equal images tie exactly.

A soft mask rewards maps that are bright throughout, whatever they explain. The masks ``matched``
and ``top`` hold the same values for every map, so that only its order counts.

Presets name what papers and libraries compute. Upsampling is the method's own here, so a map is
scaled at the image's size; and libraries that scale it before, at the layer's, differ by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..baselines import BaselineName
from ..maps import Sign
from ..masking import CleanScores, MaskedScores, MaskName, Reading, reading_of
from ..probe import Explanation, Need
from ..registry import metric

SMALLEST = 1e-6
"""Below this probability a ratio to it says nothing: the score is undefined, and counted."""

Share = Annotated[float, Field(gt=0, lt=1)]
Epsilon = Annotated[float, Field(ge=0, le=0.01)]


class Masked:
    """What the three share: the masked forward."""

    baseline: BaselineName
    sign: Sign
    mask: MaskName
    share: float
    range_epsilon: float
    read: Reading
    family: ClassVar[str] = "faithfulness"

    @property
    def masked(self) -> MaskedScores:
        # the same need, whatever was given for parameters that its kind of mask does not read
        share = self.share if self.mask == "top" else 0.5
        epsilon = self.range_epsilon if self.mask == "soft" else 0.0
        return MaskedScores(self.baseline, self.sign, self.mask, share, epsilon)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (CleanScores(), self.masked)

    @property
    def beside(self) -> tuple[Any, ...]:
        """The gain under equal masks: a map of ones has no drop, and no gain either."""
        return (
            AverageGain(
                baseline=self.baseline,
                sign=self.sign,
                mask=self.mask,
                share=self.share,
                range_epsilon=self.range_epsilon,
            ),
        )

    def scores(self, explanation: Explanation) -> tuple[Tensor, Tensor]:
        """p and o, each (N,) float64."""
        clean, masked = explanation[CleanScores()], explanation[self.masked]
        return reading_of(clean, self.read), reading_of(masked, self.read)


@metric("average_drop")
class AverageDrop(Masked):
    """Average drop: 100 max(0, p - o) / p per image, in percent, (N,); lower is better.

    Undefined (NaN) where p < 1e-6. A constant map masks all by "soft", and is ordered by the seeded
    permutation otherwise.

    Args:
        baseline: what the map's zeros blend into; black as in the Interpretable Gradients paper.
        sign: how a signed map is read before it becomes a mask.
        mask: "soft" scales the map to [0, 1] per image, as published; "matched" ranks it, so that
            the masks of all maps have the same mass; "top" keeps the most salient ``share``.
        share: of the pixels that "top" keeps, an exact number; half of them as in Score-CAM.
        read: the target's probability, or its logit as pytorch-grad-cam and Xplique do by default.
        drop: "relative" to p as published, or "absolute", 100 max(0, p - o), as pytorch-grad-cam.
        epsilon: added to p in the denominator; 0 as published.
        range_epsilon: added to the map's range by "soft"; 0, as a constant map becomes zeros.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equation 14 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    mask: MaskName = "soft"
    share: Share = 0.5
    read: Reading = "probability"
    drop: Literal["relative", "absolute"] = "relative"
    epsilon: Epsilon = 0.0
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "AD"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    undefined: ClassVar[str] = "undefined: p < 1e-6"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "interpretable-gradients-2024": {"sign": "positive"},
        "opticam-2024": {"sign": "signed"},
        "gradcampp-2018": {"sign": "positive"},
        "scorecam-2020": {"sign": "positive", "mask": "top", "baseline": "mean"},
        "torchcam-0.5": {"sign": "signed", "baseline": "mean", "epsilon": 1e-7},
        "pgc-1.5": {
            "sign": "positive",
            "baseline": "mean",
            "read": "logit",
            "drop": "absolute",
            "range_epsilon": 1e-7,
        },
        "xplique-2.0": {
            "baseline": "mean",
            "read": "logit",
            "epsilon": 1e-8,
            "range_epsilon": 1e-8,
        },
    }

    @property
    def range(self) -> tuple[float, float]:
        return (0.0, 100.0 if self.read == "probability" else float("inf"))

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.scores(explanation)
        drop = 100 * (clean - masked).clamp_min(0)
        if self.drop == "absolute":
            return drop
        return drop / (clean.where(clean >= SMALLEST, float("nan")) + self.epsilon)


@metric("average_gain")
class AverageGain(Masked):
    """Average gain: 100 max(0, o - p) / (1 - p) per image, in percent, (N,); higher is better.

    A logit has no headroom, so ``read: logit`` is refused.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it becomes a mask.
        denominator: "headroom" divides by 1 - p (Opti-CAM; 0 at p = 1) and stays within 100;
            "confidence" divides by p, as equation 16 is printed: unbounded, undefined where p <
            1e-6.
        mask, share, range_epsilon: as for average drop.
        epsilon: added to the denominator; 0 as published.
        read: the target's probability.

    Raises:
        ValueError: if logits are to be read.

    Source: Zhang et al. 2023, Opti-CAM, arXiv:2301.07002; equation 16 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    denominator: Literal["headroom", "confidence"] = "headroom"
    mask: MaskName = "soft"
    share: Share = 0.5
    read: Reading = "probability"
    epsilon: Epsilon = 0.0
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "AG"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    undefined: ClassVar[str] = "undefined: p < 1e-6"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "interpretable-gradients-2024": {"sign": "positive", "denominator": "confidence"},
        "opticam-2024": {"sign": "signed"},
        "xplique-2.0": {"baseline": "mean", "epsilon": 1e-8, "range_epsilon": 1e-8},
    }

    def __post_init__(self) -> None:
        if self.read == "logit":
            raise ValueError(
                "a gain is a share of the probability that is missing, 1 - p, which a logit does "
                "not have; read the probability"
            )

    @property
    def range(self) -> tuple[float, float]:
        return (0.0, 100.0 if self.denominator == "headroom" else float("inf"))

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.scores(explanation)
        gain = 100 * (masked - clean).clamp_min(0)
        if self.denominator == "confidence":
            return gain / (clean.where(clean >= SMALLEST, float("nan")) + self.epsilon)
        headroom = 1 - clean
        return gain / (headroom.where(headroom > 0, 1) + self.epsilon)


@metric("average_increase")
class AverageIncrease(Masked):
    """Average increase: 100 where o > p, else 0, per image, in percent, (N,); higher is better.

    Args:
        baseline: what the map's zeros blend into; black as for average drop.
        sign: how a signed map is read before it becomes a mask.
        mask, share, read, range_epsilon: as for average drop.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equation 15 of arXiv:2404.15024.
    """

    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    mask: MaskName = "soft"
    share: Share = 0.5
    read: Reading = "probability"
    range_epsilon: Epsilon = 0.0
    symbol: ClassVar[str] = "AI"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    range: ClassVar[tuple[float, float]] = (0.0, 100.0)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "interpretable-gradients-2024": {"sign": "positive"},
        "opticam-2024": {"sign": "signed"},
        "gradcampp-2018": {"sign": "positive"},
        "scorecam-2020": {"sign": "positive", "mask": "top", "baseline": "mean"},
        "torchcam-0.5": {"sign": "signed", "baseline": "mean"},
        "pgc-1.5": {
            "sign": "positive",
            "baseline": "mean",
            "read": "logit",
            "range_epsilon": 1e-7,
        },
        "xplique-2.0": {"baseline": "mean", "read": "logit", "range_epsilon": 1e-8},
    }

    def __call__(self, explanation: Explanation) -> Tensor:
        clean, masked = self.scores(explanation)
        return 100.0 * (masked > clean).double()
