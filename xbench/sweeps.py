"""Sweeps of gradients: modification x interpretation x aggregation, after Guided AbsoluteGrad.

A sweep modifies the image (noise, a straight, an adaptive or a blurring path) and adds up terms,
one at a time. Each term comes under every interpretation (signed, positive, negative, absolute), so
that all variants of a sweep share its passes, and what is kept are moments, so that memory does not
grow with the terms. A method names its sweep and how it aggregates the moments; the fields that
methods share stand at the end. The guided gradient, a single pass under another rule, is here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from .autograd import Objective, Passing, class_gradient, guided_relu
from .baselines import BaselineImage, BaselineName, Padding, gaussian_blur
from .maps import Channels, quantile, reduced
from .probe import LayerGradient, Logits, Need, Probe
from .types import Model, Passes

Processing = Literal["signed", "positive", "negative", "absolute", "guided", "guided_absolute"]
"""How the terms of a sweep become an attribution: as they are, their positive or negative parts,
their absolutes; "guided" and "guided_absolute" weigh the signed and the absolute attribution with
the terms' variance."""

GuideNorm = Literal["none", "max", "quantile"]
"""What the variance is divided by where it guides: nothing (the authors' rule), its largest value,
or its percentile, which makes the guide continuous there."""

GuideScope = Literal["channel", "image"]
"""Pixels that share a percentile: those of a channel (the authors' rule), or of all channels."""

NoiseRange = Literal["image", "batch"]
"""Whose range (max - min) in input space noise is measured by: each image's own, or that of the
whole batch, as in the code of Guided AbsoluteGrad, where a map then depends on its neighbours."""

PathBaseline = BaselineName | Literal["uniform"]
"""Where a straight path begins: a named baseline, or uniform noise over the range of the pixels."""

PathRule = Literal["midpoint", "gauss_legendre", "endpoints"]
"""Points of a straight path: middles of equal parts (the default), Gauss-Legendre nodes, or points
from the baseline to the image with both ends and equal weights, as in Guided AbsoluteGrad's code.
"""


class Term(NamedTuple):
    """What one step adds to an attribution under each interpretation, (N, 3, H, W) each.

    ``spread`` is the quantity whose variance guides the absolute attribution; its absolute value is
    the term's absolute interpretation. ``present`` is (N,) bool, the images that have this term;
    None means all.
    """

    signed: Tensor
    positive: Tensor
    negative: Tensor
    spread: Tensor
    present: Tensor | None = None

    @staticmethod
    def of(values: Tensor) -> Term:
        """A term without displacement, such as a gradient under noise."""
        return Term(values, values.clamp_min(0), values.clamp_max(0), values)

    @staticmethod
    def along(way: Tensor, positive: Tensor, negative: Tensor) -> Term:
        """A displacement times a gradient that comes in its positive and its negative part."""
        return Term(
            way * (positive + negative), way * positive, way * negative, way * (positive - negative)
        )


@dataclass(frozen=True)
class Moments:
    """A sweep's attribution under each interpretation, and how its terms vary: (N, 3, H, W) each.

    Args:
        signed, positive, negative, absolute: mean of the terms, or their sum where a path's terms
            add up to its attribution.
        square: mean of the squared signed terms.
        variance: of the signed terms, unbiased (divided by one less than their number); NaN for a
            single one.
        spread: the same of the terms' ``spread``.
        count: (N, 1, 1, 1), the number of terms of each image.
    """

    signed: Tensor
    positive: Tensor
    negative: Tensor
    absolute: Tensor
    square: Tensor
    variance: Tensor
    spread: Tensor
    count: Tensor

    @staticmethod
    def of(terms: Iterable[Term], *, total: bool = False) -> Moments:
        """Updated one term at a time (Welford), so that memory does not grow with their number.

        A plain sum of squares minus the squared sum would cancel in float32.

        Args:
            terms: at least one; an image may have none, and then has zeros.
            total: whether the terms add up to the attribution, rather than being averaged.
        """
        mean = deviation = count = torch.zeros(())
        for signed, positive, negative, spread, present in terms:
            values = torch.stack(
                (signed, positive, negative, spread.abs(), signed.square(), spread)
            )
            if mean.ndim == 0:
                mean, deviation = torch.zeros_like(values), torch.zeros_like(values[[0, -1]])
                count = values.new_zeros(values.shape[1], 1, 1, 1)
            step = values - mean
            if present is not None:
                step = step.where(present[:, None, None, None], 0)
            count = count + (1 if present is None else present[:, None, None, None])
            mean += step / count.clamp_min(1)
            deviation += step[[0, -1]] * (values - mean)[[0, -1]]
        if total:
            mean[:4] *= count
        signed, positive, negative, absolute, square, _ = mean
        variance, spread = deviation / (count - 1)
        return Moments(signed, positive, negative, absolute, square, variance, spread, count)


