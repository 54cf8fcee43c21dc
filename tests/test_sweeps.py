"""Laws of sweeps: moments are exact, memory does not grow with the samples."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from xbench.autograd import prepared
from xbench.errors import Unsupported
from xbench.probe import ImageGradient, LayerGradient, Probe
from xbench.sweeps import GuidedGradient, Moments, NoisyGradients, NoisyLayerGradients
from xbench.testing import LinearNetwork, toy_batch, toy_model
from xbench.types import Model


def samples(count: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, 2, 3, 4, 4, generator=generator).double() + offset).to(dtype)


@pytest.mark.parametrize("count", [2, 3, 20, 100])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_are_those_of_two_passes(count: int, offset: float) -> None:
    given = samples(count, offset)
    found = Moments.of(given)
    torch.testing.assert_close(found.mean, given.mean(0))
    torch.testing.assert_close(found.mean_absolute, given.abs().mean(0))
    torch.testing.assert_close(found.mean_square, given.square().mean(0))
    torch.testing.assert_close(found.variance, given.var(0, correction=1))


def test_the_variance_does_not_cancel_in_float32() -> None:
    given = samples(20, offset=1e4, dtype=torch.float32)
    expected = given.double().var(0, correction=1)
    # sums of squares of 1e4 would leave an error near 10; updated in steps it is near 1e-3
    torch.testing.assert_close(Moments.of(given).variance.double(), expected, rtol=0, atol=0.02)


def test_a_single_sample_is_its_own_mean_and_has_no_variance() -> None:
    (only,) = given = samples(1)
    found = Moments.of(given)
    assert torch.equal(found.mean, only)
    assert torch.equal(found.mean_absolute, only.abs())
    assert torch.equal(found.mean_square, only.square())
    assert found.variance.isnan().all()


def test_the_variance_of_equal_samples_is_exactly_zero() -> None:
    assert not Moments.of(samples(1).expand(7, -1, -1, -1, -1)).variance.any()


def test_moments_leave_the_samples_as_they_were() -> None:
    given = samples(5)
    before = given.clone()
    Moments.of(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("count", [3, 30])
def test_no_more_than_two_samples_live_at_once(count: int) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def gradients() -> Iterator[Tensor]:
        nonlocal most
        for at in range(count):
            gradient = torch.full((2, 3, 4, 4), float(at))
            alive.add(gradient)
            most = max(most, len(alive))
            yield gradient
            del gradient

    Moments.of(gradients())
    gc.collect()
    assert most <= 2
    assert len(alive) == 0


def test_a_sweep_is_the_loop_over_noisy_images() -> None:
    model, batch = toy_model(), toy_batch(3)
    with prepared(model.net):
        probe = Probe(model, batch, seed=5)
        found = probe[NoisyGradients(0.2, 6)]
        flat = probe.inputs.flatten(1)
        sigma = 0.2 * (flat.max(1).values - flat.min(1).values).view(-1, 1, 1, 1)
        loop = torch.stack(
            [probe.input_gradient(probe.inputs + sigma * probe.normal("gaussian", draw))
             for draw in range(6)]
        )  # fmt: skip
    torch.testing.assert_close(found.mean, loop.mean(0))
    torch.testing.assert_close(found.variance, loop.var(0))


def test_a_longer_sweep_begins_with_the_same_draws() -> None:
    model, batch = toy_model(), toy_batch(3)
    with prepared(model.net):
        probe = Probe(model, batch)
        short, long = (probe[NoisyGradients(0.2, count)] for count in (4, 5))
        fifth = 5 * long.mean - 4 * short.mean
        flat = probe.inputs.flatten(1)
        sigma = (0.2 * (flat.amax(1) - flat.amin(1))).view(-1, 1, 1, 1)
        expected = probe.input_gradient(probe.inputs + sigma * probe.normal("gaussian", 4))
    torch.testing.assert_close(fifth, expected)


def test_without_noise_every_sample_is_the_gradient() -> None:
    model, batch = toy_model(), toy_batch(3)
    with prepared(model.net):
        probe = Probe(model, batch)
        found = probe[NoisyGradients(0.0, 4)]
        gradient = probe[ImageGradient()]
    torch.testing.assert_close(found.mean, gradient)
    torch.testing.assert_close(found.mean_absolute, gradient.abs())
    assert not found.variance.any()


def test_the_noise_is_as_wide_as_its_share_of_each_images_own_range() -> None:
    """On a network that returns its input's squares, the gradient tells the noisy image."""

    class Squares(LinearNetwork):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.square() / 2)

    side = 32
    model = Model("squares", Squares(torch.ones(1, 3 * side * side).double()))
    batch = toy_batch(2, side=side)
    batch.images[1] = batch.images[1] * 0.1 + 0.5
    with prepared(model.net):
        found = Probe(model, batch)[NoisyGradients(0.15, 8)]
    spread = found.variance.flatten(1).mean(1).sqrt()
    ranges = batch.images.flatten(1).amax(1) - batch.images.flatten(1).amin(1)
    # 3 x 32 x 32 x 7 degrees of freedom: a relative error of 0.5 %, five of them
    torch.testing.assert_close(spread, 0.15 * ranges, rtol=0.025, atol=0)


def test_the_guided_gradient_of_a_network_without_relu_is_the_plain_one() -> None:
    weight = torch.randn(5, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)).double()
    model = Model("linear", LinearNetwork(weight))
    with prepared(model.net):
        probe = Probe(model, toy_batch(3))
        with pytest.raises(Unsupported, match="allow_no_relu: true accepts that"):
            probe[GuidedGradient()]
        assert torch.equal(probe[GuidedGradient(allow_no_relu=True)], probe[ImageGradient()])


def test_noisy_gradients_of_the_first_layer_are_those_of_the_input() -> None:
    """Hence the noise is the same."""
    model = toy_model()
    net = nn.Sequential(nn.Identity(), *model.net.children())
    with prepared(net):
        probe = Probe(Model("same", net, model.mean, model.std), toy_batch(3))
        first, second, _ = probe[NoisyLayerGradients("0", 0.2, 5)]
        expected = probe[NoisyGradients(0.2, 5)]
    torch.testing.assert_close(first, expected.mean)
    torch.testing.assert_close(second, expected.mean_square)


def test_powers_of_noisy_layer_gradients_are_averaged_in_float64() -> None:
    model, batch = toy_model(), toy_batch(3)
    model.net.get_submodule("6").get_parameter("weight").mul_(1e-15)  # its cube is no float32
    model.net.float()
    probe = Probe(model, replace(batch, images=batch.images.float()))
    with prepared(model.net):
        assert probe[LayerGradient("1")][1].dtype == torch.float32
        first, second, third = probe[NoisyLayerGradients("1", 0.2, 1)]
    assert third.any()
    torch.testing.assert_close(second, first.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(third, first**3, rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_the_samples_of_a_layer() -> None:
    counts = []

    class Watched(Probe):
        def normal(self, purpose: str, draw: int) -> Tensor:
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
            return super().normal(purpose, draw)

    model = toy_model()
    with prepared(model.net):
        Watched(model, toy_batch(2))[NoisyLayerGradients("1", 0.1, 8)]
    assert len(counts) == 8
    assert len(set(counts[2:])) == 1
