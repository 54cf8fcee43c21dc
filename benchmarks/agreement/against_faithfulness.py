"""Faithfulness metrics beside libraries, authors' algorithms and their definitions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import pytorch_grad_cam
import quantus
import torch
from comparison import TARGET, Comparison
from pytorch_grad_cam.metrics import arcc, cam_mult_image, road
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget as Softmax
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import spsolve
from sklearn.metrics import auc
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from xbench import registry
from xbench.autograd import prepared
from xbench.orders import Permutation
from xbench.probe import Explanation, Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

PGC = f"grad-cam {version('grad-cam')}"
QUANTUS = f"quantus {version('quantus')}"
SKLEARN = f"scikit-learn {version('scikit-learn')}'s auc of a curve by brute force"
BY_LOOP = "definition in float64, image by image"
RISE = "RISE's algorithm in numpy, float64"
GAG = "Guided AbsoluteGrad's algorithm in numpy, float64"
FLOAT32 = "the library's scores are float32"

Maps = Tensor
Score = Callable[[Tensor, int], float]
"""One image in pixels (3, H, W) and its class to a number."""


@functools.cache
def sharp() -> Model:
    """The toy network with logits far apart, so that masked images score unlike the clean one."""
    model = toy_model()
    assert isinstance(model.net, nn.Sequential)
    last = model.net[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data *= 40
    return model


class FromFloat32(nn.Module):
    """The same network for libraries that hand over float32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sharp().net
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images.double())
        return logits


Kind = Literal["plain", "rounded", "many at the top", "some at the top"]


@functools.cache
def given(side: int = 16, kind: Kind = "plain") -> tuple[Batch, Maps]:
    """Four images, and signed maps: one smooth, three noisy. The plain ones are without ties."""
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(4, side, side, generator=generator, dtype=torch.float64)
    ramp = torch.linspace(-1, 1, side, dtype=torch.float64)
    maps[0] = ramp[:, None] + 0.3141 * ramp + 0.01 * maps[0]
    if kind == "rounded":
        maps = (2 * maps).round()
    elif kind != "plain":  # so many pixels share the largest value, of either sign
        share = 0.35 if kind == "many at the top" else 0.12
        limit = maps.abs().flatten(1).quantile(1 - share, dim=1)[:, None, None]
        maps = maps.clamp(-limit, limit)
    return toy_batch(4, side=side), maps


def on(kind: Kind) -> str:
    return {"plain": "", "rounded": ", rounded maps"}.get(kind, f", maps with {kind}")


def ours(name: str, params: Mapping[str, Any], side: int = 16, kind: Kind = "plain") -> Tensor:
    batch, maps = given(side, kind)
    with prepared(sharp().net):
        probe = Probe(sharp(), batch, target=TARGET)
        found: Tensor = registry.make("metrics", name, params)(Explanation(probe, maps))
    return found


def probability(pixels: Tensor, target: int) -> float:
    return float(sharp().net(sharp().normalise(pixels[None])).double().softmax(1)[0, target])


def logit(pixels: Tensor, target: int) -> float:
    return float(sharp().net(sharp().normalise(pixels[None]))[0, target])


