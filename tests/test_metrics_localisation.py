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
from xbench.errors import Unsupported, UsageError
from xbench.maps import with_sign
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import LinearNetwork, check_metric
from xbench.types import Batch, Model

NAN = float("nan")
SCALED = ("mae", "mae_sqrt", "log_cosh_dice", "soft_iou")
"""Value by value, the map in [0, 1]."""
ORDERED = ("best_iou", "pixel_ap", "pixel_auroc", "pointing_game", "relevance_rank")
"""By the order of the pixels alone."""
MASS = ("energy_pointing_game", "relevance_mass")
METRICS = (*SCALED, *ORDERED, *MASS, "max_box_acc")
LESS_IS_BETTER = ("mae", "mae_sqrt", "log_cosh_dice")


def outcomes(
    name: str, maps: Any, masks: Any, rows: int | None = None, seed: int = 0, **params: Any
) -> list[tuple[float, str]]:
    """On a network that does not matter."""
    maps = torch.as_tensor(maps, dtype=torch.float64)
    count, height, width = maps.shape
    given = None if masks is None else torch.as_tensor(masks, dtype=torch.float64)
    keys = tuple(map(str, range(count)))
    images = torch.rand(count, 3, height, width, dtype=torch.float64)
    model = Model("any", LinearNetwork(torch.rand(2, 3 * height * width).double()))
    with prepared(model.net) as meter:
        batch = Batch(images, torch.zeros(count), keys, given)
        probe = Probe(model, batch, rows=rows, meter=meter, seed=seed)
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


# --- laws of all ----------------------------------------------------------------------------------


