"""Laws of the methods that read input gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported, UsageError
from xbench.maps import unit_range
from xbench.probe import Probe
from xbench.testing import SIDE, LinearNetwork, toy_batch, toy_model
from xbench.types import Model

TARGET = torch.tensor([4, 0, 2])


@contextmanager
def probing(model: Model | None = None, **how: Any) -> Iterator[Probe]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, toy_batch(3), target=TARGET, meter=meter, **how)


def explain(name: str, model: Model | None = None, **params: Any) -> Tensor:
    with probing(model) as probe:
        return probe.explain(registry.make("methods", name, params)).raw


def noisy_gradients(noise: float, samples: int, model: Model | None = None) -> Tensor:
    """(S, N, 3, H, W), the gradients that every noise method aggregates."""
    with probing(model) as probe:
        flat = probe.inputs.flatten(1)
        sigma = (noise * (flat.amax(1) - flat.amin(1))).view(-1, 1, 1, 1)
        return torch.stack(
            [
                probe.input_gradient(probe.inputs + sigma * probe.normal("gaussian", draw))
                for draw in range(samples)
            ]
        )


def linear_model(seed: int = 0) -> Model:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3 * SIDE * SIDE, generator=generator, dtype=torch.float64)
    return Model("linear", LinearNetwork(weight), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class Scaled(nn.Module):
    """All logits of another network times one factor."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return self.factor * logits


def scaled_model(factor: float) -> Model:
    model = toy_model()
    return replace(model, net=Scaled(model.net, factor), layers={})


# --- by hand --------------------------------------------------------------------------------------


def test_on_a_linear_network_the_gradient_is_the_targets_weight_row() -> None:
    model = linear_model()
    rows = model.net.get_parameter("weight")[TARGET].view(3, 3, SIDE, SIDE)
    assert torch.equal(explain("gradient", model), rows.abs().sum(1))


def test_on_a_linear_network_input_x_gradient_is_each_pixels_part_of_the_logit() -> None:
    model = linear_model()
    rows = model.net.get_parameter("weight")[TARGET].view(3, 3, SIDE, SIDE)
    inputs = model.normalise(toy_batch(3).images)
    torch.testing.assert_close(explain("input_x_gradient", model), (rows * inputs).abs().sum(1))


@pytest.mark.parametrize("name", ["smooth_grad", "absolute_grad"])
def test_on_a_linear_network_noise_changes_no_mean(name: str) -> None:
    model = linear_model()
    torch.testing.assert_close(explain(name, model, samples=5), explain("gradient", model))


def test_on_a_linear_network_the_variance_is_zero() -> None:
    assert not explain("var_grad", linear_model(), samples=5).any()
    assert not explain("guided_absolute_grad", linear_model(), samples=5).any()


def test_smooth_grad_squared_of_a_linear_network_is_the_squared_gradient() -> None:
    model = linear_model()
    rows = model.net.get_parameter("weight")[TARGET].view(3, 3, SIDE, SIDE)
    found = explain("smooth_grad_squared", model, samples=5)
    torch.testing.assert_close(found, rows.square().sum(1))


# --- by property ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smooth_grad", "absolute_grad"])
@pytest.mark.parametrize("samples", [1, 4])
def test_without_noise_the_mean_is_the_gradient(name: str, samples: int) -> None:
    found = explain(name, noise=0, samples=samples)
    torch.testing.assert_close(found, explain("gradient"))


def test_one_sample_of_vanishing_noise_is_the_gradient() -> None:
    # the toy network is piecewise linear: noise this small crosses no kink
    found = explain("smooth_grad", noise=1e-12, samples=1)
    torch.testing.assert_close(found, explain("gradient"))


def test_each_noise_method_is_its_formula_over_the_same_samples() -> None:
    gradients = noisy_gradients(0.3, 7)
    expected = {
        "smooth_grad": gradients.mean(0).abs(),
        "smooth_grad_squared": gradients.square().mean(0),
        "var_grad": gradients.var(0, correction=1),
        "absolute_grad": gradients.abs().mean(0),
    }
    for name, attribution in expected.items():
        found = explain(name, noise=0.3, samples=7)
        torch.testing.assert_close(found, attribution.sum(1))


def guided_by_hand(gradients: Tensor, percentile: float) -> Tensor:
    """Equation 3.4 with numpy, plane by plane."""
    found = torch.zeros(gradients.shape[1], *gradients.shape[3:], dtype=torch.float64)
    for image in range(gradients.shape[1]):
        for channel in range(gradients.shape[2]):
            samples = gradients[:, image, channel].numpy()
            variance = samples.var(axis=0, ddof=1)
            threshold = np.percentile(variance, percentile)
            guide = np.where(variance > threshold, 1.0, variance)
            found[image] += torch.from_numpy(np.abs(samples).mean(axis=0) * guide)
    return found


