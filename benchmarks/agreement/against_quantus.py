"""The adapter of Quantus beside Quantus called by hand, and what it mends beside definitions.

By hand: four images, each in a call of its own, on zeros after normalisation, with the random
numbers of the image's own stream. What the adapter changes on purpose is compared with a loop
written from the formula.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import quantus
import torch
from comparison import TARGET, Comparison
from numpy.typing import NDArray
from scipy.stats import spearmanr
from skimage.segmentation import slic
from torch import Tensor, nn

from xbench import noise, registry
from xbench.autograd import prepared
from xbench.probe import Explanation, Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

Array = NDArray[Any]

SIDE = 16
BY_HAND = f"quantus {version('quantus')}, by hand"
FLOAT32 = "Quantus' images are float32"
LOOP = "definition in float64, image by image"


@functools.cache
def sharp() -> Model:
    """The toy network with logits far apart, so that perturbed images score unlike the clean."""
    model = toy_model()
    assert isinstance(model.net, nn.Sequential)
    last = model.net[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data *= 40
    return model


class FromFloat32(nn.Module):
    """The same network for a library that hands over float32 images; its layers keep their names.

    They are the children of the network in the same order.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, module in sharp().net.named_children():
            self.add_module(name, module)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = sharp().net(images.double())
        return logits


@functools.cache
def given(kind: str = "noise") -> tuple[Batch, Tensor]:
    """Four images with masks, and signed maps; "smooth" images have superpixels."""
    batch = toy_batch(4)
    maps = torch.randn(
        4, SIDE, SIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    assert batch.masks is not None
    maps[:2] += 3 * batch.masks[:2]  # so that some point at the object
    if kind == "noise":
        return batch, maps
    ramp = torch.linspace(0, 1, 4 * SIDE, dtype=torch.float64)
    rows, columns = ramp.view(4, SIDE, 1), ramp.flip(0).view(4, 1, SIDE)
    colours = torch.stack((rows + 0 * columns, 0 * rows + columns, (rows - columns).abs()), dim=1)
    return Batch(colours, batch.labels, batch.keys, batch.masks), maps


def ours(name: str, params: Mapping[str, Any], kind: str) -> Tensor:
    batch, maps = given(kind)
    method = registry.make("methods", "gradient")
    with prepared(sharp().net):
        probe = Probe(sharp(), batch, target=TARGET)
        found: Tensor = registry.make("metrics", name, params)(Explanation(probe, maps, method))
    return found


def gradient(model: Any, inputs: Any, targets: Any, **_: Any) -> Array:
    """What ``gradient`` gives, in one's own words."""
    images = torch.tensor(np.asarray(inputs), dtype=torch.float64, requires_grad=True)
    logits = sharp().net(images)
    logits[torch.arange(len(images)), torch.as_tensor(targets)].sum().backward()
    assert images.grad is not None
    return images.grad.abs().sum(1, keepdim=True).numpy()


def theirs(name: str, options: Mapping[str, Any], call: Mapping[str, Any], kind: str) -> Tensor:
    batch, maps = given(kind)
    assert batch.masks is not None
    inputs = sharp().normalise(batch.images)
    streams = noise.stream_keys(0, batch.keys, f"quantus/{name}").tolist()
    scores = []
    for at, stream in enumerate(streams):
        one = slice(at, at + 1)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            noise.seeded(stream, torch.device("cpu")),
        ):
            warnings.simplefilter("ignore")
            (score,) = getattr(quantus, name)(
                disable_warnings=True, return_aggregate=False, **options
            )(
                model=FromFloat32(),
                x_batch=inputs[one].numpy().copy(),
                y_batch=TARGET[one].numpy(),
                a_batch=maps[one, None].numpy().copy(),
                s_batch=batch.masks[one, None].numpy(),
                explain_func=gradient,
                channel_first=True,
                device="cpu",
                **call,
            )
        scores.append(float(np.trapezoid(score, dx=1 / len(score)) if np.ndim(score) else score))
    return torch.tensor(scores, dtype=torch.float64)