def test_the_laws_hold_for_the_whole_family() -> None:
    family = [
        name
        for name, entry in registry.entries("metrics").items()
        if not entry.summary and getattr(entry.load(), "family", "") == "localisation"
    ]
    assert sorted(family) == sorted(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_the_mask_itself_is_a_perfect_map(name: str) -> None:
    assert score(name, MASK, MASK) == [0.0 if name in LESS_IS_BETTER else 1.0]


@pytest.mark.parametrize("name", METRICS)
def test_the_inverted_mask_is_the_worst_map(name: str) -> None:
    worst = {
        "mae": 1.0,
        "mae_sqrt": 1.0,
        "log_cosh_dice": pytest.approx(log_cosh_dice(0, 4, 2)),
        "best_iou": 1 / 3,  # of all pixels
        "pixel_ap": 1 / 3,
    }.get(name, 0.0)
    assert score(name, [[[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]], MASK) == [worst]


@pytest.mark.parametrize("name", METRICS)
def test_what_the_map_says_of_a_pixel_without_a_label_does_not_matter(name: str) -> None:
    ignored = [[[1, 0, 0], [0, 0, NAN]]]
    other = [[[1.0, 0.5, 0.25], [0.0, 0.0, 0.9]]]
    assert score(name, MAP, ignored) == score(name, other, ignored)


@pytest.mark.parametrize("name", ORDERED)
def test_a_pixel_without_a_label_counts_neither_where_it_is_the_maximum(name: str) -> None:
    ignored = [[[1, 1, 0], [0, 0, NAN]]]
    assert score(name, [[[0.9, 0.8, 0.2], [0.0, 0.1, 1.0]]], ignored) == [1]


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
def test_they_declare_that_they_need_masks_and_what_is_better(name: str) -> None:
    metric = registry.make("metrics", name)
    assert metric.needs_masks
    assert metric.better == ("lower" if name in LESS_IS_BETTER else "higher")
    assert metric.family == "localisation"


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
def test_the_map_is_read_by_its_sign_rule(name: str, sign: str) -> None:
    signed = torch.tensor([[[-4.0, 2.0, 1.0], [0.0, 0.0, -1.0]]])
    if sign == "signed" and name in MASS:
        with pytest.raises(UsageError, match="sign = 'signed'"):
            registry.make("metrics", name, {"sign": sign})
        return
    read = with_sign(signed, sign)  # type: ignore[arg-type]
    alone = "positive" if name in MASS else "signed"
    assert score(name, signed, MASK, sign=sign) == score(name, read, MASK, sign=alone)


@pytest.mark.parametrize("name", METRICS)
def test_a_map_times_a_constant_has_the_same_score(name: str) -> None:
    maps = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    masks = torch.zeros(4, 5, 5).double()
    masks[:, 1:3, 1:4] = 1
    assert score(name, 1024 * maps, masks) == score(name, maps, masks)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_a_constant_map_has_a_score_and_is_counted_as_degenerate(name: str, value: float) -> None:
    ((found, status),) = outcomes(name, torch.full((1, 2, 3), value), MASK)
    assert status == "degenerate"
    documented = {
        "soft_iou": 0.0,
        "best_iou": 1 / 3,
        "pixel_ap": 1 / 3,
        "pixel_auroc": 0.5,
        "energy_pointing_game": 1 / 3 if value > 0 else 0.0,
        "relevance_mass": 1 / 3 if value else 0.0,
        "max_box_acc": 0.0,
        "mae": 1 / 3,
        "mae_sqrt": math.sqrt(1 / 3),
        "log_cosh_dice": log_cosh_dice(0, 0, 2),
    }
    if name in documented:
        assert found == pytest.approx(documented[name], abs=1e-15)
    else:  # a ranking by the permutation
        assert found in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("name", METRICS)
def test_a_map_with_nan_is_counted_and_not_scored(name: str) -> None:
    broken = [[[NAN, 0.5, 0.25], [0.0, 0.0, 0.0]]]
    found = outcomes(name, broken + MAP, MASK * 2)
    assert found[0][1] == "failed: nonfinite"
    assert found[1] == outcomes(name, MAP, MASK)[0]


@given(st.integers(0, 10_000), st.integers(1, 24), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_scores_lie_in_their_range_for_any_map_and_mask(seed: int, ones: int, grid: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(1, 25).index_fill(1, torch.randperm(25, generator=generator)[:ones], 1)
    maps: Tensor = torch.randn(1, 5, 5, generator=generator)
    maps = (maps * grid).round() if grid else maps  # many ties, or none
    for name in METRICS:
        low, high = registry.make("metrics", name).range
        (value,) = score(name, maps, masks.view(1, 5, 5))
        assert low <= value <= high


@pytest.mark.parametrize("name", METRICS)
def test_the_filling_of_a_batch_changes_nothing(name: str) -> None:
    assert outcomes(name, MAP, MASK, rows=5) == outcomes(name, MAP, MASK)


@pytest.mark.parametrize("name", METRICS)
def test_the_place_in_the_batch_changes_no_bit(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(7, 9, 11, generator=generator)
    masks = (torch.rand(7, 9, 11, generator=generator) > 0.7).float()
    metric = registry.make("metrics", name)
    model = Model("any", torch.nn.Identity())

    def values(order: list[int]) -> Tensor:
        images = torch.zeros(7, 3, 9, 11)
        batch = Batch(images, torch.zeros(7), tuple(str(at) for at in order), masks[order])
        return metric(Explanation(Probe(model, batch), maps[order]))

    turned = [3, 6, 0, 5, 1, 4, 2]
    assert torch.equal(values(list(range(7)))[turned], values(turned))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (512, 512)])
def test_images_of_any_size_have_a_status(name: str, size: tuple[int, int]) -> None:
    maps = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, *size)
    masks[:, 0, 0] = 1
    params = {"steps": 3} if name == "max_box_acc" else {}
    ((value, status),) = outcomes(name, maps, masks, **params)
    assert status == ("failed: mask" if size == (1, 1) else "ok")
    assert math.isnan(value) == (size == (1, 1))


@pytest.mark.parametrize("name", ORDERED)
def test_only_the_order_of_the_pixels_counts(name: str) -> None:
    maps = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(3)).double()
    masks = torch.zeros(6, 5, 5).double()
    masks[:, 1:4, 2:4] = 1
    assert score(name, maps.exp() - 7, masks) == score(name, maps, masks)


@pytest.mark.parametrize(
    ("name", "preset"), [("pointing_game", "gag-2024"), ("energy_pointing_game", "scorecam-2020")]
)
def test_presets_keep_the_contract(name: str, preset: str) -> None:
    check_metric(name, {"preset": preset})


# --- value by value -------------------------------------------------------------------------------


def test_errors_of_six_pixels_are_known_by_hand() -> None:
    assert score("mae", MAP, MASK) == [pytest.approx(0.75 / 6)]
    assert score("log_cosh_dice", MAP, MASK) == [pytest.approx(log_cosh_dice(1.5, 1.75, 2))]
    assert score("soft_iou", MAP, MASK) == [pytest.approx(1.5 / 2.25)]


def test_pixels_without_a_label_are_left_out() -> None:
    ignored = [[[1, NAN, 0], [0, 0, NAN]]]
    assert score("mae", MAP, ignored) == [pytest.approx(0.25 / 4)]
    assert score("log_cosh_dice", MAP, ignored) == [pytest.approx(log_cosh_dice(1, 1.25, 1))]
    assert score("soft_iou", MAP, ignored) == [pytest.approx(1 / 1.25)]


def test_mae_is_a_mean_absolute_error_and_the_published_number_its_root_per_image() -> None:
    """Guided AbsoluteGrad's code prints the root under the name of the error."""
    maps, masks = [MAP[0], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]], MASK * 2
    errors = [0.75 / 6, 2 / 6]
    assert score("mae", maps, masks) == [pytest.approx(error) for error in errors]
    assert score("mae_sqrt", maps, masks) == [pytest.approx(math.sqrt(e)) for e in errors]


