"""Needs of a batch with passes of their own: noisy images, the guided gradient, attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import attention_in_graph, attention_weights, class_gradient, guided_relu
from .errors import Unsupported
from .features import FeatureLayout
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


@dataclass(frozen=True)
class SelfAttention:
    """What every token of a vision transformer attends to; layers in the order of the forward.

    Args:
        weights: of each layer, (N, heads, T, T); rows attend to columns and add up to 1.
        gradients: of the target logit towards the weights, the same shapes.
        layout: which of the T tokens are the grid of patches.
    """

    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    layout: FeatureLayout

    @property
    def tokens(self) -> int:
        return self.weights[0].shape[-1]

    def patches(self, relevance: Tensor) -> Tensor:
        """(N, T, T), tokens for tokens, to (N, h, w): of the patches for the logit.

        Those rows are averaged that the logits read, which are the ones with any gradient in the
        last layer: the class token's, or every patch's in a network that pools patches.
        """
        read = (self.gradients[-1] != 0).any(3).any(1).to(relevance.dtype)
        share = read / read.sum(1, keepdim=True).clamp_min(1)
        row = torch.einsum("nt,ntu->nu", share, relevance)
        return self.layout.grid(row[:, :, None])[:, 0]


@dataclass(frozen=True)
class Attentions(Need[SelfAttention]):
    """Weights of all self-attention, and the target logit's gradient towards them.

    Raises:
        Unsupported: if the network has no attention, or if not every token attends to every other
            in every layer, as with windows.
    """

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> SelfAttention:
        target = on.target
        with torch.enable_grad(), attention_in_graph():
            logits = on.model.logits(on.inputs.detach().requires_grad_())
            layers = attention_weights(logits)
            weights = [layer for layer, _ in layers]
            layout = _token_layout([tuple(layer.shape) for layer in weights], on.inputs.shape)
            gradients = class_gradient(logits, target, [edge for _, edge in layers])
        tokens = weights[0].shape[-1]
        # nn.MultiheadAttention that returns its weights computes them as (N * heads, T, T)
        heads = (len(on.inputs), -1, tokens, tokens)
        return SelfAttention(
            tuple(layer.reshape(heads) for layer in weights),
            tuple(layer.reshape(heads) for layer in gradients),
            layout,
        )


def _token_layout(shapes: list[tuple[int, ...]], images: Sequence[int]) -> FeatureLayout:
    """The tokens of attention weights with these shapes.

    Raises:
        Unsupported: if they are not of one global self-attention per layer.
    """
    instead = "; gradient methods and class activation maps work without"
    if not shapes:
        raise Unsupported(
            "the network shows no attention, a softmax between tokens in its forward pass" + instead
        )
    different = sorted({shape[-2:] for shape in shapes})
    if len(different) > 1 or different[0][0] != different[0][1]:
        found = ", ".join(f"{queries} to {keys}" for queries, keys in different)
        raise Unsupported(
            "attention maps need layers in which all tokens attend to the same tokens, but here "
            f"layers attend from {found} tokens" + instead
        )
    rows = {shape[0] for shape in shapes}
    by_image = {len(shape) for shape in shapes} == {4} and rows == {images[0]}
    # heads may stand beside images, as many in each layer; windows, beside them too, grow fewer
    by_head = {len(shape) for shape in shapes} == {3} and len(rows) == 1
    if not (by_image or by_head) or shapes[0][0] % images[0]:
        raise Unsupported(
            "attention maps need tokens that attend to the whole image, but here they attend "
            f"within windows or other parts: weights {shapes[0]} for {images[0]} images" + instead
        )
    try:
        return FeatureLayout.of_tokens(shapes[0][-1], images)
    except Unsupported as error:
        raise Unsupported(f"the network's attention {error}{instead}") from None