def each(
    measure: Callable[[Tensor, np.ndarray[Any, Any], int], float],
    side: int = 16,
    kind: Kind = "plain",
) -> Tensor:
    """A measure of (image in pixels, map, class), image by image."""
    batch, maps = given(side, kind)
    values = [
        measure(image, saliency.numpy(), int(target))
        for image, saliency, target in zip(batch.images, maps, TARGET, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


# --- average drop, gain, increase -----------------------------------------------------------------


def scaled(saliency: np.ndarray[Any, Any], sign: str, epsilon: float = 0) -> np.ndarray[Any, Any]:
    read = {"magnitude": np.abs(saliency), "positive": saliency.clip(min=0), "signed": saliency}
    above = read[sign] - read[sign].min()
    return above / (above.max() + epsilon)  # type: ignore[no-any-return]


def colour(baseline: str) -> Tensor:
    """In pixels: black, or the mean that multiplying the normalised image blends into."""
    mean = torch.tensor(sharp().mean, dtype=torch.float64).view(3, 1, 1)
    return mean if baseline == "mean" else torch.zeros(3, 1, 1).double()


def masked_definition(
    formula: Callable[[float, float], float],
    sign: str,
    *,
    baseline: str = "black",
    epsilon: float = 0,
    score: Score = probability,
    top: bool = False,
) -> Tensor:
    def measure(image: Tensor, saliency: np.ndarray[Any, Any], target: int) -> float:
        mask = scaled(saliency, sign, epsilon)
        if top:  # without ties
            mask = (mask > np.median(mask)).astype(float)
        weight = torch.from_numpy(mask)
        pixels = weight * image + (1 - weight) * colour(baseline)
        return formula(score(image, target), score(pixels, target))

    return each(measure)


def drop(p: float, o: float, epsilon: float = 0) -> float:
    return 100 * max(p - o, 0) / (p + epsilon) if p >= 1e-6 else 0.0  # undefined, as a logit may be


def gain(p: float, o: float, epsilon: float = 0) -> float:
    return 100 * max(o - p, 0) / (1 - p + epsilon)


def increase(p: float, o: float) -> float:
    return 100.0 * (o > p)


def masked(
    name: str,
    formula: Callable[..., float],
    sign: str,
    params: Mapping[str, Any] | None = None,
    **how: Any,
) -> Comparison:
    params = params or {}
    return Comparison(
        name,
        BY_LOOP,
        lambda: (ours(name, params).nan_to_num(0), masked_definition(formula, sign, **how)),
        params,
        kind="metrics",
    )


def pgc_targets() -> list[Any]:
    return [ClassifierOutputTarget(int(target)) for target in TARGET]


def pgc_maps() -> np.ndarray[Any, Any]:
    """As the library's methods hand them over, but in float64."""
    _, maps = given()
    found = [saliency - saliency.min() for saliency in maps.clamp(min=0).numpy()]
    return np.stack([saliency / (1e-7 + saliency.max()) for saliency in found])


def pgc_masked(name: str, metric: Callable[[], Any]) -> Comparison:
    def both() -> tuple[Tensor, Tensor]:
        batch, _ = given()
        inputs = sharp().normalise(batch.images)
        theirs = metric()(inputs, pgc_maps(), pgc_targets(), sharp().net)
        return ours(name, {"preset": "pgc-1.5"}), 100 * torch.from_numpy(theirs).double()

    reference = f"{PGC} {metric.__name__}, in percent"
    return Comparison(name, reference, both, {"preset": "pgc-1.5"}, 2e-6, FLOAT32, "metrics")


# --- curves ---------------------------------------------------------------------------------------


def shown(image: Tensor, below: Tensor, chosen: np.ndarray[Any, Any]) -> Tensor:
    return torch.where(torch.from_numpy(chosen), image, below)


def rise_blur(image: Tensor) -> Tensor:
    """With scipy's kernel, on the normalised image, zeros around it."""
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(point, 5)).expand(3, 1, 11, 11)
    blurred = torch.nn.functional.conv2d(sharp().normalise(image[None]), kernel, None, 1, 5, 1, 3)
    return sharp().pixels(blurred)[0]


def rise_game(name: str, image: Tensor, saliency: np.ndarray[Any, Any], target: int) -> float:
    """A step is a 28th of the pixels; equal values come last index first, as if sorted stably."""
    canvas, finish = image.flatten(1).clone(), colour("mean").expand_as(image).flatten(1)
    if name == "insertion":
        canvas, finish = rise_blur(image).flatten(1).clone(), canvas
    order = saliency.ravel().argsort(kind="stable")[::-1].copy()
    step = len(order) // 28
    scores = []
    for start in range(0, len(order) + step, step):
        scores.append(probability(canvas.view_as(image), target))
        next_pixels = order[start : start + step]
        canvas[:, next_pixels] = finish[:, next_pixels]
    values = np.array(scores)
    return float((values.sum() - values[0] / 2 - values[-1] / 2) / (len(values) - 1))


def rise(name: str, kind: Kind) -> Comparison:
    params = {"preset": "rise-2018"}
    return Comparison(
        name,
        RISE + on(kind),
        lambda: (ours(name, params, 28, kind), each(partial(rise_game, name), 28, kind)),
        params,
        kind="metrics",
    )


def gag_auc(name: str, image: Tensor, saliency: np.ndarray[Any, Any], target: int) -> float:
    saliency = scaled(saliency, "magnitude")
    ascending = np.sort(saliency, axis=None)
    scores = []
    for tenths in range(10, 0, -1):
        above = saliency > ascending[len(ascending) * tenths // 10 - 1]
        if name == "insertion":
            below = sharp().pixels(gaussian_blur(sharp().normalise(image[None]), 33, 16.0))[0]
            pixels = shown(image, below, above)
        else:
            pixels = shown(image, colour("mean"), ~above)
        scores.append(probability(pixels, target))
    return float(auc(np.linspace(0.1, 1.0, 10), scores))


def gag(name: str, kind: Kind) -> Comparison:
    params = {"preset": "gag-2024"}
    return Comparison(
        name,
        GAG + on(kind),
        lambda: (ours(name, params, 20, kind), each(partial(gag_auc, name), 20, kind)),
        params,
        kind="metrics",
    )


@functools.cache
def permutations(side: int) -> Tensor:
    """The seeded order of equal values, which the definition takes as given."""
    batch, _ = given(side)
    with prepared(sharp().net):
        return Probe(sharp(), batch)[Permutation()]


def brute_curve(
    keep: str, number: int, steps: int, score: Score, below: Tensor, kind: Kind
) -> tuple[list[float], list[float]]:
    """Shares of changed pixels, and scores, one forward at a time."""
    batch, maps = given(16, kind)
    image, target = batch.images[number], int(TARGET[number])
    tie = {int(pixel): place for place, pixel in enumerate(permutations(16)[number])}
    flat = maps[number].flatten().tolist()
    ranking = sorted(range(256), key=lambda pixel: (-flat[pixel], tie[pixel]))
    shares, scores = [], []
    for step in range(steps + 1):
        if keep == "salient":
            chosen = ranking[: round(256 * step / steps)]
            shares.append(len(chosen) / 256)
        else:
            chosen = ranking[256 - round(256 * (steps - step) / steps) :]
            shares.append(1 - len(chosen) / 256)
        mask = np.zeros(256, dtype=bool)
        mask[chosen] = True
        scores.append(score(shown(image, below, mask.reshape(16, 16)), target))
    return shares, scores


def blurred(image: Tensor, size: int, sigma: float) -> Tensor:
    return sharp().pixels(gaussian_blur(sharp().normalise(image[None]), size, sigma))[0]


BELOW: dict[str, Callable[[Tensor], Tensor]] = {
    "black": lambda image: colour("black"),
    "mean": lambda image: colour("mean"),
    "blur": lambda image: blurred(image, 7, 1.0),  # a sixteenth of 16 pixels, cut at three
    "blur_rise": rise_blur,
    "blur_latec": lambda image: blurred(image, 15, 5.0),
}


def areas(
    name: str,
    steps: int,
    kind: Kind = "plain",
    *,
    score: Score = probability,
    baseline: str = "black",
    without: tuple[int, int] = (0, 0),
    area: str = "raw",
) -> Tensor:
    """Of curves that lack so many points at either end."""
    first, last = without[0], steps + 1 - without[1]

    def under(keep: str, number: int) -> float:
        image, target = given(16, kind)[0].images[number], int(TARGET[number])
        below = BELOW[baseline](image)
        curve = brute_curve(keep, number, steps, score, below, kind)
        raw = float(auc(*(axis[first:last] for axis in curve)))
        full, floor = score(image, target), score(below.expand_as(image), target)
        return {
            "raw": raw,
            "relative": raw / full,
            "corrected": (raw - floor) / (full - floor) if full > floor else 0.0,
        }[area]

    keeps = {"lerf": "salient", "insertion": "salient"}
    if name == "abpc":
        values = [under("salient", number) - under("rest", number) for number in range(4)]
    else:
        values = [under(keeps.get(name, "rest"), number) for number in range(4)]
    return torch.tensor(values, dtype=torch.float64)


def curve(
    name: str, params: Mapping[str, Any], steps: int, kind: Kind = "plain", **how: Any
) -> Comparison:
    return Comparison(
        name,
        SKLEARN + on(kind),
        lambda: (ours(name, params, 16, kind).nan_to_num(0), areas(name, steps, kind, **how)),
        params,
        kind="metrics",
    )


def quantus_flipping(name: str) -> Comparison:
    """Sixteen pixels with their three channels at a time, on zeros after normalisation."""

    def both() -> tuple[Tensor, Tensor]:
        batch, maps = given(24)
        flipping = quantus.PixelFlipping(
            features_in_step=3 * 16,
            perturb_baseline=0.0,
            disable_warnings=True,
            display_progressbar=False,
        )
        curves = flipping(
            model=FromFloat32(),
            x_batch=sharp().normalise(batch.images).numpy(),
            y_batch=TARGET.numpy(),
            a_batch=maps[:, None].numpy(),
            softmax=True,
            device="cpu",
            channel_first=True,
        )
        area = np.trapezoid(np.array(curves), dx=1 / 36, axis=1)
        return ours(name, params, 24), torch.from_numpy(area)

    params = {"preset": "quantus-0.6", "steps": 36, "baseline": "mean"}
    reference = f"{QUANTUS} PixelFlipping's curve, over the share of pixels"
    return Comparison(name, reference, both, params, 1e-6, "its images are float32", "metrics")


# --- RCAP -----------------------------------------------------------------------------------------


def rcap_by_hand(
    image: Tensor, saliency: np.ndarray[Any, Any], target: int, part: str = "rcap"
) -> float:
    """Equation 4.1: strictly above a threshold, or equal to it where it is the maximum."""
    saliency = scaled(saliency, "magnitude")
    ascending = np.sort(saliency, axis=None)
    terms = []
    for tenths in (9, 8, 7, 6, 5):
        threshold = ascending[len(ascending) * tenths // 10 - 1]
        above = saliency >= threshold if threshold == 1 else saliency > threshold
        share = saliency[above].sum() / saliency.sum()
        chance = probability(shown(image, colour("black"), above), target)
        terms.append(_term(part, share, chance))
    return float(np.mean(terms))


def _term(part: str, share: float, chance: float) -> float:
    return {"rcap": share * chance, "rcap_saliency": share, "rcap_probability": chance}[part]


def rcap_authors(
    image: Tensor, saliency: np.ndarray[Any, Any], target: int, part: str = "rcap"
) -> float:
    """The authors' code: what is recovered stays, a threshold of 1 is 0, or left out."""
    saliency = scaled(saliency, "magnitude")
    ascending = np.sort(saliency, axis=None)
    thresholds = [ascending[int(len(ascending) * rate) - 1] for rate in (0.9, 0.8, 0.7, 0.6, 0.5)]
    if len(set(thresholds)) == len(thresholds):
        thresholds = [threshold for threshold in thresholds if threshold != 1]
    thresholds = [0.0 if threshold == 1 else threshold for threshold in thresholds]
    canvas, terms = torch.zeros_like(image), []
    for threshold in thresholds:
        above = saliency > threshold
        canvas = shown(image, canvas, above)
        share = saliency[above].sum() / saliency.sum()
        terms.append(_term(part, share, probability(canvas, target)))
    return float(np.mean(terms))


def rcap(
    measure: Callable[..., float], params: Mapping[str, Any], kind: Kind, name: str = "rcap"
) -> Comparison:
    return Comparison(
        name,
        (GAG if params else BY_LOOP) + on(kind),
        lambda: (ours(name, params, 20, kind), each(partial(measure, part=name), 20, kind)),
        params,
        kind="metrics",
    )


# --- ROAD and ARCC --------------------------------------------------------------------------------


@contextmanager
def without_noise() -> Iterator[None]:
    """The library's noise is drawn from the global generator, and cannot be asked for."""
    init = road.NoisyLinearImputer.__init__
    with patch.object(init, "__defaults__", (0.0, *init.__defaults__[1:])):
        yield


def imputed(image: Tensor, known: np.ndarray[Any, Any]) -> Tensor:
    """One equation for each unknown pixel, solved by scipy."""
    height, width = known.shape
    unknown = {at: row for row, at in enumerate(zip(*np.nonzero(~known), strict=True))}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), 3))
    for (down, across), row in unknown.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                there = (down + dy, across + dx)
                inside = 0 <= there[0] < height and 0 <= there[1] < width
                if (dy, dx) == (0, 0) or not inside:
                    continue
                weight = 1 / 12 if dy and dx else 1 / 6
                matrix[row, row] += weight
                if there in unknown:
                    matrix[row, unknown[there]] -= weight
                else:
                    right[row] += weight * image[:, there[0], there[1]].numpy()
    found = image.clone()
    found[:, ~known] = torch.from_numpy(spsolve(csr_matrix(matrix), right)).T
    return found


