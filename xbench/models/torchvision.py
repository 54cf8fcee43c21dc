"""Classifiers of torchvision, by name, and the padding that networks from TensorFlow need."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError


def architectures() -> dict[str, Callable[[int], nn.Module]]:
    """``torchvision/<name>`` to a function that makes it, unloaded, for a number of classes."""
    from torchvision import models  # imports much; needed only by suites that name one

    return {
        f"torchvision/{name}": partial(_build, name) for name in models.list_models(module=models)
    }


def _build(name: str, classes: int) -> nn.Module:
    from torchvision import models

    more = (
        {"init_weights": False, "aux_logits": False}
        if name in ("googlenet", "inception_v3")
        else {}
    )
    net: nn.Module = models.get_model(name, weights=None, num_classes=classes, **more)
    return net


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
