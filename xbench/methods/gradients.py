"""Methods that read gradients of the target's logit towards the normalised input."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..maps import channel_sum, quantile
from ..probe import ImageGradient, Need, Probe
from ..registry import method
from ..sweeps import GuidedGradient, Moments, NoisyGradients

Samples = Annotated[int, Field(ge=1)]
SeveralSamples = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(ge=0)]


@method("gradient")
class Gradient:
    """Vanilla gradient: sum over channels of |d logit / d input|; maps (N, H, W), non-negative.

    Source: Simonyan et al. 2014, arXiv:1312.6034 (there the maximum over channels; the sum is the
    rule of Guided AbsoluteGrad and of every gradient method here).
    """

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (ImageGradient(),)

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(probe[ImageGradient()])


@method("input_x_gradient")
class InputXGradient:
    """Input times gradient: sum over channels of |input * gradient|; maps (N, H, W), non-negative.

    The input is the normalised one, so zero is the mean colour.

    Source: Shrikumar et al. 2016, arXiv:1605.01713.
    """

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (ImageGradient(),)

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(probe.inputs * probe[ImageGradient()])


@method("smooth_grad")
class SmoothGrad:
    """SmoothGrad: sum over channels of |mean gradient| over noisy images; maps (N, H, W), >= 0.

    Args:
        noise: standard deviation as a share of each image's own range, 0.15 as in Guided
            AbsoluteGrad's code.
        samples: noisy images, 20 as in Guided AbsoluteGrad.

    Source: Smilkov et al. 2017, arXiv:1706.03825.
    """

    noise: Share = 0.15
    samples: Samples = 20

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (NoisyGradients(self.noise, self.samples),)

    def moments(self, probe: Probe) -> Moments:
        return probe[NoisyGradients(self.noise, self.samples)]

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(self.moments(probe).mean)


@method("smooth_grad_squared")
class SmoothGradSquared(SmoothGrad):
    """SmoothGrad squared: sum over channels of the mean squared gradient; maps (N, H, W), >= 0.

    Args:
        noise, samples: as in ``smooth_grad``, whose passes it shares.

    Source: Hooker et al. 2019, arXiv:1806.10758.
    """

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(self.moments(probe).mean_square)


@method("var_grad")
class VarGrad(SmoothGrad):
    """VarGrad: sum over channels of the gradients' unbiased variance; maps (N, H, W), >= 0.

    Args:
        noise: as in ``smooth_grad``, whose passes it shares.
        samples: at least 2.

    Source: Adebayo et al. 2018, arXiv:1810.03307.
    """

    samples: SeveralSamples = 20

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(self.moments(probe).variance)


@method("absolute_grad")
class AbsoluteGrad(SmoothGrad):
    """AbsoluteGrad: sum over channels of the mean |gradient|; maps (N, H, W), non-negative.

    The row GAG-0 of the paper: Guided AbsoluteGrad without its guide.

    Args:
        noise, samples: as in ``smooth_grad``, whose passes it shares.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(self.moments(probe).mean_absolute)


@method("guided_absolute_grad")
class GuidedAbsoluteGrad(SmoothGrad):
    """Guided AbsoluteGrad: the mean |gradient|, guided by the gradients' variance; (N, H, W), >= 0.

    In each channel the guide is 1 where the variance exceeds its percentile and the raw variance
    elsewhere (equation 3.4 with the authors' strict comparison); guided channels are added up. The
    guide mixes a constant with raw variances, so the map is not invariant to a scale of the logits.

    Args:
        noise: as in ``smooth_grad``, whose passes it shares at every percentile.
        samples: at least 2.
        percentile: of the variance within each channel, 0 to 100, linear between order statistics;
            85 is the paper's choice. At 100 every pixel is weighted by its variance.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    samples: SeveralSamples = 20
    percentile: Annotated[float, Field(ge=0, le=100)] = 85.0

    def __call__(self, probe: Probe) -> Tensor:
        moments = self.moments(probe)
        variance = moments.variance
        threshold = quantile(variance.flatten(2), self.percentile / 100)[..., None, None]
        guide = torch.where(variance > threshold, 1, variance)
        return channel_sum(moments.mean_absolute * guide)


@method("guided_backprop")
class GuidedBackprop:
    """Guided backpropagation: only positive signals pass every ReLU; maps (N, H, W), >= 0.

    Covers registered ReLU and ReLU6 modules; the sum over channels of absolutes makes maps >= 0.

    Args:
        allow_no_relu: accept a network without ReLU, where the map is the plain gradient's.

    Raises:
        Unsupported: if a rectifier of the network cannot be guided, or if it has none.

    Source: Springenberg et al. 2015, arXiv:1412.6806.
    """

    allow_no_relu: bool = False

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (GuidedGradient(self.allow_no_relu),)

    def __call__(self, probe: Probe) -> Tensor:
        return channel_sum(probe[GuidedGradient(self.allow_no_relu)])
