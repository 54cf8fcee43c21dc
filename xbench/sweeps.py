"""Needs of a batch with passes of their own: sweeps over noisy images, and the guided gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import class_gradient, guided_relu
from .probe import LayerGradient, Logits, Need, Probe
from .types import Model, Passes


@dataclass(frozen=True)
class Moments:
    """Moments over the samples of a sweep of gradients, each (N, 3, H, W).

    ``variance`` is unbiased (divided by samples - 1); NaN for a single sample.
    """

    mean: Tensor
    mean_absolute: Tensor
    mean_square: Tensor
    variance: Tensor

    @staticmethod
    def of(gradients: Iterable[Tensor]) -> Moments:
        """Updated one sample at a time (Welford), so that memory does not grow with their number.

        A plain sum of squares minus the squared sum would cancel in float32.
        """
        count, mean, absolute, square, spread = 0, *(torch.zeros(()) for _ in range(4))
        for gradient in gradients:
            if count == 0:
                mean, absolute, square, spread = (torch.zeros_like(gradient) for _ in range(4))
            count += 1
            step = gradient - mean
            mean.add_(step / count)
            spread.addcmul_(step, gradient - mean)
            absolute.add_((gradient.abs() - absolute) / count)
            square.add_((gradient.square() - square) / count)
        return Moments(mean, absolute, square, spread / (count - 1) if count > 1 else spread / 0)


@dataclass(frozen=True)
class NoisyGradients(Need[Moments]):
    """Moments of input gradients under Gaussian noise (Smilkov et al. 2017, arXiv:1706.03825).

    Args:
        noise: standard deviation as a share of each image's own range (max - min) in input space.
            The authors of Guided AbsoluteGrad take the range of the whole batch; then a map depends
            on its neighbours.
        samples: draws; a larger number begins with the same draws.
    """

    noise: float
    samples: int

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(self.samples, self.samples)

    def compute(self, on: Probe) -> Moments:
        flat = on.inputs.flatten(1)
        sigma = (self.noise * (flat.amax(1) - flat.amin(1)))[:, None, None, None]
        return Moments.of(
            on.input_gradient(on.inputs + sigma * on.normal("gaussian", draw))
            for draw in range(self.samples)
        )


@dataclass(frozen=True)
class GuidedGradient(Need[Tensor]):
    """(N, 3, H, W) input gradient under the guided rule (arXiv:1412.6806)."""

    allow_no_relu: bool = False

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> Tensor:
        target = on.target
        with torch.enable_grad(), guided_relu(on.model.net) as rule:
            inputs = on.inputs.detach().requires_grad_()
            logits = on.model.logits(inputs)
            rule.check(logits, allow_no_relu=self.allow_no_relu)
            (gradient,) = class_gradient(logits, target, (inputs,))
        return gradient


@dataclass(frozen=True)
class NoisyLayerGradients(Need[tuple[Tensor, Tensor, Tensor]]):
    """Means of g, g^2 and g^3 under Gaussian noise, g a layer's gradient; float64 (N, C, h, w).

    Updated one sample at a time, so that memory does not grow with their number; in float64, since
    a cube underflows.

    Args:
        layer: role or module path.
        noise, samples: as in :class:`NoisyGradients`, whose noisy images these are.
    """

    layer: str
    noise: float
    samples: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(self.samples, self.samples)

    def compute(self, on: Probe) -> tuple[Tensor, Tensor, Tensor]:
        flat = on.inputs.flatten(1)
        sigma = (self.noise * (flat.amax(1) - flat.amin(1)))[:, None, None, None]
        means = torch.zeros((), dtype=torch.float64, device=flat.device)
        for draw in range(self.samples):
            noisy = on.at(on.inputs + sigma * on.normal("gaussian", draw))
            gradient = noisy[LayerGradient(self.layer)][1].double()
            powers = torch.stack((gradient, gradient.square(), gradient.square() * gradient))
            means = means + (powers - means) / (draw + 1)
        first, second, third = means
        return first, second, third
