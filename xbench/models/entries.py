"""The models that suites can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from ..errors import UsageError
from ..registry import model
from ..types import Network
from . import resnet, torchvision
from .architectures import architecture
from .loading import damage, metadata

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]
Channels = tuple[Mean, Mean, Mean]
Scales = tuple[Std, Std, Std]
Classes = Annotated[int, Field(ge=1)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@model("shapes/resnet")
class ShapesResNet:
    """The small ResNet that ships with xbench, trained on the data set ``shapes``.

    Made by ``xbench train shapes-resnet``.
    """

    version: ClassVar[int] = 1

    def describe(self, data: Path | None) -> Network:
        return _embedded("shapes_resnet")


@model("shapes/resnet_regularised")
class RegularisedShapesResNet:
    """The twin of ``shapes/resnet``: same recipe and seed, with interpretable gradients.

    Made by ``xbench train shapes-resnet --variant cosine``.
    """

    version: ClassVar[int] = 1

    def describe(self, data: Path | None) -> Network:
        return _embedded("shapes_resnet_regularised")


def _embedded(name: str) -> Network:
    return Network(
        build=resnet.shapes_resnet,
        weights=Path(__file__).parent.parent / "weights" / f"{name}.safetensors",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers={"last_conv": "layer3"},
    )


@model("checkpoint")
class Checkpoint:
    """An architecture with weights from a file.

    A safetensors file that ``xbench train`` wrote says itself which architecture it is for, how
    many classes it has and what normalisation it wants; what is given here comes before that.

    Args:
        weights: safetensors, or a ``.pt`` file of tensors alone; a relative path is looked for in
            the data directory, then in the working directory. Weights may lie under
            ``state_dict``, ``model`` or ``net``, with the prefixes of wrappers before their names.
        architecture: for 32 x 32 images ``resnet20``, ``resnet56``, ``resnet18_32``,
            ``resnet34_32``, ``resnet50_32``, ``mobilenet_v2_32``, ``vgg16_bn_32`` or
            ``densenet121_32``; or ``torchvision/<name>`` or ``timm/<name>`` for any classifier of
            these libraries, such as ``torchvision/mobilenet_v2``. None: what the file says.
        classes: outputs of the last layer. None: what the file says, else 1000.
        mean, std: per channel on the [0, 1] scale, not 0 to 255. None: what the file says, else
            ImageNet's.
        padding: "same_tensorflow" pads strided convolutions as TensorFlow does, an odd rest at the
            right and bottom, which networks converted from there need.

    Raises:
        UsageError: on an unknown architecture, or where nobody names one.
    """

    weights: str
    architecture: str | None = None
    classes: Classes | None = None
    mean: Channels | None = None
    std: Scales | None = None
    padding: Literal["symmetric", "same_tensorflow"] = "symmetric"
    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("weights",)

    def describe(self, data: Path | None) -> Network:
        path = _locate(self.weights, data)
        said = metadata(path)
        name = self.architecture
        if name is None:
            name = _said(said, "architecture", str, path)
        if name is None:
            there = "there is no such file"
            if path.is_file():
                there = damage(path) or "the file does not name it"
            raise UsageError(
                f"model 'checkpoint' with weights {str(path)!r} lacks 'architecture': {there}"
            )
        return Network(
            build=self._builder(
                name, self.classes or _said(said, "classes", Classes, path) or 1000
            ),
            weights=path,
            mean=self.mean or _said(said, "mean", Channels, path) or IMAGENET_MEAN,
            std=self.std or _said(said, "std", Scales, path) or IMAGENET_STD,
        )

    def _builder(self, name: str, classes: int) -> Callable[[], nn.Module]:
        make = architecture(name)

        def build() -> nn.Module:
            net = make(classes)
            return torchvision.pad_like_tensorflow(net) if self.padding != "symmetric" else net

        return build


def _said(said: Mapping[str, str], key: str, kind: Any, path: Path) -> Any:
    """What a file's metadata say of a parameter, as JSON; None if nothing.

    Raises:
        UsageError: if they say something else.
    """
    if key not in said:
        return None
    try:
        return TypeAdapter(kind).validate_json(said[key], strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(
            f"weights {str(path)!r} say {key} = {said[key][:80]}, which is no value of it "
            f"({reason}); give {key} in the suite"
        ) from None


def _locate(path: str, data: Path | None) -> Path:
    inside = data / path if data is not None else None
    return inside if inside is not None and inside.is_file() else Path(path)
