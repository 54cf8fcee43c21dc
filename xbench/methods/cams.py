"""Class activation maps: the feature maps of one layer, reduced to one map.

All share one recorded layer and its gradient, and the way in which a small map becomes a map of the
image. The layer is a role (``last_conv``: the last feature map before pooling) or a module path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..errors import Unsupported
from ..layers import layer_facts
from ..maps import (
    CamParts,
    Channels,
    levelled,
    reduced,
    weighted_sum,
)
from ..probe import LayerActivation, LayerGradient, Need, Probe
from ..registry import method
from ..sweeps import GuidedGradient, NoisyLayerGradients

Epsilon = Annotated[float, Field(ge=0)]
Presets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class GradientCam(CamParts):
    """A class activation map of nothing but a layer's activation and its gradient."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerGradient(self.layer),)

    def __call__(self, probe: Probe) -> Tensor:
        return self.grown(self.cam(*probe[LayerGradient(self.layer)]), probe.inputs)

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """(N, C, h, w) twice to (N, h, w), before sign, upsampling and scaling."""
        raise NotImplementedError


@method("cam")
class CAM(GradientCam):
    """CAM: channels weighted by the classifier's weights; maps (N, H, W), non-negative.

    Needs global average pooling and a linear layer after the feature maps, and nothing else. The
    gradient is then the same at every position and for every image, and adds up over positions to
    the linear layer's row of the target class; from there the weights are read.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.

    Raises:
        Unsupported: if anything else follows the layer.

    Source: Zhou et al. 2016, arXiv:1512.04150.
    """

    def __call__(self, probe: Probe) -> Tensor:
        activation, gradient = probe[LayerGradient(self.layer)]
        path = probe.model.layer(self.layer)
        if not layer_facts(probe.model, self.layer).affine:
            raise Unsupported(
                f"layer {path!r} is followed by more than global average pooling and a linear "
                "layer: the logits are not affine in it; grad_cam works there"
            )
        spread = gradient.flatten(2).amax(2) - gradient.flatten(2).amin(2)
        if (spread > 1e-4 * gradient.abs().flatten(1).amax(1, keepdim=True)).any():
            raise Unsupported(
                f"layer {path!r} is not followed by global average pooling: its "
                f"{activation.shape[2]} x {activation.shape[3]} positions have different weights; "
                "hires_cam works there"
            )
        return self.grown(self.cam(activation, gradient), probe.inputs)

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return weighted_sum(gradient.sum((2, 3)), activation)


