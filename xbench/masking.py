"""Masked images: keep some pixels, blend the rest into a baseline, read the target's probability.

Every perturbation metric or method is a mask generator and a baseline behind one primitive,
:func:`masked_scores`. Nearly all time of a run is spent in it. Masking commutes with normalisation,
so it happens in the network's input space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .baselines import BaselineImage, BaselineName
from .imputation import linear_imputation
from .maps import Sign, unit_range, with_sign
from .orders import Ranks, SortedMap, Spread, Ties, ordered
from .probe import Again, Explanation, Logits, Need, Probe, closure, probability
from .types import Model, Passes

Read = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a row: logits (R, K) and the target of each row (R,) to (R, ...) float64."""

Forward = Callable[[Tensor, Tensor], Tensor]
"""Rows (R, ...) and the image that each belongs to, (R,) int64, to their logits (R, K)."""


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """(R,) logit of the target in float64."""
    return logits.gather(1, target[:, None])[:, 0].double()


Reading = Literal["probability", "logit"]
"""What a metric reads of the target: its softmax probability, or its logit as some libraries do."""


def readings(logits: Tensor, target: Tensor) -> Tensor:
    """(R, 2) float64: the target's probability and its logit, so that one forward answers both."""
    return torch.stack((probability(logits, target), target_logit(logits, target)), dim=-1)


def reading_of(scores: Tensor, reading: Reading) -> Tensor:
    """One of the two that :func:`readings` keeps along the last axis."""
    return scores[..., 0 if reading == "probability" else 1]


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
class BaselineScores(Need[Tensor]):
    """(N, 2) readings of the target on the baseline alone: the empty end of every curve.

    However many metrics mask an image down to nothing, this is forwarded once.
    """

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
        baseline = on[BaselineImage(self.baseline)]
        return masked_scores(on, [nothing], baseline, read=readings)[:, 0]


@dataclass(frozen=True)
class BaselineProbability(Need[Tensor]):
    """(N,) target probability on the baseline alone."""

    baseline: BaselineName

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (BaselineScores(self.baseline),)

    def compute(self, on: Probe) -> Tensor:
        return reading_of(on[BaselineScores(self.baseline)], "probability")


@dataclass(frozen=True)
class CleanScores(Need[Tensor]):
    """(N, 2) readings of the target on the image itself: the full end of every curve."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def compute(self, on: Probe) -> Tensor:
        return torch.stack((on.probability, target_logit(on[Logits()], on.target)), dim=-1)


@dataclass(frozen=True)
class Ends(Need[tuple[Tensor, Tensor]]):
    """Images (N, 3, H, W) and their baseline (1 or N, 3, H, W), laid out as the network reads them.

    Blended, they need not be laid out anew at each step.
    """

    baseline: BaselineName

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (BaselineImage(self.baseline),)

    def compute(self, on: Probe) -> tuple[Tensor, Tensor]:
        return on.model.laid_out(on.inputs), on.model.laid_out(on[BaselineImage(self.baseline)])


@dataclass(frozen=True)
class Imputation:
    """Noisy linear imputation: what stands in a baseline's place in ROAD.

    Args:
        noise: standard deviation of what is added to imputed pixels.
        space: where it is that: "pixels" in [0, 1], or "normalised".
    """

    noise: float
    space: Literal["pixels", "normalised"]


@dataclass(frozen=True)
class ImputationNoise(Need[Tensor]):
    """(N, 3, H, W) standard normal noise for imputed pixels, the same for all maps and levels."""

    def compute(self, on: Probe) -> Tensor:
        return on.normal("imputation", 0)


@dataclass(frozen=True)
class Shown(Need[Tensor]):
    """(N, 2) readings of the target with a share of the pixels shown, the rest replaced.

    The atom of all curves: two metrics that show the same pixels on the same baseline share it.

    Args:
        keep: whether the most salient pixels are shown, or the rest.
        share: of the pixels that are shown, the nearest number; or, where ties stay together, of K
            pixels those above (or the rest: up to) the value of rank floor(K (1 - salient share)).
        fill: what the others become: a baseline, or an imputation from those that are shown.
        sign, ties: make the order.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    keep: Literal["salient", "rest"]
    share: Fraction
    fill: BaselineName | Imputation
    sign: Sign = "signed"
    ties: Ties = "seeded"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        if isinstance(self.fill, Imputation):
            return (Logits(), ImputationNoise(), self.order)
        return (Logits(), Ends(self.fill), Spread(self.order))

    @property
    def order(self) -> Ranks | SortedMap:
        if self.ties == "above" or self.ties == "partition":
            return SortedMap(self.sign)
        return Ranks(self.sign, self.ties)

    def passes(self, model: Model) -> Passes:
        return Passes(1, 0)

    def compute(self, on: Explanation) -> Tensor:
        return _forwarded(on, (self,))[0]

    def mask(self, on: Explanation) -> Tensor:
        """(N, H, W) bool: the pixels that are shown."""
        compare, bound = self._rule(on)
        return compare(ordered(on, self.order)[:, None], bound)[:, 0]

    def _rule(self, on: Explanation) -> tuple[Callable[..., Tensor], int | Tensor]:
        """How the order's number of a pixel compares with which bound, (N, 1, 1, 1) or one for all,
        if the pixel is shown.
        """
        pixels = on.saliency[0].numel()
        if isinstance(self.order, Ranks):
            # of the rest too, so that both directions of a curve pass images of the same counts
            count = round(pixels * self.share)
            return (torch.lt, count) if self.keep == "salient" else (torch.ge, pixels - count)
        _, ascending = on[self.order]
        below = 1 - self.share if self.keep == "salient" else self.share
        threshold = ascending[:, max(int(pixels * below), 1) - 1]
        if self.ties == "partition":
            top = ascending[:, -1]
            threshold = torch.where(threshold == top, top.nextafter(top - 1), threshold)
        return torch.gt if self.keep == "salient" else torch.le, threshold[:, None, None, None]

    def image(self, on: Explanation) -> Tensor:
        """(real, 3, H, W) in network space; the probe's filling is left out."""
        real = slice(on.probe.real)
        if isinstance(self.fill, Imputation):
            return _imputed(self.fill, on.probe, self.mask(on))[real]
        images, baseline = on[Ends(self.fill)]
        compare, bound = self._rule(on)
        # a mask of numbers at once, then blended in place: half the time of bool and a mask for all
        mask = compare(on[Spread(self.order)], bound, out=torch.empty_like(images))
        return torch.lerp(baseline, images, mask, out=mask)[real]