def road_by_hand(name: str, complement: bool, levels: tuple[float, ...]) -> Callable[..., float]:
    weights = {"road": (-0.5, 0.5), "road_morf": (1, 0), "road_lerf": (0, 1)}[name]

    def measure(image: Tensor, saliency: np.ndarray[Any, Any], target: int) -> float:
        order = (-saliency).ravel().argsort(kind="stable")  # without ties
        total = 0.0
        for level in levels:
            count = round(level * len(order))
            least = order[count:] if complement else order[len(order) - count :]
            for weight, gone in zip(weights, (order[:count], least), strict=True):
                known = np.ones(len(order), dtype=bool)
                known[gone] = False
                pixels = imputed(image, known.reshape(saliency.shape))
                total += weight * probability(pixels, target)
        return total / len(levels)

    return measure


def road_definition(
    name: str, params: Mapping[str, Any], complement: bool, levels: tuple[float, ...]
) -> Comparison:
    given_params = {**params, "noise": 0.0}
    return Comparison(
        name,
        "definition in float64, scipy's sparse solver",
        lambda: (ours(name, given_params, 20), each(road_by_hand(name, complement, levels), 20)),
        given_params,
        kind="metrics",
    )


def pgc_road(name: str, metric: Callable[[], Any], changes: bool) -> Comparison:
    """On 20 x 20 pixels, where a percentile leaves a whole number of them.

    Its single directions are changes of the logit, ours its values.
    """

    def both() -> tuple[Tensor, Tensor]:
        batch, maps = given(20)
        inputs = sharp().normalise(batch.images).float()
        with without_noise():
            found = metric()(inputs, maps.numpy(), pgc_targets(), FromFloat32())
        clean = sharp().net(inputs.double()).gather(1, TARGET[:, None])[:, 0]
        return ours(name, params, 20), torch.from_numpy(found) + (clean if changes else 0)

    params = {"preset": "pgc-1.5", "noise": 0.0}
    reason = "its images and scores are float32"
    reference = f"{PGC} {metric.__name__}"
    return Comparison(name, reference, both, params, 2e-6, reason, "metrics")


