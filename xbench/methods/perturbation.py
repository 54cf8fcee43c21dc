"""Methods that change the image and watch the target: a sliding window, or random masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from .. import noise
from ..baselines import BaselineImage, BaselineName
from ..errors import Unsupported
from ..masking import masked_scores, target_logit
from ..probe import Logits, Need, Probe
from ..registry import method
from ..types import Model, Passes

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

BLOCK = 64
"""Random masks that are drawn at once."""


def added(probe: Probe, scores: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Masks (H, W), one after another, each times its score, one of (N, S): their sum (N, H, W).

    In float64 and one by one: a product of matrices would round by an image's place in the batch.
    """
    total = torch.zeros_like(probe.inputs[:, 0], dtype=torch.float64)
    for score, mask in zip(scores.unbind(1), masks, strict=True):
        total.addcmul_(score[:, None, None], mask.double())
    return total


@method("occlusion")
class Occlusion:
    """Occlusion: the logit's fall under a sliding window, averaged where windows overlap; signed.

    A square window slides from the upper left corner until it reaches the other edges, where it is
    cut off; its attribution is the target's logit minus the logit with the window at the baseline.
    A pixel gets the mean over the windows that cover it; maps (N, H, W).

    Args:
        window: its side, as a share of the image's shorter side, rounded to whole pixels.
        stride: step of the window, in the same unit and at most the window. The defaults, a quarter
            and an eighth, are near LATEC's 50 and 25 pixels at 224, and whole pixels at usual
            sizes; they cost 49 forwards on square images.
        baseline: what the window shows; "black" as in the metrics.

    Raises:
        ValueError: if the stride exceeds the window.

    Source: Zeiler and Fergus 2014, arXiv:1311.2901.
    """

    window: Share = 0.25
    stride: Share = 0.125
    baseline: BaselineName = "black"

    # 50 and 25 pixels at 224 x 224, on the normalised zero
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "latec-2024": {"window": 0.223, "stride": 0.112, "baseline": "mean"}
    }

    def __post_init__(self) -> None:
        if self.stride > self.window:
            raise ValueError(
                f"stride {self.stride} exceeds window {self.window}, so that pixels between the "
                "windows would get no attribution"
            )

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        if model.size is None:
            raise Unsupported(
                f"the number of windows depends on the size of {model.name!r}'s images"
            )
        return Passes(math.prod(len(self._along(side, model.size)) for side in model.size), 0)

    def _along(self, side: int, size: tuple[int, int]) -> Tensor:
        """Which pixels of a side each step of the window covers, (steps, side) bool."""
        window, stride = (max(round(share * min(size)), 1) for share in (self.window, self.stride))
        starts = stride * torch.arange(math.ceil((side - window) / stride) + 1)[:, None]
        at = torch.arange(side)
        return (at >= starts) & (at < starts + window)

    def __call__(self, probe: Probe) -> Tensor:
        height, width = probe.inputs.shape[-2:]
        rows, columns = (
            self._along(side, (height, width)).to(probe.inputs.device) for side in (height, width)
        )

        def windows() -> Iterator[Tensor]:
            return (row[:, None] & column for row in rows for column in columns)

        left = masked_scores(
            probe,
            (~window[None, None] for window in windows()),
            probe[BaselineImage(self.baseline)],
            read=target_logit,
        )
        fall = target_logit(probe[Logits()], probe.target)[:, None] - left
        covering = rows.sum(0)[:, None] * columns.sum(0)
        return (added(probe, fall, windows()) / covering).to(probe.inputs.dtype)


@method("rise")
class RISE:
    """RISE: random masks, averaged by the probability that they leave; maps (N, H, W), >= 0.

    A grid of cells, each kept with probability p1, grows bilinearly to one cell more than the image
    and is cut to the image at a random shift of less than a cell. The map is the sum of masks times
    the target's probability on the masked image, over samples times p1. The masks depend on the
    seed alone: they are the same for all images, and more samples begin with those of fewer.

    Args:
        samples: masks; 4000 as published for VGG-16 (8000 for ResNet-50). Each costs a forward.
        cells: of the grid on either side, 7 as published.
        p1: probability that a cell is kept, 0.5 as published.
        baseline: what masked pixels become; "mean", as the authors multiply the normalised image.

    Source: Petsiuk et al. 2018, arXiv:1806.07421.
    """

    samples: Count = 4000
    cells: Count = 7
    p1: Share = 0.5
    baseline: BaselineName = "mean"

    # what the authors' published script uses
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rise-2018-script": {"samples": 6000, "cells": 8, "p1": 0.1}
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(self.samples, 0)

    def masks(self, probe: Probe) -> Iterator[Tensor]:
        """The masks (H, W) in [0, 1], one after another, drawn anew at every call."""
        for start in range(0, self.samples, BLOCK):
            yield from self._drawn(probe, start, min(start + BLOCK, self.samples))

    def _drawn(self, probe: Probe, start: int, stop: int) -> Tensor:
        """Masks of these numbers, (S, H, W).

        Each has a stream of its own: the cells row by row, then the shifts down and to the right.
        """
        device, dtype = probe.inputs.device, probe.inputs.dtype
        names = [f"mask {number}" for number in range(start, stop)]
        streams = noise.stream_keys(probe.seed, names, "rise", device=device)
        drawn = noise.uniform(streams, self.cells**2 + 2).double()
        kept = (drawn[:, :-2] < self.p1).view(-1, self.cells, self.cells).to(dtype)
        for side, share in zip(probe.inputs.shape[-2:], drawn[:, -2:].unbind(1), strict=True):
            cell = math.ceil(side / self.cells)  # in pixels; the grid grows to cells + 1 of them
            pixel = torch.arange(side, device=device) + (share * cell).floor()[:, None]
            at = (pixel + 0.5) * self.cells / ((self.cells + 1) * cell) - 0.5
            kept = _between(kept, at).mT  # first the rows, then the columns
        return kept

    def __call__(self, probe: Probe) -> Tensor:
        left = masked_scores(
            probe,
            (mask[None, None] for mask in self.masks(probe)),
            probe[BaselineImage(self.baseline)],
        )
        total = added(probe, left, self.masks(probe))
        return (total / (self.samples * self.p1)).to(probe.inputs.dtype)


def _between(values: Tensor, at: Tensor) -> Tensor:
    """Rows of (S, k, m) at fractional places (S, n), linear between them: (S, n, m)."""
    at = at.clamp(0, values.shape[1] - 1)
    below, above = (
        values.take_along_dim(place.long()[..., None], 1) for place in (at.floor(), at.ceil())
    )
    return torch.lerp(below, above, at.frac()[..., None].to(values.dtype))
