"""Laws of average drop, gain and increase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import UsageError
from xbench.maps import unit_range
from xbench.masking import Shown
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import ShareNetwork, toy_batch, toy_model
from xbench.types import Batch, Model

SHARE = torch.tensor([[0.4, 0.3], [0.2, 0.0]], dtype=torch.float64)


def shared(share: Tensor = SHARE, count: int = 1) -> tuple[Model, Batch]:
    """White images whose pixels add their shares to the probability; black adds nothing."""
    images = torch.ones(count, 3, *share.shape, dtype=torch.float64)
    keys = tuple(map(str, range(count)))
    return Model("share", ShareNetwork(share)), Batch(images, torch.zeros(count).long(), keys)


def score(name: str, maps: Tensor, model: Model, batch: Batch, **params: Any) -> Tensor:
    metric = registry.make("metrics", name, params)
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=torch.zeros(len(maps)).long(), meter=meter)
        found: Tensor = metric(Explanation(probe, maps))
        return found


def one(name: str, saliency: list[list[float]], **params: Any) -> float:
    maps = torch.tensor([saliency], dtype=torch.float64)
    return float(score(name, maps, *shared(), **params))


# --- by hand: p = 0.9 on the white image ----------------------------------------------------------


def test_a_map_that_keeps_half_the_probability_drops_by_its_share() -> None:
    # kept: 0.4 + 0.5 * 0.1 = 0.45 of 0.9
    assert one("average_drop", [[1, 1 / 6], [0, 0]]) == pytest.approx(50)
    assert one("average_gain", [[1, 1 / 6], [0, 0]]) == 0
    assert one("average_increase", [[1, 1 / 6], [0, 0]]) == 0


def test_a_map_that_keeps_all_that_counts_drops_nothing() -> None:
    assert one("average_drop", [[1, 1], [1, 0]]) == pytest.approx(0, abs=1e-10)


def test_a_gain_is_a_share_of_the_headroom_or_of_the_confidence() -> None:
    """On a white baseline with a dark image: p = 0.45, and o = 0.45 + 0.5 * 0.4 = 0.65."""
    model, batch = shared()
    grey = Batch(batch.images * 0.5, batch.labels, batch.keys)
    maps = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    params = {"baseline": "white"}
    gain = score("average_gain", maps, model, grey, **params)
    printed = score("average_gain", maps, model, grey, denominator="confidence", **params)
    assert float(gain) == pytest.approx(100 * 0.2 / 0.55)
    assert float(printed) == pytest.approx(100 * 0.2 / 0.45)
    assert float(score("average_increase", maps, model, grey, **params)) == 100
    assert float(score("average_drop", maps, model, grey, **params)) == 0


def test_at_a_probability_of_one_there_is_no_gain() -> None:
    class Certain(ShareNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack((images.new_full((len(images),), 1e3), images.mean((1, 2, 3))), 1)

    _, batch = shared()
    maps = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    assert score("average_gain", maps, Model("certain", Certain(SHARE)), batch).tolist() == [0]


@pytest.mark.parametrize("name", ["average_drop", "average_gain"])
def test_a_ratio_to_hardly_any_probability_is_undefined(name: str) -> None:
    params = {"denominator": "confidence"} if name == "average_gain" else {}
    metric = registry.make("metrics", name, params)
    maps = torch.rand(2, 2, 2, dtype=torch.float64)
    model, batch = shared(count=2)
    images = batch.images.clone()
    for scale, defined in ((0.99e-6, False), (1.01e-6, True)):
        images[1] = scale / 0.9
        dark = Batch(images, batch.labels, batch.keys)
        with prepared(model.net) as meter:
            probe = Probe(model, dark, target=torch.zeros(2).long(), meter=meter)
            outcomes = evaluated(metric, Explanation(probe, maps))
        assert outcomes[0][1] == "ok"
        assert outcomes[1][1] == ("ok" if defined else "undefined: p < 1e-6")


# --- by property ----------------------------------------------------------------------------------


def random_maps(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 16, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["black", "mean", "white", "blur", "noise"])
@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
def test_the_three_are_their_formulas_over_one_masked_image(baseline: str, sign: str) -> None:
    model, batch, maps = toy_model(), toy_batch(6), random_maps()
    read = {"magnitude": maps.abs(), "positive": maps.clamp(min=0), "signed": maps}[sign]
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=torch.zeros(6).long(), meter=meter)
        pixels = {
            "black": torch.zeros(3),
            "white": torch.ones(3),
            "mean": torch.tensor(model.mean),
            "blur": None,
            "noise": None,
        }[baseline]
        if baseline == "noise":
            below = torch.stack([probe.uniform("noise baseline", at) for at in range(3)], dim=1)
        elif pixels is None:
            from xbench.baselines import gaussian_blur

            below = gaussian_blur(batch.images, 1.0)
        else:
            below = pixels.double().view(1, 3, 1, 1)
        mask = unit_range(read)[:, None]
        masked = model.normalise(mask * batch.images + (1 - mask) * below)  # in pixel space
        p = probe.probability
        o = model.net(masked).softmax(1)[:, 0]
    params = {"baseline": baseline, "sign": sign}
    expected = {
        "average_drop": 100 * (p - o).clamp(min=0) / p,
        "average_gain": 100 * (o - p).clamp(min=0) / (1 - p),
        "average_increase": 100 * (o > p).double(),
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(score(name, maps, model, batch, **params), wanted)


@pytest.mark.parametrize("name", ["average_drop", "average_gain", "average_increase"])
def test_scale_and_sign_of_a_map_read_by_magnitude_move_nothing(name: str) -> None:
    model, batch, maps = toy_model(), toy_batch(6), random_maps()
    plain = score(name, maps, model, batch)
    torch.testing.assert_close(score(name, -1e6 * maps, model, batch), plain)


def test_an_image_does_not_both_drop_and_increase() -> None:
    drop, gain, increase = (
        score(name, random_maps(), toy_model(), toy_batch(6))
        for name in ("average_drop", "average_gain", "average_increase")
    )
    assert not ((drop > 0) & (increase > 0)).any()
    assert torch.equal(gain > 0, increase > 0)


def test_all_three_share_one_masked_forward() -> None:
    model, maps = toy_model(), random_maps()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(6), meter=meter)
        explanation = Explanation(probe, maps)
        for name in ("average_drop", "average_gain", "average_increase"):
            registry.make("metrics", name)(explanation)
        assert probe.spent.forward == 2


def test_the_range_of_the_printed_gain_has_no_upper_end() -> None:
    assert registry.make("metrics", "average_gain").range == (0, 100)
    printed = registry.make("metrics", "average_gain", {"denominator": "confidence"})
    assert printed.range == (0, float("inf"))


# --- masks ----------------------------------------------------------------------------------------


def test_a_top_mask_keeps_the_better_half_whatever_the_maps_values() -> None:
    # kept: the two largest shares, 0.7 of 0.9
    for saliency in ([[9, 8], [7, 0]], [[0.2, 0.1], [-5, -9]], [[1e9, 1e-9], [0, 0]]):
        found = one("average_drop", saliency, mask="top", sign="signed")
        assert found == pytest.approx(100 * 0.2 / 0.9)
    assert one("average_drop", [[9, 8], [7, 0]], mask="top", share=0.25) == pytest.approx(
        100 * 0.5 / 0.9
    )


def test_a_matched_mask_weighs_pixels_by_rank_alone() -> None:
    # weights 1, 2/3, 1/3, 0: kept 0.4 + 0.2 + 0.2 / 3
    expected = 100 * (0.9 - (0.4 + 0.2 + 0.2 / 3)) / 0.9
    for saliency in ([[9, 8], [7, 0]], [[1e9, 2e-9], [1e-9, 0]]):
        assert one("average_drop", saliency, mask="matched") == pytest.approx(expected)


def test_a_map_of_ones_with_one_zero_wins_by_its_mass_and_by_nothing_else() -> None:
    """Fake-CAM has nearly no drop under a soft mask, and none of a random map's order otherwise."""
    model, batch = toy_model(), toy_batch(6)
    fake = torch.ones(6, 16, 16, dtype=torch.float64)
    fake[:, 0, 0] = 0
    constant = torch.ones(6, 16, 16, dtype=torch.float64)
    assert (score("average_drop", fake, model, batch) < 5).all()
    for mask in ("matched", "top"):
        found = score("average_drop", fake, model, batch, mask=mask)
        # nearly all of its pixels are tied, so that it is the seeded order of a constant map
        plain = score("average_drop", constant, model, batch, mask=mask)
        torch.testing.assert_close(found, plain, rtol=0, atol=1.0)


