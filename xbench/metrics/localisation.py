"""Metrics against object masks. Localisation is not faithfulness: they form a family of their own.

A mask that marks nothing, or all, has no object to find: the image's row is ``failed: mask``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Unsupported
from ..maps import Sign, unit_range, with_sign
from ..probe import Explanation, Need
from ..registry import metric


class AgainstMask:
    """What both share: map and mask as (N, H * W), with the pixels that are labelled."""

    sign: Sign
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "localisation"
    needs_masks: ClassVar[bool] = True
    undefined: ClassVar[str] = "failed: mask"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return ()

    def pixels(self, explanation: Explanation) -> tuple[Tensor, Tensor, Tensor]:
        """Map in [0, 1], mask in {0, 1}, and 1 where the mask is known, else 0; float64.

        The last is NaN throughout for an image without a usable mask, which makes its score NaN.

        Raises:
            Unsupported: if the data set has no masks.
        """
        masks = explanation.probe.batch.masks
        if masks is None:
            raise Unsupported("the data set has no object masks")
        saliency = unit_range(with_sign(explanation.saliency, self.sign)).flatten(1).double()
        flat = masks.flatten(1).double()
        known = flat.isfinite().double()
        mask = flat.nan_to_num(0.0)
        usable = (mask.sum(1) > 0) & (mask.sum(1) < known.sum(1))
        return saliency, mask, known.where(usable[:, None], torch.nan)


@metric("mae")
class MAE(AgainstMask):
    """Mean absolute error between map and object mask, (N,) in [0, 1]; lower is better.

    Guided AbsoluteGrad's tables print its square root, per image.

    Args:
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Huang and Liu 2024, arXiv:2404.15564.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "MAE"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.pixels(explanation)
        return ((saliency - mask).abs() * known).sum(1) / known.sum(1)


@metric("log_cosh_dice")
class LogCoshDice(AgainstMask):
    """Log-cosh Dice loss between map and object mask, (N,) in [0, 0.434]; lower is better.

    log cosh(1 - (2 sum S M + 1) / (sum S + sum M + 1)), the map not binarised.

    Args:
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Jadon 2020, arXiv:2006.14822; as used in arXiv:2404.15564.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "LCD"
    range: ClassVar[tuple[float, float]] = (0.0, 0.434)

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.pixels(explanation)
        overlap = (saliency * mask * known).sum(1)
        total = (saliency * known).sum(1) + (mask * known).sum(1)
        loss = 1 - (2 * overlap + 1) / (total + 1)
        # log cosh x; torch's cosh rounds by the place in the batch
        return (loss + torch.log1p(torch.exp(-2 * loss)) - math.log(2)).clamp_min(0)
