"""Gradient methods beside captum, PAIR's saliency, and their definitions written as plain loops.

All in float64. Noise is an input, so both sides get the same draws; everything else of the loops is
written from the formulas, one image at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import captum.attr
import numpy as np
import saliency.core
import torch
from comparison import TARGET, Comparison, explained
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

from xbench import registry
from xbench.probe import Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

IMAGES = len(TARGET)
CAPTUM, PAIR, LOOP = "captum 0.9 ", "PAIR saliency 0.2 ", "definition, by a loop"


class Residual(nn.Module):
    """Batch normalisation and a sum of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6))
            for channels in (3, 6, 6)
        )
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relus[0](self.stem(images))
        y = self.second(self.relus[1](self.first(x)))
        logits: Tensor = self.head(self.relus[2](x + y).mean((2, 3)))
        return logits


def residual_model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Residual().double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.randn(6).double()
                module.running_var = torch.rand(6).double() + 0.5
    return replace(toy_model(), net=net.eval().requires_grad_(False), layers={})


MODELS: Mapping[str, Callable[[], Model]] = {"": toy_model, ", residual network": residual_model}


@dataclass(frozen=True)
class Setting:
    """What both sides see: a network, normalised images, and the probe's random numbers."""

    model: Model
    batch: Batch

    @property
    def probe(self) -> Probe:
        return Probe(self.model, self.batch, target=TARGET)

    @property
    def images(self) -> Tensor:
        return self.model.normalise(self.batch.images)

    def gradient(self, at: int, image: Tensor, objective: str = "logit") -> Tensor:
        image = image.clone().requires_grad_()
        logits = self.model.net(image[None])[0]
        value = logits[TARGET[at]]
        if objective == "nll":
            value = logits.logsumexp(0) - value
        (gradient,) = torch.autograd.grad(value, image)
        return gradient

    def colour(self, name: str) -> Tensor:
        """A baseline of one colour, (3, 1, 1) in network space."""
        mean, std = (torch.tensor(v).double() for v in (self.model.mean, self.model.std))
        pixel = {"black": torch.zeros(3), "white": torch.ones(3), "mean": mean}[name]
        return ((pixel - mean) / std).view(3, 1, 1)


def setting(model: Callable[[], Model] = toy_model, side: int = 16) -> Setting:
    return Setting(model(), toy_batch(IMAGES, side=side))


# --- aggregation, as the paper's code has it: of stacked terms (S, 3, H, W) of one image ----------


def clipped(gradients: Tensor, processing: str) -> Tensor:
    if processing == "positive":
        return gradients.clamp(min=0)
    if processing == "negative":
        return gradients.clamp(max=0)
    return gradients.abs() if "absolute" in processing else gradients


def guide(terms: Tensor, percentile: float = 85, norm: str = "none", scope: str = "channel") -> Any:
    variance = terms.numpy().var(axis=0, ddof=1)
    weight = np.empty_like(variance)
    parts = [slice(None)] if scope == "image" else range(len(variance))
    for part in parts:
        plane = variance[part]
        threshold = np.percentile(plane, percentile)
        unit = {"none": 1.0, "max": plane.max(), "quantile": threshold}[norm]
        weight[part] = np.where(plane > threshold, 1.0, plane / unit)
    return torch.from_numpy(weight)


def summed(attribution: Tensor, channels: str = "absolute_sum") -> Tensor:
    if channels == "absolute_sum":
        return attribution.abs().sum(0)
    return attribution.sum(0) if channels == "sum" else attribution.abs().max(0).values


# --- definitions of one image ---------------------------------------------------------------------