def pgc_arcc(name: str, params: Mapping[str, Any]) -> Comparison:
    """Maps without ties, and Grad-CAM of the masked image, at a layer as large as the image.

    Three of the four have a positive ROAD, without which the composite is zero.
    """

    def both() -> tuple[Tensor, Tensor]:
        batch, _ = given(20)
        method = registry.make("methods", "grad_cam", {"layer": "1"})
        with prepared(sharp().net):
            probe = Probe(sharp(), batch, target=TARGET)
            maps = probe.explain(registry.make("methods", "gradient")).raw
            found: Tensor = registry.make("metrics", name, params)(Explanation(probe, maps, method))
        inputs, net = sharp().normalise(batch.images).float(), FromFloat32()
        cams = scale_cam_image(maps.numpy())
        with pytorch_grad_cam.GradCAM(net, [net.inner[1]]) as cam, without_noise():
            logits = pgc_targets()  # which maps explain, whatever ROAD reads
            coherency = arcc.Coherency()(inputs.requires_grad_(), cams, logits, net, cam)
            if name == "coherency":
                return found, torch.from_numpy(coherency)
            if name == "complexity":
                return found, torch.from_numpy(arcc.Complexity()(cams))
            whole = arcc.ARCC(cam)
            whole.coherency = lambda *_: coherency
            targets = [Softmax(int(target)) for target in TARGET]
            return found, torch.from_numpy(whole(inputs.detach(), cams, targets, net))

    reason = "its maps, images and scores are float32"
    return Comparison(name, f"{PGC} {name}", both, params, 2e-5, reason, "metrics")


