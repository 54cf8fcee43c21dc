"""Metrics against object masks. Localisation is not faithfulness: they form a family of their own.

A mask that marks nothing, or all, has no object to find: the image's row is ``failed: mask``.
Pixels without a label are left out everywhere: they count neither for a map nor against it.

Each metric says how it reads a signed map, by ``sign``. Those that compare values with the mask
take the ``magnitude``, those that share out saliency as mass take what their source does, and those
that only order the pixels, or threshold them, are ``signed``: what speaks against the class comes
last. For maps that are not negative these are one and the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..errors import Unsupported
from ..maps import Sign, ranks, unit_range, with_sign
from ..orders import Permutation
from ..probe import Explanation, Need
from ..registry import metric

Share = Annotated[float, Field(ge=0, lt=1)]
MassSign = Literal["magnitude", "positive"]


def labelled(explanation: Explanation) -> tuple[Tensor, Tensor]:
    """Mask in {0, 1}, and 1 where it is known, else 0; both (N, H * W) float64.

    The latter is NaN throughout for an image without a usable mask, which makes its score NaN.

    Raises:
        Unsupported: if the data set has no masks.
    """
    masks = explanation.probe.batch.masks
    if masks is None:
        raise Unsupported("the data set has no object masks")
    flat = masks.flatten(1).double()
    known = flat.isfinite().double()
    mask = flat.nan_to_num(0.0)
    usable = (mask.sum(1) > 0) & (mask.sum(1) < known.sum(1))
    return mask, known.where(usable[:, None], torch.nan)


class AgainstMask:
    """What all share: a map, read by its sign rule, beside the mask."""

    sign: Sign
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    family: ClassVar[str] = "localisation"
    needs_masks: ClassVar[bool] = True
    undefined: ClassVar[str] = "failed: mask"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return ()

    def scaled(self, explanation: Explanation) -> tuple[Tensor, Tensor, Tensor]:
        """Map in [0, 1], mask, and where it is known, as :func:`labelled`; (N, H * W) float64."""
        saliency = unit_range(with_sign(explanation.saliency, self.sign)).flatten(1).double()
        return saliency, *labelled(explanation)

    def mass(self, explanation: Explanation) -> tuple[Tensor, Tensor, Tensor]:
        """The same without scaling: a share of the mass is not one of the mass above the lowest."""
        saliency = with_sign(explanation.saliency, self.sign).flatten(1).double()
        return saliency, *labelled(explanation)

    def ranking(self, explanation: Explanation) -> Tensor:
        """Place of each pixel among those with a label, 0 for the most salient, (N, H * W).

        Pixels without one follow behind. Ties are broken by one seeded permutation per image.
        """
        saliency = with_sign(explanation.saliency, self.sign)
        known = labelled(explanation)[1].view(saliency.shape) == 1
        order = ranks(saliency.where(known, -torch.inf), explanation[Permutation()])
        return order.flatten(1)


# --- map and mask, value by value -----------------------------------------------------------------


@metric("mae")
class MAE(AgainstMask):
    """Mean absolute error between map and object mask, (N,) in [0, 1]; lower is better.

    The map is scaled to [0, 1] per image. Guided AbsoluteGrad's tables print its square root, per
    image: ``mae_sqrt``.

    Args:
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Huang and Liu 2024, arXiv:2404.15564.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "MAE"
    better: ClassVar[Literal["higher", "lower"]] = "lower"

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.scaled(explanation)
        return ((saliency - mask).abs() * known).sum(1) / known.sum(1)