@method("grad_cam")
class GradCAM(GradientCam):
    """Grad-CAM: channels weighted by their mean gradient; maps (N, H, W), non-negative.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps. Preset ``pgc-1.5``
            is pytorch-grad-cam's.

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc"}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return weighted_sum(gradient.mean((2, 3)), activation)


@method("grad_cam_plus_plus")
class GradCAMPlusPlus(GradientCam):
    """Grad-CAM++: positive gradients, weighted by higher derivatives; maps (N, H, W), non-negative.

    With exp(logit) differentiated, as published, the second and third derivatives become g^2 and
    g^3; where the gradient is zero the weight is zero.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        epsilon: added to the denominator 2 g^2 + g^3 sum A. 0 is the equation; the 1e-6 of
            pytorch-grad-cam (preset ``pgc-1.5``) is not small beside squared gradients.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equations 3 and 4 of arXiv:2404.15024.
    """

    epsilon: Epsilon = 0.0

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc", "epsilon": 1e-6}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        # g^2 / (2 g^2 + g^3 sum A) = 1 / (2 + g sum A): the square cancels, and cannot underflow
        square = gradient.square()
        denominator = (
            2
            + gradient * activation.sum((2, 3), keepdim=True)
            + self.epsilon / square.where(square != 0, 1)
        )
        weight = gradient.relu() / denominator.where(denominator != 0, 1)
        return weighted_sum(weight.sum((2, 3)), activation)


@method("xgrad_cam")
class XGradCAM(GradientCam):
    """XGrad-CAM (Axiom-CAM): gradients averaged by activation; maps (N, H, W), non-negative.

    A channel whose activation adds up to zero gets weight zero.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        epsilon: added to a channel's sum of activations, by which it is divided. 0 is the equation;
            pytorch-grad-cam adds 1e-7 (preset ``pgc-1.5``).

    Source: Fu et al. 2020, arXiv:2008.02312.
    """

    epsilon: Epsilon = 0.0

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc", "epsilon": 1e-7}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        total = activation.sum((2, 3)) + self.epsilon
        weight = (gradient * activation).sum((2, 3)) / total.where(total != 0, 1)
        return weighted_sum(weight.where(total != 0, 0), activation)


@method("hires_cam")
class HiResCAM(GradientCam):
    """HiResCAM: gradient times activation, position by position; maps (N, H, W), non-negative.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps. Preset ``pgc-1.5``
            is pytorch-grad-cam's.

    Source: Draelos and Carin 2020, arXiv:2011.08891.
    """

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc"}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        product = gradient * activation
        return levelled(product.sum(1), product)


@method("layer_cam")
class LayerCAM(GradientCam):
    """LayerCAM: positive gradient times activation, position by position; maps (N, H, W), >= 0.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps. Preset ``pgc-1.5``
            is pytorch-grad-cam's.

    Source: Jiang et al. 2021, IEEE TIP 30, doi:10.1109/TIP.2021.3089943.
    """

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc"}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        product = gradient.relu() * activation
        return levelled(product.sum(1), product)


@method("eigen_cam")
class EigenCAM(CamParts):
    """Eigen-CAM: positions projected on the first singular vector of the activations; (N, H, W).

    With a row of channels per position, activations = U S V^T; the map is activations times the
    first column of V. It asks nothing about the class. A singular vector has no sign of its own:
    here the sum of the map's cubes is not negative, which points it where it is strongest, so that
    the map of rectified features is their Perron vector and non-negative. Where the two largest
    singular values are equal, the direction is not determined.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        centred: subtract each channel's mean over positions first. The paper does not;
            pytorch-grad-cam does (preset ``pgc-1.5``), and leaves the sign to chance.

    Source: Muhammad and Yeasin 2020, arXiv:2008.00299.
    """

    centred: bool = False

    class_agnostic: ClassVar[bool] = True
    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc", "centred": True}}

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerActivation(self.layer),)

    def __call__(self, probe: Probe) -> Tensor:
        return self.grown(self.cam(probe[LayerActivation(self.layer)]), probe.inputs)

    def cam(self, activation: Tensor) -> Tensor:
        """(N, C, h, w) to (N, h, w), before sign, upsampling and scaling."""
        component = _first_component(activation, centred=self.centred)
        # not by the sum over channels: behind a layer norm that is nothing but rounding
        return _turned(component, component.pow(3).sum((1, 2)))


@method("eigen_grad_cam")
class EigenGradCAM(GradientCam):
    """Eigen-CAM of gradient times activation, hence of the class; maps (N, H, W), non-negative.

    The map's inner product with the sum over channels of gradient times activation, which is
    HiResCAM, is not negative.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        centred: as in ``eigen_cam``; preset ``pgc-1.5`` is pytorch-grad-cam's.

    Source: pytorch-grad-cam, after Muhammad and Yeasin 2020, arXiv:2008.00299.
    """

    centred: bool = False

    presets: ClassVar[Presets] = {"pgc-1.5": {"scaling": "pgc", "centred": True}}

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        product = gradient * activation
        component = _first_component(product, centred=self.centred)
        return _turned(component, (component * product.sum(1)).sum((1, 2)))


def _first_component(features: Tensor, *, centred: bool) -> Tensor:
    """(N, C, h, w) to (N, h, w): positions on the first right singular vector, of either sign."""
    rows = features.flatten(2).double()  # (N, C, h * w); squares below need the digits
    if centred:
        rows = rows - rows.mean(2, keepdim=True)
    by_channel = rows.shape[1] <= rows.shape[2]
    gram = rows @ rows.mT if by_channel else rows.mT @ rows  # the smaller of the two has all of it
    # one image that is not finite must not fail the decomposition of the others
    finite = gram.flatten(1).isfinite().all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(gram.where(finite, 0))
    first = vectors[..., -1:]
    projection = rows.mT @ first if by_channel else first * values[:, -1:, None].relu().sqrt()
    small = projection.where(finite, torch.nan).view(-1, *features.shape[2:]).to(features.dtype)
    return levelled(small, features)


def _turned(maps: Tensor, sign: Tensor) -> Tensor:
    """Maps (N, h, w) with their sign changed where ``sign`` (N,) is negative."""
    return maps.where(sign[:, None, None] >= 0, -maps).where(maps.isfinite(), maps)


@method("smooth_grad_cam_plus_plus")
class SmoothGradCAMPlusPlus(CamParts):
    """Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noisy images; (N, H, W), >= 0.

    The means over noisy images of g, g^2 and g^3 stand for the three derivatives of Grad-CAM++; the
    feature maps are those of the clean image. The weight's numerator is the second derivative, as
    in Grad-CAM++ (the paper prints the first one there).

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        noise, samples: as in ``smooth_grad``, whose noisy images it sees.

    Source: Omeiza et al. 2019, arXiv:1908.01224.
    """

    noise: Annotated[float, Field(ge=0)] = 0.15
    samples: Annotated[int, Field(ge=1)] = 20

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerActivation(self.layer), self.noisy)

    @property
    def noisy(self) -> NoisyLayerGradients:
        return NoisyLayerGradients(self.layer, self.noise, self.samples)

    def __call__(self, probe: Probe) -> Tensor:
        activation = probe[LayerActivation(self.layer)]
        first, second, third = probe[self.noisy]
        ratio = third / second.where(second != 0, 1)
        denominator = 2 + ratio * activation.sum((2, 3), keepdim=True)
        weight = first.relu() / denominator.where(denominator != 0, 1)
        cam = weighted_sum(weight.sum((2, 3)).to(activation.dtype), activation)
        return self.grown(cam, probe.inputs)


@method("guided_grad_cam")
class GuidedGradCAM(GradCAM):
    """Guided Grad-CAM: Grad-CAM times guided backpropagation; maps (N, H, W).

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps, here of Grad-CAM.
        channels: how the product's colour channels become one map.
        allow_no_relu: accept a network without ReLU, as in ``guided_backprop``.

    Raises:
        Unsupported: if a rectifier of the network cannot be guided, or if it has none.

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """

    channels: Channels = "absolute_sum"
    allow_no_relu: bool = False

    presets: ClassVar[Presets] = {}

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerGradient(self.layer), GuidedGradient(self.allow_no_relu))

    def __call__(self, probe: Probe) -> Tensor:
        cam = self.grown(self.cam(*probe[LayerGradient(self.layer)]), probe.inputs)
        return reduced(cam[:, None] * probe[GuidedGradient(self.allow_no_relu)], self.channels)
