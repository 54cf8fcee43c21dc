"""Residual networks for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))  # type: ignore[no-any-return]

    def shortcut(self, x: Tensor) -> Tensor:
        """Every ``stride``-th position, with channels of zeros on both sides."""
        if self.stride == 1 and self.added == 0:
            return x
        kept = x[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        return functional.pad(kept, (0, 0, 0, 0, before, self.added - before))


class ResNet(nn.Module):
    """ResNet of the CIFAR kind: images (N, 3, H, W) to logits (N, K).

    A 3 x 3 stem, three stages of which the second and third halve the map, global average pooling
    and one linear layer. Every ReLU is a module of its own that runs once per forward pass, and the
    output of ``layer3`` is taken after its last ReLU.

    Args:
        blocks: blocks per stage; the depth in the paper's count is ``6 * blocks + 2``.
        widths: channels of the three stages.
        classes: number of logits.
        stem_stride: 1 as published for 32 x 32 images; 2 halves the map before the first stage.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2,
    arXiv:1512.03385.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        classes: int = 10,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, first, first, stride=1)
        self.layer2 = _stage(blocks, first, second, stride=2)
        self.layer3 = _stage(blocks, second, third, stride=2)
        self.linear = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10) -> ResNet:
    """ResNet-20 for 32 x 32 images."""
    return ResNet(3, classes=classes)


def resnet56(classes: int = 10) -> ResNet:
    """ResNet-56 for 32 x 32 images."""
    return ResNet(9, classes=classes)


def shapes_resnet(classes: int = 12) -> ResNet:
    """The small network of the ``shapes`` data set: 64 x 64 images, 12 classes, last map 8 x 8."""
    return ResNet(1, (8, 16, 32), classes=classes, stem_stride=2)
