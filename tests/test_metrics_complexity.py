"""Laws of the metrics of complexity, and of the facts about maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xbench import registry
from xbench.errors import UsageError
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import check_metric
from xbench.types import Batch, Model

NAN = float("nan")
COMPLEXITY = ("sparseness", "entropy", "effective_complexity")
FACTS = ("degenerate_maps", "tied_pixels", "mean_mass")
METRICS = (*COMPLEXITY, *FACTS)


def outcomes(name: str, maps: Any, rows: int | None = None, **params: Any) -> list[Any]:
    """Without masks, on a network that is never asked."""
    maps = torch.as_tensor(maps, dtype=torch.float64)
    images = torch.zeros(len(maps), 3, *maps.shape[1:])
    batch = Batch(images, torch.zeros(len(maps)), tuple(map(str, range(len(maps)))))
    probe = Probe(Model("any", torch.nn.Identity()), batch, rows=rows)
    filled = torch.cat((maps, maps[-1:].expand(probe.rows - len(maps), -1, -1)))
    found = evaluated(registry.make("metrics", name, params), Explanation(probe, filled))
    assert probe.spent == (0, 0)
    return found


def score(name: str, *values: float, **params: Any) -> float:
    """Of one map, a line of pixels."""
    ((found, _),) = outcomes(name, [[values]], **params)
    return found  # type: ignore[no-any-return]


# --- laws of all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_they_declare_family_and_direction(name: str) -> None:
    metric = registry.make("metrics", name)
    better = {"sparseness": "higher", "entropy": "lower", "effective_complexity": "lower"}
    assert metric.better == better.get(name, "neither")
    assert metric.family == ("complexity" if name in COMPLEXITY else "diagnostics")


@pytest.mark.parametrize("name", METRICS)
@given(
    values=st.lists(st.integers(-3, 3), min_size=4, max_size=4),
    beside=st.lists(st.integers(-300, 300), min_size=4, max_size=4),
)
@settings(max_examples=20, deadline=None)
def test_a_score_does_not_depend_on_the_other_images(
    name: str, values: list[int], beside: list[int]
) -> None:
    (alone,) = outcomes(name, [[values]])
    assert outcomes(name, [[values], [beside]])[0] == alone
    assert outcomes(name, [[beside], [values]], rows=3)[1] == alone


def test_a_map_beside_a_larger_one_has_the_effective_complexity_that_it_has_alone() -> None:
    """Quantus 0.6 divides by the maximum of the batch: 254 alone, 0 beside larger maps."""
    small = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    small[0, 0, :2] = 0
    assert outcomes("effective_complexity", small) == [(254, "ok")]
    assert outcomes("effective_complexity", torch.cat((small, 1e9 * small))) == [(254, "ok")] * 2


@pytest.mark.parametrize("name", [*COMPLEXITY, "mean_mass"])
def test_the_default_reads_the_magnitude(name: str) -> None:
    assert score(name, -4, 2, 1, 0, -1) == score(name, 4, 2, 1, 0, 1)
    assert score(name, -4, 2, 1, 0, -1, sign="positive") == score(name, 0, 2, 1, 0, 0)


@pytest.mark.parametrize("name", COMPLEXITY)
def test_there_is_no_signed_mass(name: str) -> None:
    with pytest.raises(UsageError, match="sign = 'signed'"):
        registry.make("metrics", name, {"sign": "signed"})


@pytest.mark.parametrize("name", METRICS)
def test_a_map_times_a_constant_has_the_same_score(name: str) -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert score(name, *values) == score(name, *(1024 * value for value in values))


@pytest.mark.parametrize("name", METRICS)
def test_where_the_pixels_are_does_not_matter(name: str) -> None:
    values = [3, 1, 4, 1, 5, 9, 2, 6]
    assert score(name, *values) == pytest.approx(score(name, *reversed(values)), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "of_zeros", "of_ones"),
    [
        ("sparseness", 0, 0),
        ("entropy", math.log(6), math.log(6)),
        ("effective_complexity", 0, 6),
        ("degenerate_maps", 1, 1),
        ("tied_pixels", 1, 1),
        ("mean_mass", 0, 0),
    ],
)
def test_constant_maps_have_documented_values(name: str, of_zeros: float, of_ones: float) -> None:
    for fill, value in ((0, of_zeros), (1, of_ones), (-1, of_ones)):
        found = outcomes(name, torch.full((1, 2, 3), fill))
        assert found == [(pytest.approx(value, abs=1e-15), "degenerate")]


@pytest.mark.parametrize("name", METRICS)
def test_a_map_with_nan_is_counted_and_not_scored(name: str) -> None:
    good = [[3.0, 1.0, 0.0]]
    found = outcomes(name, [[[NAN, 1.0, 0.0]], good])
    assert found[0][1] == "failed: nonfinite"
    assert found[1:] == outcomes(name, [good])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (512, 512)])
def test_images_of_any_size_have_a_score(name: str, size: tuple[int, int]) -> None:
    maps = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    ((value, status),) = outcomes(name, maps)
    low, high = registry.make("metrics", name).range
    assert low <= value <= high
    assert status == ("degenerate" if size == (1, 1) else "ok")


@pytest.mark.parametrize("name", METRICS)
def test_the_place_in_the_batch_changes_no_bit(name: str) -> None:
    maps = torch.rand(7, 9, 11, generator=torch.Generator().manual_seed(1))
    turned = [3, 6, 0, 5, 1, 4, 2]
    found = outcomes(name, maps)
    assert outcomes(name, maps[turned]) == [found[at] for at in turned]


def test_the_preset_keeps_the_contract() -> None:
    check_metric("entropy", {"preset": "gag-2024"})


# --- by hand --------------------------------------------------------------------------------------


def test_the_gini_index_is_known_by_hand() -> None:
    """Four values 1, 2, 3, 4: (-3 - 2 + 3 + 12) / (4 * 10)."""
    assert score("sparseness", 0, 0, 0, 5) == 3 / 4
    assert score("sparseness", 0, 0, 5, 5) == 2 / 4
    assert score("sparseness", 4, 1, 3, 2) == pytest.approx(10 / 40)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any))
@settings(max_examples=40, deadline=None)
def test_the_gini_index_is_half_the_relative_mean_difference(values: list[int]) -> None:
    pairs = np.abs(np.subtract.outer(values, values)).mean()
    assert score("sparseness", *values) == pytest.approx(pairs / np.mean(values) / 2, abs=1e-12)


def test_the_entropy_of_mass_is_known_by_hand() -> None:
    assert score("entropy", 0, 7, 0) == 0
    assert score("entropy", 5, 5, 0, 0) == pytest.approx(math.log(2))
    assert score("entropy", 1, 1, 2, unit="bit") == pytest.approx(1.5)


def test_the_entropy_of_the_histogram_counts_grey_levels() -> None:
    assert score("entropy", 0, 9, 0, 9, preset="gag-2024") == 1
    assert score("entropy", 0, 1, 2, 3, preset="gag-2024") == 2
    assert score("entropy", 2, 2, 2, preset="gag-2024") == 0
    # the least and the next value are within one of 256 bins
    assert score("entropy", 0, 1, 512, 512, over="histogram") == pytest.approx(math.log(2))
    assert score("entropy", 0, 3, 512, 512, over="histogram") > math.log(2)


def test_the_entropy_of_the_histogram_never_exceeds_its_bins() -> None:
    maps = torch.rand(1, 200, 200, generator=torch.Generator().manual_seed(0))
    ((bits, _),) = outcomes("entropy", maps, preset="gag-2024")
    assert 7.9 < bits <= 8


def test_effective_complexity_counts_pixels_above_a_share_of_the_maximum() -> None:
    assert score("effective_complexity", 1e5, 2, 1, 0.5, 0) == 2  # the threshold itself is out
    assert score("effective_complexity", 10, 6, 5, 4, eps=0.5) == 2
    assert score("effective_complexity", 10, 1e-9, 0, eps=0.0) == 2


def test_pixels_are_tied_whose_value_another_has() -> None:
    assert score("tied_pixels", 1, 2, 1, 3) == 0.5
    assert score("tied_pixels", 1, 2, 4, 3) == 0
    assert score("tied_pixels", 2, 2, 2, 3, 3, 0) == pytest.approx(5 / 6)
    assert score("tied_pixels", 1) == 0
    assert score("tied_pixels", 1, -1, 0.0, -0.0) == 0.5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_ties_are_counted_as_by_a_dictionary(values: list[int]) -> None:
    shared = sum(values.count(value) > 1 for value in values)
    assert score("tied_pixels", *values) == pytest.approx(shared / len(values))


def test_a_map_is_degenerate_where_all_its_values_are_equal_as_they_are() -> None:
    assert outcomes("degenerate_maps", [[[2, 2]], [[2, -2]], [[0, 0]]]) == [
        (1, "degenerate"), (0, "ok"), (1, "degenerate"),
    ]  # fmt: skip


def test_mean_mass_is_that_of_the_scaled_map() -> None:
    maps: Tensor = torch.tensor([[[1.0, 2.0, 3.0, 5.0]]])
    assert outcomes("mean_mass", maps) == [(pytest.approx((1 + 2 + 4) / 16), "ok")]
    assert score("mean_mass", -1, 0, 1, sign="signed") == 0.5
