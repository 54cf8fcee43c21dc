"""Classifiers of torchvision, by name, and the padding that networks from TensorFlow need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional


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
    """A convolution with stride 2 over an even input, padded at the right and bottom only."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that nn.Conv2d uses)
        padded = functional.pad(input, (0, 1, 0, 1))
        return functional.conv2d(
            padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def pad_like_tensorflow(net: nn.Module) -> nn.Module:
    """TensorFlow's SAME padding, for even inputs, in every 3 x 3 convolution with stride 2."""
    for parent in list(net.modules()):
        for name, old in parent.named_children():
            if isinstance(old, nn.Conv2d) and old.stride == (2, 2) and old.kernel_size == (3, 3):
                new = SamePaddedConv2d(
                    old.in_channels,
                    old.out_channels,
                    3,
                    stride=2,
                    dilation=old.dilation,  # type: ignore[arg-type]
                    groups=old.groups,
                    bias=old.bias is not None,
                )
                setattr(parent, name, new)
    return net
