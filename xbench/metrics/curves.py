"""Insertion, deletion, MoRF, LeRF: areas under the target's probability as pixels come or go.

The abscissa is the share of pixels that changed, both ends included, so that areas lie in [0, 1]
for any number of steps. Curves that show the same pixels on the same baseline share their forwards:
MoRF is deletion, LeRF is insertion from the same baseline read backwards, and other numbers of
steps share what they have in common.

Presets name what papers and libraries compute, as far as it can be said of a map of pixels. All
take the target that the suite names, and none changes units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..baselines import BaselineName
from ..maps import Sign
from ..masking import BaselineScores, CleanScores, Curve, Reading, reading_of
from ..orders import Ties
from ..probe import Explanation, Need
from ..registry import metric
from ..types import Line

SMALLEST = 1e-6
"""A score below this is nothing to divide an area by: undefined, and counted."""

Steps = Annotated[int, Field(ge=1)]
Area = Literal["raw", "relative", "corrected"]
Points = Literal["all", "without_start", "without_end", "interior"]
Presets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CurveArea:
    """What all share: the curve of a map, and the trapezoids under it."""

    steps: Steps = 28
    baseline: BaselineName = "black"
    sign: Sign = "signed"
    ties: Ties = "seeded"
    points: Points = "all"
    area: Area = "raw"
    read: Reading = "probability"
    family: ClassVar[str] = "faithfulness"

    @property
    def undefined(self) -> str:
        if self.area == "corrected":
            return "undefined: the image scores no more than its baseline"
        return f"undefined: the image scores less than {SMALLEST:g}"

    @property
    def range(self) -> tuple[float, float]:
        bounded = self.area == "raw" and self.read == "probability"
        return (0.0, 1.0) if bounded else (float("-inf"), float("inf"))

    def curve(self, keep: Literal["salient", "rest"]) -> Curve:
        return Curve(keep, self.baseline, self.steps, self.sign, self.ties, self.read)

    def line(
        self, explanation: Explanation, keep: Literal["salient", "rest"], from_end: bool = False
    ) -> Line:
        """What the area spans of one curve; ``points`` may count from its end."""
        curve = self.curve(keep)
        ends = [self.points not in (one, "interior") for one in ("without_start", "without_end")]
        has_start, has_end = reversed(ends) if from_end else ends
        first, last = 1 - has_start, self.steps - 1 + has_end
        score = explanation[curve][:, first : last + 1]
        share = score.new_tensor(curve.shares(explanation.saliency[0].numel()))[first : last + 1]
        return Line(share, score)

    def removing_least(self, explanation: Explanation) -> Line:
        """LeRF's curve: what insertion shows, read from its end, the image."""
        share, score = self.line(explanation, "salient", from_end=True)
        return Line(1 - share.flip(0), score.flip(1))

    def under(
        self, explanation: Explanation, keep: Literal["salient", "rest"], from_end: bool = False
    ) -> Tensor:
        """(N,) area under one curve, as ``area`` says; ``points`` may count from its end."""
        share, score = self.line(explanation, keep, from_end)
        raw = ((score[:, 1:] + score[:, :-1]) / 2 * share.diff()).sum(1)
        if self.area == "raw":
            return raw
        full = reading_of(explanation[CleanScores()], self.read)
        if self.area == "relative":
            return raw / full.where(full >= SMALLEST, float("nan"))
        floor = reading_of(explanation[BaselineScores(self.baseline)], self.read)
        width = share[-1] - share[0]
        height = full - floor
        return (raw - width * floor) / height.where(height >= SMALLEST, float("nan"))


class OneCurve(CurveArea):
    """The area under the curve that the class names."""

    keep: ClassVar[Literal["salient", "rest"]]

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.curve(self.keep),)

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        return {"": self.line(explanation, self.keep)}

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.under(explanation, self.keep)


@metric("insertion")
class Insertion(OneCurve):
    """Insertion: area as the most salient pixels return, baseline to image, (N,); higher is better.

    Args:
        steps: points after the first; 28, as for the numbers that RISE reports at 224 x 224.
        baseline: blur, since a blurred image starts without sharp false edges; a Gaussian with a
            standard deviation of 1/16 of the shorter side (RISE: a box of 11 x 11 pixels, nearly).
        sign: how a map is read before it is ranked; signed as it is.
        ties: order of equal values; by one seeded permutation per image, the same for all methods.
            "above" and "partition" keep them together, and steps are counted as without ties.
        points: of the curve that the area spans; one that leaves an end out is not rescaled.
        area: "raw", in [0, 1]; "relative", over the score of the image, undefined below 1e-6;
            "corrected", of (curve - baseline's score) / (image's - baseline's), undefined unless
            the image scores more.
        read: the target's probability, or its logit, whose area has no bounds.

    Presets: ``rise-2018`` (with RISE's blur, and ties as a stable sort would have them: its own are
    unstable; at 224 x 224 its steps are 1792 pixels); ``interpretable-gradients-2024`` (the slides'
    algorithm from the blurred image, a row of 32 pixels per step at 32 x 32); ``gag-2024`` (shares
    0 to 0.9, so at most 0.9); ``torchcam-0.5`` (equal shares, where the library rounds a step up to
    whole pixels); ``latec-2024`` (50 values per step at 224 x 224, interior points alone; its
    ranking of 3 H W values visits a pixel up to three times, here once); ``xplique-2.0`` (its
    default, the logit).

    Source: Petsiuk et al. 2018, RISE, arXiv:1806.07421.
    """

    baseline: BaselineName = "blur"
    keep: ClassVar[Literal["salient", "rest"]] = "salient"
    symbol: ClassVar[str] = "Ins"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    presets: ClassVar[Presets] = {
        "rise-2018": {"baseline": "blur_rise", "ties": "last"},
        "interpretable-gradients-2024": {"steps": 32, "baseline": "blur_rise"},
        "gag-2024": {
            "steps": 10,
            "baseline": "blur_gag",
            "sign": "magnitude",
            "ties": "above",
            "points": "without_end",
        },
        "torchcam-0.5": {"steps": 20, "baseline": "mean", "ties": "first"},
        "latec-2024": {
            "steps": 3011,
            "baseline": "blur_latec",
            "ties": "first",
            "points": "interior",
        },
        "xplique-2.0": {"steps": 10, "baseline": "mean", "ties": "last", "read": "logit"},
    }


