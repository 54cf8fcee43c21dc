"""Laws of RCAP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import UsageError
from xbench.metrics.rcap import AuthorsRecovered, Recovered
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import PlantedNetwork, ShareNetwork, toy_batch, toy_model
from xbench.types import Batch, Model


def explanation_of(maps: Tensor, model: Model, batch: Batch) -> Explanation:
    probe = Probe(model, batch, target=torch.zeros(len(maps)).long())
    assert probe.probability.isfinite().all()
    return Explanation(probe, maps)


def rcap(maps: Tensor, model: Model | None = None, batch: Batch | None = None, **p: Any) -> Tensor:
    model, batch = model or toy_model(), batch or toy_batch(len(maps), side=maps.shape[-1])
    with prepared(model.net):
        found: Tensor = registry.make("metrics", "rcap", p)(explanation_of(maps, model, batch))
        return found


def by_hand(
    maps: Tensor, model: Model, batch: Batch, rates: list[int], sign: str = "magnitude"
) -> list[float]:
    """Equation 4.1 with numpy, image by image; rates in percent.

    The recovered set is {S > q}, except {S = max S} where q is the maximum (decision 3).
    """
    scores = []
    for image, saliency in zip(batch.images, maps.numpy(), strict=True):
        read = {
            "magnitude": np.abs(saliency),
            "positive": np.maximum(saliency, 0),
            "signed": saliency,
        }[sign]
        span = read.max() - read.min()
        scaled = (read - read.min()) / span if span else np.zeros_like(read)
        order = np.sort(scaled.ravel())
        terms = []
        for rate in rates:
            rank = max(scaled.size * rate // 100, 1)  # from 1
            threshold = order[rank - 1]
            recovered = scaled == threshold if threshold == order[-1] else scaled > threshold
            share = scaled[recovered].sum() / scaled.sum() if scaled.sum() else 0.0
            pixels = image * torch.from_numpy(recovered)  # black elsewhere, in pixel space
            probability = model.net(model.normalise(pixels[None])).softmax(1)[0, 0]
            terms.append(share * float(probability))
        scores.append(float(np.mean(terms)))
    return scores


# --- by hand --------------------------------------------------------------------------------------


def test_on_ten_pixels_rcap_is_known_by_hand() -> None:
    """S = 1, .9 .. .1 on pixels that add 0.3, 0.2, 0.1, 0.1, 0.1 to the probability."""
    share = torch.tensor([[0.3, 0.2, 0.1, 0.1, 0.1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    saliency = torch.linspace(0.9, 0, 10, dtype=torch.float64)[None, None]  # sum 4.5
    batch = Batch(torch.ones(1, 3, 1, 10).double(), torch.zeros(1).long(), ("a",))
    found = rcap(saliency, Model("share", ShareNetwork(share)), batch)
    shares = np.cumsum([0.9, 0.8, 0.7, 0.6, 0.5]) / 4.5
    assert float(found) == pytest.approx(np.mean(shares * [0.3, 0.5, 0.6, 0.7, 0.8]))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 5, 0]), st.sampled_from([4, 5, 8]))
@settings(max_examples=40, deadline=None)
def test_rcap_is_equation_4_1(seed: int, levels: int, side: int) -> None:
    """On maps with many ties, with few, and with none."""
    if levels:
        maps = torch.randint(levels, (3, side, side), generator=generator(seed)).double()
    else:
        maps = torch.randn(3, side, side, generator=generator(seed), dtype=torch.float64)
    model, batch = toy_model(), toy_batch(3, seed, side)
    expected = by_hand(maps, model, batch, [90, 80, 70, 60, 50])
    np.testing.assert_allclose(rcap(maps, model, batch).numpy(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ({"lower_bound": 0.7, "interval": 0.05}, [95, 90, 85, 80, 75, 70]),
        ({"lower_bound": 0.9, "interval": 0.1}, [90]),
        ({"lower_bound": 0.0, "interval": 0.5}, [50, 0]),
        ({"lower_bound": 0.9, "interval": 0.5}, [90]),
        ({"lower_bound": 0.97, "interval": 0.01}, [99, 98, 97]),
    ],
)
def test_bounds_and_intervals_give_whole_percents(
    params: dict[str, float], rates: list[int], sign: str
) -> None:
    """0.7 and 0.05 is where a float range of rates would end in a stray 100 %."""
    maps = torch.randn(3, 16, 16, generator=generator(1), dtype=torch.float64)
    model, batch = toy_model(), toy_batch(3)
    expected = by_hand(maps, model, batch, rates, sign)
    found = rcap(maps, model, batch, sign=sign, **params)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-14)


# --- by property ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=20, deadline=None)
def test_a_binary_map_has_all_its_saliency_in_every_partition(seed: int, ones: int) -> None:
    """However many: where the threshold is the maximum, all that equal it are recovered."""
    chosen = torch.randperm(256, generator=generator(seed))[:ones]
    maps = torch.zeros(1, 256, dtype=torch.float64).index_fill(1, chosen, 1).view(1, 16, 16)
    model, batch = toy_model(), toy_batch(1)
    with prepared(model.net):
        explanation = explanation_of(maps, model, batch)
        need = Recovered("black", "magnitude", (10, 20, 30, 40, 50))
        share, probability, _ = explanation[need]
    assert torch.equal(share, torch.ones(1, 5, dtype=torch.float64))
    # the set itself is recovered every time
    masked = model.net(model.normalise(batch.images * maps[:, None])).softmax(1)[:, :1]
    torch.testing.assert_close(probability, masked.expand(1, 5))


def test_squaring_a_map_raises_rcap_and_moves_no_ranking_metric() -> None:
    maps = torch.rand(6, 16, 16, generator=generator(0), dtype=torch.float64)
    model, batch = toy_model(), toy_batch(6)
    assert (rcap(maps**2, model, batch) > rcap(maps, model, batch)).all()
    for name in ("insertion", "deletion"):
        metric = registry.make("metrics", name)
        with prepared(model.net):
            one, two = (metric(explanation_of(m, model, batch)) for m in (maps, maps**2))
        assert torch.equal(one, two)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_rcap_lies_in_the_unit_interval(seed: int) -> None:
    maps = torch.randn(4, 16, 16, generator=generator(seed), dtype=torch.float64)
    found = rcap(maps, toy_model(seed=seed), toy_batch(4, seed))
    assert found.min() >= 0
    assert found.max() <= 1


def test_rcap_of_a_certain_classifier_is_the_mean_share() -> None:
    class Certain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([1e4, 0.0]).expand(len(images), 2)

    maps = torch.rand(3, 16, 16, generator=generator(0), dtype=torch.float64)
    binary = (maps > 0.8).double()
    assert rcap(binary, Model("certain", Certain())).tolist() == [1, 1, 1]
    assert (rcap(maps, Model("certain", Certain())) < 1).all()


def test_rcap_of_a_constant_map_is_zero() -> None:
    for value in (0.0, 1.0, -3.0):
        assert not rcap(torch.full((3, 16, 16), value).double()).any()


def test_scale_and_offset_of_a_signed_map_move_nothing() -> None:
    maps = torch.randn(3, 16, 16, generator=generator(0), dtype=torch.float64)
    plain = rcap(maps, sign="signed")
    torch.testing.assert_close(rcap(4 * maps + 2, sign="signed"), plain)


def test_a_pixel_moved_between_partitions_moves_rcap() -> None:
    """Exchanging high and low values keeps every share, and moves the probability alone."""
    maps = torch.rand(1, 16, 16, generator=generator(0), dtype=torch.float64)
    model, batch = toy_model(), toy_batch(1)
    with prepared(model.net):
        shares = [
            explanation_of(m, model, batch)[Recovered("black", "magnitude", (10, 50))][0]
            for m in (maps, maps.flip(1))
        ]
    torch.testing.assert_close(shares[0], shares[1])
    assert rcap(maps, model, batch) != rcap(maps.flip(1), model, batch)


def test_the_defaults_recover_a_tenth_to_a_half_on_black() -> None:
    metric = registry.make("metrics", "rcap")
    assert metric.recovered == Recovered("black", "magnitude", (10, 20, 30, 40, 50))
    assert metric.better == "higher"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lower_bound": 1.0}, "lower_bound = 1.0: input should be less than 1"),
        ({"lower_bound": -0.1}, "lower_bound = -0.1: input should be greater than or equal to 0"),
        ({"interval": 0.0}, "interval = 0.0: input should be greater than or equal to 0.01"),
    ],
)
def test_bounds_out_of_range_are_refused(params: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        registry.make("metrics", "rcap", params)


@pytest.mark.parametrize("params", [{"interval": 0.333}, {"lower_bound": 0.505}])
def test_thresholds_between_whole_percents_are_refused(params: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="whole number of hundredths"):
        registry.make("metrics", "rcap", params)


# --- the paper's figure 4 and propositions --------------------------------------------------------


SIDE = 40


def gaussian_map(sigma: float, shift: float) -> Tensor:
    """(1, SIDE, SIDE): a bell, its centre moved down and right by a share of the side."""
    at = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2 - shift * SIDE
    bell = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * (sigma * SIDE) ** 2))
    return bell[None]


FIGURE_4 = {
    "M1": gaussian_map(0.15, 0.0),
    "M2": gaussian_map(0.35, 0.0),
    "M3": gaussian_map(0.15, 0.3),
    "M4": gaussian_map(0.35, 0.3),
}
"""Precise or wide, on the object or 30 % of the sides towards the lower right."""

FIVE_PARTITIONS = {"lower_bound": 0.6, "interval": 0.2}


def figure_4() -> tuple[Model, Batch]:
    """The object is the centred 20 % of the pixels, and its evidence is all that counts."""
    inside = (torch.arange(SIDE) - (SIDE - 1) / 2).abs() < SIDE * 0.2**0.5 / 2
    objects = (inside[:, None] & inside).double()
    assert float(objects.mean()) == pytest.approx(0.2, abs=0.01)
    net = PlantedNetwork(objects).eval().requires_grad_(False)
    images = ((net.checker + 1) / 2).expand(1, 3, SIDE, SIDE).clone()
    return Model("planted", net, (0.0,) * 3, (1.0,) * 3), Batch(
        images, torch.zeros(1).long(), ("a",), objects[None]
    )


@pytest.mark.parametrize("params", [{}, FIVE_PARTITIONS])
@pytest.mark.parametrize("compat", ["none", "authors"])
def test_figure_4_ranks_precise_maps_before_wide_and_misplaced_ones(
    params: dict[str, float], compat: str
) -> None:
    model, batch = figure_4()
    found = {
        name: float(rcap(maps, model, batch, compat=compat, **params))
        for name, maps in FIGURE_4.items()
    }
    assert found["M1"] > found["M2"]  # a higher share of saliency
    assert found["M1"] > found["M3"]  # a higher probability
    assert min(found, key=lambda name: found[name]) == "M4"


def parts(maps: Tensor, model: Model, batch: Batch) -> tuple[float, float]:
    """RCAP's factors, each averaged over partitions."""
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=torch.zeros(len(maps)).long(), meter=meter)
        explanation = Explanation(probe, maps)
        found = [registry.make("metrics", f"rcap_{part}") for part in ("saliency", "probability")]
        first, second = (float(metric(explanation)) for metric in found)
        assert probe.spent.forward == 1 + 5  # they share the partitions
    return first, second


