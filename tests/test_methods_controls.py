"""Laws of control maps: they know nothing of the network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.probe import Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Passes

CONTROLS = ("random", "centre", "sobel", "constant", "fake_cam")


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
        if getattr(registry.find("methods", name), "control", False)
    }
    assert declared == set(CONTROLS)


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
