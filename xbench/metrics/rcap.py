"""RCAP: recover an image from its map's partitions, and predict."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..maps import Sign
from ..masking import BaselineName, Recovered
from ..probe import Explanation, Need
from ..registry import metric


@metric("rcap")
class RCAP:
    """RCAP: mean of (share of saliency) x (probability) over partitions, (N,); higher is better.

    The map is scaled to [0, 1] per image. With the defaults, the most salient 10, 20, 30, 40 and
    50 % of the pixels are recovered on the baseline in turn (equation 4.1). The score rises with
    the map's contrast by design. A constant map scores 0. Values lie in [0, 1]. Pixels equal to a
    threshold stay out, unless the threshold is the map's maximum.

    Args:
        lower_bound: the last threshold, as a share of the pixels; 0.5 as in the paper.
        interval: from one threshold to the next, in steps of 0.01; 0.1 as in the paper.
        baseline: black, in pixel space, as in the authors' code.
        sign: how a signed map is read before scaling.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    lower_bound: Annotated[float, Field(ge=0, lt=1)] = 0.5
    interval: Annotated[float, Field(ge=0.01, le=1)] = 0.1
    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "RCAP"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "faithfulness"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("lower_bound", "interval"):
            percent = 100 * getattr(self, name)
            if abs(percent - round(percent)) > 1e-9:
                raise ValueError(f"{name} must be a whole number of hundredths, such as 0.05")

    @property
    def recovered(self) -> Recovered:
        # whole percents: a float range would end in a stray 100 % for some intervals
        last, step = round(100 * (1 - self.lower_bound)), round(100 * self.interval)
        return Recovered(self.baseline, self.sign, tuple(range(step, last + 1, step)) or (last,))

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.recovered,)

    def __call__(self, explanation: Explanation) -> Tensor:
        share, probability = explanation[self.recovered]
        return (share * probability).mean(1)