def _imputed(fill: Imputation, probe: Probe, known: Tensor) -> Tensor:
    """All rows at once, filling too, as rounding may depend on their number."""
    noise = fill.noise * probe[ImputationNoise()]
    if fill.space == "pixels":
        noise = noise / probe.model.channel_constant(probe.model.std, noise)
    # weighted means commute with normalisation
    imputed = linear_imputation(probe.inputs, known) + noise
    return torch.where(known[:, None], probe.inputs, imputed)


def _forwarded(on: Explanation, wanted: Sequence[Shown]) -> tuple[Tensor, ...]:
    for need in closure(wanted):  # before inference mode, whose tensors have no gradients
        if not isinstance(need, Shown):
            on[need]
    probe, rows = on.probe, (need.image(on) for need in wanted)
    scores = row_scores(probe, rows, lambda images, _: probe.model.logits(images), read=readings)
    return scores.unbind(1)


def shown(on: Explanation, wanted: Sequence[Shown]) -> Tensor:
    """(N, S, 2) readings; those that are not known yet are forwarded in common chunks."""
    return torch.stack(on.together(wanted, lambda lacking: _forwarded(on, lacking)), dim=1)


MaskName = Literal["soft", "matched", "top"]
"""How a map becomes a mask: scaled to [0, 1]; ranked, 1 for the most salient pixel down to 0 for
the least, so that the masks of all maps hold the same values, whose mean is one half; or ones for a
share of the most salient pixels, zeros for the rest. Ties are seeded."""


