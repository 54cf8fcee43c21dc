"""Maps from the attention of vision transformers: what the token that is classified looks at.

All share one pass. They need layers in which every token attends to every other (ViT, DeiT, with
any number of registers); Swin attends within windows, and class activation maps explain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..autograd import attention_in_graph, attention_weights, class_gradient
from ..errors import Unsupported
from ..features import FeatureLayout
from ..layers import attention_shapes
from ..maps import Upsampling, upsample
from ..probe import Logits, Need, Probe
from ..registry import method
from ..types import Model, Passes


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
        image = (1, len(model.mean), *(model.size or ()))
        _token_layout(attention_shapes(model), image)  # a plan need not try what cannot be
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


@method("attention")
class Attention:
    """Raw attention of the last layer, averaged over heads; maps (N, H, W), non-negative.

    The map is the row of the token that the logits read: the class token's; the average of class
    and distillation token, or of all patches, where the logits read these.

    Args:
        upsampling: of the grid of patches.

    Raises:
        Unsupported: if the network has no attention, or attends within windows.

    Source: as a baseline, Abnar and Zuidema 2020, arXiv:2005.00928.
    """

    upsampling: Upsampling = "bilinear"
    architecture: ClassVar[str] = "transformer"
    class_agnostic: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Attentions(),)

    def __call__(self, probe: Probe) -> Tensor:
        attention = probe[Attentions()]
        small = attention.patches(self.relevance(attention))
        return upsample(small, like=probe.inputs, upsampling=self.upsampling)

    def relevance(self, attention: SelfAttention) -> Tensor:
        """(N, T, T): how much each token (row) takes from each (column)."""
        return attention.weights[-1].mean(1)


@method("attention_rollout")
class AttentionRollout(Attention):
    """Attention rollout: attention followed through all layers; maps (N, H, W), non-negative.

    Half of each layer is the skip connection: the product over layers of (A + I) / 2, A averaged
    over heads, whose rows still add up to 1. Read as in ``attention``.

    Args:
        upsampling: of the grid of patches.

    Raises:
        Unsupported: as in ``attention``.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928.
    """

    def relevance(self, attention: SelfAttention) -> Tensor:
        rollout = identity = torch.eye(attention.tokens).to(attention.weights[0])
        for weights in attention.weights:
            rollout = (weights.mean(1) + identity) / 2 @ rollout
        return rollout


@method("gradient_rollout")
class GradientRollout(Attention):
    """Gradient-weighted rollout, the generic attention rule; maps (N, H, W), non-negative.

    From R = I, each layer adds A R, where A is the average over heads of the positive part of
    attention times the target logit's gradient towards it. Read as in ``attention``.

    Args:
        upsampling: of the grid of patches.

    Raises:
        Unsupported: as in ``attention``.

    Source: Chefer, Gur and Wolf 2021, Generic Attention-model Explainability, arXiv:2103.15679.
    """

    class_agnostic: ClassVar[bool] = False

    def relevance(self, attention: SelfAttention) -> Tensor:
        relevance = torch.eye(attention.tokens).to(attention.weights[0])
        for weights, gradient in zip(attention.weights, attention.gradients, strict=True):
            relevance = relevance + (gradient * weights).relu().mean(1) @ relevance
        return relevance