def by_hand(
    name: str,
    params: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    tolerance: float = 1e-9,
    reason: str = "",
    **options: Any,
) -> Comparison:
    """With parameters of the same names, and others as ``options``."""
    params = dict(params or {})
    shared = {key: value for key, value in params.items() if key not in ("softmax", *options)}
    for key in ("normalise_func", "similarity_func"):
        if key in shared:
            shared[key] = getattr(importlib.import_module(f"quantus.functions.{key}"), shared[key])

    def both() -> tuple[Tensor, Tensor]:
        reference = theirs(name, {**shared, **options}, call or {}, "noise")
        return ours(f"quantus/{name}", params, "noise"), reference

    return Comparison(f"quantus/{name}", BY_HAND, both, params, tolerance, reason, "metrics")


# --- what the adapter mends, as loops -------------------------------------------------------------


def score(image: Tensor, at: int, softmax: bool) -> float:
    """Of the target on an image in network space."""
    logits = sharp().net(image[None])[0]
    return float((logits.softmax(0) if softmax else logits)[TARGET[at]])


def defined(
    name: str,
    formula: Callable[[Tensor, Tensor, int], float],
    params: Mapping[str, Any],
    kind: str = "noise",
) -> Comparison:
    def both() -> tuple[Tensor, Tensor]:
        batch, maps = given(kind)
        images = sharp().normalise(batch.images)
        values = [
            formula(image, saliency, at)
            for at, (image, saliency) in enumerate(zip(images, maps, strict=True))
        ]
        reference = torch.tensor(values, dtype=torch.float64)
        return ours(f"quantus/{name}", params, kind), reference

    return Comparison(f"quantus/{name}", LOOP, both, params, 1e-5, FLOAT32, "metrics")


BLACK = sharp().normalise(torch.zeros(3, 1, 1, dtype=torch.float64))[0]
"""In network space, (3, 1, 1)."""


def patches(size: int) -> list[tuple[slice, slice]]:
    starts = range(0, SIDE, size)
    return [(slice(row, row + size), slice(col, col + size)) for row in starts for col in starts]


def infidelity(image: Tensor, saliency: Tensor, at: int) -> float:
    """Each patch by itself goes to black."""
    clean, errors = score(image, at, False), []
    for rows, columns in patches(8):
        without = image.clone()
        without[:, rows, columns] = BLACK
        told = float((saliency * (image - without)).sum())
        errors.append((clean - score(without, at, False) - told) ** 2)
    return float(np.mean(errors))


def dropping(image: Tensor, saliency: Tensor, at: int) -> list[float]:
    """Scores as patches go to black for good, most relevant first."""
    found, without = [], image.clone()
    for rows, columns in sorted(patches(4), key=lambda p: -float(saliency[p].sum())):
        without[:, rows, columns] = BLACK
        found.append(score(without, at, False))
    return found


def area(curve: list[float]) -> float:
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / len(curve)


def rising(image: Tensor, saliency: Tensor, at: int) -> float:
    """Whether the score never falls as the channels of pixels come back, least relevant first."""
    order = saliency.abs().expand(3, -1, -1).flatten().numpy().argsort()
    shown = BLACK.expand_as(image).clone().flatten()
    scores = []
    for step in order.reshape(3, -1):
        shown[step] = image.flatten()[step]
        scores.append(score(shown.view_as(image), at, True))
    return float(scores == sorted(scores))


def over_superpixels(image: Tensor, saliency: Tensor, at: int) -> float:
    """Superpixels go to the mean colour, by mean attribution; their number less the area."""
    parts = slic(image.movedim(0, -1).numpy(), start_label=0)
    names = range(parts.max() + 1)
    without, ratios = image.clone(), []
    clean = score(image, at, True)
    for name in sorted(names, key=lambda n: -float(saliency[torch.from_numpy(parts == n)].mean())):
        without[:, torch.from_numpy(parts == name)] = 0
        ratios.append(score(without, at, True) / clean)
    return len(ratios) - float(np.trapezoid(ratios))