def test_proposition_1_reversing_a_map_lowers_rcap_by_the_probability_alone() -> None:
    """The top 7 % stay, and the lowest 10 % swap with those below them, as the paper reverses."""
    model, batch = figure_4()
    maps = FIGURE_4["M1"] + 1e-9 * torch.rand(1, SIDE, SIDE, generator=generator(0))
    ascending = maps.flatten().argsort()
    kept, moved = int(SIDE * SIDE * 0.07), int(SIDE * SIDE * 0.1)
    low, high = ascending[:moved], ascending[-kept - 1 - moved : -kept - 1].flip(0)
    reversed_maps = maps.flatten().clone()
    reversed_maps[low], reversed_maps[high] = maps.flatten()[high], maps.flatten()[low]
    reversed_maps = reversed_maps.view_as(maps)
    (share, chance), (other_share, other_chance) = (
        parts(each, model, batch) for each in (maps, reversed_maps)
    )
    assert share == pytest.approx(other_share, rel=1e-12)
    assert chance > other_chance
    assert rcap(maps, model, batch) > rcap(reversed_maps, model, batch)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 5.0])
def test_proposition_2_contrast_raises_rcap_by_the_share_alone(exponent: float) -> None:
    """S to S^c leaves the order, so that insertion, deletion and the probability stay."""
    model, batch = figure_4()
    for maps in FIGURE_4.values():
        sharper = maps**exponent
        (share, chance), (other_share, other_chance) = (
            parts(each, model, batch) for each in (maps, sharper)
        )
        assert other_share > share
        assert other_chance == pytest.approx(chance, rel=1e-12)
        assert rcap(sharper, model, batch) > rcap(maps, model, batch)
        for name in ("insertion", "deletion"):
            metric = registry.make("metrics", name)
            with prepared(model.net):
                one, two = (metric(explanation_of(m, model, batch)) for m in (maps, sharper))
            assert torch.equal(one, two)


