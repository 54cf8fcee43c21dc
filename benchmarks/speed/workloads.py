"""Networks with images to time: as small as the demonstration's, of 32 x 32, of 224 x 224."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from xbench.models.resnet import shapes_resnet
from xbench.noise import stream_keys, uniform
from xbench.types import Batch, Model


@dataclass(frozen=True)
class Workload:
    """A network with fresh weights and a batch of noise: their time does not depend on values.

    Args:
        words: what it stands for.
        build: makes the network.
        layer: role ``last_conv``.
        side: of the square images.
        images: in the batch; the fixed forward shape too.
    """

    words: str
    build: Callable[[], nn.Module]
    layer: str
    side: int
    images: int

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval().requires_grad_(False)

    def model(self, net: nn.Module) -> Model:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return Model("timed", net, mean, std, {"last_conv": self.layer}, (self.side, self.side))

    def batch(self, images: int, device: str) -> Batch:
        keys = tuple(f"noise/{at}" for at in range(images))
        pixels = uniform(stream_keys(0, keys, "picture", 0), 3 * self.side**2)
        shape = (images, 3, self.side, self.side)
        labels = torch.zeros(images, dtype=torch.int64)
        return Batch(pixels.view(shape).float().to(device), labels.to(device), keys)


def resnet18_of_small_images() -> nn.Module:
    """ResNet-18 with a 3 x 3 stem that keeps 32 x 32, and 100 classes."""
    net = resnet18(num_classes=100)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


WORKLOADS = {
    "W0": Workload("shapes/resnet, 64 images of 64 x 64", shapes_resnet, "layer3", 64, 64),
    "W1": Workload(
        "ResNet-18 with a 3 x 3 stem, 64 images of 32 x 32",
        resnet18_of_small_images,
        "layer4",
        32,
        64,
    ),
    "W2": Workload("ResNet-50, 8 images of 224 x 224", resnet50, "layer4", 224, 8),
}
