"""Laws of what is done to any map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xbench.maps import (
    all_finite,
    ascending,
    channel_sum,
    is_constant,
    levelled,
    quantile,
    ranks,
    stable_argsort,
    unit_range,
    upsample,
    weighted_sum,
    with_sign,
)

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.randn(5, 6, 7, generator=GENERATOR, dtype=torch.float64)
CONSTANTS = torch.tensor([0.0, 1.0, -2.5])[:, None, None].expand(3, 4, 4)


def permutations(count: int, pixels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(pixels, generator=generator) for _ in range(count)])


def test_unit_range_reaches_zero_and_one_exactly() -> None:
    scaled = unit_range(MAPS).flatten(1)
    assert torch.equal(scaled.amin(1), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(scaled.amax(1), torch.ones(5, dtype=torch.float64))


def test_unit_range_is_the_affine_map() -> None:
    for raw, scaled in zip(MAPS, unit_range(MAPS), strict=True):
        torch.testing.assert_close(scaled, (raw - raw.min()) / (raw.max() - raw.min()))


def test_unit_range_of_a_constant_map_is_zeros_whatever_its_neighbours() -> None:
    assert not unit_range(CONSTANTS).any()
    mixed = torch.cat((CONSTANTS[:1].double(), MAPS[:1, :4, :4]))
    assert not unit_range(mixed)[0].any()
    assert torch.equal(unit_range(mixed)[1], unit_range(MAPS[:1, :4, :4])[0])


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_unit_range_does_not_notice_the_scale(scale: float) -> None:
    torch.testing.assert_close(unit_range(MAPS * scale), unit_range(MAPS))


def test_an_epsilon_shrinks_the_unit_range_by_its_share() -> None:
    for raw, scaled in zip(MAPS, unit_range(MAPS, 0.5), strict=True):
        torch.testing.assert_close(scaled, (raw - raw.min()) / (raw.max() - raw.min() + 0.5))
    assert not unit_range(CONSTANTS, 0.5).any()


def test_a_map_with_nan_has_no_unit_range_and_its_neighbours_keep_theirs() -> None:
    broken = MAPS.clone()
    broken[1, 2, 3] = torch.nan
    assert unit_range(broken)[1].isnan().all()
    assert torch.equal(unit_range(broken)[2:], unit_range(MAPS)[2:])


def test_unit_range_of_binary_maps_is_themselves() -> None:
    binary = (MAPS > 0).double()
    assert torch.equal(unit_range(binary), binary)


def test_a_map_is_constant_when_all_its_pixels_are_equal() -> None:
    assert is_constant(CONSTANTS).all()
    assert not is_constant(MAPS).any()
    nearly = CONSTANTS.clone()
    nearly[:, 2, 3] += 1e-6
    assert not is_constant(nearly).any()


def test_signs_read_magnitude_positive_part_or_all() -> None:
    raw = torch.tensor([[[-2.0, 0.0, 3.0]]])
    assert with_sign(raw, "magnitude").tolist() == [[[2, 0, 3]]]
    assert with_sign(raw, "positive").tolist() == [[[0, 0, 3]]]
    assert with_sign(raw, "signed").tolist() == [[[-2, 0, 3]]]


def test_channels_are_added_as_absolutes() -> None:
    signed = torch.tensor([[[[1.0]], [[-2.0]], [[4.0]]]])
    assert channel_sum(signed).tolist() == [[[7]]]


def test_feature_maps_are_added_with_their_weights() -> None:
    weight = torch.tensor([[2.0, -1.0]])
    activation = torch.tensor([[[[1.0, 2.0]], [[10.0, 20.0]]]])
    assert weighted_sum(weight, activation).tolist() == [[[-8, -16]]]


@pytest.mark.parametrize("side", [1, 3, 7, 8, 14])
def test_a_sum_of_constant_feature_maps_is_exactly_constant(side: int) -> None:
    weight = torch.randn(3, 512, generator=GENERATOR)
    one = torch.rand(3, 512, 1, 1, generator=GENERATOR)
    total = weighted_sum(weight, one.expand(-1, -1, side, side).contiguous())
    assert is_constant(total).all()
    torch.testing.assert_close(total[:, 0, 0], (weight * one[:, :, 0, 0]).sum(1))


def test_other_sums_are_left_as_they_are() -> None:
    features = torch.rand(4, 5, 3, 3, generator=GENERATOR)
    features[0] = features[0, :, :1, :1]  # constant
    features[1, :4] = 2  # constant but for the last channel
    features[2] = torch.nan
    total = torch.rand(4, 3, 3, generator=GENERATOR)
    found = levelled(total, features)
    assert torch.equal(found[1:], total[1:])
    assert (found[0] == total[0, 0, 0]).all()


@pytest.mark.parametrize("side", [1, 3, 4])
def test_upsampling_a_constant_is_the_constant(side: int) -> None:
    constants = torch.rand(64, 1, 1, generator=GENERATOR).expand(64, side, side)
    large = upsample(constants, torch.empty(64, 3, 32, 13))
    assert torch.equal(large, constants[:, :1, :1].expand(64, 32, 13))


def test_upsampling_interpolates_between_pixel_centres() -> None:
    row = torch.tensor([[[0.0, 4.0]]])
    # centres of 4 output pixels lie at -0.25, 0.25, 0.75, 1.25 of the input's: the ends are held
    assert upsample(row, torch.empty(1, 3, 1, 4)).tolist() == [[[0, 1, 3, 4]]]


@pytest.mark.parametrize("percentile", [0, 1, 15, 33.3, 50, 85, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 1001])
def test_quantile_is_numpys_linear_percentile(percentile: float, count: int) -> None:
    values = torch.randn(3, 2, count, generator=GENERATOR, dtype=torch.float64)
    found = quantile(values, percentile / 100)
    expected = np.percentile(values.numpy(), percentile, axis=-1)
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-13)


def test_ranks_run_from_the_most_salient() -> None:
    maps = torch.tensor([[[0.1, 0.9], [0.5, -1.0]]])
    assert ranks(maps, permutations(1, 4)).tolist() == [[[2, 0], [1, 3]]]


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_ranks_are_a_permutation_that_sorts_the_map(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(levels, (2, 4, 5), generator=generator).double()
    place = ranks(maps, permutations(2, 20, seed)).flatten(1)
    assert torch.equal(place.sort(1).values, torch.arange(20).expand(2, 20))
    ordered = torch.empty_like(maps.flatten(1)).scatter(1, place, maps.flatten(1))
    assert (ordered.diff(dim=1) <= 0).all()


def test_ties_are_broken_by_the_permutation() -> None:
    order = permutations(3, 16)
    place = ranks(CONSTANTS, order).flatten(1)
    assert torch.equal(place.gather(1, order), torch.arange(16).expand(3, 16))


def test_ranks_without_ties_do_not_depend_on_the_permutation() -> None:
    one, other = permutations(5, 42, seed=1), permutations(5, 42, seed=2)
    assert torch.equal(ranks(MAPS, one), ranks(MAPS, other))


def test_ranks_of_the_negated_map_are_reversed_without_ties() -> None:
    order = permutations(5, 42)
    assert torch.equal(ranks(-MAPS, order), 41 - ranks(MAPS, order))


# --- sorting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [0, 2, 5])
def test_a_stable_argsort_is_torchs(levels: int, dtype: torch.dtype, descending: bool) -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(levels)).to(dtype)
    values = values if levels == 0 else (values * levels).round() / levels
    values[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    values[1, 7] = torch.finfo(dtype).tiny / 2
    expected = values.argsort(dim=1, descending=descending, stable=True)
    assert torch.equal(stable_argsort(values, descending), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ascending_values_are_torchs(dtype: torch.dtype) -> None:
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(ascending(values), values.sort(dim=1).values)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_marks_its_own_image_alone(wrong: float) -> None:
    images = torch.full((3, 2, 4, 4), -1e38)
    images[1, 1, 2, 3] = wrong
    assert all_finite(images).tolist() == [True, False, True]