def adcc_by_hand(name: str) -> tuple[Tensor, Tensor]:
    """With Grad-CAM as the method, written out: maps, masked image, map of that, three parts."""
    batch, _ = given()
    method = registry.make("methods", "grad_cam", {"layer": "1"})
    with prepared(sharp().net):
        explanation = Probe(sharp(), batch, target=TARGET).explain(method)
        found: Tensor = registry.make("metrics", name, {"preset": "adcc-2021"})(explanation)
    values = []
    for image, target in zip(batch.images, TARGET.tolist(), strict=True):
        first = cam_by_hand(sharp().normalise(image[None]), target)
        mask = scaled(first, "signed")
        weight = torch.from_numpy(mask)
        blended = weight * image + (1 - weight) * colour("mean")
        second = cam_by_hand(sharp().normalise(blended[None]), target)
        coherency = (np.corrcoef(first.ravel(), second.ravel())[0, 1] + 1) / 2
        p, o = probability(image, target), probability(blended, target)
        parts = (coherency, 1 - mask.mean(), 1 - max(p - o, 0) / p)
        found_parts = {"coherency": coherency, "complexity": mask.mean()}
        values.append(found_parts.get(name, 3 / sum(1 / part for part in parts)))
    return found, torch.tensor(values, dtype=torch.float64)


