"""ROAD: remove and debias; pixels go and are filled in from their neighbours.

What a mask's shape says of the class leaks through a constant baseline, so the removed pixels
become the weighted mean of their neighbours, plus a little noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..maps import Sign
from ..masking import Imputation, Reading, Shown, exactly, reading_of, shown
from ..probe import Explanation, Need
from ..registry import metric
from ..types import Line

Levels = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
Noise = Annotated[float, Field(ge=0, le=1)]
Space = Literal["pixels", "normalised"]
Lerf = Literal["share", "complement"]

TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Imputed:
    """What the three share: points of a curve whose removed pixels are imputed."""

    levels: Levels = TENTHS
    noise: Noise = 0.01
    space: Space = "pixels"
    sign: Sign = "signed"
    read: Reading = "probability"
    family: ClassVar[str] = "faithfulness"

    def points(self, keep: Literal["salient", "rest"], flipped: bool = False) -> tuple[Shown, ...]:
        """One for each level, which is the share that goes, or that stays if flipped."""
        fill = Imputation(self.noise, self.space)
        shares = (exactly(level) if flipped else 1 - exactly(level) for level in self.levels)
        return tuple(Shown(keep, share, fill, self.sign) for share in shares)

    def line(self, explanation: Explanation, points: tuple[Shown, ...]) -> Line:
        """What is read over the share that goes."""
        values = reading_of(shown(explanation, points), self.read)
        return Line(values.new_tensor([float(1 - point.share) for point in points]), values)

    def mean(self, explanation: Explanation, points: tuple[Shown, ...]) -> Tensor:
        return self.line(explanation, points).values.mean(1)

    def span(self, low: float, high: float) -> tuple[float, float]:
        return (low, high) if self.read == "probability" else (float("-inf"), float("inf"))


@metric("road")
class ROAD(Imputed):
    """ROAD: (LeRF - MoRF) / 2, averaged over levels, (N,) in [-0.5, 0.5]; higher is better.

    At each level a share of the pixels is imputed: the most salient for MoRF, the least salient
    for LeRF, an exact number of them, ties by the seeded permutation of all metrics. Each becomes
    the weighted mean of its eight neighbours, solved for all at once, plus noise that is one field
    per image, the same for all maps and levels. What is left of the target's probability is
    averaged. A map that is constant scores about 0. An image of which every pixel goes, as a single
    one, becomes the mean colour.

    Args:
        levels: shares of the pixels that go; tenths as in pytorch-grad-cam.
        noise: standard deviation of the noise on imputed pixels; 0.01 as in the authors' code.
        space: where it is that; pixels in [0, 1], as in the authors' code.
        sign: how a signed map is read before it is ranked.
        lerf: "share" imputes the least salient share; "complement" keeps the most salient share,
            and imputes the rest, as the authors' code reads a level.
        read: the target's probability, or its logit; (N,) has then no bounds.

    Source: Rong et al. 2022, arXiv:2202.00449. The authors' code adds small noise to break ties,
    and reports accuracy too. pytorch-grad-cam imputes all pixels at or above a percentile, hence
    more than asked for on maps with equal values; here the number is exact in its preset too.
    """

    lerf: Lerf = "share"
    symbol: ClassVar[str] = "ROAD"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "road-2022": {"levels": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), "lerf": "complement"},
        "pgc-1.5": {"space": "normalised", "read": "logit"},
    }

    @property
    def range(self) -> tuple[float, float]:
        return self.span(-0.5, 0.5)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (*self.points("rest"), *self.points("salient", self.lerf == "complement"))

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        lerf = self.points("salient", self.lerf == "complement")
        return {
            "lerf": self.line(explanation, lerf),
            "morf": self.line(explanation, self.points("rest")),
        }

    def __call__(self, explanation: Explanation) -> Tensor:
        morf = self.mean(explanation, self.points("rest"))
        lerf = self.mean(explanation, self.points("salient", self.lerf == "complement"))
        return (lerf - morf) / 2


@metric("road_morf")
class RoadMoRF(Imputed):
    """ROAD's most relevant first: mean probability once they are imputed, (N,); lower is better.

    Args:
        levels, noise, space, sign, read: as for road, with which it shares its forwards.

    Source: Rong et al. 2022, arXiv:2202.00449.
    """

    symbol: ClassVar[str] = "ROAD-MoRF"
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "road-2022": {"levels": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)},
        "pgc-1.5": {"space": "normalised", "read": "logit"},
    }

    @property
    def range(self) -> tuple[float, float]:
        return self.span(0.0, 1.0)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return self.points("rest")

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        return {"": self.line(explanation, self.points("rest"))}

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.mean(explanation, self.points("rest"))


@metric("road_lerf")
class RoadLeRF(Imputed):
    """ROAD's least relevant first: mean probability once they are imputed, (N,); higher is better.

    Args:
        levels, noise, space, sign, lerf, read: as for road, with which it shares its forwards.

    Source: Rong et al. 2022, arXiv:2202.00449.
    """

    lerf: Lerf = "share"
    symbol: ClassVar[str] = "ROAD-LeRF"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "road-2022": {"levels": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), "lerf": "complement"},
        "pgc-1.5": {"space": "normalised", "read": "logit"},
    }

    @property
    def range(self) -> tuple[float, float]:
        return self.span(0.0, 1.0)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return self.points("salient", self.lerf == "complement")

    def curves(self, explanation: Explanation) -> dict[str, Line]:
        return {"": self.line(explanation, self.points("salient", self.lerf == "complement"))}

    def __call__(self, explanation: Explanation) -> Tensor:
        return self.mean(explanation, self.points("salient", self.lerf == "complement"))
