"""Laws of layouts: which axis holds channels, and where the grid of positions stands."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbench.errors import Unsupported
from xbench.features import FeatureLayout

SQUARE, WIDE = (4, 3, 224, 224), (4, 3, 224, 448)


@pytest.mark.parametrize(
    ("shape", "images", "kind", "size"),
    [
        ((4, 512, 7, 7), SQUARE, "maps", (7, 7)),  # ResNet
        ((4, 512, 7, 14), WIDE, "maps", (7, 14)),
        ((4, 64, 111, 111), SQUARE, "maps", (111, 111)),  # a stride of 2 without padding
        ((4, 2048, 8, 8), (4, 3, 299, 299), "maps", (8, 8)),  # Inception
        ((4, 96, 13, 28), (4, 3, 227, 460), "maps", (13, 28)),
        ((4, 64, 56, 14), SQUARE, "maps", (56, 14)),  # neither reading fits: strides differ
        ((4, 64, 1, 1), SQUARE, "maps", (1, 1)),
        ((4, 96, 96, 96), (4, 3, 384, 384), "maps", (96, 96)),  # both readings fit
        ((4, 7, 7, 768), SQUARE, "maps_last", (7, 7)),  # Swin
        ((4, 7, 14, 768), WIDE, "maps_last", (7, 14)),
        ((4, 14, 7, 768), (4, 3, 448, 224), "maps_last", (14, 7)),
        ((4, 1, 1, 768), SQUARE, "maps_last", (1, 1)),
        ((4, 197, 768), SQUARE, "tokens", (14, 14)),  # ViT
        ((4, 196, 768), SQUARE, "tokens", (14, 14)),
        ((4, 198, 192), SQUARE, "tokens", (14, 14)),  # DeiT with distillation
        ((4, 261, 384), SQUARE, "tokens", (16, 16)),  # DINOv2 with registers
        ((4, 393, 768), WIDE, "tokens", (14, 28)),
        ((4, 50, 768), SQUARE, "tokens", (7, 7)),
    ],
)
def test_real_layers_are_read_as_their_networks_mean_them(
    shape: Sequence[int], images: Sequence[int], kind: str, size: tuple[int, int]
) -> None:
    layout = FeatureLayout.of(shape, images)
    assert (layout.kind, layout.size) == (kind, size)
    assert layout.positions == size[0] * size[1]
    assert layout.prefix == (shape[1] - layout.positions if kind == "tokens" else 0)
    channels = shape[layout.channel_axis]
    assert layout.grid(torch.zeros(shape)).shape == (4, channels, *size)


def test_each_layout_is_converted_position_by_position() -> None:
    maps = torch.randn(2, 5, 3, 6)
    images = (2, 3, 24, 48)
    tokens = torch.cat((torch.randn(2, 4, 5), maps.flatten(2).mT), dim=1)
    for values in (maps, maps.permute(0, 2, 3, 1), tokens):
        layout = FeatureLayout.of(values.shape, images)
        assert torch.equal(layout.grid(values), maps)
    assert FeatureLayout.of(tokens.shape, images).prefix == 4


@given(
    patch=st.integers(1, 32),
    grid=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    prefix=st.integers(0, 3),
)
def test_patches_of_any_size_on_any_grid_are_found(
    patch: int, grid: tuple[int, int], prefix: int
) -> None:
    height, width = grid
    images = (1, 3, patch * height, patch * width)
    layout = FeatureLayout.of_tokens(height * width + prefix, images)
    assert layout == FeatureLayout("tokens", grid, prefix)


@given(
    stride=st.integers(1, 32),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    cut=st.tuples(st.integers(0, 31), st.integers(0, 31)),
    channels=st.integers(1, 64),
)
def test_maps_of_any_stride_are_maps_however_sides_are_rounded(
    stride: int, grid: tuple[int, int], cut: tuple[int, int], channels: int
) -> None:
    sides = [stride * n + c % stride for n, c in zip(grid, cut, strict=True)]
    for size in (grid, tuple(-(-side // stride) for side in sides)):  # rounded down, and up
        layout = FeatureLayout.of((1, channels, *size), (1, 3, *sides))
        assert layout == FeatureLayout("maps", size)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 10), "returns 1 axes per image"),
        ((4, 2, 3, 7, 7), "returns 4 axes per image"),
        ((256, 49, 96), "returns 256 rows for 4 images; attention within windows"),
        ((197, 4, 768), "returns 197 rows for 4 images"),
        ((4, 1, 768), "has 1 tokens per image"),  # the class token alone
        ((4, 77, 512), r"has 77 tokens per image, which no grid .* over 224 x 224 pixels"),
        ((4, 768, 196), "has 768 tokens per image"),  # channels before positions
        ((4, 16 * 16 + 32, 64), "has 288 tokens per image"),  # too many for a prefix
    ],
)
def test_an_output_without_a_grid_is_unsupported(shape: Sequence[int], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        FeatureLayout.of(shape, SQUARE)
