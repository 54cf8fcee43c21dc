"""Needs of a batch with passes of their own: sweeps over noisy images, and the guided gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import Passing, class_gradient, guided_relu
from .probe import Logits, Need, Probe
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
    """(N, 3, H, W) input gradient under the guided rule (arXiv:1412.6806).

    Args:
        allow_no_relu: accept a network without ReLU, where it is the plain gradient.
        passing: the part of a signal that passes a ReLU on its way back.
    """

    allow_no_relu: bool = False
    passing: Passing = "positive"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> Tensor:
        target = on.target
        with torch.enable_grad():
            inputs = on.inputs.detach().requires_grad_()
            logits = on.model.logits(inputs)
            with guided_relu(logits, self.passing, allow_no_relu=self.allow_no_relu):
                (gradient,) = class_gradient(logits, target, (inputs,))
        return gradient
