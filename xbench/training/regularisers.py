"""Regularisers: what is added to the cross-entropy. Each is one class whose body is its formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..autograd import frozen_statistics, loss_gradient
from ..registry import regulariser
from .step import Step, cosine

Weight = Annotated[float, Field(ge=0)]
Norm = Literal["l1", "l2"]


@regulariser("none")
class NoRegulariser:
    """Plain cross-entropy."""

    weight: ClassVar[float] = 0.0

    def __call__(self, step: Step) -> Tensor:
        return step.losses.new_zeros(())


@regulariser("interpretable_gradients")
class InterpretableGradients:
    """Interpretable gradients: pulls the gradient of the loss towards the guided one.

    Mean over the batch of E(d, d'), where d is the gradient of an image's loss at the image and d'
    the one of guided backpropagation; no gradient flows through d'. Five passes instead of two.

    Args:
        weight: the paper's lambda; 7.5e-3 is its choice for ResNet-18, 1e-3 for MobileNet-V2.
        error: E over all 3 H W elements. ``cosine``, the paper's choice, is -cos(d, d'); ``mae``
            and ``mse`` are means of |d - d'| and of its square; ``histogram`` is
            -sum min(|d|, |d'|) / (norm1(d) norm1(d')) as printed. Gradients s times as large
            multiply these by 1, s, s^2 and 1/s.
        normalised: divide both gradients of ``histogram`` by their own sums instead, so that their
            size plays no part.
        scaling: ``image`` takes the gradient of each image's own loss; ``batch`` that of the
            batch's mean, as the paper's algorithm is written, which is 1/N of it.

    An image with a zero gradient adds 0 to cosine and histogram.

    Source: Torres Figueroa et al., A Learning Paradigm for Interpretable Gradients, 2024,
    arXiv:2404.15024.
    """

    weight: Weight = 7.5e-3
    error: Literal["cosine", "mae", "mse", "histogram"] = "cosine"
    normalised: bool = False
    scaling: Literal["image", "batch"] = "image"

    def __post_init__(self) -> None:
        if self.normalised and self.error != "histogram":
            raise ValueError(f"normalised is an option of the error histogram, not {self.error}")

    def __call__(self, step: Step) -> Tensor:
        share = 1 / len(step.losses) if self.scaling == "batch" else 1
        gradient, guided = share * step.gradient, share * step.guided_gradient
        error = "histogram_normalised" if self.normalised else self.error
        return ERRORS[error](gradient.flatten(1), guided.flatten(1)).mean()


def cosine_error(gradient: Tensor, guided: Tensor) -> Tensor:
    """-cos, and 0 where one of the two is zero; (N,)."""
    return -cosine(gradient, guided).nan_to_num(0.0)


def mae_error(gradient: Tensor, guided: Tensor) -> Tensor:
    """Mean absolute difference; (N,)."""
    return (gradient - guided).abs().mean(1)


def mse_error(gradient: Tensor, guided: Tensor) -> Tensor:
    """Mean squared difference; (N,)."""
    return (gradient - guided).square().mean(1)


def histogram_error(gradient: Tensor, guided: Tensor) -> Tensor:
    """Histogram intersection as printed: it divides by the product of two norms; (N,)."""
    sizes = gradient.abs().sum(1) * guided.abs().sum(1)
    common = torch.minimum(gradient.abs(), guided.abs()).sum(1)
    return -common / torch.where(sizes > 0, sizes, 1)


def normalised_histogram_error(gradient: Tensor, guided: Tensor) -> Tensor:
    """Histogram intersection of shares: minus the mass that both have in common; (N,)."""
    return -torch.minimum(_shares(gradient), _shares(guided)).sum(1)


def _shares(vectors: Tensor) -> Tensor:
    size = vectors.abs().sum(1, keepdim=True)
    return vectors.abs() / torch.where(size > 0, size, 1)


ERRORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_error,
    "mae": mae_error,
    "mse": mse_error,
    "histogram": histogram_error,
    "histogram_normalised": normalised_histogram_error,
}


@regulariser("double_backpropagation")
class DoubleBackpropagation:
    """Double backpropagation: mean size of the gradient of an image's loss at the image.

    Args:
        weight: factor in the loss; there is no value that suits every network.
        norm: ``l2`` is the sum of squares, as published; ``l1`` the sum of absolute values.

    Source: Drucker and LeCun, Improving generalization performance using double backpropagation,
    IEEE Transactions on Neural Networks, 1992.
    """

    weight: Weight
    norm: Norm = "l2"

    def __call__(self, step: Step) -> Tensor:
        return _size(step.gradient, self.norm).mean()


@regulariser("input_gradient_norm")
class InputGradientNorm:
    """Mean size of the gradient of an image's own logit, that of its label, at the image.

    Args:
        weight: factor in the loss; there is no value that suits every network.
        norm: ``l2`` is the sum of squares, ``l1`` the sum of absolute values.

    Source: Ross and Doshi-Velez, Improving the Adversarial Robustness and Interpretability of Deep
    Neural Networks by Regularizing their Input Gradients, 2018, arXiv:1711.09404, for the idea.
    """

    weight: Weight
    norm: Norm = "l2"

    def __call__(self, step: Step) -> Tensor:
        return _size(step.logit_gradient, self.norm).mean()


def _size(gradient: Tensor, norm: Norm) -> Tensor:
    """(N,) sum of squares or of absolute values."""
    return (gradient.square() if norm == "l2" else gradient.abs()).flatten(1).sum(1)


@regulariser("adversarial")
class Adversarial:
    """Adversarial training: how much the loss grows at the worst image nearby.

    Mean loss at x + e less that at x, where e is found by ascending the loss with all |e| at most
    ``radius``. With weight 1 the network learns from adversarial images alone, as published; with
    1/2 from both in equal parts. While e is sought, batch normalisation is in evaluation mode.

    Args:
        weight: share of the adversarial images.
        attack: ``pgd`` takes ``steps`` steps from a random point; ``fgsm`` one step of full size
            from the image itself.
        radius: on the [0, 1] scale of pixels.
        step_size: of ``pgd``, on the same scale.
        steps: of ``pgd``; each costs a forward and a backward.

    Sources: Goodfellow et al., 2015, arXiv:1412.6572; Madry et al., 2018, arXiv:1706.06083, whose
    values for CIFAR-10 are the defaults.
    """

    weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    attack: Literal["fgsm", "pgd"] = "pgd"
    radius: Annotated[float, Field(gt=0, le=1)] = 8 / 255
    step_size: Annotated[float, Field(gt=0, le=1)] = 2 / 255
    steps: Annotated[int, Field(ge=1)] = 7

    def __call__(self, step: Step) -> Tensor:
        return step.losses_at(self._worst(step)).mean() - step.losses.mean()

    def _worst(self, step: Step) -> Tensor:
        """Inputs whose pixels are at most ``radius`` away and inside [0, 1]."""
        clean = step.inputs.detach()
        radius, step_size = self.radius / step.std, self.step_size / step.std
        low = torch.maximum(clean - radius, (0 - step.mean) / step.std)
        high = torch.minimum(clean + radius, (1 - step.mean) / step.std)
        found, steps = clean, 1
        if self.attack == "fgsm":
            step_size = radius
        else:
            steps = self.steps
            found = (clean + radius * (2 * torch.rand_like(clean) - 1)).clamp(low, high)
        with frozen_statistics(step.net):
            for _ in range(steps):
                found = found.detach().requires_grad_()
                slope = loss_gradient(step.losses_at(found), found)
                found = (found + step_size * slope.sign()).clamp(low, high)
        return found.detach()
