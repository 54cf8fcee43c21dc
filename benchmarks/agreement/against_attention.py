"""Transformers: attention maps against their definitions, class activation maps against grad-cam.

The definitions are loops over images, layers and heads, on weights that a hand-written attention
computes in the place of the network's, differentiated by ``Tensor.backward``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pytorch_grad_cam
import torch
from comparison import TARGET, Comparison, explained
from families import FAMILIES, Family
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional

# --- attention ------------------------------------------------------------------------------------


def watched(family: Family, target: Tensor) -> list[Tensor]:
    """Weights (N, heads, T, T) of each layer, with the target logits' gradient in ``.grad``."""
    model = family.model()
    net = copy.deepcopy(model.net)
    kept: list[Tensor] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
        """(N, T, C) thrice, before they are split into heads."""
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
        scores = torch.einsum("nhic,nhjc->nhij", q, k) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(3, keepdim=True)
        if not weights.requires_grad:
            weights.requires_grad_()
        weights.retain_grad()
        kept.append(weights)
        return torch.einsum("nhij,nhjc->nhic", weights, v).transpose(1, 2).flatten(2)

    def torchvision(module: nn.MultiheadAttention, x: Tensor, *_: Any, **__: Any) -> Any:
        inner = x @ module.in_proj_weight.T + module.in_proj_bias
        out = attend(*inner.chunk(3, dim=2), module.num_heads)
        return module.out_proj(out), None

    def of_timm(module: Any, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = module.proj(attend(*module.qkv(x).chunk(3, dim=2), module.num_heads))
        return out

    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = partial(torchvision, module)  # type: ignore[method-assign]
        elif hasattr(module, "qkv"):
            module.forward = partial(of_timm, module)
    logits = net(model.normalise(family.batch(len(target)).images))
    logits[range(len(target)), target].sum().backward()
    return kept


def attention(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
    """Mean over heads in the last layer; one image, weights (heads, T, T)."""
    last = weights[-1]
    return sum(last[head] for head in range(len(last))) / len(last)


def rollout(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
    """Abnar and Zuidema 2020, section 3: identity added, rows normalised, layers multiplied."""
    tokens = weights[0].shape[-1]
    joint = np.eye(tokens)
    for layer in weights:
        mixed = sum(layer[head] for head in range(len(layer))) / len(layer) + np.eye(tokens)
        mixed = mixed / mixed.sum(axis=1, keepdims=True)
        joint = mixed @ joint
    return joint


def chefer(weights: list[np.ndarray], gradients: list[np.ndarray]) -> np.ndarray:
    """Chefer, Gur and Wolf 2021, equations 5 and 6, for self-attention alone."""
    relevance = np.eye(weights[0].shape[-1])
    for layer, gradient in zip(weights, gradients, strict=True):
        heads = len(layer)
        weighted = sum(np.maximum(gradient[head] * layer[head], 0) for head in range(heads)) / heads
        relevance = relevance + weighted @ relevance
    return relevance


RULES: dict[str, Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray]] = {
    "attention": attention,
    "attention_rollout": rollout,
    "gradient_rollout": chefer,
}


def by_definition(method: str, family: Family) -> tuple[Tensor, Tensor]:
    ours = explained(method, model=family.model(), batch=family.batch())
    layers = watched(family, TARGET)
    patches = range(family.prefix, layers[0].shape[-1])
    theirs = []
    for image in range(len(TARGET)):
        weights = [layer.detach()[image].numpy() for layer in layers]
        gradients = [layer.grad[image].numpy() for layer in layers]  # type: ignore[index]
        relevance = RULES[method](weights, gradients)
        rows = [relevance[token] for token in (family.read or patches)]
        row = sum(rows) / len(rows)
        theirs.append(torch.tensor(np.array([row[patch] for patch in patches])))
    return ours, enlarged(torch.stack(theirs).view(-1, *family.grid), family)


def enlarged(small: Tensor, family: Family) -> Tensor:
    size = list(family.size)
    return functional.interpolate(small[:, None], size, mode="bilinear", align_corners=False)[:, 0]


# --- class activation maps ------------------------------------------------------------------------

LIBRARY = f"grad-cam {version('grad-cam')}"
CAMS = {
    "grad_cam": pytorch_grad_cam.GradCAM,
    "grad_cam_plus_plus": pytorch_grad_cam.GradCAMPlusPlus,
    "xgrad_cam": pytorch_grad_cam.XGradCAM,
    "hires_cam": pytorch_grad_cam.HiResCAM,
    "layer_cam": pytorch_grad_cam.LayerCAM,
}
LARGE = 1e9
"""The head is multiplied by it: the library adds 1e-6 to terms with squares of gradients."""


def reshape(family: Family) -> Callable[[Tensor], Tensor] | None:
    """What users of the library write by hand."""
    height, width = family.grid
    if family.role == "permute":
        return None
    if not family.attends:
        return lambda output: output.permute(0, 3, 1, 2)
    return lambda output: (
        output[:, family.prefix :]
        .reshape(len(output), height, width, output.shape[2])
        .permute(0, 3, 1, 2)
    )


def by_library(method: str, family: Family) -> tuple[Tensor, Tensor]:
    model, batch = family.model(), family.batch()
    for path, parameter in model.net.named_parameters():
        if "head" in path:
            parameter.mul_(LARGE)
    ours = explained(method, model=model, batch=batch)
    layers = [model.net.get_submodule(family.role)]
    found = []
    with CAMS[method](model.net, layers, reshape_transform=reshape(family)) as library:
        inner = library.get_cam_image

        def before_scaling(*args: Any, **kwargs: Any) -> Any:
            found.append(torch.from_numpy(raw := inner(*args, **kwargs)))
            return raw

        library.get_cam_image = before_scaling
        targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
        library(model.normalise(batch.images).requires_grad_(), targets)
    return ours, enlarged(found[0].relu(), family)


# --- all of them ----------------------------------------------------------------------------------


def of_all(
    one: Callable[[str, Family], tuple[Tensor, Tensor]], method: str, families: list[Family]
) -> tuple[Tensor, Tensor]:
    """The maps of all families in one row, each relative to its reference's largest value."""
    pairs = [one(method, family) for family in families]
    scales = [theirs.abs().max() for _, theirs in pairs]
    ours, theirs = (
        torch.cat(
            [(pair[side] / scale).flatten() for pair, scale in zip(pairs, scales, strict=True)]
        )
        for side in (0, 1)
    )
    return ours, theirs


EVERY = list(FAMILIES.values())
GLOBAL = [family for family in EVERY if family.attends]

COMPARISONS: tuple[Comparison, ...] = (
    *(
        Comparison(
            method,
            f"definition, by loops, on {len(GLOBAL)} vision transformers",
            partial(of_all, by_definition, method, GLOBAL),
        )
        for method in RULES
    ),
    *(
        Comparison(
            method,
            f"{LIBRARY} with reshape_transform, on {len(EVERY)} transformers, ViT to Swin",
            partial(of_all, by_library, method, EVERY),
            tolerance=1e-5 if method == "xgrad_cam" else 1e-9,
            reason="grad-cam adds 1e-7 to each channel's sum" if method == "xgrad_cam" else "",
        )
        for method in CAMS
    ),
)