# --- every threshold at once ----------------------------------------------------------------------

FOUR = [[[0.9, 0.8, 0.7, 0.1]]]
TWO_OF_FOUR = [[[1, 0, 1, 0]]]


def test_thresholds_of_four_pixels_are_known_by_hand() -> None:
    """Sets of 1, 2, 3 and 4 pixels have IoU 1/2, 1/3, 2/3, 2/4; precision 1 and 2/3 where found."""
    assert score("best_iou", FOUR, TWO_OF_FOUR) == [pytest.approx(2 / 3)]
    assert score("pixel_ap", FOUR, TWO_OF_FOUR) == [pytest.approx((1 + 2 / 3) / 2)]
    assert score("pixel_auroc", FOUR, TWO_OF_FOUR) == [pytest.approx(3 / 4)]


def test_equal_pixels_come_at_one_threshold() -> None:
    tied = [[[0.9, 0.5, 0.5, 0.1]]]
    assert score("best_iou", tied, TWO_OF_FOUR) == [pytest.approx(2 / 3)]
    assert score("pixel_ap", tied, TWO_OF_FOUR) == [pytest.approx((1 + 2 / 3) / 2)]
    assert score("pixel_auroc", tied, TWO_OF_FOUR) == [pytest.approx((2 + 1.5) / 4)]


@pytest.mark.parametrize("name", ["best_iou", "pixel_ap", "pixel_auroc"])
@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
def test_the_order_of_equal_pixels_in_the_image_does_not_matter(name: str, sign: str) -> None:
    generator = torch.Generator().manual_seed(5)
    maps = torch.randint(-2, 3, (1, 6, 6), generator=generator).double()
    masks = (torch.rand(1, 6, 6, generator=generator) > 0.6).double()
    turned = score(name, maps.flip(1, 2), masks.flip(1, 2), sign=sign)
    assert turned == pytest.approx(score(name, maps, masks, sign=sign), rel=1e-12)  # sums


