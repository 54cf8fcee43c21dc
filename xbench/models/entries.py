"""The models that suites can name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from ..registry import model
from ..types import Network
from . import resnet, torchvision
from .architectures import architecture

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@model("shapes/resnet")
class ShapesResNet:
    """The small ResNet that ships with xbench, trained on the data set ``shapes``.

    ``benchmarks/training/shapes.py`` is the command that trained it.
    """

    version: ClassVar[int] = 1

    def describe(self, data: Path | None) -> Network:
        return Network(
            build=resnet.shapes_resnet,
            weights=Path(__file__).parent.parent / "weights" / "shapes_resnet.safetensors",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layers={"last_conv": "layer3"},
        )


@model("checkpoint")
class Checkpoint:
    """An architecture with weights from a file.

    Args:
        architecture: for 32 x 32 images ``resnet20``, ``resnet56``, ``resnet18_32``,
            ``resnet34_32``, ``resnet50_32``, ``mobilenet_v2_32``, ``vgg16_bn_32`` or
            ``densenet121_32``; or ``torchvision/<name>`` for any classifier of torchvision, such as
            ``torchvision/mobilenet_v2``.
        weights: safetensors, or a ``.pt`` file of tensors alone; a relative path is looked for in
            the data directory, then in the working directory.
        classes: outputs of the last layer.
        mean, std: per channel on the [0, 1] scale, not 0 to 255; ImageNet's by default.
        padding: "same_tensorflow" pads strided convolutions as TensorFlow does, an odd rest at the
            right and bottom, which networks converted from there need.

    Raises:
        UsageError: on an unknown architecture.
    """

    architecture: str
    weights: str
    classes: Annotated[int, Field(ge=1)] = 1000
    mean: tuple[Mean, Mean, Mean] = IMAGENET_MEAN
    std: tuple[Std, Std, Std] = IMAGENET_STD
    padding: Literal["symmetric", "same_tensorflow"] = "symmetric"
    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("weights",)

    def describe(self, data: Path | None) -> Network:
        return Network(
            build=self._builder(),
            weights=_locate(self.weights, data),
            mean=self.mean,
            std=self.std,
        )

    def _builder(self) -> Callable[[], nn.Module]:
        make = architecture(self.architecture)

        def build() -> nn.Module:
            net = make(self.classes)
            return torchvision.pad_like_tensorflow(net) if self.padding != "symmetric" else net

        return build


def _locate(path: str, data: Path | None) -> Path:
    inside = data / path if data is not None else None
    return inside if inside is not None and inside.is_file() else Path(path)
