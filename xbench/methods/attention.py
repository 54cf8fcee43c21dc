"""Maps from the attention of vision transformers: what the token that is classified looks at.

All share one pass. They need layers in which every token attends to every other (ViT, DeiT, with
any number of registers); Swin attends within windows, and class activation maps explain it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..maps import Upsampling, upsample
from ..probe import Need, Probe
from ..registry import method
from ..sweeps import Attentions, SelfAttention


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
