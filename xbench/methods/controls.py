"""Control maps: none explains the network, so a metric that one of them wins is suspect."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..errors import Unsupported
from ..probe import MapOf, Need, Probe
from ..registry import MethodName, Nested, method


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

    version: ClassVar[int] = 2

    def __call__(self, probe: Probe) -> Tensor:
        rows, columns = (
            torch.exp(
                -torch.linspace(-2, 2, side, dtype=torch.float64).to(probe.inputs).square() / 2
            )
            for side in probe.inputs.shape[-2:]
        )
        bell = rows[:, None] * columns
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


@method("identity")
class Identity(Control):
    """The image itself: mean over its colour channels; maps (N, H, W) in [0, 1].

    Masking an image by its own brightness tells how much a metric rewards that alone.
    """

    def __call__(self, probe: Probe) -> Tensor:
        return probe.batch.images.mean(1)


@method("oracle")
class Oracle(Control):
    """The object's mask, where the data set has one; maps (N, H, W), zero where nothing is known.

    The best that localisation can be; what it scores in faithfulness is what an object is worth.

    Raises:
        Unsupported: without masks.
    """

    needs_masks: ClassVar[bool] = True

    def __call__(self, probe: Probe) -> Tensor:
        if probe.batch.masks is None:
            raise Unsupported("the images have no object masks")
        return probe.batch.masks.nan_to_num(0).to(probe.inputs.dtype)


class Transformed:
    """What is made of another method's map: it costs what that costs, and shares it."""

    of: Nested

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (MapOf(self.of.make()),)

    @property
    def class_agnostic(self) -> bool:
        return bool(getattr(self.of.make(), "class_agnostic", False))

    @property
    def precomputed(self) -> bool:
        return bool(getattr(self.of.make(), "precomputed", False))

    @property
    def needs_masks(self) -> bool:
        return bool(getattr(self.of.make(), "needs_masks", False))

    @property
    def control(self) -> bool:
        return bool(getattr(self.of.make(), "control", False))

    def raw(self, probe: Probe) -> Tensor:
        return probe[MapOf(self.of.make())]


@method("inverted")
class Inverted(Transformed):
    """A method's map upside down: its largest value minus itself; maps (N, H, W), non-negative.

    What a method calls most salient comes last here, so a metric that prefers it is suspect.

    Args:
        of: the method, by name or as a mapping of its name and hyper-parameters.
    """

    of: MethodName = Field(default="grad_cam", validate_default=True)
    control: ClassVar[bool] = True

    def __call__(self, probe: Probe) -> Tensor:
        maps = self.raw(probe)
        return maps.flatten(1).amax(1)[:, None, None] - maps


Fraction = Annotated[float, Field(ge=0, le=1)]


@method("reversed")
class Reversed(Transformed):
    """M^R, a method's map with its lowest and some of its highest values exchanged; (N, H, W).

    With K pixels in ascending order, the lowest floor(K m) are paired at random with as many just
    below the top floor(K l) + 1, and each pair swaps its values. So the values stay as a whole, and
    with them all saliency ratios of RCAP, while their places become wrong. Any method takes
    ``reversed: {l: 0.07, m: 0.1}`` for this. Equal values are ordered by the image's own stream,
    from which the pairs are drawn too.

    Args:
        of: the method, by name or as a mapping of its name and hyper-parameters.
        l: share of pixels at the top that keep their place; 0.07 as in the authors' code for
            ImageNet-S and Places365 (the paper names none).
        m: share of pixels exchanged at either end; 0.1 likewise.

    Raises:
        ValueError: if the two ends overlap.

    Source: Huang and Liu 2024, Guided AbsoluteGrad, arXiv:2404.15564, section 4.
    """

    of: MethodName = Field(default="guided_absolute_grad", validate_default=True)
    l: Fraction = 0.07  # noqa: E741  (the paper's name)
    m: Fraction = 0.1

    def __post_init__(self) -> None:
        if self.l + 2 * self.m >= 1:
            raise ValueError(f"l + 2 m must be less than 1, but is {self.l + 2 * self.m:g}")

    def __call__(self, probe: Probe) -> Tensor:
        maps = self.raw(probe)
        flat = maps.flatten(1)
        pixels = flat.shape[1]
        kept, moved = int(pixels * self.l), int(pixels * self.m)
        shuffle = probe.uniform("reversed ties").flatten(1).argsort(dim=1, stable=True)
        ascending = shuffle.gather(1, flat.gather(1, shuffle).argsort(dim=1, stable=True))
        top = pixels - 1 - kept
        low, high = ascending[:, :moved], ascending[:, top - moved : top]
        partner = probe.uniform("reversed pairs").flatten(1)[:, :moved].argsort(dim=1, stable=True)
        high = high.gather(1, partner)
        swapped = flat.scatter(1, low, flat.gather(1, high))
        return swapped.scatter(1, high, flat.gather(1, low)).view(maps.shape)
