"""Laws of control maps: they know nothing of the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported, UsageError
from xbench.metrics.rcap import Recovered
from xbench.plan import batch_needs
from xbench.probe import MapOf, Probe, cost, method_cost
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Passes

CONTROLS = ("random", "centre", "sobel", "constant", "fake_cam", "identity", "oracle")


def made(name: str, **params: Any) -> Tensor:
    """The map of a transformed method, which the network takes part in."""
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(3), target=torch.tensor([4, 0, 2]), meter=meter)
        return probe.explain(registry.make("methods", name, params)).raw


def explain(name: str, batch: Batch | None = None, model_seed: int = 0, **how: Any) -> Tensor:
    model = toy_model(seed=model_seed)
    with prepared(model.net) as meter:
        probe = Probe(model, batch or toy_batch(3), meter=meter, **how)
        found = probe.explain(registry.make("methods", name)).raw
        assert probe.spent == Passes(0, 0)
        return found


def test_the_controls_are_the_entries_that_call_themselves_so() -> None:
    declared = {
        name
        for name in registry.entries("methods")
        if getattr(registry.find("methods", name), "control", False) is True
    }
    assert declared == {*CONTROLS, "inverted"}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_asks_the_network_nothing(name: str) -> None:
    target = torch.tensor([4, 0, 2])
    assert torch.equal(explain(name), explain(name, model_seed=1, target=target))


def test_random_maps_are_uniform_and_belong_to_their_image_and_seed() -> None:
    batch = toy_batch(3, side=64)
    maps = explain("random", batch)
    assert maps.min() >= 0
    assert maps.max() < 1
    # a uniform mean has the standard error 1 / sqrt(12 n): five of them
    assert (maps.mean((1, 2)) - 0.5).abs().max() < 5 / (12 * 64 * 64) ** 0.5
    assert len({float(value) for value in maps[:, 0, 0]}) == 3
    assert not torch.equal(maps, explain("random", batch, seed=1))
    backwards = Batch(batch.images.flip(0), batch.labels, batch.keys[::-1])
    assert torch.equal(explain("random", backwards), maps.flip(0))


@pytest.mark.parametrize("side", [16, 17])
def test_centre_is_a_bell_a_quarter_of_the_side_wide(side: int) -> None:
    (bell,) = explain("centre", toy_batch(1, side=side))
    assert torch.equal(bell, bell.flip(0))
    assert torch.equal(bell, bell.flip(1))
    assert torch.equal(bell, bell.mT)
    at = np.linspace(-2, 2, side)  # in standard deviations
    expected = np.exp(-(at[:, None] ** 2 + at**2) / 2)
    # the control is drawn in float32, whatever the images' dtype
    np.testing.assert_allclose(bell.numpy(), expected, rtol=1e-6, atol=0)


def test_sobel_of_a_ramp_is_its_slope_inside_and_zero_of_one_colour() -> None:
    ramp = torch.arange(16.0, dtype=torch.float64).expand(1, 3, 16, 16) / 100
    across = explain("sobel", Batch(ramp, torch.zeros(1), ("a",)))
    torch.testing.assert_close(across[0, :, 1:-1], torch.full((16, 14), 0.08).double())
    down = explain("sobel", Batch(ramp.mT.contiguous(), torch.zeros(1), ("a",)))
    torch.testing.assert_close(down, across.mT)
    flat = torch.full((1, 3, 16, 16), 0.3, dtype=torch.float64)
    assert explain("sobel", Batch(flat, torch.zeros(1), ("a",))).abs().max() < 1e-15


def test_constant_is_ones() -> None:
    assert torch.equal(explain("constant"), torch.ones(3, 16, 16, dtype=torch.float64))


def test_fake_cam_is_ones_but_for_the_upper_left_corner() -> None:
    maps = explain("fake_cam")
    assert not maps[:, 0, 0].any()
    assert maps.sum() == 3 * (16 * 16 - 1)


def test_identity_is_the_images_brightness() -> None:
    batch = toy_batch(3)
    torch.testing.assert_close(explain("identity", batch), batch.images.mean(1))


def test_the_oracle_is_the_mask_and_zero_where_nothing_is_known() -> None:
    batch = toy_batch(3)
    assert batch.masks is not None
    batch.masks[0, :4] = torch.nan
    found = explain("oracle", batch)
    assert torch.equal(found[1:], batch.masks[1:])
    assert torch.equal(found[0], batch.masks[0].nan_to_num(0))
    with pytest.raises(Unsupported, match="no object masks"):
        explain("oracle", replace(batch, masks=None))


# --- made of another method's map -----------------------------------------------------------------


def test_an_inverted_map_turns_the_order_round() -> None:
    upright, found = made("gradient"), made("inverted", of="gradient")
    torch.testing.assert_close(
        found + upright, upright.amax((1, 2), keepdim=True).expand(3, 16, 16)
    )
    assert found.min() == 0
    twice = made("inverted", of={"name": "inverted", "of": "gradient"})
    torch.testing.assert_close(twice, upright - upright.amin((1, 2), keepdim=True))


@pytest.mark.parametrize(("l", "m"), [(0.07, 0.1), (0.02, 0.3), (0.0, 0.5 - 1e-9), (0.5, 0.0)])
@pytest.mark.parametrize("name", ["gradient", "random"])
def test_reversing_swaps_the_lowest_with_those_below_the_top(
    name: str,
    l: float,  # noqa: E741
    m: float,
) -> None:
    before = made(name).flatten(1)
    after = made("reversed", of=name, l=l, m=m).flatten(1)
    kept, moved = int(256 * l), int(256 * m)
    ascending = before.argsort(1)
    low, top = ascending[:, :moved], 255 - kept
    high = ascending[:, top - moved : top]
    assert torch.equal(after.sort(1).values, before.sort(1).values)
    assert int((after != before).sum()) == 3 * 2 * moved
    assert torch.equal(after.gather(1, ascending[:, top:]), before.gather(1, ascending[:, top:]))
    for one, other in ((low, high), (high, low)):
        swapped = after.gather(1, one).sort(1).values
        assert torch.equal(swapped, before.gather(1, other).sort(1).values)
    if moved > 1:  # paired at random, not the lowest with the highest
        assert not torch.equal(after.gather(1, low), before.gather(1, high))
        assert not torch.equal(after.gather(1, low), before.gather(1, high.flip(1)))


def test_reversing_keeps_the_saliency_ratios_of_rcap() -> None:
    """Proposition 1 of Guided AbsoluteGrad: only the probabilities can change."""
    model = toy_model()
    with prepared(model.net):
        probe = Probe(model, toy_batch(3))
        need = Recovered("black", "magnitude", (10, 20, 30, 40, 50))
        maps = [
            probe.explain(registry.make("methods", "gradient", params))
            for params in ({}, {"reversed": {}})
        ]
        (ratio, chance, _), (other_ratio, other_chance, _) = (found[need] for found in maps)
    torch.testing.assert_close(ratio, other_ratio)
    assert not torch.equal(chance, other_chance)


def test_reversed_is_written_beside_any_methods_parameters() -> None:
    params = {"samples": 3, "reversed": {"l": 0.02, "m": 0.3}}
    found = registry.make("methods", "smooth_grad", params)
    of = {"name": "smooth_grad", "samples": 3}
    assert found == registry.make("methods", "reversed", {"of": of, "l": 0.02, "m": 0.3})
    assert registry.label(found) == "reversed(smooth_grad(samples=3), l=0.02, m=0.3)"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"reversed": 0.1}, r"must be a mapping, such as \{l: 0.07, m: 0.1\}"),
        ({"reversed": {"k": 0.1}}, "method 'reversed' has no parameter 'k'"),
        ({"reversed": {"l": 0.5, "m": 0.25}}, r"l \+ 2 m must be less than 1, but is 1"),
        ({"reversed": {"l": -0.1}}, "greater than or equal to 0"),
        ({"layers": "x", "reversed": {}}, "method 'grad_cam' has no parameter 'layers'"),
    ],
)
def test_a_wrong_reversal_is_explained(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("methods", "grad_cam", params)


def test_what_is_made_of_a_map_shares_it() -> None:
    model = toy_model()
    methods = [
        registry.make("methods", "smooth_grad", {"samples": 3}),
        registry.make("methods", "smooth_grad", {"samples": 3, "reversed": {}}),
        registry.make("methods", "inverted", {"of": {"name": "smooth_grad", "samples": 3}}),
    ]
    needs = batch_needs(methods, [])
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(3), needs=needs, meter=meter)
        for method in methods:
            probe.explain(method)
        assert probe.spent == cost(needs, model) == Passes(4, 3)


def test_what_is_made_of_an_unpriced_map_is_unpriced() -> None:
    class Plain:
        def __call__(self, probe: Probe) -> Tensor:
            return probe.inputs[:, 0]

    class Wrapper:
        needs = (MapOf(Plain()),)

    assert method_cost(Plain(), toy_model()) is None
    assert method_cost(Wrapper(), toy_model()) is None


def test_an_inverted_oracle_needs_masks_and_knows_no_class() -> None:
    found = registry.make("methods", "inverted", {"of": "oracle"})
    assert found.needs_masks
    assert found.class_agnostic
    assert not registry.make("methods", "inverted").class_agnostic


def test_a_reversed_control_stays_a_control() -> None:
    assert registry.make("methods", "random", {"reversed": {}}).control
    assert not registry.make("methods", "gradient", {"reversed": {}}).control