@metric("mae_sqrt")
class MAESqrt(MAE):
    """Square root of each image's mean absolute error, (N,) in [0, 1]; lower is better.

    What Guided AbsoluteGrad's tables print as MAE; its mean over images is not the root of theirs.

    Args:
        sign: how a signed map is read before it is scaled to [0, 1] per image.

    Source: Huang and Liu 2024, arXiv:2404.15564, by its authors' code.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "√MAE"

    def __call__(self, explanation: Explanation) -> Tensor:
        return super().__call__(explanation).sqrt()


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
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    range: ClassVar[tuple[float, float]] = (0.0, 0.434)

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.scaled(explanation)
        overlap = (saliency * mask * known).sum(1)
        total = (saliency * known).sum(1) + (mask * known).sum(1)
        loss = 1 - (2 * overlap + 1) / (total + 1)
        # log cosh x; torch's cosh rounds by the place in the batch
        return (loss + torch.log1p(torch.exp(-2 * loss)) - math.log(2)).clamp_min(0)


@metric("soft_iou")
class SoftIoU(AgainstMask):
    """Soft intersection over union of map and object mask, (N,) in [0, 1]; higher is better.

    sum min(S, M) / sum max(S, M), the map scaled to [0, 1] per image and not binarised. A constant
    map, being zeros after scaling, scores 0.

    Args:
        sign: how a signed map is read before it is scaled; magnitude, as for ``mae``.

    Source: Ruzicka 1958's similarity, which is Jaccard's index where the map is binary too.
    """

    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "sIoU"

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.scaled(explanation)
        shared = torch.minimum(saliency, mask) * known
        return shared.sum(1) / (torch.maximum(saliency, mask) * known).sum(1)


# --- every threshold at once ----------------------------------------------------------------------


class Levels(NamedTuple):
    """Each pixel's value as a threshold, pixels in descending order; all (N, H * W) float64.

    Equal pixels have equal entries, since no threshold parts them.

    Args:
        on_object: 1 where the pixel itself is on the object, else 0.
        inside, outside: how many pixels on the object, and off it, have at least this value.
        outside_above: how many off the object have a greater one.
    """

    on_object: Tensor
    inside: Tensor
    outside: Tensor
    outside_above: Tensor


@dataclass(frozen=True)
class MaskLevels(Need[Levels]):
    """A map and its mask at all thresholds that tell two pixels apart: one sort for many scores."""

    scope: ClassVar[Literal["batch", "map"]] = "map"
    sign: Sign

    def compute(self, on: Explanation) -> Levels:
        mask, known = labelled(on)
        values, order = (
            with_sign(on.saliency, self.sign).flatten(1).sort(dim=1, descending=True, stable=True)
        )
        place = torch.arange(values.shape[1], device=values.device).expand_as(order)
        differs = values[:, 1:] != values[:, :-1]
        edge = differs.new_ones(len(values), 1)
        first = place.where(torch.cat((edge, differs), 1), 0).cummax(1).values
        last = place.where(torch.cat((differs, edge), 1), place.shape[1])
        last = last.flip(1).cummin(1).values.flip(1)
        on_object = (mask * known).gather(1, order)
        off_object = ((1 - mask) * known).gather(1, order)
        outside = off_object.cumsum(1)
        return Levels(
            on_object,
            on_object.cumsum(1).gather(1, last),
            outside.gather(1, last),
            (outside - off_object).gather(1, first),
        )


class AtAllThresholds(AgainstMask):
    """What shares one sort."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (MaskLevels(self.sign),)


@metric("best_iou")
class BestIoU(AtAllThresholds):
    """Intersection over union at each image's best threshold, (N,) in [0, 1]; higher is better.

    The largest over all sets {S >= t}, t any of the map's values: exact, not over a grid. It says
    what a map could do if its threshold were known. The set may hold all pixels, so that no map,
    not even a constant one, scores less than the share of the object.

    Args:
        sign: signed, since a threshold on the map is meant.

    Source: Jaccard's index; the best threshold as in Choe et al. 2020, arXiv:2001.12268, who
    choose one for all images.
    """

    sign: Sign = "signed"
    symbol: ClassVar[str] = "IoU*"

    def __call__(self, explanation: Explanation) -> Tensor:
        at = explanation[MaskLevels(self.sign)]
        objects = at.on_object.sum(1, keepdim=True)
        return (at.inside / (objects + at.outside)).amax(1)


