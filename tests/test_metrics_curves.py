"""Laws of insertion and deletion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.baselines import BaselineImage
from xbench.errors import UsageError
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import ShareNetwork, planted_batch, toy_batch, toy_model
from xbench.types import Batch, Model

SHARE = torch.tensor([[0.4, 0.3], [0.2, 0.1]], dtype=torch.float64)


def score(name: str, maps: Tensor, model: Model, batch: Batch, **params: Any) -> Tensor:
    metric = registry.make("metrics", name, params)
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=torch.zeros(len(maps)).long(), meter=meter)
        found: Tensor = metric(Explanation(probe, maps))
        return found


def by_hand(name: str, saliency: Tensor, **params: Any) -> float:
    images = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    params = {"steps": 4, "baseline": "black"} | params
    return float(score(name, saliency[None], Model("share", ShareNetwork(SHARE)), batch, **params))


def random_maps(count: int = 4, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, side, side, generator=generator, dtype=torch.float64)


# --- by hand --------------------------------------------------------------------------------------


def test_the_right_ranking_of_four_pixels_has_insertion_0_625() -> None:
    # 0, 0.4, 0.7, 0.9, 1; the network holds probabilities 1e-12 away from 0 and 1
    assert by_hand("insertion", SHARE) == pytest.approx(0.625, abs=1e-11)


def test_the_reversed_ranking_of_four_pixels_has_insertion_0_375() -> None:
    assert by_hand("insertion", -SHARE) == pytest.approx(0.375, abs=1e-11)  # 0, 0.1, 0.3, 0.6, 1


def test_the_right_ranking_of_four_pixels_has_deletion_0_375() -> None:
    assert by_hand("deletion", SHARE) == pytest.approx(0.375, abs=1e-11)  # 1, 0.6, 0.3, 0.1, 0


@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_one_step_is_the_mean_of_both_ends(name: str) -> None:
    assert by_hand(name, SHARE, steps=1) == pytest.approx(0.5)


def test_two_steps_show_the_two_most_salient_pixels() -> None:
    assert by_hand("insertion", SHARE, steps=2) == pytest.approx((0 + 2 * 0.7 + 1) / 4, abs=1e-11)


def test_steps_of_uneven_size_weigh_by_their_share_of_the_pixels() -> None:
    # three steps change 1, 2 and 1 of four pixels: 0, 0.4, 0.9, 1
    expected = 0.25 * 0.2 + 0.5 * 0.65 + 0.25 * 0.95
    assert by_hand("insertion", SHARE, steps=3) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_more_steps_than_pixels_change_nothing(name: str) -> None:
    assert by_hand(name, SHARE, steps=8) == pytest.approx(by_hand(name, SHARE), abs=1e-14)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_the_area_of_a_constant_classifier_is_its_probability(name: str, steps: int) -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([0.3, 0.7]).log().expand(len(images), 2)

    found = score(name, random_maps(), Model("fixed", Fixed()), toy_batch(4), steps=steps)
    torch.testing.assert_close(found, torch.full((4,), 0.3, dtype=torch.float64))


# --- by property ----------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["black", "mean", "white", "blur"])
@pytest.mark.parametrize(("steps", "side"), [(1, 16), (4, 16), (28, 16), (28, 7), (2, 5)])
def test_deletion_of_the_negated_map_is_insertion_of_the_map(
    baseline: str, steps: int, side: int
) -> None:
    model, batch, maps = toy_model(), toy_batch(4, side=side), random_maps(side=side)
    params = {"baseline": baseline, "steps": steps}
    insertion = score("insertion", maps, model, batch, **params)
    deletion = score("deletion", -maps, model, batch, **params)
    # the network sees the same images in the reversed order of steps
    torch.testing.assert_close(insertion, deletion, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["insertion", "deletion"])
@pytest.mark.parametrize(
    "transform",
    [lambda m: m + 7, lambda m: 3 * m, torch.exp, lambda m: m**3, lambda m: 1e-6 * m - 5],
    ids=["plus a constant", "scaled", "exp", "cube", "affine"],
)
def test_an_increasing_transform_moves_nothing(
    name: str, transform: Callable[[Tensor], Tensor]
) -> None:
    model, batch, maps = toy_model(), toy_batch(4), random_maps()
    plain = score(name, maps, model, batch)
    assert torch.equal(score(name, transform(maps), model, batch), plain)


@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_ties_are_broken_alike_in_all_maps(name: str) -> None:
    model, batch = toy_model(), toy_batch(4)
    flat = [torch.full((4, 16, 16), value).double() for value in (0.0, 1.0, -3.0)]
    scores = [score(name, maps, model, batch) for maps in flat]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_areas_lie_in_the_unit_interval(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(3, (4, 16, 16), generator=generator).double()
    for name in ("insertion", "deletion"):
        found = score(name, maps, toy_model(seed=seed), toy_batch(4, seed), steps=5)
        assert found.min() >= 0
        assert found.max() <= 1


def test_no_ranking_beats_that_of_the_pixels_own_parts() -> None:
    """Probability adds up pixel by pixel there, so every curve is sorted by its increments."""
    best = by_hand("insertion", SHARE)
    for seed in range(24):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).double().view(2, 2)
        assert by_hand("insertion", order) <= best + 1e-12
        assert by_hand("deletion", order) >= 1 - best - 1e-12


def test_the_object_beats_its_negation_in_both_directions() -> None:
    model, batch = planted_batch()
    assert batch.masks is not None
    for name, sign in (("insertion", 1), ("deletion", -1)):
        right, wrong = (score(name, m, model, batch) for m in (batch.masks, -batch.masks))
        assert ((right - wrong) * sign > 0).all()


def test_the_defaults_are_those_of_the_decisions() -> None:
    insertion, deletion = (registry.make("metrics", name) for name in ("insertion", "deletion"))
    assert (insertion.baseline, insertion.steps, insertion.better) == ("blur", 28, "higher")
    assert (deletion.baseline, deletion.steps, deletion.better) == ("black", 28, "lower")


# --- which part of the curve, and in which units --------------------------------------------------


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ("all", 0.625),
        ("without_start", 0.625 - 0.25 * 0.2),
        ("without_end", 0.625 - 0.25 * 0.95),
        ("interior", 0.625 - 0.25 * (0.2 + 0.95)),
    ],
)
def test_an_area_without_an_end_is_not_rescaled(points: str, area: float) -> None:
    # 0, 0.4, 0.7, 0.9, 1
    assert by_hand("insertion", SHARE, points=points) == pytest.approx(area, abs=1e-11)


def grey(level: float) -> Batch:
    images = torch.full((1, 3, 2, 2), level, dtype=torch.float64)
    return Batch(images, torch.zeros(1).long(), ("a",))


def test_areas_over_the_full_score_and_above_the_floor_are_known_by_hand() -> None:
    """On an image of 0.9 against one of 0.1: p = 0.8 there, 0.2 here; the curve runs between."""

    class Between(ShareNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(0.2 + 0.6 * images)

    model = Model("between", Between(SHARE))
    curve = torch.tensor([0.2, 0.44, 0.62, 0.74, 0.8], dtype=torch.float64)
    raw = float(((curve[1:] + curve[:-1]) / 8).sum())
    for area, expected in (
        ("raw", raw),
        ("relative", raw / 0.8),
        ("corrected", (raw - 0.2) / 0.6),
    ):
        params = {"steps": 4, "baseline": "black", "area": area}
        found = score("insertion", SHARE[None], model, grey(1.0), **params)
        assert float(found) == pytest.approx(expected, abs=1e-9)
    # a corrected area is that of the network whose floor is 0 and whose image scores 1
    assert by_hand("insertion", SHARE) == pytest.approx((raw - 0.2) / 0.6, abs=1e-9)


def test_an_image_that_scores_no_more_than_its_baseline_has_no_corrected_area() -> None:
    model = Model("share", ShareNetwork(SHARE))
    for area, level, status in (
        ("corrected", 0.5, "ok"),
        ("corrected", 0.0, "undefined: the image scores no more than its baseline"),
        ("relative", 0.5, "ok"),
        ("relative", 1e-7, "undefined: the image scores less than 1e-06"),
    ):
        metric = registry.make("metrics", "deletion", {"steps": 4, "area": area})
        with prepared(model.net):
            probe = Probe(model, grey(level), target=torch.zeros(1).long())
            ((_, found),) = evaluated(metric, Explanation(probe, SHARE[None]))
        assert found == status


@pytest.mark.parametrize("name", ["insertion", "deletion", "morf", "lerf", "abpc"])
def test_raw_relative_and_corrected_areas_share_their_forwards(name: str) -> None:
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), meter=meter)
        explanation = Explanation(probe, random_maps())
        registry.make("metrics", name, {"steps": 4})(explanation)
        spent = probe.spent
        for params in ({"area": "relative"}, {"area": "corrected"}, {"read": "logit"}):
            registry.make("metrics", name, {"steps": 4, **params})(explanation)
        assert probe.spent == spent


# --- MoRF, LeRF, AbPC -----------------------------------------------------------------------------


CHOICES = [
    {},
    {"baseline": "mean", "steps": 5},
    {"ties": "first", "sign": "magnitude"},
    {"ties": "above", "steps": 10},
    {"area": "corrected", "baseline": "blur"},
    {"read": "logit"},
]


@pytest.mark.parametrize("params", CHOICES)
def test_morf_is_deletion_and_lerf_is_insertion_from_the_same_baseline(params: Any) -> None:
    model, batch, maps = toy_model(), toy_batch(4), random_maps()
    both = {"baseline": "black", **params}
    morf, deletion, lerf, insertion, between = (
        score(name, maps, model, batch, **both)
        for name in ("morf", "deletion", "lerf", "insertion", "abpc")
    )
    assert torch.equal(morf, deletion)
    assert torch.equal(lerf, insertion)
    torch.testing.assert_close(between, lerf - morf, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("points", "seen_backwards"),
    [("without_start", "without_end"), ("without_end", "without_start")],
)
def test_the_start_of_lerf_is_the_end_of_insertion(points: str, seen_backwards: str) -> None:
    model, batch, maps = toy_model(), toy_batch(4), random_maps()
    lerf = score("lerf", maps, model, batch, points=points)
    insertion = score("insertion", maps, model, batch, baseline="black", points=seen_backwards)
    assert torch.equal(lerf, insertion)
    between = score("abpc", maps, model, batch, points=points)
    morf = score("morf", maps, model, batch, points=points)
    torch.testing.assert_close(between, lerf - morf, rtol=0, atol=1e-12)


def test_the_negated_map_has_the_negated_area_between_the_curves() -> None:
    model, batch, maps = toy_model(), toy_batch(4), random_maps()
    found = [score("abpc", m, model, batch) for m in (maps, -maps)]
    torch.testing.assert_close(found[0], -found[1], rtol=0, atol=1e-12)


def test_the_right_ranking_of_four_pixels_has_abpc_one_quarter() -> None:
    assert by_hand("abpc", SHARE) == pytest.approx(0.25, abs=1e-11)
    assert by_hand("abpc", -SHARE) == pytest.approx(-0.25, abs=1e-11)


def test_curves_over_equal_masks_cost_their_forwards_once() -> None:
    """Insertion from black, MoRF, LeRF, AbPC and deletion: two curves and one black image."""
    model = toy_model()
    names = ["morf", "lerf", "abpc", "deletion", "insertion"]
    metrics = [registry.make("metrics", name, {"baseline": "black", "steps": 6}) for name in names]
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), meter=meter)
        explanation = Explanation(probe, random_maps())
        for metric in metrics:
            metric(explanation)
        assert probe.spent.forward == 1 + 1 + 2 * 5


# --- images of curves -----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [{}, {"preset": "rise-2018"}, {"preset": "gag-2024"}])
def test_insertions_first_point_is_the_blurred_image(preset: Any) -> None:
    model, batch = toy_model(), toy_batch(4)
    metric = registry.make("metrics", "insertion", preset)
    with prepared(model.net):
        probe = Probe(model, batch, target=torch.zeros(4).long())
        curve = Explanation(probe, random_maps())[metric.curve("salient")]
        blurred = probe[BaselineImage(metric.baseline)]
        torch.testing.assert_close(curve[:, 0], model.net(blurred).softmax(1)[:, 0])
    assert metric.baseline.startswith("blur")


@pytest.mark.parametrize("ties", ["seeded", "first", "last"])
@pytest.mark.parametrize("keep", ["salient", "rest"])
def test_each_pixel_changes_once_and_all_its_channels_together(keep: Any, ties: Any) -> None:
    model, batch = toy_model(), toy_batch(4, side=9)
    maps = random_maps(side=9).round()
    metric = registry.make("metrics", "deletion", {"steps": 27, "ties": ties})
    with prepared(model.net):
        probe = Probe(model, batch)
        explanation = Explanation(probe, maps)
        images = torch.stack([need.image(explanation) for need in metric.curve(keep).inner], dim=1)
        black = probe[BaselineImage("black")]
        is_shown = images == probe.inputs[:, None]
        assert (is_shown | (images == black[:, None])).all()
        assert (is_shown == is_shown[:, :, :1]).all()
        counts = is_shown[:, :, 0].flatten(2).sum(2)
        steps = counts.diff(dim=1).unique().tolist()
        assert steps == ([3] if keep == "salient" else [-3])
        changes = is_shown[:, :, 0].diff(dim=1).sum(1)
        assert changes.max() == 1


@pytest.mark.parametrize("name", ["insertion", "deletion", "morf", "lerf", "abpc"])
def test_every_parameter_that_is_passed_is_used(name: str) -> None:
    model, batch, maps = toy_model(), toy_batch(4), random_maps().round(decimals=1)
    plain = score(name, maps, model, batch, steps=7)
    for params in (
        {"steps": 3},
        {"steps": 7, "baseline": "white"},
        {"steps": 7, "sign": "magnitude"},
        {"steps": 7, "ties": "first"},
        {"steps": 7, "points": "interior"},
        {"steps": 7, "area": "relative"},
        {"steps": 7, "read": "logit"},
    ):
        assert not torch.equal(score(name, maps, model, batch, **params), plain), params


# --- presets --------------------------------------------------------------------------------------


def test_a_constant_classifier_has_nine_tenths_of_its_probability_under_gag_2024() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([0.3, 0.7]).log().expand(len(images), 2)

    for name in ("insertion", "deletion"):
        found = score(name, random_maps(), Model("fixed", Fixed()), toy_batch(4), preset="gag-2024")
        torch.testing.assert_close(found, torch.full((4,), 0.27, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "preset", "points", "baseline"),
    [
        ("insertion", "rise-2018", 29, "blur_rise"),
        ("deletion", "rise-2018", 29, "mean"),
        ("insertion", "interpretable-gradients-2024", 33, "blur_rise"),
        ("deletion", "interpretable-gradients-2024", 33, "black"),
        ("insertion", "gag-2024", 11, "blur_gag"),
        ("deletion", "gag-2024", 11, "mean"),
        ("deletion", "torchcam-0.5", 21, "mean"),
        ("insertion", "latec-2024", 3012, "blur_latec"),
        ("deletion", "xplique-2.0", 11, "mean"),
        ("morf", "quantus-0.6", 29, "black"),
    ],
)
def test_presets_are_the_sources_points_and_baselines(
    name: str, preset: str, points: int, baseline: str
) -> None:
    metric = registry.make("metrics", name, {"preset": preset})
    assert len(metric.curve("rest").shares(224 * 224)) == points
    assert metric.baseline == baseline


def test_a_step_of_rise_2018_at_224_pixels_is_1792_pixels() -> None:
    metric = registry.make("metrics", "deletion", {"preset": "rise-2018"})
    assert set(torch.tensor(metric.curve("rest").counts(224 * 224)).diff().tolist()) == {1792}
    metric = registry.make("metrics", "insertion", {"preset": "interpretable-gradients-2024"})
    assert set(torch.tensor(metric.curve("salient").counts(32 * 32)).diff().tolist()) == {32}


def test_presets_never_change_units_but_for_the_logit() -> None:
    for name in ("insertion", "deletion", "morf"):
        for preset in registry.find("metrics", name).presets:
            metric = registry.make("metrics", name, {"preset": preset})
            assert metric.range == (0, 1) or metric.read == "logit"


@pytest.mark.parametrize("params", [{"steps": 0}, {"ties": "random"}, {"area": "mean"}])
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(params))} = "):
        registry.make("metrics", "insertion", params)