@dataclass(frozen=True)
class MapMask(Need[Tensor]):
    """(N, H, W) a map as a mask in [0, 1].

    Args:
        sign: how the map is read before.
        mask: "soft" or "matched"; the single pixel of an image is kept by the latter.
        range_epsilon: added to the range that "soft" divides by, as some libraries do.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    sign: Sign
    mask: MaskName = "soft"
    range_epsilon: float = 0.0

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return () if self.mask == "soft" else (Ranks(self.sign),)

    def compute(self, on: Explanation) -> Tensor:
        if self.mask == "matched":
            place = on[Ranks(self.sign)].to(on.saliency.dtype)
            return 1 - place / max(place[0].numel() - 1, 1)
        maps = with_sign(on.saliency, self.sign)
        if not self.range_epsilon:
            return unit_range(maps)
        above = maps - maps.flatten(1).amin(1)[:, None, None]
        return above / (above.flatten(1).amax(1)[:, None, None] + self.range_epsilon)


def exactly(share: float) -> Fraction:
    """A share as it is written: 0.1 is one tenth."""
    return Fraction(str(share))


@dataclass(frozen=True)
class MaskedScores(Need[Tensor]):
    """(N, 2) readings of the target on the image under its map's mask, blended into the baseline.

    The top of a map is also a point of a curve, and shares that forward.

    Args:
        baseline: what masked pixels become.
        share: of the pixels that "top" keeps.
        sign, mask, range_epsilon: as in :class:`MapMask`.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    baseline: BaselineName
    sign: Sign
    mask: MaskName = "soft"
    share: float = 0.5
    range_epsilon: float = 0.0

    @property
    def source(self) -> Shown | MapMask:
        if self.mask == "top":
            return Shown("salient", exactly(self.share), self.baseline, self.sign)
        return MapMask(self.sign, self.mask, self.range_epsilon)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline), self.source)

    def passes(self, model: Model) -> Passes:
        return Passes() if self.mask == "top" else Passes(1, 0)

    def compute(self, on: Explanation) -> Tensor:
        if self.mask == "top":
            return on[self.source]
        mask, baseline = on[self.source][:, None], on[BaselineImage(self.baseline)]
        return masked_scores(on.probe, [mask], baseline, read=readings)[:, 0]


@dataclass(frozen=True)
class MaskedMap(Again[Tensor]):
    """(N, H, W) the raw map that the method makes of the image under its own map's soft mask.

    The method runs on a probe of the masked images, with the same target and noise, and costs what
    it costs alone.

    Args:
        baseline: what masked pixels become.
        sign, range_epsilon: as in :class:`MapMask`.
    """

    baseline: BaselineName
    sign: Sign
    range_epsilon: float = 0.0

    @property
    def mask(self) -> MapMask:
        return MapMask(self.sign, range_epsilon=self.range_epsilon)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(), BaselineImage(self.baseline), self.mask)

    def compute(self, on: Explanation) -> Tensor:
        probe, baseline = on.probe, on[BaselineImage(self.baseline)]
        masked = torch.lerp(baseline.expand_as(probe.inputs), probe.inputs, on[self.mask][:, None])
        return self.explained(probe.with_images(probe.model.pixels(masked))).raw


@dataclass(frozen=True)
class Curve(Need[Tensor]):
    """(N, steps + 1) readings of the target as pixels come or go, most salient first.

    Both ends are the same for all methods: the baseline, forwarded once per batch, and the image.

    Args:
        keep: "salient" starts from the baseline and shows the most salient pixels first; "rest"
            starts from the image and removes them first.
        baseline: what is not shown.
        steps: points after the first.
        sign, ties: make the order, as in :class:`Ranks`.
        reading: probability or logit.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    keep: Literal["salient", "rest"]
    baseline: BaselineName
    steps: int
    sign: Sign = "signed"
    ties: Ties = "seeded"
    reading: Reading = "probability"

    @property
    def inner(self) -> tuple[Shown, ...]:
        """The points between both ends."""
        shares = [Fraction(step, self.steps) for step in range(1, self.steps)]
        if self.keep == "rest":
            shares.reverse()
        return tuple(
            Shown(self.keep, share, self.baseline, self.sign, self.ties) for share in shares
        )

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (CleanScores(), BaselineScores(self.baseline), *self.inner)

    def shares(self, pixels: int) -> list[float]:
        """Share of the pixels that have changed at each point, from none to all.

        What ties keep together is counted as if there were none.
        """
        if self.ties in ("above", "partition"):
            return [step / self.steps for step in range(self.steps + 1)]
        return [count / pixels for count in self.counts(pixels)]

    def counts(self, pixels: int) -> list[int]:
        """Pixels that have changed after each step, from none to all."""
        shown = [round(pixels * step / self.steps) for step in range(self.steps + 1)]
        # so that removing from one end and showing from the other pass the same images
        return shown if self.keep == "salient" else [pixels - count for count in reversed(shown)]

    def compute(self, on: Explanation) -> Tensor:
        ends = [on[BaselineScores(self.baseline)], on[CleanScores()]]
        first, last = ends if self.keep == "salient" else reversed(ends)
        middle = [shown(on, self.inner)] if self.inner else []
        return reading_of(torch.cat((first[:, None], *middle, last[:, None]), dim=1), self.reading)
