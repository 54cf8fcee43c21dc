"""Laws of the metrics against object masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import LinearNetwork
from xbench.types import Batch, Model

NAN = float("nan")
METRICS = ("mae", "log_cosh_dice")


def outcomes(
    name: str, maps: Any, masks: Any, rows: int | None = None, **params: Any
) -> list[tuple[float, str]]:
    """On a network that does not matter."""
    maps = torch.as_tensor(maps, dtype=torch.float64)
    count, height, width = maps.shape
    given = None if masks is None else torch.as_tensor(masks, dtype=torch.float64)
    keys = tuple(map(str, range(count)))
    images = torch.rand(count, 3, height, width, dtype=torch.float64)
    model = Model("any", LinearNetwork(torch.rand(2, 3 * height * width).double()))
    with prepared(model.net) as meter:
        probe = Probe(model, Batch(images, torch.zeros(count), keys, given), rows=rows, meter=meter)
        filled = torch.cat((maps, maps[-1:].expand(probe.rows - count, -1, -1)))
        found = evaluated(registry.make("metrics", name, params), Explanation(probe, filled))
        assert probe.spent == (0, 0)
        return found


def score(name: str, maps: Any, masks: Any, **params: Any) -> list[float]:
    return [value for value, _ in outcomes(name, maps, masks, **params)]


MASK = [[[1, 1, 0], [0, 0, 0]]]
MAP = [[[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]]


def log_cosh_dice(overlap: float, saliency: float, mask: float) -> float:
    return math.log(math.cosh(1 - (2 * overlap + 1) / (saliency + mask + 1)))


def test_a_perfect_map_has_no_error() -> None:
    assert score("mae", MASK, MASK) == [0]
    assert score("log_cosh_dice", MASK, MASK) == [0]


def test_errors_of_six_pixels_are_known_by_hand() -> None:
    assert score("mae", MAP, MASK) == [pytest.approx(0.75 / 6)]
    assert score("log_cosh_dice", MAP, MASK) == [pytest.approx(log_cosh_dice(1.5, 1.75, 2))]


def test_the_inverted_map_has_all_the_error() -> None:
    inverted = [[[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]]
    assert score("mae", inverted, MASK) == [1]
    assert score("log_cosh_dice", inverted, MASK) == [pytest.approx(log_cosh_dice(0, 4, 2))]


def test_pixels_without_a_label_are_left_out() -> None:
    ignored = [[[1, NAN, 0], [0, 0, NAN]]]
    assert score("mae", MAP, ignored) == [pytest.approx(0.25 / 4)]
    assert score("log_cosh_dice", MAP, ignored) == [pytest.approx(log_cosh_dice(1, 1.25, 1))]


@pytest.mark.parametrize("name", METRICS)
def test_what_the_map_says_of_a_pixel_without_a_label_does_not_matter(name: str) -> None:
    ignored = [[[1, 0, 0], [0, 0, NAN]]]
    other = [[[1.0, 0.5, 0.25], [0.0, 0.0, 0.9]]]
    assert score(name, MAP, ignored) == score(name, other, ignored)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 0], [0, 0, 0]],
        [[1, 1, 1], [1, 1, 1]],
        [[NAN, 0, 0], [0, 0, NAN]],
        [[1, 1, NAN], [NAN, 1, 1]],
        [[NAN, NAN, NAN], [NAN, NAN, NAN]],
    ],
    ids=["empty", "full", "empty but for unknown", "full but for unknown", "unknown"],
)
def test_a_mask_without_object_or_without_rest_fails_its_own_image_alone(
    name: str, mask: list[list[float]]
) -> None:
    found = outcomes(name, MAP * 2, [mask, MASK[0]])
    assert math.isnan(found[0][0])
    assert found[0][1] == "failed: mask"
    assert found[1] == outcomes(name, MAP, MASK)[0]
    assert found[1][1] == "ok"


@pytest.mark.parametrize("name", METRICS)
def test_without_masks_the_metric_is_unsupported(name: str) -> None:
    with pytest.raises(Unsupported, match="the data set has no object masks"):
        outcomes(name, MAP, None)


@pytest.mark.parametrize("name", METRICS)
def test_they_declare_that_they_need_masks_and_that_less_is_better(name: str) -> None:
    metric = registry.make("metrics", name)
    assert metric.needs_masks
    assert metric.better == "lower"
    assert metric.family == "localisation"


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
def test_the_map_is_read_by_its_rule_and_scaled(name: str, sign: str) -> None:
    signed = torch.tensor([[[-4.0, 2.0, 1.0], [0.0, 0.0, -1.0]]])
    read = {
        "magnitude": [[[1.0, 0.5, 0.25], [0.0, 0.0, 0.25]]],
        "positive": [[[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]],
        "signed": [[[0.0, 1.0, 5 / 6], [4 / 6, 4 / 6, 0.5]]],
    }[sign]
    found = score(name, signed, MASK, sign=sign)
    assert found == [pytest.approx(score(name, read, MASK, sign="signed")[0])]


@pytest.mark.parametrize("name", METRICS)
def test_a_constant_map_is_scored_as_zeros(name: str) -> None:
    found = outcomes(name, torch.full((1, 2, 3), 0.7), MASK)
    assert found == [(pytest.approx(score(name, torch.zeros(1, 2, 3), MASK)[0]), "degenerate")]


@given(st.integers(0, 10_000), st.integers(1, 24))
@settings(max_examples=25, deadline=None)
def test_scores_lie_in_their_range_for_any_map_and_mask(seed: int, ones: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(1, 25).index_fill(1, torch.randperm(25, generator=generator)[:ones], 1)
    maps: Tensor = torch.randn(1, 5, 5, generator=generator)
    for name in METRICS:
        low, high = registry.make("metrics", name).range
        (value,) = score(name, maps, masks.view(1, 5, 5))
        assert low <= value <= high


@pytest.mark.parametrize("name", METRICS)
def test_the_filling_of_a_batch_changes_nothing(name: str) -> None:
    assert outcomes(name, MAP, MASK, rows=5) == outcomes(name, MAP, MASK)