@metric("pixel_ap")
class PixelAP(AtAllThresholds):
    """Average precision of pixels as detections of the object, (N,) in [0, 1]; higher is better.

    sum over thresholds of (recall - recall before) x precision, without interpolation; pixels of
    equal value come at one threshold. A constant map scores the share of the object. Each image by
    itself: PxAP of arXiv:2001.12268 pools the pixels of all images instead.

    Args:
        sign: signed, since the map orders the pixels.

    Source: Choe et al. 2020, arXiv:2001.12268; average precision as in scikit-learn.
    """

    sign: Sign = "signed"
    symbol: ClassVar[str] = "AP"

    def __call__(self, explanation: Explanation) -> Tensor:
        at = explanation[MaskLevels(self.sign)]
        # pixels without a label may lead, and nothing is recovered yet
        precision = at.inside / (at.inside + at.outside).clamp_min(1)
        return (at.on_object * precision).sum(1) / at.on_object.sum(1)


@metric("pixel_auroc")
class PixelAUROC(AtAllThresholds):
    """Area under the ROC of pixels as detections of the object, (N,) in [0, 1]; higher is better.

    The probability that a pixel of the object has a larger value than one off it, equal values
    counting half. Chance, a constant map among it, scores 0.5.

    Args:
        sign: signed, since the map orders the pixels.

    Source: Hanley and McNeil 1982, Radiology 143, for the area as a probability.
    """

    sign: Sign = "signed"
    symbol: ClassVar[str] = "AUROC"

    def __call__(self, explanation: Explanation) -> Tensor:
        at = explanation[MaskLevels(self.sign)]
        beaten_by = (at.outside + at.outside_above) / 2
        pairs = at.on_object.sum(1) * at.outside[:, -1]
        return 1 - (at.on_object * beaten_by).sum(1) / pairs


# --- where saliency lies --------------------------------------------------------------------------


@metric("pointing_game")
class PointingGame(AgainstMask):
    """Pointing game: 1 where the map's point hits the object, else 0, (N,); higher is better.

    The point is the most salient pixel. It hits if it is on the object, or closer to it than the
    tolerance. Equal maxima are decided by one seeded permutation per image, the same for all
    methods: neither the first in raster order, which favours the upper left corner, nor any that
    hits. So a constant map points at random.

    Args:
        point: "maximum" as published. "centroid" is the mean place, rounded towards the upper
            left, of all pixels not below the order statistic of rank floor(0.7 K) of K pixels, that
            is of the most salient 30 %: preset ``gag-2024``. It may lie where there is no saliency,
            and of a map that is zero on 70 % of the pixels it is the middle of the image.
        tolerance: as a share of the longer side. 0.03 is the published 15 pixels on the 500 pixels
            of a PASCAL VOC image; 15 pixels at any size would hit nearly always on 32 x 32. Below
            one pixel it is none.
        sign: signed, as published. For the magnitude the point may be what speaks most against
            the class.

    Source: Zhang et al. 2018, Excitation Backprop, arXiv:1608.00507; tolerance as in TorchRay
    (Fong et al. 2019, arXiv:1910.08485). The centroid is that of Guided AbsoluteGrad's code.
    """

    point: Literal["maximum", "centroid"] = "maximum"
    tolerance: Share = 0.03
    sign: Sign = "signed"
    symbol: ClassVar[str] = "PG"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gag-2024": {"point": "centroid", "tolerance": 0.0, "sign": "magnitude"}
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Permutation(),) if self.point == "maximum" else ()

    def __call__(self, explanation: Explanation) -> Tensor:
        mask, known = labelled(explanation)
        height, width = explanation.saliency.shape[1:]
        pixel = torch.arange(height * width, device=mask.device)
        rows, columns = pixel // width, pixel % width
        row, column = (
            self._maximum(explanation, width)
            if self.point == "maximum"
            else self._centroid(explanation, rows, columns)
        )
        away = (rows - row[:, None]).square() + (columns - column[:, None]).square()
        reach = max(self.tolerance * max(height, width), 1)
        hit = ((away < reach * reach) & (mask > 0)).any(1)
        return hit.double().where(known[:, 0].isfinite(), torch.nan)

    def _maximum(self, explanation: Explanation, width: int) -> tuple[Tensor, Tensor]:
        point = self.ranking(explanation).argmin(1)
        return point // width, point % width

    def _centroid(
        self, explanation: Explanation, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        saliency, _, known = self.scaled(explanation)
        is_known = known == 1
        ascending = saliency.where(is_known, torch.inf).sort(dim=1, stable=True).values
        rank = (0.7 * is_known.sum(1).double()).floor().long().clamp_min(1)
        chosen = is_known & (saliency >= ascending.gather(1, rank[:, None] - 1))
        count = chosen.sum(1).clamp_min(1)
        return (chosen * rows).sum(1) // count, (chosen * columns).sum(1) // count


@metric("energy_pointing_game")
class EnergyPointingGame(AgainstMask):
    """Energy-based pointing game: share of positive saliency on the object, (N,) in [0, 1].

    Higher is better; a map without positive values scores 0. The map is not scaled.

    Args:
        region: "mask" counts the object's own pixels; "box" the smallest box around them, as
            published, where data had boxes only: preset ``scorecam-2020``.
        sign: positive, as published: class activation maps end with a ReLU. A signed mass could
            vanish, so there is none.

    Source: Wang et al. 2020, Score-CAM, arXiv:1910.01279.
    """

    region: Literal["mask", "box"] = "mask"
    sign: MassSign = "positive"
    symbol: ClassVar[str] = "EPG"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"scorecam-2020": {"region": "box"}}

    def __call__(self, explanation: Explanation) -> Tensor:
        saliency, mask, known = self.mass(explanation)
        if self.region == "box":
            mask = box_around(mask.view(explanation.saliency.shape)).flatten(1)
        return share_of_mass(saliency, mask, known)


