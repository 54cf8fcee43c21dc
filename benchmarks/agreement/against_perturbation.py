"""Occlusion, RISE, Score-CAM and Ablation-CAM beside libraries and their definitions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import captum
import pytorch_grad_cam
import torch
from against_attention import enlarged, of_all, reshape
from captum.attr import Occlusion
from comparison import TARGET, Comparison, explained
from families import FAMILIES, Family
from pytorch_grad_cam import AblationCAM, ScoreCAM
from pytorch_grad_cam.ablation_layer import AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn.functional import interpolate

from xbench import noise, registry
from xbench.autograd import prepared
from xbench.datasets.shapes import generate
from xbench.models.loading import load_model
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

PGC = f"grad-cam {version('grad-cam')}"
CAPTUM = f"captum {captum.__version__}"
BY_LOOP = "definition in float64, image by image"
DIVISION = "captum divides by the number of windows in float32"
FLOAT32 = "the library's scores and map are float32"
EPSILONS = "float32; the library adds 1e-8 to each mask's range and resizes with cv2"


@functools.cache
def residual() -> tuple[Model, Batch]:
    """The embedded network, with BatchNorm and by-passes, in float64; four of its images."""
    network = registry.make("models", "shapes/resnet").describe(None)
    model = load_model(network, "shapes/resnet", network.layers, "cpu")
    images, labels, _ = generate(3, "test", range(4))
    model = replace(model, net=model.net.double(), size=(64, 64))
    return model, Batch(images.double(), labels, tuple(map(str, range(4))))


@functools.cache
def toy() -> tuple[Model, Batch]:
    return toy_model(), toy_batch(4)


@functools.cache
def wide() -> tuple[Model, Batch]:
    """A layer of 40 signed channels: the library ablates 32 at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = (nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net = nn.Sequential(*parts, nn.Linear(40, 5)).double().eval().requires_grad_(False)
    return replace(toy_model(), net=net, layers={"last_conv": "0"}), toy_batch(4)


Toy = Callable[[], tuple[Model, Batch]]


def inputs_of(on: Toy) -> tuple[Model, Tensor]:
    model, batch = on()
    return model, model.normalise(batch.images)


# --- theirs ---------------------------------------------------------------------------------------


def captums(window: int, stride: int, pixel: float | None, on: Toy) -> Tensor:
    """captum's Occlusion of a window over all channels, by a pixel value or the normalised zero."""
    model, inputs = inputs_of(on)
    value = 0 if pixel is None else model.normalise(torch.full_like(inputs[:1], pixel))
    found = Occlusion(model.net).attribute(
        inputs,
        sliding_window_shapes=(3, window, window),
        strides=(3, stride, stride),
        baselines=value,
        target=TARGET,
    )
    return found[:, 0]  # the same in every channel


def librarys(name: str, layer: str, on: Toy) -> tuple[Tensor, Tensor]:
    """The library's map at the layer's resolution, and its final one."""
    model, inputs = inputs_of(on)
    caught = []
    targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
    module = model.net.get_submodule(model.layer(layer))
    with (
        prepared(model.net),
        getattr(pytorch_grad_cam, name)(model.net, [module]) as library,
    ):
        inner = library.get_cam_image

        def get_cam_image(*args: Any, **named: Any) -> Any:
            caught.append(inner(*args, **named))
            return caught[0]

        library.get_cam_image = get_cam_image
        final = library(inputs, targets)
    return torch.from_numpy(caught[0]), torch.from_numpy(final)


def by_probability(model: Model, inputs: Tensor, target: Tensor) -> Tensor:
    return model.net(inputs[None])[0].softmax(0)[target]


def rise(samples: int, cells: int, p1: float, on: Toy) -> Tensor:
    """The sum of masks times probabilities; masks from their documented streams."""
    model, inputs = inputs_of(on)
    height, width = inputs.shape[-2:]
    high, wide = math.ceil(height / cells), math.ceil(width / cells)
    total = torch.zeros(len(inputs), height, width, dtype=torch.float64)
    for number in range(samples):
        stream = noise.stream_keys(0, [f"mask {number}"], "rise")
        drawn = noise.uniform(stream, cells * cells + 2)[0].double()
        grid = (drawn[:-2] < p1).double().view(1, 1, cells, cells)
        grown = interpolate(grid, ((cells + 1) * high, (cells + 1) * wide), mode="bilinear")[0, 0]
        top, left = int(drawn[-2] * high), int(drawn[-1] * wide)
        mask = grown[top : top + height, left : left + width]
        for at, (image, target) in enumerate(zip(inputs, TARGET, strict=True)):
            total[at] += mask * by_probability(model, image * mask, target)
    return total / (samples * p1)


def activation_of(model: Model, layer: str, inputs: Tensor) -> Tensor:
    kept: list[Tensor] = []
    module = model.net.get_submodule(model.layer(layer))
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
    model.net(inputs)
    handle.remove()
    return kept[0]


def score_cam(layer: str, on: Toy) -> Tensor:
    """Equation 5 of arXiv:2404.15024 on black, then ReLU and bilinear upsampling."""
    model, inputs = inputs_of(on)
    size = inputs.shape[-2:]
    black = model.normalise(torch.zeros_like(inputs[:1]))[0]
    maps = []
    for image, target in zip(inputs, TARGET, strict=True):
        activation = activation_of(model, layer, image[None])[0]
        cam = torch.zeros_like(activation[0])
        alone = by_probability(model, black, target)
        for channel in activation:
            mask = interpolate(channel[None, None], size, mode="bilinear")[0, 0]
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
            masked = mask * image + (1 - mask) * black
            cam += (by_probability(model, masked, target) - alone) * channel
        maps.append(interpolate(cam.relu()[None, None], size, mode="bilinear")[0, 0])
    return torch.stack(maps)


def ablation_cam(layer: str, on: Toy) -> Tensor:
    """(y - y_k) / y by whole forwards with a hook, then ReLU and bilinear upsampling."""
    model, inputs = inputs_of(on)
    module = model.net.get_submodule(model.layer(layer))
    maps = []
    for image, target in zip(inputs, TARGET, strict=True):
        activation = activation_of(model, layer, image[None])[0]
        logit = model.net(image[None])[0, target]
        cam = torch.zeros_like(activation[0])
        for channel in range(len(activation)):
            changed = activation.clone()
            changed[channel] = 0
            handle = module.register_forward_hook(lambda *_, changed=changed: changed[None])
            cam += (logit - model.net(image[None])[0, target]) / logit * activation[channel]
            handle.remove()
        size = inputs.shape[-2:]
        maps.append(interpolate(cam.relu()[None, None], size, mode="bilinear")[0, 0])
    return torch.stack(maps)


# --- transformers ---------------------------------------------------------------------------------


@torch.no_grad()
def ablated_by_hooks(method: str, family: Family) -> tuple[Tensor, Tensor]:
    """As :func:`ablation_cam`, every token of a channel set to zero, the class token's too."""
    model, batch = family.model(), family.batch()
    inputs = model.normalise(batch.images)
    activation = activation_of(model, "last_conv", inputs)
    logits = model.net(inputs)
    axis = 1 if family.role == "permute" else -1
    weights = []
    for channel in range(activation.shape[axis]):
        changed = activation.clone()
        changed.select(axis, channel).zero_()
        module = model.net.get_submodule(family.role)
        handle = module.register_forward_hook(lambda *_, changed=changed: changed)
        weights.append(((logits - model.net(inputs)) / logits).gather(1, TARGET[:, None]))
        handle.remove()
    grown = reshape(family) or (lambda output: output)
    cam = (torch.cat(weights, dim=1)[:, :, None, None] * grown(activation)).sum(1)
    return explained(method, model=model, batch=batch), enlarged(cam.relu(), family)


@torch.no_grad()
def librarys_tokens(method: str, family: Family) -> tuple[Tensor, Tensor]:
    """The library's final maps with the reshape that its users write."""
    model, batch = family.model(), family.batch()
    more = {} if family.role == "permute" else {"ablation_layer": AblationLayerVit()}
    kind = {"score_cam": ScoreCAM, "ablation_cam": partial(AblationCAM, **more)}[method]
    layers = [model.net.get_submodule(family.role)]
    with kind(model.net, layers, reshape_transform=reshape(family)) as library:
        targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
        theirs = torch.from_numpy(library(model.normalise(batch.images), targets))
    return explained(method, {"preset": "pgc-1.5"}, model=model, batch=batch), theirs


# --- the comparisons ------------------------------------------------------------------------------


def beside(
    method: str,
    params: Mapping[str, Any],
    reference: str,
    theirs: Callable[..., Tensor],
    *args: Any,
    on: Toy = toy,
    tolerance: float = 1e-12,
    reason: str = "",
) -> Comparison:
    def compute() -> tuple[Tensor, Tensor]:
        model, batch = on()
        with torch.no_grad():
            expected = theirs(*args, on)
        return explained(method, params, model=model, batch=batch), expected

    words = reference if on is toy else f"{reference}, {on.__name__} network"
    return Comparison(method, words, compute, params, tolerance, reason)


def raw(name: str, layer: str, on: Toy) -> Tensor:
    return librarys(name, layer, on)[0]


def final(name: str, layer: str, on: Toy) -> Tensor:
    return librarys(name, layer, on)[1]


SOFTMAX = {"weights": "softmax", "baseline": "mean", "mask_upsampling": "corners"}
ODD = {"window": 0.4, "stride": 0.3}
EVERY = list(FAMILIES.values())
POSITIVE = [family for name, family in FAMILIES.items() if name != "timm Swin V2"]
"""Score-CAM of the other is negative everywhere, which the library shows as zeros."""

COMPARISONS: tuple[Comparison, ...] = (
    beside("occlusion", {}, f"{CAPTUM} Occlusion", captums, 4, 2, 0.0,
           tolerance=1e-6, reason=DIVISION),
    beside("occlusion", {}, f"{CAPTUM} Occlusion", captums, 16, 8, 0.0,
           on=residual, tolerance=1e-6, reason=DIVISION),
    beside("occlusion", {**ODD, "baseline": "white"}, f"{CAPTUM} Occlusion", captums, 6, 5, 1.0,
           tolerance=1e-6, reason=DIVISION),
    beside("occlusion", {"preset": "latec-2024"}, f"{CAPTUM} Occlusion", captums, 14, 7, None,
           on=residual, tolerance=1e-6, reason=DIVISION),
    beside("rise", {"samples": 70}, BY_LOOP, rise, 70, 7, 0.5),
    beside("rise", {"samples": 66, "cells": 5, "p1": 0.2}, BY_LOOP, rise, 66, 5, 0.2, on=residual),
    beside("score_cam", {}, BY_LOOP, score_cam, "last_conv"),
    beside("score_cam", {"layer": "layer2"}, BY_LOOP, score_cam, "layer2", on=residual),
    beside("score_cam", {**SOFTMAX, "layer": "1", "sign": "signed"}, f"{PGC} ScoreCAM, unscaled",
           raw, "ScoreCAM", "1", tolerance=1e-6, reason=FLOAT32),
    beside("score_cam", {"preset": "pgc-1.5"}, f"{PGC} ScoreCAM", final, "ScoreCAM", "last_conv",
           tolerance=1e-5, reason=EPSILONS),
    beside("score_cam", {"preset": "pgc-1.5"}, f"{PGC} ScoreCAM", final, "ScoreCAM", "last_conv",
           on=residual, tolerance=1e-5, reason=EPSILONS),
    beside("ablation_cam", {}, BY_LOOP, ablation_cam, "last_conv"),
    beside("ablation_cam", {"layer": "1"}, BY_LOOP, ablation_cam, "1"),
    beside("ablation_cam", {"layer": "layer2.0.conv1"}, BY_LOOP, ablation_cam, "layer2.0.conv1",
           on=residual),
    beside("ablation_cam", {"layer": "1", "ablation": "pgc", "sign": "signed"},
           f"{PGC} AblationCAM, unscaled", raw, "AblationCAM", "1", tolerance=1e-5, reason=FLOAT32),
    beside("ablation_cam", {"layer": "0", "ablation": "pgc", "sign": "signed"},
           f"{PGC} AblationCAM, unscaled", raw, "AblationCAM", "0", tolerance=1e-5, reason=FLOAT32),
    beside("ablation_cam", {"ablation": "pgc", "sign": "signed"}, f"{PGC} AblationCAM, unscaled",
           raw, "AblationCAM", "last_conv", on=wide, tolerance=1e-5, reason=FLOAT32),
    beside("ablation_cam", {"preset": "pgc-1.5"}, f"{PGC} AblationCAM", final, "AblationCAM",
           "last_conv", tolerance=1e-5, reason=FLOAT32),
    beside("ablation_cam", {"preset": "pgc-1.5", "layer": "layer2.0.conv1"}, f"{PGC} AblationCAM",
           final, "AblationCAM", "layer2.0.conv1", on=residual, tolerance=1e-5, reason=FLOAT32),
    Comparison("ablation_cam", f"definition, by hooks, on {len(EVERY)} transformers, ViT to Swin",
               partial(of_all, ablated_by_hooks, "ablation_cam", EVERY)),
    *(
        Comparison(name, f"{PGC} with reshape_transform, on {len(families)} transformers",
                   partial(of_all, librarys_tokens, name, families), {"preset": "pgc-1.5"},
                   tolerance=1e-5, reason=reason)
        for name, families, reason in (("score_cam", POSITIVE, EPSILONS),
                                       ("ablation_cam", EVERY, FLOAT32))
    ),
)  # fmt: skip
