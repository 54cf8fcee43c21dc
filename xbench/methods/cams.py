"""Class activation maps: feature maps of one layer, weighted by gradients of the target's logit.

All share one recorded layer and its gradient. Their published formulas end with a ReLU, so maps are
non-negative. The layer is a role (``last_conv``: the last feature map before pooling) or a module
path.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..maps import upsample, weighted_sum
from ..probe import LayerGradient, Need, Probe
from ..registry import method


@method("grad_cam")
class GradCAM:
    """Grad-CAM: channels weighted by their mean gradient; maps (N, H, W), non-negative.

    Args:
        layer: role or module path.

    Source: Selvaraju et al. 2017, arXiv:1610.02391.
    """

    layer: str = "last_conv"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerGradient(self.layer),)

    def __call__(self, probe: Probe) -> Tensor:
        activation, gradient = probe[LayerGradient(self.layer)]
        return upsample(self.cam(activation, gradient).relu(), like=probe.inputs)

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """(N, C, h, w) twice to (N, h, w), before ReLU and upsampling."""
        return weighted_sum(gradient.mean((2, 3)), activation)


@method("grad_cam_plus_plus")
class GradCAMPlusPlus(GradCAM):
    """Grad-CAM++: positive gradients, weighted by higher derivatives; maps (N, H, W), non-negative.

    With exp(logit) differentiated, as published, the second and third derivatives become g^2 and
    g^3; where the gradient is zero the weight is zero. Nothing is added to the denominator.

    Args:
        layer: role or module path.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063; equations 3 and 4 of arXiv:2404.15024.
    """

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        # g^2 / (2 g^2 + g^3 sum A) = 1 / (2 + g sum A): the square cancels, and cannot underflow
        denominator = 2 + gradient * activation.sum((2, 3), keepdim=True)
        weight = gradient.relu() / denominator.where(denominator != 0, 1)
        return weighted_sum(weight.sum((2, 3)), activation)


@method("xgrad_cam")
class XGradCAM(GradCAM):
    """XGrad-CAM (Axiom-CAM): gradients averaged by activation; maps (N, H, W), non-negative.

    A channel whose activation adds up to zero gets weight zero.

    Args:
        layer: role or module path.

    Source: Fu et al. 2020, arXiv:2008.02312.
    """

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        total = activation.sum((2, 3))
        weight = (gradient * activation).sum((2, 3)) / total.where(total != 0, 1)
        return weighted_sum(weight.where(total != 0, 0), activation)


@method("hires_cam")
class HiResCAM(GradCAM):
    """HiResCAM: gradient times activation, position by position; maps (N, H, W), non-negative.

    Args:
        layer: role or module path.

    Source: Draelos and Carin 2020, arXiv:2011.08891.
    """

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (gradient * activation).sum(1)


@method("layer_cam")
class LayerCAM(GradCAM):
    """LayerCAM: positive gradient times activation, position by position; maps (N, H, W), >= 0.

    Args:
        layer: role or module path.

    Source: Jiang et al. 2021, IEEE TIP 30, doi:10.1109/TIP.2021.3089943.
    """

    def cam(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.relu() * activation).sum(1)