@given(
    values=st.lists(st.integers(-2, 3), min_size=6, max_size=6),
    marks=st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_the_best_iou_is_the_largest_of_all_thresholds(
    values: list[int], marks: list[float]
) -> None:
    known = [(v, m) for v, m in zip(values, marks, strict=True) if not math.isnan(m)]
    ((found, status),) = outcomes("best_iou", [[values]], [[marks]])
    if len({mark for _, mark in known}) < 2:
        assert status == "failed: mask"
        return
    tried = []
    for threshold in values:
        chosen = [value >= threshold for value, _ in known]
        either = sum(c or m == 1 for c, (_, m) in zip(chosen, known, strict=True))
        both = sum(c and m == 1 for c, (_, m) in zip(chosen, known, strict=True))
        tried.append(both / either)
    assert found == pytest.approx(max(tried))


def test_the_negated_map_has_the_complement_of_the_auroc() -> None:
    generator = torch.Generator().manual_seed(5)
    maps = torch.randint(0, 4, (5, 6, 6), generator=generator).double()
    masks = (torch.rand(5, 6, 6, generator=generator) > 0.6).double()
    both = torch.tensor(
        [score("pixel_auroc", maps, masks), score("pixel_auroc", -maps, masks)]
    ).sum(0)
    assert torch.allclose(both, torch.ones(5))


# --- points ---------------------------------------------------------------------------------------


def line(*at: int, width: int = 10) -> list[list[list[float]]]:
    return [[[float(column in at) for column in range(width)]]]


def test_the_pointing_game_tests_the_maximum_not_the_centroid() -> None:
    """Guided AbsoluteGrad's code tests the centroid of the top 30 %, here between two blobs."""
    blobs = [[[0.9, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7, 0.8]]]
    assert score("pointing_game", blobs, line(0)) == [1]
    assert score("pointing_game", blobs, line(4)) == [0]
    assert score("pointing_game", blobs, line(0), preset="gag-2024") == [0]
    assert score("pointing_game", blobs, line(4), preset="gag-2024") == [1]


def test_the_centroid_is_that_of_the_order_statistic_rounded_down() -> None:
    """Rank 7 of 10 is the value 6: pixels 6 to 9, whose mean place is 7.5."""
    ascending = [[[float(value) for value in range(10)]]]
    assert score("pointing_game", ascending, line(7), point="centroid") == [1]
    assert score("pointing_game", ascending, line(6, 8), point="centroid") == [0]


def test_the_centroid_of_a_map_that_is_mostly_zero_is_the_middle_of_the_image() -> None:
    """So the object's own mask misses it: pixels 0 to 9 have the mean place 4.5."""
    assert score("pointing_game", line(0), line(0), preset="gag-2024") == [0]
    assert score("pointing_game", line(0), line(4), preset="gag-2024") == [1]


def test_the_centroid_leaves_out_pixels_without_a_label() -> None:
    """Of nine, rank 6 is the value 5: pixels 5, 6, 7 and 8, whose mean place is 6.5."""
    ascending = [[[float(value) for value in range(10)]]]
    mask = line(6)
    mask[0][0][9] = NAN
    assert score("pointing_game", ascending, mask, point="centroid") == [1]


def test_a_point_hits_what_is_closer_than_the_tolerance() -> None:
    """0.3 of 10 pixels are 3; the pixel itself is hit at any tolerance."""
    near = [score("pointing_game", line(at), line(0), tolerance=0.3) == [1] for at in range(10)]
    assert near == [True] * 3 + [False] * 7
    alone = [score("pointing_game", line(at), line(0)) == [1] for at in range(10)]
    assert alone == [True] + [False] * 9


def test_the_tolerance_is_a_circle_and_a_share_of_the_longer_side() -> None:
    maps, masks = torch.zeros(1, 5, 10), torch.zeros(1, 5, 10)
    maps[0, 0, 0], masks[0, 3, 4] = 1, 1
    assert score("pointing_game", maps, masks, tolerance=0.51) == [1]
    assert score("pointing_game", maps, masks, tolerance=0.5) == [0]


def test_the_default_tolerance_is_the_published_one_at_the_published_size() -> None:
    default = registry.make("metrics", "pointing_game").tolerance
    assert default * 500 == pytest.approx(15)


@pytest.mark.parametrize("name", ["pointing_game", "relevance_rank"])
@pytest.mark.parametrize("corner", [0, -1])
def test_ties_favour_no_corner(name: str, corner: int) -> None:
    """200 constant maps, the object in a corner with 1/16 of the pixels."""
    masks = torch.zeros(200, 4, 4)
    masks[:, corner, corner] = 1
    found = score(name, torch.zeros(200, 4, 4), masks)
    assert 4 <= sum(found) <= 25  # 12.5 expected, within 3.5 standard deviations


@pytest.mark.parametrize("name", ["pointing_game", "relevance_rank"])
def test_ties_are_the_seed_s(name: str) -> None:
    masks = torch.zeros(40, 4, 4)
    masks[:, :2, :2] = 1
    flat = torch.zeros(40, 4, 4)
    assert score(name, flat, masks) == score(name, flat, masks)
    assert score(name, flat, masks) != score(name, flat, masks, seed=1)


# --- mass -----------------------------------------------------------------------------------------

SIGNED = [[[3.0, -1.0, 1.0], [0.0, -2.0, 2.0]]]


def test_shares_of_mass_are_known_by_hand() -> None:
    assert score("energy_pointing_game", SIGNED, MASK) == [pytest.approx(3 / 6)]
    assert score("relevance_mass", SIGNED, MASK) == [pytest.approx(4 / 9)]


def test_the_box_of_an_object_has_its_corners_too() -> None:
    corner = [[[1, 1, 0], [0, 1, 0]]]
    maps = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]
    assert score("energy_pointing_game", maps, corner) == [pytest.approx(8 / 21)]
    found = score("energy_pointing_game", maps, corner, preset="scorecam-2020")
    assert found == [pytest.approx(12 / 21)]


