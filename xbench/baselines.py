"""What absent pixels are: colours, noise and blurs, named in pixel terms, made in network space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .errors import Unsupported
from .probe import Need, Probe
from .types import Model

BaselineName = Literal[
    "black", "mean", "white", "blur", "noise", "blur_rise", "blur_gag", "blur_latec"
]
"""What masked pixels become.

``black`` and ``white`` are pixel values 0 and 1, ``mean`` is the model's mean colour (zero after
normalisation), ``blur`` the image under a Gaussian with a standard deviation of 1/16 of its shorter
side (16 at 256 pixels, as in Guided AbsoluteGrad's insertion), cut at three of them, edges
reflected; ``noise`` is uniform between 0 and 1 in every channel, drawn from the image's own stream.

The others are blurs of a fixed size, for presets. ``blur_rise``: 11 x 11 pixels, called "sigma 5"
in RISE's code, yet nearly a box: a point filtered with its reflections inside the window; beyond
the image lies the mean colour. ``blur_gag``: Guided AbsoluteGrad's 33 x 33, sigma 16, and
``blur_latec``: LATEC's 15 x 15, sigma 5, both true Gaussians, edges reflected.
"""

Padding = Literal["reflect", "zero"]
"""What a blur sees beyond the image's edge: the image mirrored at the centre of its outermost
pixels (the default), or zeros."""


def baseline_image(name: BaselineName, model: Model, inputs: Tensor) -> Tensor:
    """The baseline in network space, (1 or N, 3, H, W).

    Raises:
        Unsupported: for noise, which hangs on the images' keys; a need, BaselineImage, has it.
    """
    if name == "noise":
        raise Unsupported("baseline 'noise' is drawn for each image of a probe, and not known here")
    if name == "blur":
        return gaussian_blur(inputs, sigma=min(inputs.shape[-2:]) / 16)
    if name == "blur_rise":
        return rise_blur(inputs)
    if name == "blur_gag":
        return gaussian_blur(inputs, sigma=16, radius=16)
    if name == "blur_latec":
        return gaussian_blur(inputs, sigma=5, radius=7)
    colours = {"black": (0.0,), "white": (1.0,), "mean": model.mean}
    pixels = model.channel_constant(colours[name], inputs)
    height, width = inputs.shape[-2:]
    return model.normalise(torch.zeros_like(inputs[:1, :, :1, :1]) + pixels).expand(
        1, -1, height, width
    )


def gaussian_blur(
    images: Tensor, sigma: float, radius: int | None = None, padding: Padding = "reflect"
) -> Tensor:
    """(N, C, H, W) under a Gaussian of standard deviation ``sigma`` in pixels.

    Each axis is one product with a matrix, which is exact for any radius and several times faster
    than a convolution.

    Args:
        radius: pixels on either side at which the kernel is cut; three sigma where none is given.
        padding: what lies beyond the edge.
    """
    radius = round(3 * sigma) if radius is None else radius
    return _separable(
        images, *(gaussian_matrix(side, sigma, radius, padding) for side in images.shape[-2:])
    )


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, C, H, W) under a matrix (H, H) for its rows and another (W, W) for its columns."""
    # planes of whole cache lines: else an image's place in the batch would move its last bit
    spare = [-side % 8 for side in images.shape[-2:]]
    rows, columns = (
        functional.pad(matrix.to(images), (0, more, 0, more))
        for matrix, more in zip((rows, columns), spare, strict=True)
    )
    whole = functional.pad(images, (0, spare[1], 0, spare[0]))
    blurred = (columns @ (rows @ whole).mT).mT
    return blurred[..., : images.shape[-2], : images.shape[-1]].contiguous()


def gaussian_matrix(side: int, sigma: float, radius: int, padding: Padding) -> Tensor:
    """(side, side) float64 on the CPU: its product with a line of pixels is the line's blur.

    Row i holds the weights of pixel i: a Gaussian cut at ``radius`` and scaled to add up to 1, then
    folded back at the edges ("reflect", as often as needed) or cut there ("zero").
    """
    if sigma == 0:
        return torch.eye(side, dtype=torch.float64)
    return kernel_matrix(side, gaussian_kernel(sigma, radius), padding)


def gaussian_kernel(sigma: float, radius: int) -> Tensor:
    """(2 radius + 1,) float64 samples of a Gaussian, adding up to 1."""
    kernel = torch.exp(-torch.arange(-radius, radius + 1).double().square() / (2 * sigma * sigma))
    return kernel / kernel.sum()


def kernel_matrix(side: int, kernel: Tensor, padding: Padding) -> Tensor:
    """(side, side): its product with a line of pixels is the line under a kernel of odd length."""
    radius = len(kernel) // 2
    at = torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)
    weight = kernel.expand(side, -1)
    if padding == "reflect":
        period = max(2 * (side - 1), 1)
        at = torch.minimum(at % period, -at % period)
    else:
        weight = weight.where((at >= 0) & (at < side), 0)
        at = at.clamp(0, side - 1)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, at, weight)


def rise_kernel() -> Tensor:
    """(11,) float64: RISE's blur along one axis.

    A point in the middle of 11 pixels, under a Gaussian with sigma 5 that is cut at 4 sigma, and
    what leaves the 11 pixels is folded back at their edges: much flatter than the Gaussian.
    """
    size, radius = 11, 20
    at = (size // 2 + torch.arange(-radius, radius + 1)) % (2 * size)
    folded = torch.minimum(at, 2 * size - 1 - at)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, folded, gaussian_kernel(5, radius))


def rise_blur(images: Tensor) -> Tensor:
    """(N, C, H, W) under RISE's kernel of 11 x 11 pixels, zeros beyond the edges."""
    sides = images.shape[-2:]
    return _separable(images, *(kernel_matrix(side, rise_kernel(), "zero") for side in sides))


@dataclass(frozen=True)
class BaselineImage(Need[Tensor]):
    """The baseline of this batch in network space, (1 or N, 3, H, W)."""

    baseline: BaselineName

    def compute(self, on: Probe) -> Tensor:
        if self.baseline == "noise":
            channels = (on.uniform("noise baseline", at) for at in range(on.inputs.shape[1]))
            return on.model.normalise(torch.stack(tuple(channels), dim=1))
        return baseline_image(self.baseline, on.model, on.inputs)