def cam_by_hand(inputs: Tensor, target: int) -> np.ndarray[Any, Any]:
    net = sharp().net
    assert isinstance(net, nn.Sequential)
    with torch.enable_grad():
        activation = net[:2](inputs).detach().requires_grad_()
        net[2:](activation)[0, target].backward()
    assert activation.grad is not None
    weight = activation.grad.mean((2, 3), keepdim=True)
    return (weight * activation.detach()).sum(1).relu()[0].numpy()  # type: ignore[no-any-return]


MEAN = {"baseline": "mean"}
REMOVING = ("deletion", "morf")
ROADS = ("road", "road_morf", "road_lerf")
LATEC = {"preset": "latec-2024", "steps": 16}

COMPARISONS: tuple[Comparison, ...] = (
    masked("average_drop", drop, "magnitude"),
    masked("average_gain", gain, "magnitude"),
    masked("average_increase", increase, "magnitude"),
    masked("average_drop", drop, "positive", {"preset": "interpretable-gradients-2024"}),
    masked(
        "average_gain",
        lambda p, o: 100 * max(o - p, 0) / p,
        "positive",
        {"preset": "interpretable-gradients-2024"},
    ),
    masked("average_drop", drop, "signed", {"preset": "opticam-2024"}),
    masked("average_gain", gain, "signed", {"preset": "opticam-2024"}),
    masked("average_increase", increase, "signed", {"preset": "opticam-2024"}),
    masked("average_drop", drop, "positive", {"preset": "gradcampp-2018"}),
    masked("average_increase", increase, "positive", {"preset": "gradcampp-2018"}),
    masked(
        "average_drop",
        drop,
        "magnitude",
        {"preset": "scorecam-2020", "sign": "magnitude"},
        top=True,
        **MEAN,
    ),
    masked(
        "average_drop",
        partial(drop, epsilon=1e-7),
        "signed",
        {"preset": "torchcam-0.5"},
        **MEAN,
    ),
    masked(
        "average_increase",
        increase,
        "magnitude",
        {"preset": "scorecam-2020", "sign": "magnitude"},
        top=True,
        **MEAN,
    ),
    masked("average_increase", increase, "positive", {"preset": "interpretable-gradients-2024"}),
    masked("average_increase", increase, "signed", {"preset": "torchcam-0.5"}, **MEAN),
    masked(
        "average_drop",
        partial(drop, epsilon=1e-8),
        "magnitude",
        {"preset": "xplique-2.0"},
        epsilon=1e-8,
        score=logit,
        **MEAN,
    ),
    masked(
        "average_drop",
        partial(drop, epsilon=1e-8),
        "magnitude",
        {"preset": "xplique-2.0", "read": "probability"},
        epsilon=1e-8,
        **MEAN,
    ),
    masked(
        "average_gain",
        partial(gain, epsilon=1e-8),
        "magnitude",
        {"preset": "xplique-2.0"},
        epsilon=1e-8,
        **MEAN,
    ),
    masked(
        "average_increase",
        increase,
        "magnitude",
        {"preset": "xplique-2.0"},
        epsilon=1e-8,
        score=logit,
        **MEAN,
    ),
    pgc_masked("average_drop", cam_mult_image.DropInConfidence),
    pgc_masked("average_increase", cam_mult_image.IncreaseInConfidence),
    *(
        rise(name, kind)
        for name in ("insertion", "deletion", "morf")
        for kind in ("plain", "rounded")
    ),
    *(
        gag(name, kind)
        for name in ("insertion", "deletion", "morf")
        for kind in ("plain", "rounded", "many at the top")
    ),
    *(
        curve(name, {}, 28, kind, baseline="blur" if name == "insertion" else "black")
        for name in ("insertion", "deletion", "morf", "lerf", "abpc")
        for kind in ("plain", "rounded")
    ),
    *(
        curve(name, {"area": area}, 28, area=area)
        for name in ("deletion", "lerf")
        for area in ("relative", "corrected")
    ),
    curve("insertion", {"preset": "interpretable-gradients-2024"}, 32, baseline="blur_rise"),
    *(curve(name, {"preset": "interpretable-gradients-2024"}, 32) for name in REMOVING),
    *(curve(name, {"preset": "torchcam-0.5"}, 20, **MEAN) for name in ("insertion", *REMOVING)),
    curve("insertion", LATEC, 16, baseline="blur_latec", without=(1, 1)),
    *(curve(name, LATEC, 16, without=(1, 1), **MEAN) for name in REMOVING),
    *(
        curve(name, {"preset": "xplique-2.0"}, 10, score=logit, **MEAN)
        for name in ("insertion", *REMOVING)
    ),
    *(quantus_flipping(name) for name in REMOVING),
    *(rcap(rcap_by_hand, {}, kind) for kind in get_args(Kind)),
    *(rcap(rcap_authors, {"preset": "gag-2024"}, kind) for kind in get_args(Kind)),
    *(
        rcap(measure, params, "some at the top", name)
        for name in ("rcap_saliency", "rcap_probability")
        for measure, params in ((rcap_by_hand, {}), (rcap_authors, {"preset": "gag-2024"}))
    ),
    *(
        road_definition(name, {}, False, tuple(tenth / 10 for tenth in range(1, 10)))
        for name in ROADS
    ),
    *(
        road_definition(name, {"preset": "road-2022"}, True, (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9))
        for name in ROADS
    ),
    pgc_road("road", road.ROADCombined, False),
    pgc_road("road_morf", road.ROADMostRelevantFirstAverage, True),
    pgc_road("road_lerf", road.ROADLeastRelevantFirstAverage, True),
    pgc_arcc("coherency", {"preset": "arcc-2026"}),
    pgc_arcc("complexity", {"preset": "arcc-2026"}),
    pgc_arcc("arcc", {"preset": "arcc-2026", "noise": 0.0}),
    *(
        Comparison(
            name,
            "definition in float64, with Grad-CAM written out",
            partial(adcc_by_hand, name),
            {"preset": "adcc-2021"},
            kind="metrics",
        )
        for name in ("adcc", "coherency", "complexity")
    ),
)