def test_rcap_is_the_mean_of_its_factors_products() -> None:
    maps = torch.rand(4, 16, 16, generator=generator(0), dtype=torch.float64)
    with prepared(toy_model().net):
        explanation = explanation_of(maps, toy_model(), toy_batch(4))
        share, probability, counts = explanation[registry.make("metrics", "rcap").recovered]
        scores = {
            name: registry.make("metrics", name)(explanation)
            for name in ("rcap", "rcap_saliency", "rcap_probability")
        }
    assert counts.all()
    torch.testing.assert_close(scores["rcap"], (share * probability).mean(1))
    torch.testing.assert_close(scores["rcap_saliency"], share.mean(1))
    torch.testing.assert_close(scores["rcap_probability"], probability.mean(1))


# --- the authors' ties ----------------------------------------------------------------------------


def authors(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, recovered pixels (S, K) and counting partitions of one map."""
    seen = []

    class Sees(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images[:, 0].flatten(1) > 0)
            return images.new_zeros(len(images), 2)

    images = torch.ones(1, 3, *maps.shape[1:], dtype=torch.float64)
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    model = Model("sees", Sees())
    with prepared(model.net):
        probe = Probe(model, batch, target=torch.zeros(1).long())
        need = AuthorsRecovered("black", "magnitude", (10, 20, 30, 40, 50))
        share, _, counts = Explanation(probe, maps)[need]
    return share[0], torch.cat(seen[1:]), counts[0]


def test_a_threshold_of_one_recovers_all_above_zero_and_keeps_it() -> None:
    """Of ten pixels three are 1: so are the thresholds for 10, 20 and 30 %, but not that for 40."""
    maps = torch.tensor([[[1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.1, 0, 0]]], dtype=torch.float64)
    share, recovered, counts = authors(maps)
    positive = [True] * 8 + [False] * 2
    assert counts.all()
    # floor(10 * 0.7) = 7: the seventh value is 0.8, which three pixels exceed
    expected = torch.tensor([1, 1, 3 / 5.1, 3.8 / 5.1, 4.4 / 5.1], dtype=torch.float64)
    torch.testing.assert_close(share, expected)
    assert recovered.tolist() == [positive] * 5  # what was recovered is never removed


def test_a_single_threshold_of_one_is_left_out_where_all_differ() -> None:
    maps = torch.tensor([[[1, 1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0, 0]]], dtype=torch.float64)
    _, recovered, counts = authors(maps)
    # the ninth value is 1, the eighth 0.9, and so on
    assert counts.tolist() == [False, True, True, True, True]
    assert recovered[1:].sum(1).tolist() == [2, 3, 4, 5]
    model = Model("half", Halves())
    batch = Batch(torch.ones(1, 3, 1, 10).double(), torch.zeros(1).long(), ("a",))
    shares = torch.tensor([2, 2.9, 3.7, 4.3], dtype=torch.float64) / 5.0
    assert float(rcap(maps, model, batch, compat="authors")) == pytest.approx(shares.mean() / 2)


class Halves(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 2)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=20, deadline=None)
def test_a_binary_map_has_all_its_saliency_in_the_authors_partitions_too(
    seed: int, ones: int
) -> None:
    chosen = torch.randperm(256, generator=generator(seed))[:ones]
    maps = torch.zeros(1, 256, dtype=torch.float64).index_fill(1, chosen, 1).view(1, 16, 16)
    share, recovered, counts = authors(maps)
    assert counts.all()
    assert torch.equal(share, torch.ones(5, dtype=torch.float64))
    assert torch.equal(recovered, (maps.flatten(1) > 0).expand(5, -1))


def test_without_ties_at_the_top_the_authors_score_is_the_default() -> None:
    maps = torch.randn(4, 20, 20, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(rcap(maps, preset="gag-2024"), rcap(maps), rtol=0, atol=1e-14)


def test_a_zero_map_is_undefined_in_the_authors_code_and_zero_here() -> None:
    maps = torch.rand(3, 16, 16, generator=generator(0), dtype=torch.float64)
    maps[1] = 0
    for name in ("rcap", "rcap_saliency"):
        for params, outcome in (
            ({}, (0.0, "degenerate")),
            ({"preset": "gag-2024"}, (None, "undefined: the map is zero")),
        ):
            metric = registry.make("metrics", name, params)
            with prepared(toy_model().net):
                explanation = explanation_of(maps, toy_model(), toy_batch(3))
                found = evaluated(metric, explanation)
            assert [status for _, status in found[::2]] == ["ok", "ok"]
            assert found[1][1] == outcome[1]
            assert outcome[0] is None or found[1][0] == outcome[0]


# --- sharing --------------------------------------------------------------------------------------


def test_insertion_from_black_shares_the_partitions_where_their_fractions_agree() -> None:
    """Tenths of the pixels, ties kept together as RCAP does: five of nine points are its own."""
    maps = torch.rand(4, 16, 16, generator=generator(0), dtype=torch.float64).round(decimals=1)
    insertion = registry.make(
        "metrics",
        "insertion",
        {"steps": 10, "baseline": "black", "sign": "magnitude", "ties": "partition"},
    )
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), target=torch.zeros(4).long(), meter=meter)
        explanation = Explanation(probe, maps)
        registry.make("metrics", "rcap")(explanation)
        assert probe.spent.forward == 1 + 5
        found = insertion(explanation)
        assert probe.spent.forward == 1 + 5 + (9 - 5) + 1
        alone = insertion(Explanation(probe, maps))
    assert torch.equal(found, alone)
