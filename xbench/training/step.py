"""One training step as a regulariser sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..autograd import class_gradient, guided_relu, loss_gradient


@dataclass
class Step:
    """A batch on its way through the network, before its loss goes back.

    Everything comes from one forward in training mode; what is derived here is computed at most
    once, when somebody asks.

    Args:
        net: the network, in training mode.
        forward: normalised images to (N, K) float32 logits, through ``net`` at the recipe's
            precision.
        inputs: (N, 3, H, W) augmented, normalised images, of which gradients can be taken.
        labels: (N,) int64.
        logits: (N, K) float32.
        losses: (N,) cross-entropy of each image.
        criterion: logits and labels to such losses.
        mean, std: per channel, (1, 3, 1, 1), of the normalisation.
    """

    net: nn.Module
    forward: Callable[[Tensor], Tensor]
    inputs: Tensor
    labels: Tensor
    logits: Tensor
    losses: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]
    mean: Tensor
    std: Tensor

    def losses_at(self, inputs: Tensor) -> Tensor:
        """(N,) losses of other images under these labels, by another forward."""
        return self.criterion(self.forward(inputs), self.labels)

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of each image's loss at the image, like ``inputs``; differentiable."""
        return loss_gradient(self.losses, self.inputs, create_graph=True)

    @cached_property
    def guided_gradient(self) -> Tensor:
        """The same by the guided rule: a teacher, through which no gradient flows.

        Raises:
            Unsupported: if the network has no ReLU, or a rectifier that the rule does not know.
        """
        with guided_relu(self.logits):
            return loss_gradient(self.losses, self.inputs)

    @cached_property
    def logit_gradient(self) -> Tensor:
        """Gradient of each image's own logit at the image, like ``inputs``; differentiable."""
        return class_gradient(self.logits, self.labels, (self.inputs,), create_graph=True)[0]

    @property
    def alignment(self) -> Tensor | None:
        """(N,) cosine of both gradients, NaN where one is zero; None if nobody asked for both."""
        if not {"gradient", "guided_gradient"} <= vars(self).keys():
            return None
        return cosine(self.gradient.detach(), self.guided_gradient)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(N,) cosine of each image's vectors, NaN where one is zero.

    Each is divided by its largest value first: squares of tiny gradients would vanish in float32,
    and a constant in the denominator would weaken them.
    """
    one, other = one.flatten(1), other.flatten(1)
    product = (_scaled(one) * _scaled(other)).sum(1)
    is_zero = (one == 0).all(1) | (other == 0).all(1)
    lengths = _length(_scaled(one)) * _length(_scaled(other))
    return torch.where(is_zero, torch.nan, product / lengths)


def _scaled(vectors: Tensor) -> Tensor:
    largest = vectors.detach().abs().amax(1, keepdim=True)
    return vectors / torch.where(largest > 0, largest, 1)


def _length(vectors: Tensor) -> Tensor:
    """At least 1 after scaling, but for zero vectors, whose length has no gradient at 0."""
    squares = (vectors * vectors).sum(1)
    return torch.where(squares > 0, squares, 1).sqrt()
