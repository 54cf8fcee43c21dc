"""What a run keeps beside its scores: curves, maps, and pictures with their masks.

Each is read from an explanation as a metric reads it, and stands in a metric's place among the
cells of a unit of work; what it returns are arrays instead of scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .probe import Explanation, Need, Probe, needs_of
from .store import Piece
from .suite import Choice

Kind = Literal["curves", "maps", "pictures"]


@dataclass(frozen=True)
class Kept:
    """Something to keep, in a metric's place: plain data, as a suite's choices are.

    Args:
        kind: what to read.
        metric: whose curves.
        folder: for maps that go to files there, not to the store.
        images: the keys that it is wanted of.
    """

    kind: Kind
    metric: Choice | None = None
    folder: Path | None = None
    images: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def label(self) -> str:
        return self.kind if self.metric is None else f"{self.kind} of {self.metric.label}"

    def make(self) -> Any:
        """What reads it: called with an Explanation (pictures: with a Probe), it returns arrays
        (N, ...) by name.
        """
        if self.metric is not None:
            return Curves(self.metric.make())
        return Maps() if self.kind == "maps" else Pictures()


@dataclass(frozen=True)
class Curves:
    """(N, 2, P) float64 by curve: shares and values, the very numbers of a metric's score."""

    metric: Any

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return needs_of(self.metric)

    def __call__(self, explanation: Explanation) -> dict[str, Tensor]:
        return {
            name: torch.stack((line.shares.expand_as(line.values), line.values), dim=1).double()
            for name, line in self.metric.curves(explanation).items()
        }


class Maps:
    """(N, H, W) raw maps, not finite where they are not, bit for bit."""

    needs: ClassVar[tuple[Need[Any], ...]] = ()

    def __call__(self, explanation: Explanation) -> dict[str, Tensor]:
        return {"": explanation.raw}


class Pictures:
    """(N, H, W, 3) uint8, and masks (N, H, W) as a data set gives them, where it has any."""

    needs: ClassVar[tuple[Need[Any], ...]] = ()

    def __call__(self, probe: Probe) -> dict[str, Tensor]:
        pixels = (probe.batch.images.clamp(0, 1) * 255).round().to(torch.uint8)
        found = {"picture": pixels.permute(0, 2, 3, 1)}
        return found if probe.batch.masks is None else {**found, "mask": probe.batch.masks}


def pieces(of: str, kept: Kept, found: Mapping[str, Tensor], keys: tuple[str, ...]) -> list[Piece]:
    """Those arrays whose images want them, on the host."""
    at = [place for place, key in enumerate(keys) if key in kept.images]
    arrays = {name: values[at].cpu().numpy() for name, values in found.items()}
    return [
        Piece(of, keys[place], name, "ok", values[row], kept.folder)
        for name, values in arrays.items()
        for row, place in enumerate(at)
    ]