# --- modifications --------------------------------------------------------------------------------


class Sweep(Need[Moments]):
    """A need of moments, with passes of its own."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    @property
    def gradients(self) -> int:
        """Gradients per image."""
        raise NotImplementedError

    def passes(self, model: Model) -> Passes:
        return Passes(self.gradients, self.gradients)


@dataclass(frozen=True)
class NoisyGradients(Sweep):
    """Gradients under Gaussian noise (Smilkov et al. 2017, arXiv:1706.03825), averaged.

    Args:
        noise: standard deviation as a share of the range.
        samples: draws; a larger number begins with the same draws.
        noise_range: the range, or whose it is.
    """

    noise: float
    samples: int
    noise_range: NoiseRange | float = "image"

    @property
    def gradients(self) -> int:
        return self.samples

    def compute(self, on: Probe) -> Moments:
        return Moments.of(Term.of(on.input_gradient(noisy)) for noisy in self.images(on))

    def images(self, on: Probe) -> Iterator[Tensor]:
        """The noisy images, (N, 3, H, W) each."""
        if isinstance(self.noise_range, str):
            low, high = _ranges(on, self.noise_range)
            sigma = self.noise * (high - low)
        else:
            sigma = torch.full_like(on.inputs[:, :1, :1, :1], self.noise * self.noise_range)
        for draw in range(self.samples):
            yield on.inputs + sigma * on.normal("gaussian", draw)


@dataclass(frozen=True)
class StraightPath(Sweep):
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365), averaged over trials.

    A term is one trial: image minus baseline, times the mean gradient between them. The positive
    and negative interpretations clip each gradient before that mean.

    Args:
        baseline: where the path begins; "uniform" draws another one for every trial.
        steps: gradients per trial.
        trials: more than one only says something with uniform baselines.
        rule: points and weights of the mean.
        objective: what is differentiated.
        noise_range: whose range uniform baselines fill.
    """

    baseline: PathBaseline = "black"
    steps: int = 20
    trials: int = 1
    rule: PathRule = "midpoint"
    objective: Objective = "logit"
    noise_range: NoiseRange = "image"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        named = () if self.baseline == "uniform" else (BaselineImage(self.baseline),)
        return (Logits(), *named)

    @property
    def gradients(self) -> int:
        return self.steps * self.trials

    def compute(self, on: Probe) -> Moments:
        return Moments.of(self._trial(on, trial) for trial in range(self.trials))

    def _trial(self, on: Probe, trial: int) -> Term:
        start = self._start(on, trial)
        way = on.inputs - start
        positive, negative = torch.zeros_like(way), torch.zeros_like(way)
        for place, weight in quadrature(self.rule, self.steps):
            gradient = on.input_gradient(start + place * way, self.objective)
            positive += weight * gradient.clamp_min(0)
            negative += weight * gradient.clamp_max(0)
        return Term.along(way, positive, negative)

    def _start(self, on: Probe, trial: int) -> Tensor:
        if self.baseline != "uniform":
            return on[BaselineImage(self.baseline)]
        drawn = torch.stack(
            [on.uniform(f"baseline {channel}", trial) for channel in range(on.inputs.shape[1])], 1
        )
        return torch.lerp(*_ranges(on, self.noise_range), drawn)


@dataclass(frozen=True)
class AdaptivePath(Sweep):
    """Guided IG (Kapishnikov et al. 2021, arXiv:2106.09788): terms are moves times gradients.

    The path follows, inside a tube around the straight line, the coordinates of smallest gradient.
    Each step takes one gradient and shortens the L1 distance to the image by the same amount, in as
    many moves as that needs; every move is credited. An image that is its baseline gets zeros.
    What moves nothing is no term: whether a step ends at once or finds out on another look that its
    distance is reached is a matter of rounding, and must not enter a variance.

    Args:
        baseline: where the path begins.
        steps: gradients.
        fraction: share of the coordinates that one move takes, at least.
        max_dist: half width of the tube, as a share of the straight line.
    """

    baseline: BaselineName = "black"
    steps: int = 20
    fraction: float = 0.25
    max_dist: float = 0.1

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    @property
    def gradients(self) -> int:
        return self.steps

    def compute(self, on: Probe) -> Moments:
        return Moments.of(self._terms(on), total=True)

    def _terms(self, on: Probe) -> Iterator[Term]:
        # in float64: whether a distance is reached hangs on sums over all pixels
        end = on.inputs.double()
        start = on[BaselineImage(self.baseline)].double().expand_as(end)
        way, point = end - start, start
        for step in range(1, self.steps + 1):
            gradient = on.input_gradient(point.to(on.inputs.dtype)).double()
            share = step / self.steps
            behind, ahead = max(share - self.max_dist, 0), min(share + self.max_dist, 1)
            low, high = start + behind * way, start + ahead * way
            goal = _length(way) * (1 - share)
            moving = torch.ones_like(goal, dtype=torch.bool)
            while moving.any():
                # 0 / 0 where image and baseline agree: not behind
                moved = torch.where((point - start) / way < behind, low, point)
                distance = _length(end - moved)
                tolerance = 1e-9 * torch.maximum(distance, goal).clamp_min(1)
                reached = (distance - goal).abs() <= tolerance
                free = moved != high
                slope = torch.where(free, gradient.abs(), torch.inf).flatten(1)
                rank = int(self.fraction * (slope.shape[1] - 1)) + 1
                least = slope.kthvalue(rank).values[:, None, None, None]
                chosen = free & (gradient.abs() <= least)
                room = _length((high - moved) * chosen)
                ratio = torch.where(reached | ~(room > 0), 0, (distance - goal) / room)
                moved = moved.lerp(high, ratio.clamp(0, 1) * chosen)
                present = moving[:, 0, 0, 0] & (moved != point).flatten(1).any(1)
                credit = Term.of(((moved - point) * gradient).to(on.inputs.dtype))
                yield credit._replace(spread=credit.signed.abs(), present=present)
                point = torch.where(moving, moved, point)
                moving = moving & (ratio > 1)


