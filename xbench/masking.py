"""Masked images: keep some pixels, blend the rest into a baseline, read the target's probability.

Every perturbation metric or method is a mask generator and a baseline behind one primitive,
:func:`masked_scores`. Nearly all time of a run is spent in it. Masking commutes with normalisation,
so it happens in the network's input space, for baselines named in pixel terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from .maps import Sign, ranks, unit_range, with_sign
from .probe import Explanation, Logits, Need, Probe, probability
from .types import Model, Passes

BaselineName = Literal["black", "mean", "white", "blur"]
"""What masked pixels become.

``black`` and ``white`` are pixel values 0 and 1, ``mean`` is the model's mean colour (zero after
normalisation), ``blur`` the image under a Gaussian with a standard deviation of 1/16 of its shorter
side (16 at 256 pixels, as in Guided AbsoluteGrad's insertion), cut at three of them, edges
reflected.
"""


Padding = Literal["reflect", "zero"]
"""What a blur sees beyond the image's edge: the image mirrored at the centre of its outermost
pixels (the default), or zeros."""


def baseline_image(name: BaselineName, model: Model, inputs: Tensor) -> Tensor:
    """The baseline in network space, (1 or N, 3, H, W)."""
    if name == "blur":
        return gaussian_blur(inputs, sigma=min(inputs.shape[-2:]) / 16)
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
    rows, columns = (
        gaussian_matrix(side, sigma, radius, padding).to(images) for side in images.shape[-2:]
    )
    # planes of whole cache lines: else an image's place in the batch would move its last bit
    spare = [-side % 8 for side in images.shape[-2:]]
    rows, columns = (
        functional.pad(matrix, (0, more, 0, more))
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
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-offset.double().square() / (2 * sigma * sigma))
    weight = (kernel / kernel.sum()).expand(side, -1)
    at = torch.arange(side)[:, None] + offset
    if padding == "reflect":
        period = max(2 * (side - 1), 1)
        at = torch.minimum(at % period, -at % period)
    else:
        weight = weight.where((at >= 0) & (at < side), 0)
        at = at.clamp(0, side - 1)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, at, weight)


Read = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a row: logits (R, K) and the target of each row (R,) to (R, ...) float64."""

Forward = Callable[[Tensor, Tensor], Tensor]
"""Rows (R, ...) and the image that each belongs to, (R,) int64, to their logits (R, K)."""


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """(R,) logit of the target in float64."""
    return logits.gather(1, target[:, None])[:, 0].double()


def masked_probabilities(probe: Probe, masks: Iterable[Tensor], baseline: Tensor) -> Tensor:
    """Target probability of each image under each mask, (N, S) float64: see masked_scores."""
    return masked_scores(probe, masks, baseline)


def masked_scores(
    probe: Probe, masks: Iterable[Tensor], baseline: Tensor, *, read: Read = probability
) -> Tensor:
    """What the network says of each image under each mask, (N, S) or (N, S, ...) float64.

    Args:
        masks: yields (N, s, H, W), bool or in [0, 1], a few steps at a time; 1 keeps the pixel.
            (1, s, H, W) are the same masks for all images.
        baseline: (1 or N, 3, H, W) in network space, what masked pixels become.
        read: the target's probability, or another reading of its logits.
    """
    rows = _masked_rows(probe, masks, baseline.expand(probe.rows, -1, -1, -1))
    return row_scores(probe, rows, lambda images, _: probe.model.logits(images), read=read)


def row_scores(
    probe: Probe, rows: Iterable[Tensor], forward: Forward, *, read: Read = probability
) -> Tensor:
    """Readings of rows that are forwarded, step after step, one row for each image: (N, S, ...).

    The chunk that is forwarded has the probe's fixed shape; it is filled across images and steps,
    and nothing larger is ever held. Out of memory halves the chunk and goes on; the probe's
    ``events`` say so, since the forward shape then changed. Filling rows of the probe are not
    forwarded: NaN.

    Args:
        rows: yields (real, ...), a row for each of the probe's images without its filling.
        forward: rows to logits.
        read: what is kept of them.
    """
    # asked for before inference mode, inside which its clean pass could not be differentiated
    target = probe.target[: probe.real]
    with torch.inference_mode():
        found = torch.cat(list(_scored(probe, rows, forward, lambda y, of: read(y, target[of]))))
    steps = found.shape[0] // probe.real
    scores = found.new_full((probe.rows, steps, *found.shape[1:]), torch.nan)
    scores[: probe.real] = found.view(steps, probe.real, *found.shape[1:]).transpose(0, 1)
    return scores


def _masked_rows(probe: Probe, masks: Iterable[Tensor], baseline: Tensor) -> Iterator[Tensor]:
    """(real, 3, H, W) blended images, step after step, the probe's filling left out."""
    images, baseline = probe.inputs[: probe.real], baseline[: probe.real]
    for block in masks:
        for mask in block[: probe.real].unbind(1):
            # exact at 0 and 1, and vectorised, which torch.where is not on a CPU
            yield torch.lerp(baseline, images, mask[:, None].to(images.dtype))


def _scored(
    probe: Probe, steps: Iterable[Tensor], forward: Forward, read: Read
) -> Iterator[Tensor]:
    """Readings of rows that arrive a step at a time, forwarded in chunks of the fixed shape."""
    waiting: list[tuple[Tensor, Tensor]] = []
    images = torch.arange(probe.real, device=probe.inputs.device)
    count = 0
    for rows in steps:
        waiting.append((rows, images))
        count += probe.real
        if count < probe.rows:
            continue
        pieces, waiting = waiting, []
        rows, of = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
        yield _chunk(probe, rows[: probe.rows], of[: probe.rows], forward, read)
        count -= probe.rows
        if count:
            waiting = [(rows[probe.rows :], of[probe.rows :])]
    if waiting:
        rows, of = map(torch.cat, zip(*waiting, strict=True))
        yield _chunk(probe, rows, of, forward, read)


def _chunk(probe: Probe, rows: Tensor, of: Tensor, forward: Forward, read: Read) -> Tensor:
    """Readings (R, ...) of one chunk, padded with zeros up to the fixed shape."""
    size = probe.chunk
    found = []
    while len(rows):
        part = rows[:size]
        real = len(part)
        try:
            with probe.meter.padded(real, size):
                logits = forward(_padded(part, size), _padded(of[:size], size))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = probe.halve_chunk()
            continue
        found.append(read(logits[:real], of[:real]))
        rows, of = rows[real:], of[real:]
    return torch.cat(found)


def _padded(rows: Tensor, size: int) -> Tensor:
    lack = size - len(rows)
    return torch.cat((rows, rows.new_zeros(lack, *rows.shape[1:]))) if lack else rows


# --- needs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaselineImage(Need[Tensor]):
    """The baseline of this batch in network space, (1 or N, 3, H, W)."""

    baseline: BaselineName

    def compute(self, on: Probe) -> Tensor:
        return baseline_image(self.baseline, on.model, on.inputs)


@dataclass(frozen=True)
class BaselineProbability(Need[Tensor]):
    """(N,) target probability on the baseline alone: the empty end of every curve."""

    baseline: BaselineName

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(1, 0)

    def compute(self, on: Probe) -> Tensor:
        nothing = torch.zeros(
            on.rows, 1, *on.inputs.shape[-2:], dtype=torch.bool, device=on.inputs.device
        )
        return masked_probabilities(on, [nothing], on[BaselineImage(self.baseline)])[:, 0]


@dataclass(frozen=True)
class Permutation(Need[Tensor]):
    """(N, H * W), one permutation of the pixels per image, for all methods: breaks ties."""

    def compute(self, on: Probe) -> Tensor:
        # 24-bit numbers may repeat; the stable sort then keeps raster order among those few
        return on.uniform("ties").flatten(1).argsort(dim=1, stable=True)


@dataclass(frozen=True)
class Ranks(Need[Tensor]):
    """(N, H, W) place of each pixel in the signed map's order, 0 for the most salient."""

    scope: ClassVar[Literal["batch", "map"]] = "map"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Permutation(),)

    def compute(self, on: Explanation) -> Tensor:
        return ranks(on.saliency, on[Permutation()])


