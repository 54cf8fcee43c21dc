"""FullGrad: the gradient towards the image together with those towards every bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..autograd import bias_terms
from ..errors import Unsupported
from ..features import FeatureLayout
from ..maps import PGC_EPSILON, Scaling, Upsampling, unit_range, upsample
from ..probe import ImageGradient, Logits, Need, Probe
from ..registry import method
from ..types import Model, Passes


@method("full_grad")
class FullGrad:
    """FullGrad: |input x gradient| and every layer's |bias x gradient|; maps (N, H, W), >= 0.

    Each part is scaled to its range within the image, added up over channels and upsampled. Parts
    are those of convolutions, of linear layers that keep positions, and of batch normalisation with
    its implicit bias, one for every call. Biases without positions, such as the classifier's, have
    no part. In a ReLU network all bias terms and input x gradient add up to the logit. Other
    nonlinearities (ReLU6, GELU, layer normalisation), and constants that a forward adds without a
    module, are biases of their own, which the map leaves out, as it does those of attention.

    Args:
        range_over: "image" scales all channels of a part together, as the authors' code does;
            "channel" scales each by itself, as pytorch-grad-cam does.
        epsilon: added to each range. 0 keeps the map free of the gradient's scale; the authors'
            code (preset ``fullgrad-2019``) adds 1e-6, pytorch-grad-cam 1e-7.
        upsampling: bilinear on pixel centres, as everywhere here; the authors align corners.
        scaling: "pgc" scales the sum once more (preset ``pgc-1.5``).

    Raises:
        Unsupported: if a batch normalisation does more in its forward than normalise.

    Source: Srinivas and Fleuret 2019, arXiv:1905.00780.
    """

    range_over: Literal["image", "channel"] = "image"
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    upsampling: Upsampling = "bilinear"
    scaling: Scaling = "none"

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fullgrad-2019": {"epsilon": 1e-6, "upsampling": "corners"},
        "pgc-1.5": {"range_over": "channel", "epsilon": PGC_EPSILON, "scaling": "pgc"},
    }

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def __call__(self, probe: Probe) -> Tensor:
        clean = probe.at(probe.inputs, ImageGradient())
        saliency = torch.zeros_like(probe.inputs[:, 0])

        def add(term: Tensor) -> None:
            if term.ndim == 3:  # tokens, channels second
                try:
                    layout = FeatureLayout.of_tokens(term.shape[2], probe.inputs.shape)
                except Unsupported:
                    return  # no grid of positions
                term = layout.grid(term.mT)
            if term.ndim == 4:
                saliency.add_(upsample(self.part(term), saliency, self.upsampling))

        with bias_terms(probe.model.net, add):
            gradient = clean[ImageGradient()]
        add(probe.inputs * gradient)
        return saliency if self.scaling == "none" else unit_range(saliency, PGC_EPSILON)

    def part(self, term: Tensor) -> Tensor:
        """(N, C, h, w) to (N, h, w): absolutes in their range, added up over channels."""
        rows = term.abs().flatten(2)
        if self.range_over == "image":
            scaled = unit_range(rows, self.epsilon)
        else:
            scaled = unit_range(rows.flatten(0, 1)[:, None], self.epsilon)
        return scaled.view(term.shape).sum(1)