def noisy(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    """(S, 3, H, W) gradients under noise."""
    kind = params.get("noise_range", "image")
    seen = s.images if kind == "batch" else s.images[at]
    width = seen.max() - seen.min() if isinstance(kind, str) else kind
    sigma = params.get("noise", 0.15) * width
    draws = [s.probe.normal("gaussian", draw)[at] for draw in range(params.get("samples", 20))]
    return torch.stack([s.gradient(at, s.images[at] + sigma * draw) for draw in draws])


def smooth_grad(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    gradients, processing = noisy(s, at, params), params.get("processing", "signed")
    mean = clipped(gradients, processing).mean(0)
    return mean * guide(gradients) if processing.startswith("guided") else mean


def guided_absolute_grad(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    gradients = noisy(s, at, params)
    how = {key.removeprefix("guide_"): params[key] for key in GUIDE if key in params}
    return gradients.abs().mean(0) * guide(gradients, **how)


GUIDE = ("percentile", "guide_norm", "guide_scope")
MEANS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "smooth_grad_squared": lambda gradients: gradients.square().mean(0),
    "var_grad": lambda gradients: gradients.var(0, correction=1),
    "absolute_grad": lambda gradients: gradients.abs().mean(0),
}


def mean_of_noise(name: str, s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    return MEANS[name](noisy(s, at, params))


def integrated(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    """Trials of (image - baseline) times the mean clipped gradient; the mean over trials."""
    image, steps = s.images[at], params.get("steps", 20)
    processing = params.get("processing", "signed")
    terms = []
    for trial in range(params.get("trials", 1)):
        if params.get("baseline", "black") == "uniform":
            seen = s.images if params.get("noise_range") == "batch" else image
            drawn = torch.stack([s.probe.uniform(f"baseline {c}", trial)[at] for c in range(3)])
            start = seen.min() + drawn * (seen.max() - seen.min())
        else:
            start = s.colour(params.get("baseline", "black"))
        if params.get("rule") == "endpoints":
            places = [k / (steps - 1) for k in range(steps)]
        else:
            places = [(2 * k + 1) / (2 * steps) for k in range(steps)]
        path = torch.stack(
            [
                s.gradient(at, start + place * (image - start), params.get("objective", "logit"))
                for place in places
            ]
        )
        terms.append((image - start) * clipped(path, processing).mean(0))
    stacked = torch.stack(terms)
    mean = (stacked.abs() if "absolute" in processing else stacked).mean(0)
    return mean * guide(stacked) if processing.startswith("guided") else mean


def increments(s: Setting, at: int, params: Mapping[str, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Guided IG's moves times gradients, coordinate by coordinate; moves of nothing left out."""
    image = s.images[at].flatten().numpy()
    start = s.colour(params.get("baseline", "black")).expand_as(s.images[at]).flatten().numpy()
    steps, fraction = params.get("steps", 20), params.get("fraction", 0.25)
    half = params.get("max_dist", 0.1)
    total = np.abs(image - start).sum()
    point = start.copy()
    for step in range(1, steps + 1):
        here = torch.from_numpy(point.copy()).view_as(s.images[at])
        gradient = s.gradient(at, here).flatten().numpy()
        low = start + max(step / steps - half, 0) * (image - start)
        high = start + min(step / steps + half, 1) * (image - start)
        goal = total * (1 - step / steps)
        while True:
            before = point.copy()
            for k in range(len(point)):
                if image[k] != start[k] and (point[k] - start[k]) / (image[k] - start[k]) < max(
                    step / steps - half, 0
                ):
                    point[k] = low[k]
            distance = np.abs(point - image).sum()
            if np.isclose(distance, goal, rtol=1e-9, atol=1e-9):
                if (point != before).any():
                    yield (point - before) * gradient
                break
            slope = np.where(point == high, np.inf, np.abs(gradient))
            threshold = np.sort(slope)[int(np.floor(fraction * (len(slope) - 1)))]
            chosen = [k for k in range(len(slope)) if slope[k] <= threshold and slope[k] < np.inf]
            room = np.abs(high[chosen] - point[chosen]).sum()
            gamma = (distance - goal) / room
            if gamma > 1:
                point[chosen] = high[chosen]
            else:
                point[chosen] += gamma * (high[chosen] - point[chosen])
            yield (point - before) * gradient
            if gamma <= 1:
                break


def guided_ig(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    moves = [torch.from_numpy(move).view_as(s.images[at]) for move in increments(s, at, params)]
    processing = params.get("processing", "signed")
    terms = clipped(torch.stack(moves), processing)
    return terms.sum(0) * guide(terms) if processing.startswith("guided") else terms.sum(0)


def mirrored_blur(image: Tensor, sigma: float) -> Tensor:
    """torchvision's, which Guided AbsoluteGrad's code calls: 41 pixels wide, edges mirrored."""
    return vision.gaussian_blur(image, [41, 41], [sigma, sigma]) if sigma else image


def blur_ig(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    image, steps = s.images[at], params.get("steps", 20)
    processing = params.get("processing", "signed")
    terms = []
    for step in range(steps):
        sigma = 50 * step / steps
        blurred = mirrored_blur(image, sigma)
        change = -(mirrored_blur(image, sigma + 0.01) - blurred) / 0.01 * 50 / steps
        terms.append(change * clipped(s.gradient(at, blurred), processing))
    stacked = torch.stack(terms)
    total = (stacked.abs() if "absolute" in processing else stacked).sum(0)
    return total * guide(stacked) if processing.startswith("guided") else total


class Passing(torch.autograd.Function):
    """A ReLU whose way back lets one part of the signal through."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, part: str) -> Tensor:
        context.save_for_backward(inputs)
        context.part = part
        return inputs.clamp(min=0)

    @staticmethod
    def backward(context: Any, signal: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inputs,) = context.saved_tensors
        return clipped(signal * (inputs > 0), context.part), None


def guided_backprop(s: Setting, at: int, params: Mapping[str, Any]) -> Tensor:
    def relu(module: nn.Module, inputs: Tensor) -> Tensor:
        found: Tensor = Passing.apply(inputs, params["processing"])
        return found

    with mock.patch.object(nn.ReLU, "forward", relu):
        return s.gradient(at, s.images[at])


# --- comparisons ----------------------------------------------------------------------------------

Definition = Callable[[Setting, int, Mapping[str, Any]], Tensor]


def by_loop(
    method: str,
    definition: Definition,
    params: Mapping[str, Any] | None = None,
    *,
    model: str = "",
    side: int = 16,
    **how: Any,
) -> Comparison:
    params = params or {}

    def compute() -> tuple[Tensor, Tensor]:
        s = setting(MODELS[model], side)
        channels = params.get("channels", "absolute_sum")
        theirs = [summed(definition(s, at, params), channels) for at in range(IMAGES)]
        return explained(method, params, model=s.model, batch=s.batch), torch.stack(theirs)

    return Comparison(method, LOOP + model, compute, params, **{"tolerance": 1e-11, **how})


def by_captum(
    method: str,
    reference: str,
    attribute: Callable[[Setting], Tensor],
    params: Mapping[str, Any] | None = None,
    *,
    model: str = "",
    **how: Any,
) -> Comparison:
    params = params or {}

    def compute() -> tuple[Tensor, Tensor]:
        s = setting(MODELS[model])
        with warnings.catch_warnings():  # that it sets hooks, and where it wants gradients
            warnings.simplefilter("ignore")
            theirs = attribute(s).detach()
        ours = explained(method, params, model=s.model, batch=s.batch)
        channels = params.get("channels", "absolute_sum")
        return ours, torch.stack([summed(one, channels) for one in theirs])

    name = CAPTUM + reference + model
    return Comparison(method, name, compute, params, **{"tolerance": 1e-11, **how})


def captum_of(kind: type, s: Setting, **how: Any) -> Tensor:
    found: Tensor = kind(s.model.net).attribute(
        s.images.clone().requires_grad_(), target=TARGET, **how
    )
    return found


def captum_path(s: Setting, baseline: str, rule: str, steps: int) -> Tensor:
    start = s.colour(baseline).expand_as(s.images)
    return captum_of(
        captum.attr.IntegratedGradients, s, baselines=start, method=rule, n_steps=steps
    )


def captum_tunnel(s: Setting, kind: str, samples: int, noise: float) -> Tensor:
    """One image at a time, since its noise is as wide for all; the draws are the probe's."""
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(s.model.net))
    draws = torch.stack([s.probe.normal("gaussian", draw) for draw in range(samples)])
    found = []
    for at, image in enumerate(s.images):
        own = draws[:, at]
        with mock.patch.object(torch, "normal", lambda mean, stdev, own=own: own * stdev):
            found.append(
                tunnel.attribute(
                    image[None].clone(),
                    nt_type=kind,
                    nt_samples=samples,
                    stdevs=float(noise * (image.max() - image.min())),
                    target=int(TARGET[at]),
                    abs=False,
                )
            )
    whole = torch.cat(found)
    # it divides the variance by the number of samples, not by one less
    return whole * samples / (samples - 1) if kind == "vargrad" else whole


def by_pair(method: str, explainer: type, params: Mapping[str, Any], **how: Any) -> Comparison:
    chosen = {**preset(method, "pair"), **params}

    def compute() -> tuple[Tensor, Tensor]:
        s = setting()
        theirs = []
        for at, image in enumerate(s.images):

            def call(inputs: Any, at: int = at, **_: Any) -> dict[str, Any]:
                first = torch.from_numpy(np.asarray(inputs[0])).permute(2, 0, 1)
                gradient = s.gradient(at, first).permute(1, 2, 0)
                return {saliency.core.INPUT_OUTPUT_GRADIENTS: gradient.numpy()[None]}

            with mock.patch.object(np, "quantile", older_quantile):
                mask = explainer().GetMask(image.permute(1, 2, 0).numpy(), call)
            theirs.append(torch.from_numpy(mask).permute(2, 0, 1))
        ours = explained(method, chosen, model=s.model, batch=s.batch)
        channels = params.get("channels", "absolute_sum")
        return ours, torch.stack([summed(one, channels) for one in theirs])

    return Comparison(method, PAIR + explainer.__name__, compute, chosen, **how)


def older_quantile(values: Any, share: float, interpolation: str, at: Any = np.quantile) -> Any:
    """numpy has renamed the argument since the library was written."""
    return at(values, share, method=interpolation)


def preset(method: str, name: str) -> dict[str, Any]:
    return dict(registry.find("methods", method).presets[name])


PROCESSINGS = ("positive", "negative", "absolute", "guided", "guided_absolute")
FEW = {"samples": 6, "noise": 0.2}
UNIFORM = {"baseline": "uniform", "trials": 3, "steps": 4}
HUNDREDFOLD = "rounding, times 100: the change of blur is divided by 0.01"
GAG_IG = preset("integrated_gradients", "gag-2024")
GAG_BLUR = preset("blur_ig", "gag-2024")

COMPARISONS: tuple[Comparison, ...] = (
    *(
        by_captum(
            "gradient",
            "Saliency",
            partial(captum_of, captum.attr.Saliency, abs=False),
            {"channels": channels} if channels != "absolute_sum" else {},
            model=model,
        )
        for model in MODELS
        for channels in ("absolute_sum", "sum", "max")
    ),
    *(
        by_captum(
            "input_x_gradient",
            "InputXGradient",
            partial(captum_of, captum.attr.InputXGradient),
            model=model,
        )
        for model in MODELS
    ),
    *(
        by_captum(
            "guided_backprop",
            "GuidedBackprop",
            partial(captum_of, captum.attr.GuidedBackprop),
            model=model,
        )
        for model in MODELS
    ),
    *(
        by_loop("guided_backprop", guided_backprop, {"processing": part}, model=model)
        for model in MODELS
        for part in ("negative", "absolute")
    ),
    *(
        by_captum(
            method,
            f"NoiseTunnel {kind}, the same noise",
            partial(captum_tunnel, kind=kind, **FEW),
            FEW,
        )
        for method, kind in (
            ("smooth_grad", "smoothgrad"),
            ("smooth_grad_squared", "smoothgrad_sq"),
            ("var_grad", "vargrad"),
        )
    ),
    *(
        by_loop(name, partial(mean_of_noise, name), FEW, model=", residual network")
        for name in MEANS
    ),
    *(
        by_loop(name, partial(mean_of_noise, name), {**preset(name, "gag-2024"), "samples": 6})
        for name in MEANS
    ),
    by_loop("smooth_grad", smooth_grad),
    by_loop("smooth_grad", smooth_grad, {**FEW, "noise_range": "batch"}),
    by_loop("smooth_grad", smooth_grad, {**FEW, "noise_range": 4.758}),
    *(by_loop("smooth_grad", smooth_grad, {**FEW, "processing": kind}) for kind in PROCESSINGS),
    by_loop("guided_absolute_grad", guided_absolute_grad),
    by_loop("guided_absolute_grad", guided_absolute_grad, model=", residual network"),
    *(
        by_loop("guided_absolute_grad", guided_absolute_grad, {**FEW, **params})
        for params in (
            preset("guided_absolute_grad", "gag-2024"),
            {"percentile": 15.0},
            {"percentile": 100.0},
            {"guide_norm": "max"},
            {"guide_norm": "quantile"},
            {"guide_scope": "image"},
            {"guide_scope": "image", "guide_norm": "max", "percentile": 40.0},
        )
    ),
    *(
        by_captum(
            "integrated_gradients",
            f"IntegratedGradients {theirs}",
            partial(captum_path, baseline=baseline, rule=theirs, steps=20),
            {"baseline": baseline, "rule": rule, "channels": "sum"},
            model=model,
            tolerance=1e-6,
            reason="its weights of the steps are float32",
        )
        for model in MODELS
        for baseline in ("black", "mean", "white")
        for rule, theirs in (("midpoint", "riemann_middle"), ("gauss_legendre", "gausslegendre"))
    ),
    by_loop("integrated_gradients", integrated, {"objective": "nll", "rule": "endpoints"}),
    *(
        by_loop("integrated_gradients", integrated, {**UNIFORM, "processing": kind})
        for kind in ("signed", *PROCESSINGS)
    ),
    *(
        by_loop("integrated_gradients", integrated, {**GAG_IG, "processing": kind})
        for kind in ("signed", *PROCESSINGS)
    ),
    by_pair("guided_ig", saliency.core.GuidedIG, {}),
    by_pair("guided_ig", saliency.core.GuidedIG, {"channels": "sum"}),
    by_loop("guided_ig", guided_ig, {"channels": "sum"}),
    by_loop("guided_ig", guided_ig, model=", residual network"),
    by_loop("guided_ig", guided_ig, {"steps": 7, "fraction": 0.1, "max_dist": 0.5}),
    by_loop("guided_ig", guided_ig, preset("guided_ig", "gag-2024")),
    *(
        by_loop("guided_ig", guided_ig, {**preset("guided_ig", "gag-2024"), "processing": kind})
        for kind in PROCESSINGS
    ),
    *(
        by_pair(
            "blur_ig",
            saliency.core.BlurIG,
            params,
            reason=HUNDREDFOLD,
        )
        for params in ({}, {"channels": "sum"})
    ),
    *(
        by_loop(
            "blur_ig",
            blur_ig,
            {**GAG_BLUR, "processing": kind},
            side=24,  # its blur needs a side above the radius
            tolerance=1e-9,
            reason=HUNDREDFOLD,
        )
        for kind in ("signed", *PROCESSINGS)
    ),
)
