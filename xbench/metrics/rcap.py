"""RCAP: recover an image from its map's partitions, and predict; and its two factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..baselines import BaselineImage, BaselineName
from ..maps import Sign
from ..masking import Shown, masked_probabilities, reading_of, shown
from ..orders import SortedMap
from ..probe import Explanation, Logits, Need
from ..registry import metric
from ..types import Line, Model, Passes

LowerBound = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[float, Field(ge=0.01, le=1)]
Compat = Literal["none", "authors"]


class Recovery(NamedTuple):
    """RCAP's partitions, each (N, S): share of the saliency, probability of the target, and whether
    the partition counts.
    """

    share: Tensor
    probability: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Partitions(Need[Recovery]):
    """RCAP's partitions of a map; how they are made is left open.

    Args:
        baseline: what is not recovered.
        sign: how the map is read before it is scaled.
        percents: recovered shares of the pixels, in percent.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    baseline: BaselineName
    sign: Sign
    percents: tuple[int, ...]


class Recovered(Partitions):
    """RCAP's partitions of a map, as published.

    With K pixels and the map scaled to [0, 1], the threshold of a fraction is the order statistic
    of rank floor(K (1 - fraction)); strictly greater pixels are recovered, or those equal to the
    maximum where the threshold is the maximum. All else is baseline. The partitions are points of a
    curve with ``ties="partition"``.
    """

    @property
    def points(self) -> tuple[Shown, ...]:
        return tuple(
            Shown("salient", Fraction(percent, 100), self.baseline, self.sign, "partition")
            for percent in self.percents
        )

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (SortedMap(self.sign), *self.points)

    def compute(self, on: Explanation) -> Recovery:
        chosen = torch.stack([point.mask(on) for point in self.points], dim=1)
        maps, _ = on[SortedMap(self.sign)]
        mass, total = _saliency(maps, chosen)
        share = mass / total.where(total > 0, 1)
        probability = reading_of(shown(on, self.points), "probability")
        return Recovery(share, probability, torch.ones_like(share, dtype=torch.bool))


class AuthorsRecovered(Partitions):
    """RCAP's partitions as the authors' code makes them.

    They differ where many pixels share the largest value, 1. A threshold of 1 is replaced by 0, so
    that all above 0 is recovered, and a pixel stays recovered for the partitions that follow. Yet
    if no two thresholds are equal, a first one of 1 does not count. The share of a zero map is NaN.
    """

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline), SortedMap(self.sign))

    def passes(self, model: Model) -> Passes:
        return Passes(len(self.percents), 0)

    def compute(self, on: Explanation) -> Recovery:
        maps, ascending = on[SortedMap(self.sign)]
        flat = maps.flatten(1)
        pixels = flat.shape[1]
        # their rank is a product in floating point, cut to a whole number
        ranked = [max(int(pixels * ((100 - percent) / 100)), 1) - 1 for percent in self.percents]
        threshold = ascending[:, ranked]  # (N, S), falling
        is_top = threshold == 1
        counts = ~(is_top & (threshold.diff(dim=1) != 0).all(1, keepdim=True))
        threshold = threshold.masked_fill(is_top, 0)
        chosen = flat[:, None] > threshold[..., None]
        chosen = chosen.view(*threshold.shape, *maps.shape[1:])
        mass, total = _saliency(maps, chosen)
        recovered = (chosen & counts[..., None, None]).cumsum(dim=1) > 0
        baseline = on[BaselineImage(self.baseline)]
        return Recovery(mass / total, masked_probabilities(on.probe, [recovered], baseline), counts)


def _saliency(maps: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of a map in each set of pixels (N, S, H, W), and in all: (N, S) and (N, 1) float64."""
    mass = (maps[:, None] * chosen.to(maps.dtype)).sum((2, 3), dtype=torch.float64)
    return mass, maps.sum((1, 2), dtype=torch.float64)[:, None]


@dataclass(frozen=True)
class Partitioned:
    """What the three metrics share."""

    lower_bound: LowerBound = 0.5
    interval: Interval = 0.1
    baseline: BaselineName = "black"
    sign: Sign = "magnitude"
    compat: Compat = "none"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    family: ClassVar[str] = "faithfulness"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    undefined: ClassVar[str] = "undefined: the map is zero"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gag-2024": {"compat": "authors"}}

    def __post_init__(self) -> None:
        for name in ("lower_bound", "interval"):
            percent = 100 * getattr(self, name)
            if abs(percent - round(percent)) > 1e-9:
                raise ValueError(f"{name} must be a whole number of hundredths, such as 0.05")

    @property
    def recovered(self) -> Partitions:
        # whole percents: a float range would end in a stray 100 % for some intervals
        last, step = round(100 * (1 - self.lower_bound)), round(100 * self.interval)
        percents = tuple(range(step, last + 1, step)) or (last,)
        made_by = AuthorsRecovered if self.compat == "authors" else Recovered
        return made_by(self.baseline, self.sign, percents)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.recovered,)

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        """Both factors over the recovered share; NaN where a partition does not count."""
        share, probability, counts = explanation[self.recovered]
        at = probability.new_tensor(self.recovered.percents) / 100
        factors = {"saliency": share, "probability": probability}
        return {key: Line(at, each.where(counts, float("nan"))) for key, each in factors.items()}


def mean(values: Tensor, counts: Tensor) -> Tensor:
    """(N,) over the partitions (N, S) that count."""
    return values.where(counts, 0).sum(1) / counts.sum(1)


@metric("rcap")
class RCAP(Partitioned):
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
        compat: "authors" has their code's rules for maps of which many pixels share the largest
            value: a threshold there becomes 0, and what was recovered stays so; where no two
            thresholds are equal, the first is left out. A zero map is then undefined. Their code
            may add a threshold of 100 % by rounding; not so here, nor with their settings.

    Raises:
        ValueError: if a bound or interval is no whole number of hundredths.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    symbol: ClassVar[str] = "RCAP"

    def __call__(self, explanation: Explanation) -> Tensor:
        share, probability, counts = explanation[self.recovered]
        return mean(share * probability, counts)


@metric("rcap_saliency")
class RCAPSaliency(Partitioned):
    """RCAP's first factor alone: mean share of saliency over partitions, (N,); higher is better.

    It reads the map and not the network: how much of it stands in few pixels. It takes no forward
    of its own beside RCAP.

    Args:
        lower_bound, interval, baseline, sign, compat: as for rcap.

    Raises:
        ValueError: if a bound or interval is no whole number of hundredths.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    symbol: ClassVar[str] = "RCAP-S"

    def __call__(self, explanation: Explanation) -> Tensor:
        share, _, counts = explanation[self.recovered]
        return mean(share, counts)


@metric("rcap_probability")
class RCAPProbability(Partitioned):
    """RCAP's second factor alone: mean probability over partitions, (N,); higher is better.

    It reads the map's order and not its values.

    Args:
        lower_bound, interval, baseline, sign, compat: as for rcap.

    Raises:
        ValueError: if a bound or interval is no whole number of hundredths.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    symbol: ClassVar[str] = "RCAP-P"

    def __call__(self, explanation: Explanation) -> Tensor:
        _, probability, counts = explanation[self.recovered]
        return mean(probability, counts)
