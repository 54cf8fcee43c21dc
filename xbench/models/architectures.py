"""Names of architectures, as checkpoints and training recipes use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ..errors import UsageError
from ..registry import suggestion
from . import resnet, small, timm, torchvision

Builder = Callable[[int], nn.Module]
"""Number of classes to a network with fresh weights, drawn from torch's global stream."""

OWN: Mapping[str, Builder] = {
    "densenet121_32": small.densenet121_32,
    "mobilenet_v2_32": small.mobilenet_v2_32,
    "resnet18_32": small.resnet18_32,
    "resnet34_32": small.resnet34_32,
    "resnet50_32": small.resnet50_32,
    "resnet20": resnet.resnet20,
    "resnet56": resnet.resnet56,
    "shapes_resnet": resnet.shapes_resnet,
    "vgg16_bn_32": small.vgg16_bn_32,
}
"""Our own: for 32 x 32 images, and ``shapes_resnet`` for the 64 x 64 of the data set ``shapes``."""


def architecture(name: str) -> Builder:
    """What makes a network for a number of classes.

    Args:
        name: of :data:`OWN`, ``torchvision/<name>`` or, where timm is installed, ``timm/<name>``.

    Raises:
        UsageError: if nothing has that name.
    """
    if name in OWN:
        return OWN[name]
    if name.startswith("timm/"):
        key = name.removeprefix("timm/")
        timm.facts(key)  # which knows all names
        return partial(timm.build, key)
    known = {**OWN, **torchvision.architectures()}
    if name not in known:
        raise UsageError(f"unknown architecture {name!r}{suggestion(name, known)}")
    return known[name]