def untouched(image: Tensor, saliency: Tensor, at: int) -> float:
    """Rank correlation of attributions with the squared change that a black feature makes."""
    size = saliency.abs().expand(3, -1, -1).flatten()
    order = size.numpy().argsort()
    sums, spreads = [], []
    clean = score(image, at, True)
    for step in order.reshape(12, -1):
        without = image.flatten().clone()
        without[step] = BLACK.expand_as(image).flatten()[step]
        spreads.append((score(without.view_as(image), at, True) - clean) ** 2)
        sums.append(float(size[step].sum()))
    return float(spearmanr(sums, spreads)[0])


ZERO = {"perturb_baseline": 0.0}
FEW = {"nr_samples": 4}

COMPARISONS: tuple[Comparison, ...] = (
    *(by_hand(name) for name in (
        "AUC", "AttributionLocalisation", "Complexity", "EffectiveComplexity", "PointingGame",
        "RelevanceMassAccuracy", "RelevanceRankAccuracy", "Sparseness",
    )),
    by_hand("Sparseness", {"normalise_func": "normalise_by_average_second_moment_estimate"}),
    by_hand("RelevanceMassAccuracy", {"abs": True, "normalise": False}),
    by_hand("TopKIntersection", {"k": 40}),
    by_hand("TopKIntersection", {"k": 40, "concept_influence": True}),
    by_hand("FaithfulnessCorrelation",
            {"perturb_baseline": "mean", "nr_runs": 20, "subset_size": 40}, **ZERO),
    by_hand("FaithfulnessCorrelation",
            {"perturb_baseline": "mean", "nr_runs": 20, "subset_size": 40, "softmax": True,
             "similarity_func": "correlation_kendall_tau"}, {"softmax": True}, **ZERO),
    by_hand("FaithfulnessEstimate", {"perturb_baseline": "mean", "features_in_step": 32}, **ZERO),
    by_hand("PixelFlipping", {"perturb_baseline": "mean", "features_in_step": 32}, **ZERO),
    by_hand("Selectivity", {"perturb_baseline": "mean", "patch_size": 4}, **ZERO),
    by_hand("RegionPerturbation", {"perturb_baseline": "mean", "patch_size": 4}, **ZERO),
    by_hand("RegionPerturbation",
            {"perturb_baseline": "mean", "patch_size": 2, "regions_evaluation": 9}, **ZERO),
    by_hand("NonSensitivity", {"perturb_baseline": "mean", "eps": 0.002}, **ZERO),
    by_hand("MonotonicityCorrelation",
            {"perturb_baseline": "mean", "features_in_step": 64, "nr_samples": 1}, **ZERO),
    by_hand("Continuity", {"nr_steps": 5}),
    by_hand("LocalLipschitzEstimate", FEW),
    by_hand("MaxSensitivity", FEW),
    by_hand("MaxSensitivity", {**FEW, "lower_bound": 0.1, "upper_bound": 0.3, "normalise": True}),
    by_hand("AvgSensitivity", FEW),
    by_hand("RelativeInputStability", {**FEW, "return_nan_when_prediction_changes": False}),
    by_hand("RelativeOutputStability", {**FEW, "return_nan_when_prediction_changes": False}),
    by_hand("RelativeRepresentationStability",
            {**FEW, "return_nan_when_prediction_changes": False}),
    by_hand("RelativeRepresentationStability",
            {**FEW, "return_nan_when_prediction_changes": False, "layer_names": ("2", "6")}),
    defined("Infidelity", infidelity, {"perturb_patch_sizes": (8,)}),
    defined("RegionPerturbation",
            lambda image, saliency, at: area(
                [score(image, at, False) - left for left in dropping(image, saliency, at)]),
            {"patch_size": 4, "softmax": False}),
    defined("Selectivity", lambda *given: area(dropping(*given)),
            {"patch_size": 4, "softmax": False}),
    defined("Monotonicity", rising, {"features_in_step": SIDE * SIDE}),
    defined("MonotonicityCorrelation", untouched,
            {"features_in_step": 64, "nr_samples": 2, "perturb_baseline": "black"}),
    defined("IROF", over_superpixels, {}, "smooth"),
)  # fmt: skip
