"""Classifiers of torchvision, by name, and the padding that networks from TensorFlow need."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import UsageError


def names() -> list[str]:
    """All classifiers."""
    from torchvision import models  # imports much; needed only by suites that name one

    return list(models.list_models(module=models))


def architectures() -> dict[str, Callable[[int], nn.Module]]:
    """``torchvision/<name>`` to a function that makes it, unloaded, for a number of classes."""
    return {f"torchvision/{name}": partial(_build, name) for name in names()}


def weights(name: str) -> dict[str, Any]:
    """Weights of a classifier by their name, with ``DEFAULT`` for those that torchvision prefers.

    Those of features alone are left out: they classify nothing.
    """
    from torchvision import models

    known = models.get_model_weights(name)
    found = {weights.name: weights for weights in known if not weights.name.endswith("_FEATURES")}
    return {"DEFAULT": known.DEFAULT, **found}


def checksum(file: str) -> str:
    """How a file's SHA-256 begins, which torchvision writes into its name; or empty."""
    found = re.search(r"-([0-9a-f]{8,})\.", file)
    return found[1] if found else ""


def build_for(name: str, weights: Any) -> nn.Module:
    """The form of a network that its weights were trained in, with fresh ones."""
    more: dict[str, Any] = {}
    if name.startswith("vit_"):  # positions are weights
        more["image_size"] = weights.meta["min_size"][0]
    if name in _WITH_AUXILIARY_HEADS:  # their weights came from elsewhere, where they saw [-1, 1]
        more["transform_input"] = True
    return _build(name, len(weights.meta["categories"]), **more)


_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def _build(name: str, classes: int, **more: Any) -> nn.Module:
    from torchvision import models

    if name in _WITH_AUXILIARY_HEADS:
        more |= {"init_weights": False, "aux_logits": False}
    with _Counting() if name.startswith("regnet") else nullcontext():
        net: nn.Module = models.get_model(name, weights=None, num_classes=classes, **more)
    return net


class _Counting(TorchFunctionMode):
    """Small tensors that a constructor counts with have values under ``torch.device("meta")`` too:
    RegNet's widths come from them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            given.setdefault("device", "cpu")
        return func(*args, **given)


class SamePaddedConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(side / stride) outputs along each axis.

    What an odd amount of padding leaves over goes to the right and the bottom.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that nn.Conv2d uses)
        edges: list[int] = []
        axes = zip(input.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        for side, kernel, stride, dilation in axes:
            reach = (math.ceil(side / stride) - 1) * stride + (kernel - 1) * dilation + 1
            lack = max(reach - side, 0)
            edges = [
                lack // 2,
                lack - lack // 2,
                *edges,
            ]  # functional.pad begins with the last axis
        padded = functional.pad(input, edges)
        return functional.conv2d(
            padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def pad_like_tensorflow(net: nn.Module) -> nn.Module:
    """TensorFlow's SAME padding in every strided convolution; the others have it anyway.

    Raises:
        UsageError: if the network has a strided pooling layer with padding, which this leaves out.
    """
    for path, module in net.named_modules():
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and module.padding not in (0, (0, 0)):
            raise UsageError(
                f"padding: same_tensorflow covers convolutions, but pooling layer {path!r} of "
                f"{type(net).__name__} is padded too"
            )
    for parent in list(net.modules()):
        for name, old in parent.named_children():
            if isinstance(old, nn.Conv2d) and max(old.stride) > 1:
                new = SamePaddedConv2d(
                    old.in_channels,
                    old.out_channels,
                    old.kernel_size,  # type: ignore[arg-type]
                    stride=old.stride,  # type: ignore[arg-type]
                    dilation=old.dilation,  # type: ignore[arg-type]
                    groups=old.groups,
                    bias=old.bias is not None,
                )
                setattr(parent, name, new)
    return net
