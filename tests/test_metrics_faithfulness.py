"""Laws of average drop, gain and increase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import unit_range
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


@pytest.mark.parametrize("baseline", ["black", "mean", "white", "blur"])
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
        }[baseline]
        if pixels is None:
            from xbench.masking import gaussian_blur

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
