"""Methods that read gradients of the target's logit towards the normalised input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..autograd import Passing
from ..maps import Channels, reduced
from ..probe import ImageGradient, Need, Probe
from ..registry import method
from ..sweeps import Guided, GuidedGradient, Moments, Noisy, Processed

SeveralSamples = Annotated[int, Field(ge=2)]
GAG_2024: Mapping[str, Mapping[str, Any]] = {"gag-2024": {"noise_range": "batch"}}


@method("gradient")
class Gradient:
    """Vanilla gradient: sum over channels of |d logit / d input|; maps (N, H, W), non-negative.

    Args:
        channels: "absolute_sum", the rule of Guided AbsoluteGrad and of every gradient method here;
            "max" is that of the source; "sum" keeps the sign.

    Source: Simonyan et al. 2014, arXiv:1312.6034.
    """

    channels: Channels = "absolute_sum"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (ImageGradient(),)

    def __call__(self, probe: Probe) -> Tensor:
        return reduced(probe[ImageGradient()], self.channels)


@method("input_x_gradient")
class InputXGradient:
    """Input times gradient: sum over channels of |input * gradient|; maps (N, H, W), non-negative.

    The input is the normalised one, so zero is the mean colour.

    Args:
        channels: as in ``gradient``; "sum" adds up to the logit where the network is linear.

    Source: Shrikumar et al. 2016, arXiv:1605.01713.
    """

    channels: Channels = "absolute_sum"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (ImageGradient(),)

    def __call__(self, probe: Probe) -> Tensor:
        return reduced(probe.inputs * probe[ImageGradient()], self.channels)


@method("smooth_grad")
class SmoothGrad(Processed, Noisy):
    """SmoothGrad: sum over channels of |mean gradient| over noisy images; maps (N, H, W), >= 0.

    Args:
        noise: standard deviation as a share of the range, 0.15 as in Guided AbsoluteGrad's code.
        samples: noisy images, 20 as in Guided AbsoluteGrad; at least 2 where the guide is used.
        noise_range: "image", each image's own range; "batch", that of all images, the authors'
            quirk, by which a map depends on its neighbours; or a number, the range itself in the
            network's input space.
        processing: "signed"; "positive" and "negative" clip every gradient; "absolute" is
            ``absolute_grad``, "guided_absolute" is ``guided_absolute_grad``; "guided" weighs the
            signed mean with that guide.
        percentile, guide_norm, guide_scope: of the guide, as in ``guided_absolute_grad``.
        channels: as in ``gradient``.

    Raises:
        ValueError: if the guide is set without being used, or has a single sample.

    Source: Smilkov et al. 2017, arXiv:1706.03825; processing: Huang and Liu 2024, arXiv:2404.15564.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GAG_2024
    several: ClassVar[str] = "samples"


@method("smooth_grad_squared")
class SmoothGradSquared(Noisy):
    """SmoothGrad squared: sum over channels of the mean squared gradient; maps (N, H, W), >= 0.

    Args:
        noise, samples, noise_range: as in ``smooth_grad``, whose passes it shares.
        channels: as in ``gradient``.

    Source: Hooker et al. 2019, arXiv:1806.10758.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GAG_2024

    def attribution(self, moments: Moments) -> Tensor:
        return moments.square


@method("var_grad")
class VarGrad(Noisy):
    """VarGrad: sum over channels of the gradients' unbiased variance; maps (N, H, W), >= 0.

    Args:
        noise, noise_range: as in ``smooth_grad``, whose passes it shares.
        samples: at least 2.
        channels: as in ``gradient``.

    Source: Adebayo et al. 2018, arXiv:1810.03307.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GAG_2024

    samples: SeveralSamples = 20

    def attribution(self, moments: Moments) -> Tensor:
        return moments.variance


@method("absolute_grad")
class AbsoluteGrad(Noisy):
    """AbsoluteGrad: sum over channels of the mean |gradient|; maps (N, H, W), non-negative.

    The row GAG-0 of the paper: Guided AbsoluteGrad without its guide.

    Args:
        noise, samples, noise_range: as in ``smooth_grad``, whose passes it shares.
        channels: as in ``gradient``.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GAG_2024

    def attribution(self, moments: Moments) -> Tensor:
        return moments.absolute


@method("guided_absolute_grad")
class GuidedAbsoluteGrad(Guided, Noisy):
    """Guided AbsoluteGrad: the mean |gradient|, guided by the gradients' variance; (N, H, W), >= 0.

    In each channel the guide is 1 where the variance exceeds its percentile and the raw variance
    elsewhere (equation 3.4 with the authors' strict comparison); guided channels are added up. The
    guide mixes a constant with raw variances, so the map is not invariant to a scale of the logits,
    unless ``guide_norm`` makes it so.

    Args:
        noise, noise_range: as in ``smooth_grad``, whose passes it shares at every percentile.
        samples: at least 2.
        percentile: of the variance, 0 to 100, linear between order statistics; 85 is the paper's
            choice. At 100 every pixel is weighted by its variance.
        guide_norm: "none", the authors' raw variance below the percentile; "max" divides it by its
            largest value, "quantile" by the percentile, where the guide is then continuous.
        guide_scope: "channel", as the authors take percentiles; or "image", over all channels.
        channels: as in ``gradient``.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GAG_2024

    samples: SeveralSamples = 20

    def attribution(self, moments: Moments) -> Tensor:
        return moments.absolute * self.guide(moments.spread)


@method("guided_backprop")
class GuidedBackprop:
    """Guided backpropagation: only positive signals pass every ReLU; maps (N, H, W), >= 0.

    Every ReLU and ReLU6 is guided, module or function. The authors of Guided AbsoluteGrad reach
    modules alone; where a network has both, as DenseNet has, its maps differ from theirs.

    Args:
        processing: the part of a signal that passes a ReLU: "positive", the guided rule;
            "negative" or "absolute", variants of Guided AbsoluteGrad's code.
        allow_no_relu: accept a network without ReLU, where the map is the plain gradient's.
        channels: as in ``gradient``.

    Raises:
        Unsupported: if a rectifier of the network cannot be guided, or if it has none.

    Source: Springenberg et al. 2015, arXiv:1412.6806.
    """

    processing: Passing = "positive"
    allow_no_relu: bool = False
    channels: Channels = "absolute_sum"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (GuidedGradient(self.allow_no_relu, self.processing),)

    def __call__(self, probe: Probe) -> Tensor:
        return reduced(probe[self.needs[0]], self.channels)