@pytest.mark.parametrize("percentile", [15, 33.3, 50, 85, 99, 100])
def test_guided_absolute_grad_takes_its_percentile_in_each_channel_plane(
    percentile: float,
) -> None:
    found = explain("guided_absolute_grad", noise=0.3, samples=7, percentile=percentile)
    torch.testing.assert_close(found, guided_by_hand(noisy_gradients(0.3, 7), percentile))


def test_at_percentile_100_every_pixel_is_weighted_by_its_variance() -> None:
    gradients = noisy_gradients(0.3, 7)
    found = explain("guided_absolute_grad", noise=0.3, samples=7, percentile=100)
    weighted = (gradients.abs().mean(0) * gradients.var(0)).sum(1)
    torch.testing.assert_close(found, weighted)


def test_at_percentile_0_guided_absolute_grad_is_absolute_grad() -> None:
    """The row GAG-0 of the paper's tables, which is computed without the guide."""
    plain = explain("absolute_grad", noise=0.3, samples=7)
    guided = explain("guided_absolute_grad", noise=0.3, samples=7, percentile=0)
    assert torch.equal(guided, plain)


SAMPLED = ("smooth_grad", "smooth_grad_squared", "var_grad", "absolute_grad")


@pytest.mark.parametrize("name", ["gradient", "input_x_gradient", "guided_backprop", *SAMPLED])
def test_a_scale_of_all_logits_moves_no_scaled_map(name: str) -> None:
    params = {"samples": 5} if name in SAMPLED else {}
    plain, scaled = (unit_range(explain(name, scaled_model(k), **params)) for k in (1.0, 50.0))
    torch.testing.assert_close(plain, scaled)


def test_a_scale_of_all_logits_moves_guided_absolute_grad() -> None:
    plain, scaled = (
        unit_range(explain("guided_absolute_grad", scaled_model(k), samples=5)) for k in (1.0, 1e5)
    )
    assert (plain - scaled).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gradient", "guided_backprop", *SAMPLED])
def test_maps_of_absolutes_are_not_negative(name: str) -> None:
    assert explain(name).min() >= 0


def test_a_guided_map_is_no_larger_than_the_paths_of_positive_signals_allow() -> None:
    """With positive weights throughout, no signal is negative: the guided map is the gradient."""
    model = toy_model()
    for parameter in model.net.parameters():
        parameter.abs_()
    torch.testing.assert_close(explain("guided_backprop", model), explain("gradient", model))


def test_with_negative_weights_at_the_end_no_guided_signal_is_left() -> None:
    model = toy_model()
    head = model.net.get_submodule("6")
    assert isinstance(head, nn.Linear)
    head.weight.abs_().neg_()
    assert explain("gradient", model).any()
    assert not explain("guided_backprop", model).any()


def test_without_relu_guided_backprop_is_the_gradient_where_that_is_allowed() -> None:
    model = linear_model()
    with pytest.raises(Unsupported, match="allow_no_relu: true accepts that"):
        explain("guided_backprop", model)
    assert torch.equal(
        explain("guided_backprop", model, allow_no_relu=True), explain("gradient", model)
    )


def test_another_seed_moves_sampled_maps_alone() -> None:
    for name in ("gradient", "guided_backprop", *SAMPLED):
        method = registry.make("methods", name)
        with probing(seed=0) as one, probing(seed=1) as other:
            same = torch.equal(one.explain(method).raw, other.explain(method).raw)
        assert same == (name not in SAMPLED)


# --- interpretations, channels, ranges ------------------------------------------------------------


@pytest.mark.parametrize(
    ("processing", "name"),
    [("signed", "smooth_grad"), ("absolute", "absolute_grad")],
)
def test_a_processing_of_smooth_grad_is_the_method_of_that_name(processing: str, name: str) -> None:
    assert torch.equal(explain("smooth_grad", processing=processing), explain(name))


@pytest.mark.parametrize("how", [{}, {"percentile": 40.0}, {"guide_norm": "max"}])
def test_guided_absolute_smooth_grad_is_guided_absolute_grad(how: dict[str, Any]) -> None:
    found = explain("smooth_grad", processing="guided_absolute", **how)
    assert torch.equal(found, explain("guided_absolute_grad", **how))


def test_positive_and_negative_parts_add_up_to_the_signed_and_the_absolute_map() -> None:
    parts = {
        kind: explain("smooth_grad", processing=kind, channels="sum")
        for kind in ("signed", "positive", "negative", "absolute")
    }
    assert parts["positive"].min() >= 0
    assert parts["negative"].max() <= 0
    torch.testing.assert_close(parts["positive"] + parts["negative"], parts["signed"])
    torch.testing.assert_close(parts["positive"] - parts["negative"], parts["absolute"])


