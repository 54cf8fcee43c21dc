"""Networks that were made for ImageNet, in the form that 32 x 32 images want.

They keep a map of 2 x 2 to 5 x 5 before the pooling, where the ImageNet forms would leave a single
position and so a constant class activation map. Every activation is a module of its own that runs
once per forward pass and never in place. Names of weights are torchvision's, but for MobileNet-V2.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)

# --- ResNet ---------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.downsample(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 3 x 3 convolution, where the stride is, between two of 1 x 1, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = _convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(residual)))))
        return self.relu3(residual + self.downsample(x))  # type: ignore[no-any-return]


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The identity where nothing changes, else a 1 x 1 convolution (option B of the paper)."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """ResNet of the ImageNet kind with a 3 x 3 stem of stride 1 and no max-pooling.

    Images (N, 3, 32, 32) to logits (N, K); the last map, of ``layer4``, is 4 x 4.

    Args:
        block: what the stages are made of.
        blocks: blocks of each of the four stages, 64, 128, 256 and 512 wide.
        classes: number of logits.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: tuple[int, int, int, int],
        classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        inputs = 64
        for at, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
            outputs = block.expansion * width
            first = block(inputs, width, stride=1 if at == 0 else 2)
            rest = [block(outputs, width, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{at + 1}", nn.Sequential(first, *rest))
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


resnet18_32 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34_32 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50_32 = partial(ResNet, Bottleneck, (3, 4, 6, 3))

# --- MobileNet-V2 ---------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """Widen, convolve each channel alone, narrow; the input is added where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * inputs
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.is_added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.residual(x)
        return x + residual if self.is_added else residual


def mobilenet_v2_32(classes: int) -> nn.Sequential:
    """MobileNet-V2 whose last map, of ``features``, is 5 x 5 after ReLU6.

    Other than the ImageNet network, it has a stem of 1 x 1 with padding 1, a widening convolution
    in the first block too (so 36 ReLU6), stride 2 in stages 2 to 4 alone, and biases beneath its
    normalisations, as in the recipe that Torres Figueroa et al. follow.

    Source: Sandler et al., MobileNetV2, CVPR 2018, arXiv:1801.04381; pytorch-cifar100 of GitHub's
    weiaicunzai for the form for 32 x 32 images.
    """
    stages = (
        # expansion, outputs, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 1),
        (6, 320, 1, 1),
    )
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6()]
    inputs = 32
    for expansion, outputs, blocks, stride in stages:
        for at in range(blocks):
            step = stride if at == 0 else 1
            layers.append(InvertedResidual(inputs, outputs, step, expansion))
            inputs = outputs
    layers += [nn.Conv2d(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6()]
    return _pooled(nn.Sequential(*layers), 1280, classes)


# --- VGG and DenseNet -----------------------------------------------------------------------------


def vgg16_bn_32(classes: int) -> nn.Sequential:
    """VGG-16 with batch normalisation, 512 features into its three linear layers.

    Its last map, before the last max-pooling, is 2 x 2: a class activation map of an earlier
    layer, such as ``features.32`` (4 x 4), shows more.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv:1409.1556.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(
        nn.Linear(512, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, classes),
    )
    parts = OrderedDict(
        features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=classifier
    )
    return _initialised(nn.Sequential(parts))


def densenet121_32(classes: int) -> nn.Sequential:
    """DenseNet-121 with a 3 x 3 stem of stride 1 and no max-pooling; last map 4 x 4, ``features``.

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993.
    """
    from torchvision import models

    features = models.densenet121(weights=None).features
    features.conv0 = _convolution(3, 64, 3)
    del features.pool0
    features.relu5 = nn.ReLU()  # a function in torchvision's forward, where no hook reaches it
    for module in features.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return _pooled(features, features.norm5.num_features, classes)


# --- what they share ------------------------------------------------------------------------------


def _pooled(features: nn.Module, channels: int, classes: int) -> nn.Sequential:
    """Average pooling and a linear layer behind feature maps."""
    parts = OrderedDict(
        features=features,
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(channels, classes),
    )
    return _initialised(nn.Sequential(parts))


def _initialised(net: T) -> T:
    """Convolutions drawn as He et al. (2015) do, so that gradients keep their variance."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