@metric("relevance_mass")
class RelevanceMass(AgainstMask):
    """Relevance mass accuracy: share of the map's mass on the object, (N,) in [0, 1].

    Higher is better; a map of zeros scores 0, and any other constant map the share of the object.
    The map is not scaled.

    Args:
        sign: magnitude: the source pools relevance into values that are not negative, and what
            speaks against the class is relevance too. ``energy_pointing_game`` is the same for the
            positive part. A signed mass could vanish, so there is none.

    Source: Arras, Osman and Samek 2022, CLEVR-XAI, arXiv:2003.07258.
    """

    sign: MassSign = "magnitude"
    symbol: ClassVar[str] = "RMA"

    def __call__(self, explanation: Explanation) -> Tensor:
        return share_of_mass(*self.mass(explanation))


@metric("relevance_rank")
class RelevanceRank(AgainstMask):
    """Relevance rank accuracy: share of the K most salient pixels on the object, (N,) in [0, 1].

    K is the number of the object's pixels. Higher is better. Ties are broken by one seeded
    permutation per image, the same for all methods, so that a constant map has about the object's
    share of the image.

    Args:
        sign: signed, since the map orders the pixels.

    Source: Arras, Osman and Samek 2022, CLEVR-XAI, arXiv:2003.07258.
    """

    sign: Sign = "signed"
    symbol: ClassVar[str] = "RRA"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Permutation(),)

    def __call__(self, explanation: Explanation) -> Tensor:
        mask, known = labelled(explanation)
        objects = (mask * known).sum(1, keepdim=True)
        chosen = self.ranking(explanation) < objects
        return (chosen * mask).sum(1) / objects[:, 0]


def share_of_mass(saliency: Tensor, region: Tensor, known: Tensor) -> Tensor:
    """Share of the mass on pixels with a label that lies in the region, (N,); 0 without mass."""
    total = (saliency * known).sum(1)
    return (saliency * region * known).sum(1) / total.where(total != 0, 1)


def box_around(mask: Tensor) -> Tensor:
    """Smallest box that holds all pixels of a mask, as a mask; (N, H, W) both."""
    rows, columns = (
        side.cummax(1).values * side.flip(1).cummax(1).values.flip(1)
        for side in (mask.amax(2), mask.amax(1))
    )
    return rows[:, :, None] * columns[:, None, :]