@pytest.mark.parametrize("name", ["gradient", "input_x_gradient", "guided_backprop"])
def test_channels_are_summed_signed_or_their_largest_absolute(name: str) -> None:
    absolute, signed, largest = (
        explain(name, channels=channels) for channels in ("absolute_sum", "sum", "max")
    )
    assert (signed.abs() <= absolute + 1e-15).all()
    assert (largest <= absolute).all()
    assert (absolute <= 3 * largest + 1e-15).all()
    assert signed.min() < 0 < signed.max()


def test_on_a_linear_network_the_signed_input_x_gradient_adds_up_to_the_logit() -> None:
    with probing(linear_model()) as probe:
        method = registry.make("methods", "input_x_gradient", {"channels": "sum"})
        logit = probe.model.net(probe.inputs).gather(1, TARGET[:, None])[:, 0]
        torch.testing.assert_close(probe.explain(method).raw.sum((1, 2)), logit)


@pytest.mark.parametrize("name", [*SAMPLED, "guided_absolute_grad"])
def test_the_preset_of_2024_takes_the_range_of_the_batch_and_nothing_else(name: str) -> None:
    preset = registry.find("methods", name).presets["gag-2024"]
    batch = toy_batch(3)
    batch.images[1] = batch.images[1] * 0.1 + 0.5

    def explained(**params: Any) -> Tensor:
        model = toy_model()
        with prepared(model.net):
            probe = Probe(model, batch, target=TARGET)
            return probe.explain(registry.make("methods", name, params)).raw

    inputs = toy_model().normalise(batch.images)
    found, plain = explained(**preset), explained()
    width = float(inputs.max() - inputs.min())
    torch.testing.assert_close(found, explained(noise_range=width))
    assert not torch.allclose(found[1], plain[1])


@pytest.mark.parametrize("norm", ["max", "quantile"])
def test_a_scaled_guide_makes_guided_absolute_grad_blind_to_a_scale_of_all_logits(
    norm: str,
) -> None:
    plain, scaled = (
        unit_range(explain("guided_absolute_grad", scaled_model(k), samples=5, guide_norm=norm))
        for k in (1.0, 1e5)
    )
    torch.testing.assert_close(plain, scaled)


FAMILY = ("gradient", "input_x_gradient", "guided_backprop", "guided_absolute_grad", *SAMPLED)


@pytest.mark.parametrize("name", FAMILY)
def test_where_no_gradient_is_there_is_a_map_of_zeros(name: str) -> None:
    model = toy_model()
    head = model.net.get_submodule("6")
    assert isinstance(head, nn.Linear)
    head.weight.zero_()
    assert torch.equal(explain(name, model), torch.zeros(3, SIDE, SIDE, dtype=torch.float64))


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["var_grad", "guided_absolute_grad"])
def test_a_variance_needs_two_samples(name: str) -> None:
    with pytest.raises(UsageError, match="samples = 1: input should be greater than or equal to 2"):
        registry.make("methods", name, {"samples": 1})


@pytest.mark.parametrize("processing", ["guided", "guided_absolute"])
def test_a_guided_smooth_grad_needs_two_samples(processing: str) -> None:
    message = f"'{processing}' needs a variance over samples, and samples = 1 has none; give 2 or"
    with pytest.raises(UsageError, match=message):
        registry.make("methods", "smooth_grad", {"processing": processing, "samples": 1})


@pytest.mark.parametrize("processing", ["signed", "positive", "negative", "absolute"])
@pytest.mark.parametrize(
    ("key", "value"), [("percentile", 50.0), ("guide_norm", "max"), ("guide_scope", "image")]
)
def test_a_guide_without_use_is_refused(processing: str, key: str, value: Any) -> None:
    message = f"{key} belongs to the guide, which processing = '{processing}' has not; leave it out"
    with pytest.raises(UsageError, match=message):
        registry.make("methods", "smooth_grad", {"processing": processing, key: value})
    assert registry.make("methods", "smooth_grad", {"processing": "guided", key: value})


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("smooth_grad", {"noise": -0.1}, "noise = -0.1: input should be greater than or equal"),
        ("smooth_grad", {"noise_range": "dataset"}, "noise_range = 'dataset': input should be 'im"),
        ("smooth_grad", {"noise_range": 0.0}, "noise_range = 0.0: input should be greater than 0"),
        ("smooth_grad", {"processing": "squared"}, "processing = 'squared': input should be 'sign"),
        ("gradient", {"channels": "mean"}, "channels = 'mean': input should be 'absolute_sum', 's"),
        ("guided_absolute_grad", {"percentile": 101.0}, "percentile = 101.0: input should be less"),
        ("guided_absolute_grad", {"percentile": -1.0}, "percentile = -1.0: input should be greate"),
        ("guided_absolute_grad", {"guide_norm": "min"}, "guide_norm = 'min': input should be 'non"),
        ("guided_backprop", {"processing": "signed"}, "processing = 'signed': input should be 'po"),
    ],
)
def test_parameters_out_of_range_are_refused(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        registry.make("methods", name, params)