@pytest.mark.parametrize("mask", ["matched", "top"])
@pytest.mark.parametrize("name", ["average_drop", "average_gain", "average_increase"])
def test_an_increasing_transform_moves_no_metric_of_equal_masses(name: str, mask: str) -> None:
    model, batch, maps = toy_model(), toy_batch(6), random_maps()
    plain = score(name, maps, model, batch, mask=mask, sign="signed")
    found = score(name, torch.exp(3 * maps), model, batch, mask=mask, sign="signed")
    assert torch.equal(plain, found)


# --- readings -------------------------------------------------------------------------------------


def test_the_drop_is_of_the_probability_and_relative_unless_asked_otherwise() -> None:
    """As published; pytorch-grad-cam's is absolute, and of the logit."""
    model, batch, maps = toy_model(), toy_batch(6), random_maps()
    with prepared(model.net):
        probe = Probe(model, batch, target=torch.zeros(6).long())
        p = probe.probability
        masked = model.net(model.normalise(unit_range(maps.abs())[:, None] * batch.images))
        clean = model.net(probe.inputs)
        o = masked.softmax(1)[:, 0]
    found = score("average_drop", maps, model, batch)
    torch.testing.assert_close(found, 100 * (p - o).clamp(min=0) / p)
    absolute = score("average_drop", maps, model, batch, drop="absolute")
    torch.testing.assert_close(absolute, 100 * (p - o).clamp(min=0))
    fall = 100 * (clean - masked)[:, 0].clamp(min=0)
    logit = score("average_drop", maps, model, batch, drop="absolute", read="logit")
    torch.testing.assert_close(logit, fall)
    relative = score("average_drop", maps, model, batch, read="logit")
    small = clean[:, 0] < 1e-6
    torch.testing.assert_close(relative[~small], (fall / clean[:, 0])[~small])
    assert relative[small].isnan().all()


