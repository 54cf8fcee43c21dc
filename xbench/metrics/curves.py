"""Insertion and deletion: the area under the target's probability as pixels come or go.

Pixels are ranked by the signed map; ties are broken by one seeded permutation per image, the same
for all methods. The abscissa is the share of pixels that changed, both ends included, so areas lie
in [0, 1] for any number of steps.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..masking import BaselineName, Curve
from ..probe import Explanation, Need
from ..registry import metric

Steps = Annotated[int, Field(ge=1)]


class CurveArea:
    """What both share: a curve and the trapezoids under it."""

    baseline: BaselineName
    steps: int
    keep: ClassVar[Literal["salient", "rest"]]
    family: ClassVar[str] = "faithfulness"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def curve(self) -> Curve:
        return Curve(self.keep, self.baseline, self.steps)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.curve,)

    def __call__(self, explanation: Explanation) -> Tensor:
        probability = explanation[self.curve]
        pixels = explanation.saliency[0].numel()
        share = probability.new_tensor(self.curve.counts(pixels)) / pixels
        return ((probability[:, 1:] + probability[:, :-1]) / 2 * share.diff()).sum(1)


@metric("insertion")
class Insertion(CurveArea):
    """Insertion: area as the most salient pixels return, baseline to image, (N,); higher is better.

    Pixels are ranked by the signed map, ties by one seeded permutation per image.

    Args:
        steps: points after the first; 28, as for the numbers that RISE reports at 224 x 224.
        baseline: blur, since a blurred image starts without sharp false edges; a Gaussian with a
            standard deviation of 1/16 of the shorter side (RISE: a box of 11 x 11 pixels, nearly).

    Source: Petsiuk et al. 2018, RISE, arXiv:1806.07421.
    """

    steps: Steps = 28
    baseline: BaselineName = "blur"
    keep: ClassVar[Literal["salient", "rest"]] = "salient"
    symbol: ClassVar[str] = "Ins"
    better: ClassVar[Literal["higher", "lower"]] = "higher"


@metric("deletion")
class Deletion(CurveArea):
    """Deletion: area as the most salient pixels go, image to baseline, (N,); lower is better.

    Pixels are ranked by the signed map, ties by one seeded permutation per image.

    Args:
        steps: points after the first; 28, as for the numbers that RISE reports at 224 x 224.
        baseline: black, in pixel space.

    Source: Petsiuk et al. 2018, RISE, arXiv:1806.07421.
    """

    steps: Steps = 28
    baseline: BaselineName = "black"
    keep: ClassVar[Literal["salient", "rest"]] = "rest"
    symbol: ClassVar[str] = "Del"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