@dataclass(frozen=True)
class BlurPath(Sweep):
    """Blur IG (Xu et al. 2020, arXiv:2004.03383): terms add up towards f(image) - f(blurred).

    A term is a change of blur times the gradient at the sharper image. The blur's derivative is a
    forward difference, in float64, since it divides the small change of an image by a small number.

    Args:
        steps: gradients, at standard deviations from 0 in equal steps up to one below the largest.
        max_sigma: largest standard deviation, in pixels.
        radius: where the kernel is cut, in pixels, or at four standard deviations.
        padding: what lies beyond the edge.
        difference: change of the standard deviation from which the derivative is taken, in pixels.
    """

    steps: int = 20
    max_sigma: float = 50.0
    radius: Literal["4sigma"] | int = "4sigma"
    padding: Padding = "zero"
    difference: float = 0.01

    @property
    def gradients(self) -> int:
        return self.steps

    def compute(self, on: Probe) -> Moments:
        return Moments.of(self._terms(on), total=True)

    def _terms(self, on: Probe) -> Iterator[Term]:
        images = on.inputs.double()
        for step in range(self.steps):
            sigma = step * self.max_sigma / self.steps
            blurred = self._blurred(images, sigma)
            change = (self._blurred(images, sigma + self.difference) - blurred) / self.difference
            way = (-self.max_sigma / self.steps * change).to(on.inputs.dtype)
            gradient = on.input_gradient(blurred.to(on.inputs.dtype))
            yield Term.along(way, gradient.clamp_min(0), gradient.clamp_max(0))

    def _blurred(self, images: Tensor, sigma: float) -> Tensor:
        # rounded as SciPy does, on which the authors' code rests
        radius = int(4 * sigma + 0.5) if self.radius == "4sigma" else self.radius
        return gaussian_blur(images, sigma, radius, self.padding)


def quadrature(rule: PathRule, steps: int) -> list[tuple[float, float]]:
    """Points in [0, 1] and their weights, which add up to 1."""
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return list(zip(((1 + nodes) / 2).tolist(), (weights / 2).tolist(), strict=True))
    if rule == "endpoints":
        return [(at / (steps - 1), 1 / steps) for at in range(steps)]
    return [((at + 0.5) / steps, 1 / steps) for at in range(steps)]


