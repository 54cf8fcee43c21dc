"""Localisation and complexity beside Quantus, scikit-learn, scikit-image, SciPy and formulas.

References take one image at a time, since some of Quantus' scores depend on the batch, and know
nothing of our functions. Maps are signed noise with values of their own, or rounded so that most
pixels are tied; masks have pixels without a label only where the reference is a formula.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import quantus
import torch
from comparison import Comparison
from numpy.typing import NDArray
from scipy import ndimage, stats
from skimage import measure
from sklearn import metrics as sklearn
from torch import Tensor, nn

from xbench import registry
from xbench.probe import Explanation, Probe
from xbench.types import Batch, Model

Array = NDArray[np.float64]
Reference = Callable[[Array, Array], float]
"""A map and its mask, (H, W) each, to a score."""

COUNT, HEIGHT, WIDTH = 12, 16, 20


def maps(kind: str) -> Tensor:
    noise = torch.randn(
        COUNT, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    some_flat = noise.where(torch.arange(COUNT)[:, None, None] % 3 > 0, 1)
    kinds = {"signed": noise, "smooth": smooth, "tied": (2 * noise).round(), "flat": some_flat}
    return kinds[kind]


def masks(unlabelled: bool) -> Tensor:
    """A ragged disc per image, each somewhere else, and perhaps a strip that nobody labelled."""
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    centre = 4 + torch.arange(COUNT)[:, None, None] % 7
    away = ((rows - centre).square() + (columns - centre - 3).square()).sqrt()
    found = (away + maps("signed").roll(1, 0) < 4).double()
    if unlabelled:
        found[:, :6] = torch.nan
    return found


def compared(
    name: str,
    reference: Reference,
    params: Mapping[str, Any],
    kind: str = "signed",
    unlabelled: bool = False,
) -> tuple[Tensor, Tensor]:
    saliency, mask = maps(kind), masks(unlabelled)
    images = torch.zeros(COUNT, 3, HEIGHT, WIDTH, dtype=torch.float64)
    keys = tuple(map(str, range(COUNT)))
    probe = Probe(Model("any", nn.Identity()), Batch(images, torch.zeros(COUNT), keys, mask))
    ours = registry.make("metrics", name, params)(Explanation(probe, saliency))
    pairs = zip(saliency.numpy(), mask.numpy(), strict=True)
    return ours, torch.tensor([float(reference(*pair)) for pair in pairs], dtype=torch.float64)


def comparison(
    name: str,
    words: str,
    reference: Reference,
    params: Mapping[str, Any] | None = None,
    kind: str = "signed",
    unlabelled: bool = False,
    **facts: Any,
) -> Comparison:
    params = params or {}
    compute = partial(compared, name, reference, params, kind, unlabelled)
    return Comparison(name, words, compute, params, kind="metrics", **facts)


def by_quantus(metric: str, **options: Any) -> Reference:
    def score(saliency: Array, mask: Array) -> float:
        options.setdefault("abs", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scorer = getattr(quantus, metric)(disable_warnings=True, **options)
            (found,) = scorer(
                model=None,
                x_batch=np.zeros((1, 3, *saliency.shape)),
                y_batch=np.zeros(1, dtype=int),
                a_batch=saliency[None, None].copy(),
                s_batch=mask[None, None].copy(),
            )
        return float(found)

    return score


# --- formulas, pixel by pixel ---------------------------------------------------------------------


def scaled(saliency: Array) -> Array:
    size = np.abs(saliency)
    return (size - size.min()) / (size.max() - size.min())


def pairs_of(saliency: Array, mask: Array) -> list[tuple[float, float]]:
    flat = zip(scaled(saliency).ravel().tolist(), mask.ravel().tolist(), strict=True)
    return [(value, mark) for value, mark in flat if mark == mark]


def mean_error(saliency: Array, mask: Array) -> float:
    pairs = pairs_of(saliency, mask)
    return sum(abs(value - mark) for value, mark in pairs) / len(pairs)


def dice(saliency: Array, mask: Array) -> float:
    pairs = pairs_of(saliency, mask)
    shared = 2 * sum(value * mark for value, mark in pairs) + 1
    return float(np.log(np.cosh(1 - shared / (sum(value + mark for value, mark in pairs) + 1))))


def soft_jaccard(saliency: Array, mask: Array) -> float:
    pairs = pairs_of(saliency, mask)
    return sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)


def best_jaccard(saliency: Array, mask: Array) -> float:
    return max(
        float(sklearn.jaccard_score(mask.ravel(), (saliency >= threshold).ravel()))
        for threshold in np.unique(saliency)
    )


def best_of_all_thresholds(saliency: Array, mask: Array) -> float:
    known, found = ~np.isnan(mask), mask == 1
    levels = [(saliency >= threshold) & known for threshold in saliency.ravel()]
    return max(float((level & found).sum() / (level | found).sum()) for level in levels)


def near_the_maximum(share: float, saliency: Array, mask: Array) -> float:
    away = ndimage.distance_transform_edt(mask != 1)
    known = np.where(np.isnan(mask), -np.inf, saliency)
    place = np.unravel_index(known.argmax(), known.shape)
    return float(away[place] < max(share * max(mask.shape), 1))


def at_the_centroid(saliency: Array, mask: Array) -> float:
    size = scaled(saliency)
    level = np.sort(size.ravel())[int(0.7 * size.size) - 1]
    rows, columns = np.nonzero(size >= level)
    return float(mask[int(rows.mean()), int(columns.mean())] == 1)


def energy(boxed: bool, saliency: Array, mask: Array) -> float:
    region = np.zeros(mask.shape, dtype=bool)
    if boxed:
        (found,) = measure.regionprops((mask == 1).astype(int))
        top, left, bottom, right = found.bbox
        region[top:bottom, left:right] = True
    else:
        region = mask == 1
    positive = np.where((saliency > 0) & ~np.isnan(mask), saliency, 0)
    return float(positive[region].sum() / positive.sum())


def box_fits(
    thresholds: list[float], iou: tuple[float, ...], saliency: Array, mask: Array
) -> float:
    """Boxes as sets of pixels."""
    span = (saliency - saliency.min()) / (saliency.max() - saliency.min())

    def box(found: Any) -> set[tuple[int, int]]:
        top, left, bottom, right = found.bbox
        return {(row, column) for row in range(top, bottom) for column in range(left, right)}

    (wanted,) = (box(found) for found in measure.regionprops((mask == 1).astype(int)))
    best = 0.0
    for threshold in thresholds:
        parts = measure.regionprops(measure.label(span >= threshold, connectivity=2))
        largest = box(max(parts, key=lambda part: part.area))
        best = max(best, len(wanted & largest) / len(wanted | largest))
    return float(np.mean([best >= needed for needed in iou]))


def gini(saliency: Array, _: Array) -> float:
    size = np.abs(saliency).ravel()
    return float(np.abs(np.subtract.outer(size, size)).sum() / (2 * size.size * size.sum()))


def tied(saliency: Array, _: Array) -> float:
    _, counts = np.unique(saliency, return_counts=True)
    return float(counts[counts > 1].sum() / saliency.size)


def grey_levels(saliency: Array, _: Array) -> float:
    counts, _ = np.histogram(scaled(saliency), bins=256)
    return float(stats.entropy(counts, base=2))


def pixels(score: Callable[[Array, Array], float]) -> Reference:
    return lambda saliency, mask: score(mask.ravel(), saliency.ravel())


HUNDRED = [step / 100 for step in range(100)]
V2 = (0.3, 0.5, 0.7)

COMPARISONS: tuple[Comparison, ...] = (
    comparison("mae", "definition, pixel by pixel", mean_error, unlabelled=True),
    comparison(
        "mae_sqrt",
        "definition, pixel by pixel",
        lambda *pair: mean_error(*pair) ** 0.5,
        unlabelled=True,
    ),
    comparison("log_cosh_dice", "definition, pixel by pixel", dice, unlabelled=True),
    comparison("soft_iou", "definition, pixel by pixel", soft_jaccard, unlabelled=True),
    comparison("best_iou", "definition, at every value", best_of_all_thresholds, unlabelled=True),
    comparison("best_iou", "scikit-learn jaccard_score at every value, most pixels tied",
               best_jaccard, kind="tied"),
    comparison("pixel_ap", "scikit-learn average_precision_score",
               pixels(sklearn.average_precision_score)),
    comparison("pixel_ap", "the same, most pixels tied",
               pixels(sklearn.average_precision_score), kind="tied"),
    comparison("pixel_auroc", "scikit-learn roc_auc_score", pixels(sklearn.roc_auc_score)),
    comparison("pixel_auroc", "the same, most pixels tied",
               pixels(sklearn.roc_auc_score), kind="tied"),
    comparison("pixel_auroc", "Quantus AUC", by_quantus("AUC")),
    comparison("pointing_game", "Quantus PointingGame, one image at a time",
               by_quantus("PointingGame"), {"tolerance": 0.0}),
    comparison("pointing_game", "definition, SciPy distance_transform_edt",
               partial(near_the_maximum, 0.15), {"tolerance": 0.15}, unlabelled=True),
    comparison("pointing_game", "definition, in NumPy", at_the_centroid,
               {"preset": "gag-2024"}, kind="smooth"),
    comparison("energy_pointing_game", "definition, in NumPy",
               partial(energy, False), unlabelled=True),
    comparison("energy_pointing_game", "definition, scikit-image regionprops for the box",
               partial(energy, True), {"preset": "scorecam-2020"}, unlabelled=True),
    comparison("relevance_mass", "Quantus RelevanceMassAccuracy",
               by_quantus("RelevanceMassAccuracy", abs=True)),
    comparison("relevance_rank", "Quantus RelevanceRankAccuracy",
               by_quantus("RelevanceRankAccuracy")),
    comparison("relevance_rank", "Quantus TopKIntersection, k = pixels of the mask",
               lambda saliency, mask: by_quantus("TopKIntersection", k=int(mask.sum()))(
                   saliency, mask)),
    comparison("max_box_acc", "scikit-image label and regionprops, boxes as sets of pixels",
               partial(box_fits, HUNDRED, (0.5,)), kind="smooth"),
    comparison("max_box_acc", "scikit-image label and regionprops, boxes as sets of pixels",
               partial(box_fits, [0.6], V2), {"threshold": 0.6, "iou": V2}, kind="smooth"),
    comparison("sparseness", "definition, mean difference of all pairs", gini),
    comparison("sparseness", "Quantus Sparseness", by_quantus("Sparseness", abs=True),
               tolerance=1e-6, reason="Quantus adds 1e-7 to each value, relative to the maximum"),
    comparison("entropy", "SciPy stats.entropy of the magnitudes",
               lambda saliency, _: float(stats.entropy(np.abs(saliency).ravel()))),
    comparison("entropy", "Quantus Complexity", by_quantus("Complexity", abs=True),
               tolerance=1e-9, reason="Quantus adds 1e-12 inside the logarithm"),
    comparison("entropy", "NumPy histogram and SciPy stats.entropy",
               grey_levels, {"preset": "gag-2024"}),
    comparison("effective_complexity", "Quantus EffectiveComplexity, one image at a time",
               by_quantus("EffectiveComplexity", abs=True, eps=0.2), {"eps": 0.2}),
    comparison("degenerate_maps", "definition, NumPy ptp",
               lambda saliency, _: float(np.ptp(saliency) == 0), kind="flat"),
    comparison("tied_pixels", "NumPy unique", tied, kind="tied"),
    comparison("mean_mass", "definition, in NumPy",
               lambda saliency, _: float(scaled(saliency).mean())),
)  # fmt: skip
