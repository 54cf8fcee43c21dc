"""Methods that add up gradients of the target along a path from a baseline to the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..autograd import Objective
from ..baselines import BaselineName, Padding
from ..registry import method
from ..sweeps import (
    AdaptivePath,
    BlurPath,
    NoiseRange,
    PathBaseline,
    PathRule,
    Processed,
    StraightPath,
)

Count = Annotated[int, Field(ge=1)]


@method("integrated_gradients")
class IntegratedGradients(Processed):
    """Integrated Gradients: (image - baseline) times the mean gradient between; (N, H, W), >= 0.

    With ``channels: sum`` the map adds up to f(image) - f(baseline), up to the error of the rule.

    Args:
        baseline: "black" by default; "uniform" draws every value from the range of the pixels.
        steps: gradients per trial.
        trials: paths that are averaged; more than one needs uniform baselines.
        rule: "midpoint", of second order, and with few steps the most complete on networks with
            ReLU; "gauss_legendre", exact to rounding on smooth networks; "endpoints", both ends and
            equal weights, as in Guided AbsoluteGrad's code.
        objective: "logit"; or "nll", the negative logarithm of the target's probability, which
            exchanges positive and negative.
        noise_range: whose range uniform baselines fill, "image" or, as in Guided AbsoluteGrad's
            code, "batch".
        processing: "signed"; "positive", "negative" and "absolute" act on every gradient before the
            mean, "absolute" on the product too; "guided" and "guided_absolute" take the variance
            over trials.
        percentile, guide_norm, guide_scope: of the guide, as in ``guided_absolute_grad``.
        channels: as in ``gradient``.

    Raises:
        ValueError: if a parameter is set that the others leave without effect.

    Source: Sundararajan et al. 2017, arXiv:1703.01365.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gag-2024": {
            "baseline": "uniform",
            "steps": 5,
            "trials": 2,
            "rule": "endpoints",
            "objective": "nll",
            "noise_range": "batch",
        }
    }
    several: ClassVar[str] = "trials"

    baseline: PathBaseline = "black"
    steps: Count = 20
    trials: Count = 1
    rule: PathRule = "midpoint"
    objective: Objective = "logit"
    noise_range: NoiseRange = "image"

    def __post_init__(self) -> None:
        if self.rule == "endpoints" and self.steps < 2:
            raise ValueError("rule = 'endpoints' has two ends; give steps: 2 or more")
        if self.baseline != "uniform":
            if self.processing.startswith("guided"):
                raise ValueError(
                    f"processing = {self.processing!r} needs a variance over trials, which are all "
                    f"the same with baseline = {self.baseline!r}; give baseline: uniform and "
                    "trials: 2 or more"
                )
            if self.trials > 1 or self.noise_range != "image":
                name = "trials" if self.trials > 1 else "noise_range"
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} belongs to baseline: uniform; with baseline "
                    f"= {self.baseline!r} leave it out"
                )
        super().__post_init__()

    @property
    def sweep(self) -> StraightPath:
        return StraightPath(
            self.baseline, self.steps, self.trials, self.rule, self.objective, self.noise_range
        )


@method("guided_ig")
class GuidedIG(Processed):
    """Guided Integrated Gradients: the path follows small gradients first; maps (N, H, W), >= 0.

    With ``channels: sum`` the map adds up to f(image) - f(baseline), up to the error of the steps.

    Args:
        baseline: where the path begins.
        steps: gradients, 20 as in Guided AbsoluteGrad; the source's code takes 200.
        fraction: share of the coordinates that move at a time, those of smallest |gradient|.
        max_dist: how far a coordinate may leave the straight line, as a share of its length; 0.1
            as in Guided AbsoluteGrad's code, the source's has 0.02.
        processing: "signed"; "positive", "negative" and "absolute" act on every increment; "guided"
            and "guided_absolute" take the variance over increments, about two per step.
        percentile, guide_norm, guide_scope: of the guide, as in ``guided_absolute_grad``.
        channels: as in ``gradient``.

    Raises:
        ValueError: if the guide is set without being used, or has a single step.

    Source: Kapishnikov et al. 2021, arXiv:2106.09788; its authors' code, PAIR saliency.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gag-2024": {"baseline": "mean"},
        "pair": {"baseline": "mean", "steps": 200, "max_dist": 0.02},
    }
    several: ClassVar[str] = "steps"

    baseline: BaselineName = "black"
    steps: Count = 20
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    max_dist: Annotated[float, Field(ge=0, le=1)] = 0.1

    @property
    def sweep(self) -> AdaptivePath:
        return AdaptivePath(self.baseline, self.steps, self.fraction, self.max_dist)


@method("blur_ig")
class BlurIG(Processed):
    """Blur Integrated Gradients: along ever stronger blur; maps (N, H, W), non-negative.

    With ``channels: sum`` the map adds up towards f(image) - f(blurred image), as far as steps and
    the cut kernel allow: the first term, at the sharp image, is zero, since a kernel a hundredth of
    a pixel wide is none.

    Args:
        steps: gradients, 20 as in Guided AbsoluteGrad; the source's code takes 100.
        max_sigma: standard deviation at the blurred end, in pixels; 50 as in the source's code.
        radius: of the kernel in pixels; "4sigma" as in the source's code. A fixed one, such as
            Guided AbsoluteGrad's 20, stops to blur more once sigma exceeds it.
        padding: "zero", as in the source's code; "reflect" as in Guided AbsoluteGrad's.
        difference: change of sigma over which the blur's derivative is taken, in pixels.
        processing: "signed"; "positive", "negative" and "absolute" act on every gradient before its
            product with the change of blur, "absolute" on the product too; "guided" and
            "guided_absolute" take the variance over steps.
        percentile, guide_norm, guide_scope: of the guide, as in ``guided_absolute_grad``.
        channels: as in ``gradient``.

    Raises:
        ValueError: if the guide is set without being used, or has a single step.

    Source: Xu et al. 2020, arXiv:2004.03383; its authors' code, PAIR saliency.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gag-2024": {"radius": 20, "padding": "reflect"},
        "pair": {"steps": 100},
    }
    several: ClassVar[str] = "steps"

    steps: Count = 20
    max_sigma: Annotated[float, Field(gt=0)] = 50.0
    radius: Literal["4sigma"] | Count = "4sigma"
    padding: Padding = "zero"
    difference: Annotated[float, Field(gt=0)] = 0.01

    @property
    def sweep(self) -> BlurPath:
        return BlurPath(self.steps, self.max_sigma, self.radius, self.padding, self.difference)