def _ranges(on: Probe, whose: NoiseRange) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each image, or of all of them: (N, 1, 1, 1)."""
    low, high = on.inputs.flatten(1).aminmax(dim=1)
    if whose == "batch":  # a filled batch too: its filling repeats an image
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    return low[:, None, None, None], high[:, None, None, None]


def _length(way: Tensor) -> Tensor:
    """L1 norm of each image, (N, 1, 1, 1)."""
    return way.abs().sum((1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class GuidedGradient(Need[Tensor]):
    """(N, 3, H, W) input gradient under the guided rule (arXiv:1412.6806).

    Args:
        allow_no_relu: accept a network without ReLU, where it is the plain gradient.
        passing: the part of a signal that passes a ReLU on its way back.
    """

    allow_no_relu: bool = False
    passing: Passing = "positive"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> Tensor:
        target = on.target
        with torch.enable_grad():
            inputs = on.inputs.detach().requires_grad_()
            logits = on.model.logits(inputs)
            with guided_relu(logits, self.passing, allow_no_relu=self.allow_no_relu):
                (gradient,) = class_gradient(logits, target, (inputs,))
        return gradient


@dataclass(frozen=True)
class NoisyLayerGradients(Need[tuple[Tensor, Tensor, Tensor]]):
    """Means of g, g^2 and g^3 under Gaussian noise, g a layer's gradient; float64 (N, C, h, w).

    Updated one sample at a time, so that memory does not grow with their number; in float64, since
    a cube underflows.

    Args:
        layer: role or module path.
        noise, samples: as in :class:`NoisyGradients`, whose noisy images these are.
    """

    layer: str
    noise: float
    samples: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(self.samples, self.samples)

    def compute(self, on: Probe) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.zeros((), dtype=torch.float64, device=on.inputs.device)
        for draw, noisy in enumerate(NoisyGradients(self.noise, self.samples).images(on)):
            gradient = on.at(noisy)[LayerGradient(self.layer)][1].double()
            powers = torch.stack((gradient, gradient.square(), gradient.square() * gradient))
            means = means + (powers - means) / (draw + 1)
        first, second, third = means
        return first, second, third


# --- what methods share ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """A method that aggregates the moments of one sweep.

    Args:
        channels: how colour channels become one map.
    """

    channels: Channels = "absolute_sum"

    @property
    def sweep(self) -> Sweep:
        """The need whose moments the map is made of."""
        raise NotImplementedError

    def attribution(self, moments: Moments) -> Tensor:
        """(N, 3, H, W) from the moments."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.sweep,)

    def __call__(self, probe: Probe) -> Tensor:
        return reduced(self.attribution(probe[self.sweep]), self.channels)


@dataclass(frozen=True)
class Guided(Swept):
    """The guide of Guided AbsoluteGrad: 1 where the variance exceeds its percentile, else itself.

    Args:
        percentile: of the variance, 0 to 100, linear between order statistics; 85 is the paper's
            choice. At 100 the guide is the variance, at 0 there is none, as in the paper's GAG-0.
        guide_norm: what the variance is divided by below the percentile.
        guide_scope: pixels that share a percentile.
    """

    percentile: Annotated[float, Field(ge=0, le=100)] = 85.0
    guide_norm: GuideNorm = "none"
    guide_scope: GuideScope = "channel"

    def guide(self, variance: Tensor) -> Tensor:
        """The weight of each pixel, the shape of the variance (N, 3, H, W).

        The comparison is strict, as in the authors' code; equation 3.4 differs on ties alone.
        """
        if self.percentile == 0:  # GAG-0 of the paper is without the guide
            return torch.ones_like(variance)
        planes = variance.flatten(2 if self.guide_scope == "channel" else 1)
        threshold = quantile(planes, self.percentile / 100)[..., None]
        if self.guide_norm == "none":
            low = planes
        else:
            unit = planes.amax(-1, keepdim=True) if self.guide_norm == "max" else threshold
            low = planes / unit.where(unit != 0, 1)
        return torch.where(planes > threshold, 1, low).view_as(variance)


@dataclass(frozen=True)
class Processed(Guided):
    """A method with every interpretation of its sweep.

    Args:
        processing: the interpretation, and whether the guide weighs it.
    """

    several: ClassVar[str] = ""
    """The parameter that says how many terms the guide's variance is of."""

    processing: Processing = "signed"

    def __post_init__(self) -> None:
        if self.processing.startswith("guided"):
            count = getattr(self, self.several)
            if count < 2:
                raise ValueError(
                    f"processing = {self.processing!r} needs a variance over {self.several}, and "
                    f"{self.several} = {count} has none; give 2 or more, or another processing"
                )
            return
        for name in ("percentile", "guide_norm", "guide_scope"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name} belongs to the guide, which processing = {self.processing!r} has not; "
                    "leave it out, or choose processing: guided or guided_absolute"
                )

    def attribution(self, moments: Moments) -> Tensor:
        match self.processing:
            case "guided":
                return moments.signed * self.guide(moments.variance)
            case "guided_absolute":
                return moments.absolute * self.guide(moments.spread)
            case name:
                found: Tensor = getattr(moments, name)
                return found


@dataclass(frozen=True)
class Noisy(Swept):
    """A method over noisy gradients.

    Args:
        noise: standard deviation as a share of the range; 0.15 as in Guided AbsoluteGrad's code.
        samples: noisy images, 20 as in Guided AbsoluteGrad.
        noise_range: "image", each image's own range; "batch", the authors' quirk, which makes a map
            depend on its neighbours; or a number, the range itself in the network's input space.
    """

    noise: Annotated[float, Field(ge=0)] = 0.15
    samples: Annotated[int, Field(ge=1)] = 20
    noise_range: NoiseRange | Annotated[float, Field(gt=0)] = "image"

    @property
    def sweep(self) -> NoisyGradients:
        return NoisyGradients(self.noise, self.samples, self.noise_range)