REMOVAL: Presets = {
    "rise-2018": {"baseline": "mean", "ties": "last"},
    "interpretable-gradients-2024": {"steps": 32},
    "gag-2024": {
        "steps": 10,
        "baseline": "mean",
        "sign": "magnitude",
        "ties": "above",
        "points": "without_end",
    },
    "torchcam-0.5": {"steps": 20, "baseline": "mean", "ties": "first"},
    "latec-2024": {"steps": 3011, "baseline": "mean", "ties": "first", "points": "interior"},
    "xplique-2.0": {"steps": 10, "baseline": "mean", "ties": "last", "read": "logit"},
    "quantus-0.6": {"ties": "first", "points": "without_start"},
}


@metric("deletion")
class Deletion(OneCurve):
    """Deletion: area as the most salient pixels go, image to baseline, (N,); lower is better.

    Args:
        steps: points after the first; 28, as for the numbers that RISE reports at 224 x 224.
        baseline: black, in pixel space.
        sign, ties, points, area, read: as for insertion.

    Presets: those of insertion, on the mean colour where the source has zeros after normalisation;
    and ``quantus-0.6``, PixelFlipping without its point at zero. Quantus flips single channels of
    pixels, here whole pixels go, H W of them with ``steps`` as large; its "black" is the darkest
    value of the normalised image, here it is black; its area is not divided by the steps.

    Source: Petsiuk et al. 2018, RISE, arXiv:1806.07421.
    """

    keep: ClassVar[Literal["salient", "rest"]] = "rest"
    symbol: ClassVar[str] = "Del"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    presets: ClassVar[Presets] = REMOVAL


@metric("morf")
class MoRF(OneCurve):
    """MoRF: area as the most relevant pixels go first, image to baseline, (N,); lower is better.

    The same as deletion, under the name of pixel flipping, and beside LeRF.

    Args:
        steps, baseline, sign, ties, points, area, read: as for deletion.

    Source: Samek et al. 2017, arXiv:1509.06321.
    """

    keep: ClassVar[Literal["salient", "rest"]] = "rest"
    symbol: ClassVar[str] = "MoRF"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    presets: ClassVar[Presets] = REMOVAL


@metric("lerf")
class LeRF(OneCurve):
    """LeRF: area as the least relevant pixels go first, image to baseline, (N,); higher is better.

    What remains of an image then is what insertion shows of it, so this is the area of insertion
    from the same baseline.

    Args:
        steps, baseline, sign, ties, area, read: as for deletion.
        points: of the curve that the area spans; its start is the image.

    Source: Ancona et al. 2018, arXiv:1711.06104.
    """

    keep: ClassVar[Literal["salient", "rest"]] = "salient"
    symbol: ClassVar[str] = "LeRF"
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        return {"": self.removing_least(explanation)}

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.under(explanation, self.keep, from_end=True)


@metric("abpc")
class AbPC(CurveArea):
    """AbPC: area between the perturbation curves, LeRF - MoRF, (N,) in [-1, 1]; higher is better.

    Both remove pixels down to the same baseline, so that what the network makes of that, and of the
    number of pixels alone, cancels. A map that says nothing scores about 0.

    Args:
        steps, baseline, sign, ties, points, area, read: as for deletion; "relative" and "corrected"
            divide the difference.

    Source: Schulz et al. 2020, arXiv:2001.00396; pnpxai has it under this name.
    """

    symbol: ClassVar[str] = "AbPC"
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    @property
    def range(self) -> tuple[float, float]:
        low, high = super().range
        return (-high, high) if low == 0 else (low, high)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.curve("salient"), self.curve("rest"))

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        return {"lerf": self.removing_least(explanation), "morf": self.line(explanation, "rest")}

    def __call__(self, explanation: Explanation) -> Tensor:
        lerf = self.under(explanation, "salient", from_end=True)
        return lerf - self.under(explanation, "rest")
