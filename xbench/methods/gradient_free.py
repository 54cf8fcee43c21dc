"""Class activation maps without gradients: each channel is weighted by what the network says of it.

One forward for each channel of the layer shows the image through the channel's map, or takes the
channel away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..baselines import BaselineImage, BaselineName
from ..features import FeatureLayout
from ..layers import LayerFacts, layer_facts
from ..maps import CamParts, Upsampling, unit_range, upsample, weighted_sum
from ..masking import BaselineProbability, masked_scores, readings, row_scores, target_logit
from ..probe import LayerActivation, LayerGradient, Logits, Need, Probe
from ..registry import method
from ..replay import Replay
from ..types import Model, Passes

TINY = 1e-6


@dataclass(frozen=True)
class ChannelScores(Need[tuple[Tensor, Tensor]]):
    """Target probability and logit of the image seen through each channel, (N, C) float64 each.

    Args:
        layer: role or module path.
        baseline: what the image is blended into where a channel's map is low.
        upsampling: of the channel's map, before it is scaled to [0, 1]; a constant one is zeros.
    """

    layer: str
    baseline: BaselineName
    upsampling: Upsampling

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), LayerActivation(self.layer), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(layer_facts(model, self.layer).channels, 0)

    def compute(self, on: Probe) -> tuple[Tensor, Tensor]:
        masks = (
            unit_range(upsample(channel, on.inputs, self.upsampling))[:, None]
            for channel in on[LayerActivation(self.layer)].unbind(1)
        )
        scores = masked_scores(on, masks, on[BaselineImage(self.baseline)], read=readings)
        return scores[..., 0], scores[..., 1]


@method("score_cam")
class ScoreCAM(CamParts):
    """Score-CAM: channels weighted by how the image scores through them; maps (N, H, W), >= 0.

    Every channel's map, upsampled and scaled to [0, 1], masks the image once, so a layer of C
    channels costs C forwards.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        weights: "increase", the gain in probability over the baseline alone (equation 5 of
            arXiv:2404.15024), or "softmax", the softmax over channels of the logits.
        baseline: what masked pixels become, "black" as in the metrics; "mean" multiplies the
            normalised image by the mask.
        mask_upsampling: of the channels' maps that mask the image.

    Raises:
        Unsupported: if the layer has no feature maps.

    Source: Wang et al. 2020, arXiv:1910.01279.
    """

    weights: Literal["increase", "softmax"] = "increase"
    baseline: BaselineName = "black"
    mask_upsampling: Upsampling = "bilinear"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pgc-1.5": {
            "weights": "softmax",
            "baseline": "mean",
            "mask_upsampling": "corners",
            "scaling": "pgc",
        }
    }

    @property
    def scores(self) -> ChannelScores:
        return ChannelScores(self.layer, self.baseline, self.mask_upsampling)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        alone = (BaselineProbability(self.baseline),) if self.weights == "increase" else ()
        return (LayerActivation(self.layer), self.scores, *alone)

    def __call__(self, probe: Probe) -> Tensor:
        activation, (chance, logit) = probe[LayerActivation(self.layer)], probe[self.scores]
        if self.weights == "increase":
            weight = chance - probe[BaselineProbability(self.baseline)][:, None]
        else:
            weight = logit.softmax(1)
        cam = weighted_sum(weight.to(activation.dtype), activation)
        return self.grown(cam, probe.inputs)


Ablation = Literal["zero", "pgc"]
"""What an ablated channel becomes: zero (as published), or what pytorch-grad-cam makes of it."""


@dataclass(frozen=True)
class ChannelDrops(Need[Tensor]):
    """(N, C) float64: by how much the target's logit falls when a channel is ablated.

    Where the logits are affine in the layer, the fall under "zero" is the channel's sum of gradient
    times activation, and costs nothing more. Elsewhere what follows the layer is run again for each
    channel; a forward records what comes before, and another checks the record.
    """

    layer: str
    ablation: Ablation

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        gradient = (LayerGradient(self.layer),) if self.ablation == "zero" else ()
        return (Logits(), *gradient)

    def passes(self, model: Model) -> Passes:
        facts = layer_facts(model, self.layer)
        return Passes() if self._is_closed(facts) else Passes(facts.channels + 2, 0)

    def _is_closed(self, facts: LayerFacts) -> bool:
        return self.ablation == "zero" and facts.affine

    def compute(self, on: Probe) -> Tensor:
        if self._is_closed(layer_facts(on.model, self.layer, on.inputs.shape[1:])):
            activation, gradient = on[LayerGradient(self.layer)]
            return (gradient * activation).sum((2, 3)).double()
        whole = target_logit(on[Logits()], on.target)[:, None]
        with torch.inference_mode():
            replay = Replay(on.model, self.layer, on.inputs)
            axis = FeatureLayout.of(replay.output.shape, on.inputs.shape).channel_axis
            ablated = _ablated(replay.output[: on.real], axis, self.ablation)
            return whole - row_scores(on, ablated, replay, read=target_logit)


def _ablated(output: Tensor, axis: int, ablation: Ablation) -> Iterator[Tensor]:
    """A layer's output (N, ...) without its first channel, without its second, and so on."""
    lowest = output.flatten(1).amin(1)
    for channel in range(output.shape[axis]):
        value = torch.zeros_like(lowest)
        if ablation == "pgc":
            # the library lowers the minimum of what it has ablated already, 32 channels at a time
            value = torch.where(lowest == 0, value, lowest - 1e7 * (channel % 32 + 1))
        features = output.clone()
        chosen = features.select(axis, channel)
        chosen.copy_(value.view(-1, *[1] * (chosen.ndim - 1)).expand_as(chosen))
        yield features


@method("ablation_cam")
class AblationCAM(CamParts):
    """Ablation-CAM: channels weighted by the logit's relative fall without them; (N, H, W), >= 0.

    The weight of channel k is (y - y_k) / y, with the target's logit y and y_k the logit when the
    channel is zero. As published it changes its sign with y. Where y is nearer to zero than 1e-6,
    which is rounding, the fall y - y_k is not divided.

    Where the logits are affine in the layer (average pooling and a linear layer) the fall is known
    in closed form, from one gradient. Elsewhere only what follows the layer runs again, once for
    each channel; that counts as a forward.

    Args:
        layer, sign, upsampling, scaling: common to all class activation maps.
        ablation: "zero" as published, or "pgc": zero only where the layer's smallest activation in
            the image is exactly 0, and 1e7 below the smallest elsewhere, as pytorch-grad-cam does
            (which lowers it by further 1e7 for every channel of a block of 32).

    Raises:
        Unsupported: if the layer has no feature maps, or if what follows it cannot be run alone.

    Source: Desai and Ramaswamy 2020, WACV, doi:10.1109/WACV45572.2020.9093360.
    """

    ablation: Ablation = "zero"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pgc-1.5": {"ablation": "pgc", "scaling": "pgc"}
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerActivation(self.layer), ChannelDrops(self.layer, self.ablation))

    def __call__(self, probe: Probe) -> Tensor:
        activation = probe[LayerActivation(self.layer)]
        logit = target_logit(probe[Logits()], probe.target)[:, None]
        weight = probe[ChannelDrops(self.layer, self.ablation)] / logit.where(logit.abs() > TINY, 1)
        cam = weighted_sum(weight.to(activation.dtype), activation)
        return self.grown(cam, probe.inputs)