# --- boxes ----------------------------------------------------------------------------------------


@metric("max_box_acc")
class MaxBoxAcc(AgainstMask):
    """Box accuracy: 1 where the map's box fits the object's, else 0, (N,); higher is better.

    The map is scaled to [0, 1] per image; its box at a threshold t is the smallest around the
    largest connected component of {S >= t}, corners connecting. It fits if its intersection over
    union with the smallest box around all of the mask's pixels reaches ``iou``. Of components equal
    in size, the seeded permutation of the image chooses one.

    With ``threshold="best"`` each image has its own best threshold, so the mean is an upper bound
    of the published MaxBoxAcc, which chooses one for the whole data set: the largest of the means
    over a list of thresholds, ``threshold: [0.0, 0.1, ...]``. The lowest threshold keeps all
    pixels, hence any map finds an object whose box fills half of the image: read it beside the
    controls.

    Components are found on the CPU, image by image and threshold by threshold; at 224 x 224 this
    takes about 0.1 s per map.

    Args:
        threshold: "best" of k / steps, k = 0 .. steps - 1, for each image; or one in [0, 1).
        steps: 100; the authors' code tries 1000.
        iou: 0.5 as published. Several are averaged, such as (0.3, 0.5, 0.7) of MaxBoxAccV2, which
            also tries all components, not the largest alone.
        sign: signed, since a threshold on the map is meant.

    Source: Choe et al. 2020, Evaluating Weakly Supervised Object Localization Methods Right,
    arXiv:2001.12268; V2 in arXiv:2007.04178.
    """

    threshold: Literal["best"] | Share = "best"
    steps: Annotated[int, Field(ge=1)] = 100
    iou: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.5,)
    sign: Sign = "signed"
    symbol: ClassVar[str] = "Box"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Permutation(),)

    @property
    def thresholds(self) -> list[float]:
        if self.threshold == "best":
            return [step / self.steps for step in range(self.steps)]
        return [self.threshold]

    def __call__(self, explanation: Explanation) -> Tensor:
        shape = explanation.saliency.shape
        saliency, mask, known = (part.view(shape) for part in self.scaled(explanation))
        visible = saliency.where(known == 1, -torch.inf).cpu().numpy()
        # less than half a pixel over a whole component: it decides between equal sizes alone
        lots = explanation[Permutation()].view(shape).double() / (2 * shape[1:].numel() ** 2)
        images = zip(visible, (mask > 0).cpu().numpy(), lots.cpu().numpy(), strict=True)
        best = [self._best_iou(*image) for image in images]
        found = known.new_tensor(best)[:, None] >= known.new_tensor(self.iou)
        return found.double().mean(1).where(known[:, 0, 0].isfinite(), torch.nan)

    def _best_iou(
        self, saliency: NDArray[Any], mask: NDArray[np.bool_], lots: NDArray[np.float64]
    ) -> float:
        wanted = _box(mask)
        levels = (saliency >= threshold for threshold in self.thresholds)
        return max(_iou(wanted, _box(_largest_component(level, lots))) for level in levels)


Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last."""


def _largest_component(chosen: NDArray[np.bool_], lots: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The pixels (H, W) of the largest component, by number and then by lot."""
    from scipy import ndimage  # slow to import, and for this metric alone

    labels, count = ndimage.label(chosen, np.ones((3, 3), dtype=int))
    if count < 2:
        return chosen
    weight = np.bincount(labels.ravel(), weights=(1 + lots).ravel())
    weight[0] = 0  # the background
    largest: NDArray[np.bool_] = labels == weight.argmax()
    return largest


def _box(pixels: NDArray[np.bool_]) -> Box:
    """The smallest box around the pixels; without any, an empty one."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _iou(one: Box, other: Box) -> float:
    height = min(one[1], other[1]) - max(one[0], other[0])
    width = min(one[3], other[3]) - max(one[2], other[2])
    shared = max(height, 0) * max(width, 0)
    areas = [(box[1] - box[0]) * (box[3] - box[2]) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1)
