"""Generated pictures: one textured shape among plain ones, with its exact mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import BadImage
from ..noise import stream_keys, uniform
from ..registry import dataset
from ..types import Sample, Source

SIZE = 64
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("striped", "checked", "dotted")
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)

DISTRACTORS = 3
SCALES = {2: 0.5, 4: 0.25, 8: 0.125, 16: 0.125}
"""Cells of a background grid along an edge, and the weight of the grid in the sum."""

ANGLES = 256
CHUNK = 64  # images drawn at once; their planes then fit a processor's cache

_TURNS = [2 * math.pi * step / ANGLES for step in range(ANGLES)]
_COSINES = torch.tensor([math.cos(turn) for turn in _TURNS], dtype=torch.float32)
_SINES = torch.tensor([math.sin(turn) for turn in _TURNS], dtype=torch.float32)
_CENTRES = torch.arange(SIZE, dtype=torch.float32) + 0.5


COUNT = 10_000
"""Images of a split."""


@dataset("shapes")
class Shapes:
    """Shapes: 64 x 64 pictures of 12 classes, four shapes times three textures.

    A picture holds one textured object, fully inside, at a random place, size and angle and in two
    random colours, over a random background with a few plain discs, ellipses and rectangles. The
    class needs both the object's shape and its texture. The mask is 1 on the object and 0
    elsewhere, without doubtful pixels. A picture depends on (seed, split, index) only, and its
    label is ``index % 12``, so every run of 12 pictures holds each class once.

    Args:
        split: ``train`` and ``test`` share no picture; the embedded network learnt from ``train``.
        seed: another seed gives other pictures.
    """

    version: ClassVar[int] = 1
    split: Literal["test", "train"] = "test"
    seed: int = 0

    def open(self, data: Path | None) -> Source:
        """The pictures; nothing is read, so ``data`` is not used."""
        return ShapesSource(self.split, self.seed, tuple(f"{i:07d}" for i in range(COUNT)))


@dataclass(frozen=True)
class ShapesSource:
    """An opened :class:`Shapes`; pictures are drawn when they are loaded."""

    split: str
    seed: int
    ids: tuple[str, ...]
    classes: ClassVar[tuple[str, ...]] = CLASSES
    revision: ClassVar[str] = str(Shapes.version)
    size: ClassVar[tuple[int, int]] = (SIZE, SIZE)
    has_masks: ClassVar[bool] = True

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(int(name) % len(CLASSES) for name in self.ids)

    def key(self, index: int) -> str:
        return image_key(self.seed, self.split, index)

    def load(self, indices: Sequence[int]) -> list[Sample | BadImage]:
        images, labels, masks = generate(self.seed, self.split, indices)
        return [
            Sample(image, label, mask)
            for image, label, mask in zip(images, labels.tolist(), masks, strict=True)
        ]


def image_key(seed: int, split: str, index: int) -> str:
    """The stable key of one picture."""
    return f"shapes/{split}/{seed}/{index:07d}"


def generate(seed: int, split: str, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures, each from (seed, split, index) alone.

    The same bits on every machine: the steps are single additions, multiplications, divisions and
    square roots, which IEEE 754 rounds alike everywhere, and matrix products that are exact.

    Returns:
        Images (N, 3, 64, 64), multiples of 1/255 in [0, 1]; labels (N,) int64; masks (N, 64, 64),
        1 on the object and 0 elsewhere.
    """
    count = len(indices)
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.float32)
    labels = torch.tensor(indices, dtype=torch.int64) % len(CLASSES)
    masks = torch.empty(count, SIZE, SIZE, dtype=torch.float32)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        keys = [image_key(seed, split, index) for index in indices[part]]
        canvas = _background(uniform(stream_keys(seed, keys, "background"), _BACKGROUND_DRAWS))
        distractors = uniform(stream_keys(seed, keys, "distractors"), DISTRACTORS * 9)
        for draws in distractors.chunk(DISTRACTORS, dim=1):
            canvas = _with_distractor(canvas, draws)
        draws = uniform(stream_keys(seed, keys, "object"), 14)
        inside = _object(draws[:, :4], labels[part] // len(TEXTURES))
        paint = _texture(draws[:, 4:], labels[part] % len(TEXTURES))
        canvas = torch.where(inside[:, None], paint, canvas)
        images[part] = (canvas * 255).round() / 255
        masks[part] = inside
    return images, labels, masks


def _upsampling(cells: int) -> Tensor:
    """(64, cells + 1): weights of the grid's nodes at each pixel, a smooth step between two nodes.

    They are multiples of 1/64 and the nodes' values multiples of 1/256, so a product of two such
    matrices with a grid fits float32 exactly, in whatever order it is summed.
    """
    places = _CENTRES * (cells / SIZE)
    left = places.floor()
    step = places - left
    right_weight = (step * step * (3 - 2 * step) * 64).round() / 64
    nodes = torch.arange(cells + 1)
    is_left = nodes == left[:, None]
    is_right = nodes == left[:, None] + 1
    return is_left * (1 - right_weight[:, None]) + is_right * right_weight[:, None]


_UPSAMPLINGS = {cells: _upsampling(cells) for cells in SCALES}
_BACKGROUND_DRAWS = sum(6 + (cells + 1) ** 2 for cells in SCALES)


def _background(draws: Tensor) -> Tensor:
    """Grids of mixtures of two colours, upsampled and summed over the scales: (N, 3, 64, 64)."""
    canvas = draws.new_zeros(len(draws), 3, SIZE, SIZE)
    for cells, weight in SCALES.items():
        nodes = cells + 1
        colours, mixture, draws = draws.tensor_split((6, 6 + nodes**2), dim=1)
        one, other = colours[:, :3, None, None], colours[:, 3:, None, None]
        grid = one + mixture.view(-1, 1, nodes, nodes) * (other - one)
        grid = (grid * 256).round() / 256
        upsampling = _UPSAMPLINGS[cells]
        canvas += weight * (upsampling @ grid @ upsampling.T)
    return canvas


def _rotated(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates (N, 64, 64) about (x, y), each (N,), turned by a share of a full turn."""
    step = (angle * ANGLES).long()
    cosine, sine = _COSINES[step, None], _SINES[step, None]
    dx, dy = _CENTRES - x[:, None], _CENTRES - y[:, None]
    u = (cosine * dx)[:, None, :] + (sine * dy)[:, :, None]
    v = (cosine * dy)[:, :, None] - (sine * dx)[:, None, :]
    return u, v


def _with_distractor(canvas: Tensor, draws: Tensor) -> Tensor:
    """The canvas under one plain disc, ellipse or rectangle."""
    x, y, angle, kind, width, height = (draws[:, i] for i in range(6))
    u, v = _rotated(x * SIZE, y * SIZE, angle)
    half_width = 5 + 7 * width
    half_height = torch.where(kind < 1 / 3, half_width, 5 + 7 * height)
    u = u.abs() / half_width[:, None, None]
    v = v.abs() / half_height[:, None, None]
    is_round = (kind < 2 / 3)[:, None, None]
    inside = torch.where(is_round, u * u + v * v, torch.maximum(u, v)) <= 1
    return torch.where(inside[:, None], draws[:, 6:, None, None], canvas)


# Each shape is where its gauge is at most the radius of the circle around it.
_GAUGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda u, v: (u * u + v * v).sqrt() * 1.25,
    lambda u, v: torch.maximum(u.abs(), v.abs()) * math.sqrt(2),
    lambda u, v: torch.maximum(-2 * v, math.sqrt(3) * u.abs() + v),
    lambda u, v: torch.minimum(
        torch.maximum(u.abs() * 1.07, v.abs() * 3), torch.maximum(u.abs() * 3, v.abs() * 1.07)
    ),
)


def _object(draws: Tensor, shapes: Tensor) -> Tensor:
    """Whether a pixel is on the object, (N, 64, 64) bool."""
    radius = 14 + 8 * draws[:, 0]
    x, y = (radius + draws[:, i] * (SIZE - 2 * radius) for i in (1, 2))
    u, v = _rotated(x, y, draws[:, 3])
    gauge = torch.empty_like(u)
    for shape, formula in enumerate(_GAUGES):
        chosen = shapes == shape
        gauge[chosen] = formula(u[chosen], v[chosen])
    return gauge <= radius[:, None, None]


def _stripes(u: Tensor, v: Tensor) -> Tensor:
    return u.abs() - 0.25


def _checks(u: Tensor, v: Tensor) -> Tensor:
    across, along = _stripes(u, v), _stripes(v, u)
    return torch.minimum(across.abs(), along.abs()) * (across * along).sign()


def _dots(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt() - 0.32


# Signed distance to the border between the texture's two colours, in periods; one period of the
# texture is -0.5 <= u, v < 0.5.
_BORDERS = (_stripes, _checks, _dots)


def _texture(draws: Tensor, textures: Tensor) -> Tensor:
    """The textured plane that the object is cut from, (N, 3, 64, 64).

    The two colours differ by 0.4 to 0.6 in every channel.
    """
    period = 6 + 3 * draws[:, 0, None, None]
    u, v = _rotated(draws[:, 1] * SIZE, draws[:, 2] * SIZE, draws[:, 3])
    u, v = u / period, v / period
    u, v = u - u.floor() - 0.5, v - v.floor() - 0.5
    border = torch.empty_like(u)
    for texture, formula in enumerate(_BORDERS):
        chosen = textures == texture
        border[chosen] = formula(u[chosen], v[chosen])
    mixture = (border * period + 0.5).clamp(0, 1)[:, None]  # one pixel wide, for smooth borders
    one = draws[:, 4:7, None, None]
    other = one + 0.4 + 0.2 * draws[:, 7:, None, None]
    other = other - other.floor()
    return one + mixture * (other - one)