@dataclass(frozen=True)
class MaskedProbability(Need[Tensor]):
    """(N,) target probability on the image times its map in [0, 1], blended into the baseline."""

    scope: ClassVar[Literal["batch", "map"]] = "map"
    baseline: BaselineName
    sign: Sign

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(1, 0)

    def compute(self, on: Explanation) -> Tensor:
        mask = unit_range(with_sign(on.saliency, self.sign))[:, None]
        return masked_probabilities(on.probe, [mask], on[BaselineImage(self.baseline)])[:, 0]


@dataclass(frozen=True)
class Curve(Need[Tensor]):
    """(N, steps + 1) target probability as pixels come or go, most salient first.

    Both ends are the same for all methods, so they are forwarded once per batch: a map costs
    ``steps - 1`` forwards.

    Args:
        keep: "salient" starts from the baseline and shows the most salient pixels first; "rest"
            starts from the image and removes them first.
        steps: points after the first. Step k acts on ``counts(...)[k]`` pixels.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    keep: Literal["salient", "rest"]
    baseline: BaselineName
    steps: int

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineProbability(self.baseline), Ranks())

    def passes(self, model: Model) -> Passes:
        return Passes(self.steps - 1, 0)

    def counts(self, pixels: int) -> list[int]:
        """Pixels that have changed after each step, from none to all."""
        shown = [round(pixels * step / self.steps) for step in range(self.steps + 1)]
        # so that removing from one end and showing from the other pass the same images
        return shown if self.keep == "salient" else [pixels - count for count in reversed(shown)]

    def compute(self, on: Explanation) -> Tensor:
        place = on[Ranks()][:, None]
        inner = self.counts(place[0].numel())[1:-1]
        masks = (place < count if self.keep == "salient" else place >= count for count in inner)
        empty, full = on[BaselineProbability(self.baseline)], on.probe.probability
        ends = (empty, full) if self.keep == "salient" else (full, empty)
        middle = (
            [masked_probabilities(on.probe, masks, on[BaselineImage(self.baseline)])]
            if inner
            else []
        )
        return torch.cat((ends[0][:, None], *middle, ends[1][:, None]), dim=1)


@dataclass(frozen=True)
class Recovered(Need[tuple[Tensor, Tensor]]):
    """RCAP's partitions of a map: (share of saliency, probability of the target), each (N, S).

    With K pixels and the map scaled to [0, 1], the threshold of a fraction is the order statistic
    of rank floor(K (1 - fraction)); strictly greater pixels are recovered, or those equal to the
    maximum where the threshold is the maximum. All else is baseline.

    Args:
        percents: recovered shares of the pixels, in percent.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    baseline: BaselineName
    sign: Sign
    percents: tuple[int, ...]

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline))

    def passes(self, model: Model) -> Passes:
        return Passes(len(self.percents), 0)

    def compute(self, on: Explanation) -> tuple[Tensor, Tensor]:
        saliency = unit_range(with_sign(on.saliency, self.sign))
        flat = saliency.flatten(1)
        ascending = flat.sort(dim=1).values
        pixels, top = flat.shape[1], ascending[:, -1:]
        places = [max(pixels * (100 - percent) // 100, 1) - 1 for percent in self.percents]
        threshold = ascending[:, places]  # (N, S)
        threshold = torch.where(threshold == top, top.nextafter(top - 1), threshold)
        chosen = flat[:, None] > threshold[..., None]  # (N, S, H * W)
        mass = flat.double()
        total = mass.sum(1, keepdim=True)
        share = (mass[:, None] * chosen).sum(2) / total.where(total > 0, 1)
        masks = chosen.view(*chosen.shape[:2], *saliency.shape[1:])
        return share, masked_probabilities(on.probe, [masks], on[BaselineImage(self.baseline)])
