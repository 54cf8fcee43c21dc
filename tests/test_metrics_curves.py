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
from xbench.probe import Explanation, Probe
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
