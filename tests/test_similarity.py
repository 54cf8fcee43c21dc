"""Laws of the similarities of two maps, and SciPy's and scikit-image's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from skimage import metrics as skimage
from torch import Tensor

from xbench.similarity import SIMILARITIES, similarities, spearman, ssim, ssim_second_moment

SIDES = st.tuples(st.integers(1, 14), st.integers(1, 14))


def maps(sides: tuple[int, int], seed: int = 0, levels: int = 0) -> Tensor:
    noise = torch.randn(3, *sides, generator=torch.Generator().manual_seed(seed)).double()
    return (levels * noise).round() if levels else noise


@settings(max_examples=30, deadline=None)
@given(SIDES, st.integers(0, 99), st.sampled_from([0, 1, 3]))
def test_spearman_is_scipys_with_ties_averaged(sides, seed: int, levels: int) -> None:
    one, other = maps(sides, seed, levels), maps(sides, seed + 100, levels)
    for found, a, b in zip(spearman(one, other).tolist(), one, other, strict=True):
        if a.min() < a.max() and b.min() < b.max():
            assert found == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-9)
        else:
            assert found == (a.min() == a.max() and b.min() == b.max())


@pytest.mark.parametrize("sides", [(11, 11), (12, 30), (40, 17)])
def test_ssim_is_scikit_images_with_the_published_window(sides: tuple[int, int]) -> None:
    one, other = maps(sides), maps(sides, 1) + 0.7 * maps(sides)
    options = {"gaussian_weights": True, "use_sample_covariance": False}
    for found, found_moment, a, b in zip(
        ssim(one, other).tolist(),
        ssim_second_moment(one, other).tolist(),
        one.numpy(),
        other.numpy(),
        strict=True,
    ):
        ranged = [(x - x.min()) / (x.max() - x.min()) for x in (a, b)]
        expected = skimage.structural_similarity(*ranged, data_range=1, **options)
        assert found == pytest.approx(expected, abs=1e-12)
        a, b = (x / np.sqrt((x**2).mean()) for x in (a, b))
        span = max(a.max(), b.max()) - min(a.min(), b.min())
        expected = skimage.structural_similarity(a, b, data_range=span, **options)
        assert found_moment == pytest.approx(expected, abs=1e-12)


def test_ssim_of_an_image_smaller_than_the_window_is_one_window_by_hand() -> None:
    one, other = (torch.tensor(each).double().view(1, 1, 2) for each in ([0, 1], [1, 0]))
    mean, variance, covariance = 0.5, 0.25, -0.25
    light, contrast = 0.01**2, 0.03**2
    expected = (2 * mean * mean + light) * (2 * covariance + contrast)
    expected /= (2 * mean * mean + light) * (2 * variance + contrast)
    assert float(ssim(one, other)) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(SIDES, st.integers(0, 99), st.sampled_from([1e-30, 0.3, 1e30]))
def test_no_similarity_depends_on_the_scale_of_a_map(sides, seed: int, scale: float) -> None:
    one, other = maps(sides, seed), maps(sides, seed + 100)
    assert torch.allclose(
        similarities(one, other), similarities(scale * one, other), rtol=0, atol=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(SIDES, st.integers(0, 99))
def test_similarities_are_symmetric_bounded_and_1_for_equal_maps(sides, seed: int) -> None:
    one, other = maps(sides, seed), maps(sides, seed + 100, 1)
    found = similarities(one, other)
    assert torch.allclose(found, similarities(other, one), rtol=0, atol=1e-12)
    assert found.abs().max() <= 1
    assert torch.allclose(similarities(one, one), torch.ones(3, 3).double(), rtol=0, atol=1e-12)


def test_constant_maps_have_documented_similarities() -> None:
    ramp = torch.arange(16).double().view(1, 4, 4)
    zeros, ones = torch.zeros_like(ramp), torch.ones_like(ramp)
    assert spearman(ramp, ones).tolist() == [0]
    assert similarities(zeros, zeros).tolist() == [[1, 1, 1]]
    assert spearman(ones, zeros).tolist() == ssim(ones, zeros).tolist() == [1]
    beside = similarities(ramp, zeros)
    assert beside.isfinite().all()
    assert beside.max() < 0.01


def test_ssim_finds_sparse_maps_alike_that_share_no_pixel() -> None:
    """Why it is not the default."""
    one, other = torch.zeros(2, 1, 64, 64).double().unbind(0)
    one[0, 10, 10] = other[0, 50, 50] = 1
    found = dict(zip(SIMILARITIES, similarities(one, other)[0].tolist(), strict=True))
    assert found["ssim"] > 0.9
    assert abs(found["spearman"]) < 0.01