def test_a_logit_has_no_gain() -> None:
    with pytest.raises(UsageError, match="1 - p, which a logit does not have; read the prob"):
        registry.make("metrics", "average_gain", {"read": "logit"})


@pytest.mark.parametrize(
    ("name", "params", "factor"),
    [
        ("average_drop", {}, lambda p: p / (p + 0.01)),
        ("average_gain", {}, lambda p: (1 - p) / (1 - p + 0.01)),
        ("average_gain", {"denominator": "confidence"}, lambda p: p / (p + 0.01)),
    ],
)
def test_an_epsilon_is_added_to_the_denominator(name: str, params: Any, factor: Any) -> None:
    model, batch, maps = toy_model(), toy_batch(6), random_maps()
    with prepared(model.net):
        p = Probe(model, batch, target=torch.zeros(6).long()).probability
    plain = score(name, maps, model, batch, **params)
    found = score(name, maps, model, batch, epsilon=0.01, **params)
    torch.testing.assert_close(found, plain * factor(p))


# --- presets and sharing --------------------------------------------------------------------------


SOURCES = {
    "average_drop": {
        "interpretable-gradients-2024",
        "opticam-2024",
        "gradcampp-2018",
        "scorecam-2020",
        "torchcam-0.5",
        "pgc-1.5",
        "xplique-2.0",
    },
    "average_gain": {"interpretable-gradients-2024", "opticam-2024", "xplique-2.0"},
}
SOURCES["average_increase"] = SOURCES["average_drop"]


@pytest.mark.parametrize("name", SOURCES)
def test_there_is_a_preset_for_every_source_that_defines_the_metric(name: str) -> None:
    assert set(registry.find("metrics", name).presets) == SOURCES[name]


def test_presets_that_differ_only_in_what_is_read_share_their_forward() -> None:
    model, maps = toy_model(), random_maps()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(6), meter=meter)
        explanation = Explanation(probe, maps)
        for name, preset in (("average_drop", "pgc-1.5"), ("average_increase", "pgc-1.5")):
            registry.make("metrics", name, {"preset": preset})(explanation)
            params = {"preset": preset, "read": "probability"}
            registry.make("metrics", name, params)(explanation)
        assert probe.spent.forward == 2


def test_the_top_half_is_a_point_of_a_curve_and_shares_its_forward() -> None:
    model, maps = toy_model(), random_maps()
    drop = registry.make("metrics", "average_drop", {"mask": "top", "sign": "signed"})
    assert drop.masked.source == Shown("salient", drop.masked.source.share, "black")
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(6), meter=meter)
        explanation = Explanation(probe, maps)
        registry.make("metrics", "lerf", {"steps": 4})(explanation)
        spent = probe.spent.forward
        drop(explanation)
        assert probe.spent.forward == spent


def test_parameters_that_a_mask_does_not_read_change_no_need() -> None:
    plain = registry.make("metrics", "average_drop")
    assert registry.make("metrics", "average_drop", {"share": 0.3}).masked == plain.masked
    top = registry.make("metrics", "average_drop", {"mask": "top"})
    other = registry.make("metrics", "average_drop", {"mask": "top", "range_epsilon": 1e-3})
    assert top.masked == other.masked


@pytest.mark.parametrize(
    "params",
    [{"share": 0.0}, {"share": 1.0}, {"epsilon": -1e-9}, {"epsilon": 0.1}, {"mask": "half"}],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(params))} = "):
        registry.make("metrics", "average_drop", params)
