"""Opti-CAM: the weights of a class activation map, found by optimisation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..baselines import BaselineImage, BaselineName
from ..maps import Upsampling, unit_range, upsample, weighted_sum
from ..probe import ImageGradient, LayerActivation, Logits, Need, Probe
from ..registry import method
from ..types import Model, Passes


@method("opti_cam")
class OptiCAM:
    """Opti-CAM: channel weights that maximise the masked image's logit; maps (N, H, W) in [0, 1].

    The map is the min-max of the upsampled sum of rectified feature maps, weighted by a softmax
    over channels; where it is 0, the image becomes the baseline. Adam (0.9, 0.999, 1e-8) minimises
    logit(image) - logit(masked image), from equal weights. At every tenth of the iterations it
    stops where the loss has risen since the tenth before, with the map of that moment. The authors
    add the loss up over the batch; here each image stops by itself. A map without range, as of a
    single position, is zero.

    Args:
        layer: role or module path.
        iterations: at most, 50 as in the authors' script; each is a forward and a backward.
        learning_rate: of Adam, 0.1 as in the authors' script.
        baseline: what is masked; black as published.
        upsampling: from the layer's h x w to H x W.

    Source: Zhang et al. 2024, Opti-CAM, arXiv:2301.07002.
    """

    layer: str = "last_conv"
    iterations: Annotated[int, Field(ge=1)] = 50
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    baseline: BaselineName = "black"
    upsampling: Upsampling = "bilinear"

    passes_bound: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (LayerActivation(self.layer), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(self.iterations, self.iterations)

    def __call__(self, probe: Probe) -> Tensor:
        features = probe[LayerActivation(self.layer)].relu()
        # min-max forgets a constant; without it, constant feature maps are exactly nothing
        features = features - features.amin((2, 3), keepdim=True)
        rows, columns = (
            self.growth(small, large, features)
            for small, large in zip(features.shape[2:], probe.inputs.shape[2:], strict=True)
        )

        def saliency(weight: Tensor) -> Tensor:
            """(N, C) to (N, H, W)."""
            small = weighted_sum(weight.softmax(1), features)
            return unit_range(torch.bmm(torch.bmm(rows, small), columns.mT))

        baseline = probe[BaselineImage(self.baseline)]
        weight = torch.full_like(features[:, :, 0, 0], 0.5)
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        before = torch.full_like(weight[:, 0], -torch.inf)
        stopped = torch.zeros_like(before, dtype=torch.bool)
        for step in range(self.iterations):
            mask, pulled_back = torch.func.vjp(saliency, weight)[:2]
            masked = probe.at(torch.lerp(baseline, probe.inputs, mask[:, None]), ImageGradient())
            if step % max(1, self.iterations // 10) == 0:
                logit = masked[Logits()].gather(1, probe.target[:, None])[:, 0]
                stopped |= logit < before
                before = logit
                if stopped.all():
                    break
            by_mask = (masked[ImageGradient()] * (probe.inputs - baseline)).sum(1)
            (slope,) = pulled_back(by_mask)
            mean = torch.lerp(mean, slope, 0.1)
            square = torch.lerp(square, slope.square(), 0.001)
            rate = self.learning_rate / (1 - 0.9 ** (step + 1))
            size = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            weight = weight.where(stopped[:, None], weight + rate * mean / size)
        return saliency(weight)

    def growth(self, small: int, large: int, like: Tensor) -> Tensor:
        """(N, large, small): upsampling along one axis, as a matrix for each image.

        Its transpose adds in a fixed order, which the derivative of torch's interpolation on a GPU
        does not.
        """
        basis = torch.eye(small, dtype=like.dtype, device=like.device)[:, :, None]
        grown = upsample(basis, like.new_empty(large, 1), self.upsampling)[:, :, 0]
        return grown.T.expand(like.shape[0], -1, -1)
