"""Robustness: how much a map changes when the image hardly does.

A map that ignores the image, such as a control, is perfectly robust; so this is a family of its
own, and never part of a rank of methods beside others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..probe import Again, Explanation, Need, Probe
from ..registry import metric
from ..types import Model

Radius = Annotated[float, Field(gt=0, le=10)]
Samples = Annotated[int, Field(ge=1)]
Space = Literal["pixels", "normalised"]


@dataclass(frozen=True)
class Changes(Again[Tensor]):
    """(N, samples) float64: norm of a map's change under noise on the image, over the map's norm.

    The method runs again for the same class and with its own noise as before: a difference of two
    draws of that would be there without any change of the image. One sample is held at a time.

    Args:
        radius, space, samples: as in :class:`MaxSensitivity`.
    """

    radius: float
    space: Space
    samples: int

    def times(self, model: Model) -> int:
        return self.samples

    def compute(self, on: Explanation) -> Tensor:
        """The changes; NaN where the map of the perturbed image is not finite."""
        found = []
        for draw in range(self.samples):
            again = self.explained(self.near(on.probe, draw))
            change = relative_change(on.saliency, again.saliency)
            found.append(change.where(again.finite, torch.nan))
        return torch.stack(found, dim=1)

    def near(self, probe: Probe, draw: int) -> Probe:
        """The probe of the images with one draw of noise."""
        channels = probe.inputs.shape[1]
        drawn = [probe.uniform("perturbation", draw * channels + at) for at in range(channels)]
        noise = (2 * torch.stack(drawn, dim=1) - 1) * self.radius
        if self.space == "pixels":
            return probe.with_images(probe.batch.images + noise)
        return probe.with_images(probe.model.pixels(probe.inputs + noise))


def relative_change(maps: Tensor, others: Tensor) -> Tensor:
    """|others - maps| / |maps|, (N,), Frobenius norms; beside zeros 1, between zeros 0."""
    one, other = (each.flatten(1).double() for each in (maps, others))
    largest = torch.cat((one, other), dim=1).abs().amax(1, keepdim=True)
    one, other = (each / largest.where(largest > 0, 1) for each in (one, other))  # squares are safe
    size, change = (torch.linalg.vector_norm(each, dim=1) for each in (one, other - one))
    found: Tensor = change / size.where(size > 0, change.where(change > 0, 1))
    return found


class NearBy:
    """What both share: the changes, which they sum up."""

    radius: Radius
    space: Space
    samples: Samples
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "robustness"
    range: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    needs_method: ClassVar[bool] = True
    undefined: ClassVar[str] = "undefined: the map of a perturbed image is not finite"

    @property
    def changes(self) -> Changes:
        return Changes(self.radius, self.space, self.samples)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.changes,)


@metric("max_sensitivity")
class MaxSensitivity(NearBy):
    """Max-sensitivity: largest relative change of the map near the image, (N,); lower is better.

    max |M(x + d) - M(x)| / |M(x)| over uniform noise d in [-radius, radius] on every channel value,
    drawn from the image's own stream, the same for all methods. Norms are Frobenius, maps raw; the
    class and the method's own noise stay, so that a method which samples is not charged for its
    sampling. 0 is a map that ignores the image. Where M(x) is zeros there is no scale: 1 if any
    other map is not, else 0. It costs ``samples`` times the method. Undefined where the map of a
    perturbed image is not finite.

    Args:
        radius: 0.02 as in captum, of the unit that ``space`` names.
        space: "pixels", the range [0, 1] of the images, about five grey levels of 256, and the
            same for every model; "normalised", the network's input, as libraries take it. Sums are
            not clipped in either.
        samples: 10 as in captum; the maximum grows with them.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: Yeh et al. 2019, arXiv:1901.09392; divided by the norm as in captum and Quantus. There a
    map of zeros has a denominator of 1, or an infinite score.
    """

    radius: Radius = 0.02
    space: Space = "pixels"
    samples: Samples = 10
    symbol: ClassVar[str] = "Smax"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "captum-0.9": {"space": "normalised"},
        "quantus-0.6": {"space": "normalised", "radius": 0.2, "samples": 200},
        "latec-2024": {"space": "normalised", "radius": 0.2},
    }

    def __call__(self, explanation: Explanation) -> Tensor:
        return explanation[self.changes].amax(1)


@metric("avg_sensitivity")
class AvgSensitivity(NearBy):
    """Average sensitivity: mean relative change of the map near the image, (N,); lower is better.

    As ``max_sensitivity``, with the mean over the same perturbations in place of the maximum. It
    does not grow with the number of samples. Both together cost what one does.

    Args:
        radius, space, samples: as for ``max_sensitivity``.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: Yeh et al. 2019, arXiv:1901.09392; the mean as in Quantus.
    """

    radius: Radius = 0.02
    space: Space = "pixels"
    samples: Samples = 10
    symbol: ClassVar[str] = "Savg"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quantus-0.6": {"space": "normalised", "radius": 0.2, "samples": 200},
    }

    def __call__(self, explanation: Explanation) -> Tensor:
        return explanation[self.changes].mean(1)
