"""Control maps: they know nothing of the network; a metric that they win is suspect."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..probe import Need, Probe
from ..registry import method


class Control:
    """Facts that controls share: no needs, the same map for every class."""

    control: ClassVar[bool] = True
    class_agnostic: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return ()


@method("random")
class Random(Control):
    """Uniform noise in [0, 1), drawn per pixel from the image's own stream; maps (N, H, W)."""

    def __call__(self, probe: Probe) -> Tensor:
        return probe.uniform("random map")


@method("centre")
class Centre(Control):
    """A Gaussian about the image's centre, a quarter of each side wide; maps (N, H, W) in (0, 1].

    Photographs have their object in the middle, so localisation metrics must be read against this.
    """

    def __call__(self, probe: Probe) -> Tensor:
        rows, columns = (
            torch.exp(-torch.linspace(-2, 2, side, device=probe.inputs.device).square() / 2)
            for side in probe.inputs.shape[-2:]
        )
        bell = (rows[:, None] * columns).to(probe.inputs.dtype)
        return bell.expand(probe.inputs.shape[0], -1, -1)


@method("sobel")
class Sobel(Control):
    """Edges: length of the grey image's Sobel gradient, borders replicated; (N, H, W), >= 0.

    Source: as a control, Adebayo et al. 2018, arXiv:1810.03292.
    """

    def __call__(self, probe: Probe) -> Tensor:
        grey = functional.pad(
            probe.batch.images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"
        )
        across = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
        edges = torch.cat(
            (functional.conv2d(grey, across), functional.conv2d(grey, across.mT.contiguous())),
            dim=1,
        )
        return edges.square().sum(1).sqrt()


@method("constant")
class Constant(Control):
    """Ones everywhere; maps (N, H, W). Its rows are scored and counted as degenerate."""

    def __call__(self, probe: Probe) -> Tensor:
        return torch.ones_like(probe.inputs[:, 0])


@method("fake_cam")
class FakeCAM(Control):
    """Fake-CAM: ones with one zero, in the upper left corner; maps (N, H, W).

    It masks next to nothing, and so has nearly the best average drop that there is.

    Source: Poppi et al. 2021, arXiv:2104.10252.
    """

    def __call__(self, probe: Probe) -> Tensor:
        ones = torch.ones_like(probe.inputs[:, 0])
        ones[:, 0, 0] = 0
        return ones
