"""Laws of linear imputation: its equations, beside a direct sparse solution, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor

from xbench.imputation import linear_imputation

OFFSETS = {
    (down, right): (1 / 6 if 0 in (down, right) else 1 / 12)
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if (down, right) != (0, 0)
}


def solved(image: Tensor, known: Tensor) -> Tensor:
    """(C, H, W), one equation per unknown pixel, solved by scipy."""
    height, width = known.shape
    unknown = [tuple(at) for at in (~known).nonzero().tolist()]
    number = {at: row for row, at in enumerate(unknown)}
    matrix = np.zeros((len(unknown), len(unknown)))
    right = np.zeros((len(unknown), image.shape[0]))
    for (down, across), row in number.items():
        for (dy, dx), weight in OFFSETS.items():
            there = (down + dy, across + dx)
            if not (0 <= there[0] < height and 0 <= there[1] < width):
                continue
            matrix[row, row] += weight
            if there in number:
                matrix[row, number[there]] -= weight
            else:
                right[row] += weight * image[:, there[0], there[1]].numpy()
    filled = image.clone()
    solution = np.atleast_2d(spsolve(csr_matrix(matrix), right).reshape(len(unknown), -1))
    for at, row in number.items():
        filled[:, at[0], at[1]] = torch.from_numpy(solution[row])
    return filled


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(height: int, width: int, share: float, seed: int) -> Tensor:
    """(H, W) bool, unknown in large connected areas, as under a class activation map."""
    small = torch.rand(1, 1, 4, 4, generator=generator(seed), dtype=torch.float64)
    saliency = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")[0, 0]
    order = saliency.flatten().argsort().argsort()
    return (order < (1 - share) * order.numel()).view(height, width)


def scattered(height: int, width: int, share: float, seed: int) -> Tensor:
    order = torch.randperm(height * width, generator=generator(seed))
    return (order < (1 - share) * order.numel()).view(height, width)


# --- by hand --------------------------------------------------------------------------------------


def test_one_unknown_pixel_is_the_weighted_mean_of_its_neighbours() -> None:
    image = torch.tensor([[1.0, 2, 3], [4, 100, 6], [7, 8, 9]], dtype=torch.float64)[None, None]
    known = torch.ones(1, 3, 3, dtype=torch.bool)
    known[0, 1, 1] = False
    expected = (2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 9) / 12
    assert float(linear_imputation(image, known)[0, 0, 1, 1]) == pytest.approx(expected)


def test_in_a_corner_the_three_neighbours_share_the_weight() -> None:
    image = torch.tensor([[100.0, 2], [4, 8]], dtype=torch.float64)[None, None]
    known = torch.tensor([[[False, True], [True, True]]])
    expected = (2 / 6 + 4 / 6 + 8 / 12) / (5 / 12)
    assert float(linear_imputation(image, known)[0, 0, 0, 0]) == pytest.approx(expected)


def test_between_two_columns_the_imputed_image_is_a_ramp() -> None:
    image = torch.rand(1, 1, 9, 6, generator=generator(0), dtype=torch.float64)
    image[..., 0], image[..., 5] = 1, 11
    known = torch.zeros(1, 9, 6, dtype=torch.bool)
    known[..., 0] = known[..., 5] = True
    ramp = torch.linspace(1, 11, 6, dtype=torch.float64).expand(1, 1, 9, 6)
    torch.testing.assert_close(linear_imputation(image, known), ramp)


# --- beside a direct solution ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [blob, scattered])
@pytest.mark.parametrize("sides", [(24, 24), (7, 19), (1, 30)])
def test_the_solution_is_the_sparse_direct_one(
    sides: tuple[int, int], shape: Any, share: float, dtype: torch.dtype
) -> None:
    """To 1e-12 of the largest value; to 1e-5 in float32, whose equations hold to 4 x 6e-8."""
    image = torch.randn(3, *sides, generator=generator(1), dtype=torch.float64)
    known = shape(*sides, share, 2)
    found = linear_imputation(image[None].to(dtype), known[None])[0].double()
    expected = solved(image, known)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() <= tolerance * image.abs().max()


def test_at_224_pixels_the_equations_hold() -> None:
    """Where a dense matrix would not fit: each unknown pixel against its neighbours' mean."""
    image = torch.randn(1, 1, 224, 224, generator=generator(1))
    known = blob(224, 224, 0.9, 3)[None]
    found = linear_imputation(image, known)[0, 0].double()
    total, weights = torch.zeros_like(found), torch.zeros_like(found)
    for (down, right), weight in OFFSETS.items():
        here = slice(max(0, -down), 224 - max(0, down)), slice(max(0, -right), 224 - max(0, right))
        there = slice(max(0, down), 224 - max(0, -down)), slice(max(0, right), 224 - max(0, -right))
        total[here] += weight * found[there]
        weights[here] += weight
    off = (found - total / weights).where(~known[0], 0)
    assert off.abs().max() < 2e-6 * image.abs().max()
    assert torch.equal(found.where(known[0], 0), image[0, 0].double().where(known[0], 0))


# --- by property ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 3, 8]))
@settings(max_examples=25, deadline=None)
def test_imputed_values_lie_between_the_known_ones(seed: int, height: int, width: int) -> None:
    image = torch.randn(1, 2, height, width, generator=generator(seed), dtype=torch.float64)
    known = torch.rand(1, height, width, generator=generator(seed + 1)) < 0.3
    found = linear_imputation(image, known)
    if not known.any():
        assert not found.any()
        return
    inside = image[:, :, known[0]]
    assert (found >= inside.amin(2)[..., None, None] - 1e-12).all()
    assert (found <= inside.amax(2)[..., None, None] + 1e-12).all()


def test_an_image_of_which_all_is_known_stays_and_one_of_which_nothing_is_becomes_zero() -> None:
    images = torch.randn(2, 3, 10, 10, generator=generator(0))
    known = torch.tensor([True, False])[:, None, None].expand(2, 10, 10)
    found = linear_imputation(images, known)
    assert torch.equal(found[0], images[0])
    assert not found[1].any()


def test_each_image_stops_by_itself() -> None:
    """An easy image beside a hard one, or beside one that is not finite, keeps its bits."""
    images = torch.randn(3, 3, 40, 40, generator=generator(0))
    known = torch.stack((scattered(40, 40, 0.05, 1), blob(40, 40, 0.95, 2), blob(40, 40, 0.5, 3)))
    images[2, :, 0, :] = torch.nan
    together = linear_imputation(images, known)
    turned = linear_imputation(images.flip(0), known.flip(0)).flip(0)
    for at in (0, 1):
        same = images[at : at + 1].expand(3, -1, -1, -1).contiguous()
        alone = linear_imputation(same, known[at].expand(3, -1, -1).contiguous())
        assert torch.equal(together[at], alone[at])
        assert torch.equal(together[at], turned[at])
        assert together[at].isfinite().all()


def test_what_is_not_known_is_not_read() -> None:
    images = torch.randn(1, 3, 12, 12, generator=generator(0), dtype=torch.float64)
    known = scattered(12, 12, 0.4, 1)[None]
    hidden = images.where(known[:, None], torch.nan)
    assert torch.equal(linear_imputation(images, known), linear_imputation(hidden, known))


def test_it_commutes_with_any_affine_change_of_colours() -> None:
    images = torch.randn(1, 3, 12, 12, generator=generator(0), dtype=torch.float64)
    known = scattered(12, 12, 0.7, 1)[None]
    changed = linear_imputation(images * 0.2 + 0.4, known)
    torch.testing.assert_close(changed, linear_imputation(images, known) * 0.2 + 0.4)