def test_the_map_is_not_scaled_before_its_mass_is_shared() -> None:
    assert score("relevance_mass", [[[3.0, 3.0, 2.0], [2.0, 2.0, 2.0]]], MASK) == [
        pytest.approx(6 / 14)
    ]


def test_the_most_salient_pixels_are_as_many_as_the_object_s() -> None:
    maps = [[[0.9, 0.1, 0.8], [0.0, 0.0, 0.7]]]
    assert score("relevance_rank", maps, MASK) == [0.5]
    assert score("relevance_rank", maps, [[[1, 0, 0], [0, 1, 1]]]) == [pytest.approx(2 / 3)]


# --- boxes ----------------------------------------------------------------------------------------


def picture(*lines: str) -> Tensor:
    """One map: digits are tenths."""
    return torch.tensor([[[int(digit) / 10 for digit in line] for line in lines]])


OBJECT = (picture("0000000", "0111000", "0111000", "0000000") > 0).float()


def test_the_box_is_that_of_the_largest_component() -> None:
    two = picture("0000009", "0999009", "0999009", "0000000")
    assert score("max_box_acc", two, OBJECT, threshold=0.5) == [1]
    right = picture("0000999", "0900999", "0900999", "0000999")
    assert score("max_box_acc", right, OBJECT, threshold=0.5) == [0]


def test_corners_connect() -> None:
    diagonal = picture("0000000", "0900000", "0099000", "0000000")
    assert score("max_box_acc", diagonal, OBJECT, threshold=0.5) == [1]


def test_a_box_fits_from_its_share_on() -> None:
    """Boxes of 3 and 2 pixels in one of 6."""
    half = picture("0000000", "0999000", "0000000", "0000000")
    third = picture("0000000", "0990000", "0000000", "0000000")
    assert score("max_box_acc", half, OBJECT, threshold=0.5) == [1]
    assert score("max_box_acc", third, OBJECT, threshold=0.5) == [0]
    found = score("max_box_acc", third, OBJECT, threshold=0.5, iou=(0.3, 0.5, 0.7))
    assert found == [pytest.approx(1 / 3)]


def test_each_image_has_its_own_best_threshold() -> None:
    """0.2 is right for the first and 0.6 for the second; either alone fails one of them."""
    first = picture("0000000", "0933000", "0333000", "0000000")
    second = picture("0444444", "4999444", "4999444", "4444444")
    maps, masks = torch.cat((first, second)), torch.cat((OBJECT, OBJECT))
    assert score("max_box_acc", maps, masks, threshold=0.2) == [1, 0]
    assert score("max_box_acc", maps, masks, threshold=0.6) == [0, 1]
    assert score("max_box_acc", maps, masks) == [1, 1]


def test_the_best_threshold_is_the_best_of_those_that_are_tried() -> None:
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(12, 8, 8, generator=generator)
    masks = torch.zeros(12, 8, 8)
    masks[:, 2:5, 3:7] = 1
    tried = [
        score("max_box_acc", maps, masks, threshold=step / 10, iou=(0.2, 0.3, 0.4))
        for step in range(10)
    ]
    best = score("max_box_acc", maps, masks, steps=10, iou=(0.2, 0.3, 0.4))
    assert best == [max(one) for one in zip(*tried, strict=True)]
    assert len(set(best)) > 1


def test_components_of_one_size_are_drawn_by_lot() -> None:
    """Two squares, the object one of them, 100 images."""
    maps, masks = torch.zeros(100, 6, 6), torch.zeros(100, 6, 6)
    maps[:, :2, :2], maps[:, 4:, 4:] = 1, 1
    masks[:, :2, :2] = 1
    found = score("max_box_acc", maps, masks, threshold=0.5)
    assert 32 <= sum(found) <= 68  # 50 expected, within 3.5 standard deviations


def test_pixels_without_a_label_belong_to_no_box() -> None:
    bar = picture("0000000", "0999999", "0999999", "0000000")
    ignored = OBJECT.clone()
    ignored[0, :, 4:] = NAN
    assert score("max_box_acc", bar, OBJECT, threshold=0.5) == [1]  # 6 of 12
    assert score("max_box_acc", bar, OBJECT, threshold=0.5, iou=(0.6,)) == [0]
    assert score("max_box_acc", bar, ignored, threshold=0.5, iou=(0.6,)) == [1]
