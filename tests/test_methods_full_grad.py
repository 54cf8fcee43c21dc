"""Laws of FullGrad's map; that its parts add up to the logit is a law of ``bias_terms``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import unit_range, upsample
from xbench.methods.full_grad import FullGrad
from xbench.probe import ImageGradient, LayerGradient, Probe
from xbench.testing import LinearNetwork, toy_batch, toy_model
from xbench.types import Batch, Model

TARGET = torch.tensor([4, 0, 2])


def explain(model: Model | None = None, batch: Batch | None = None, **params: Any) -> Tensor:
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, batch or toy_batch(3), target=TARGET, meter=meter)
        return probe.explain(registry.make("methods", "full_grad", params)).raw


def input_x_gradient(model: Model) -> Tensor:
    with prepared(model.net):
        probe = Probe(model, toy_batch(3), target=TARGET)
        return probe.inputs * probe[ImageGradient()]


def test_a_part_is_known_by_hand() -> None:
    term = torch.tensor([[[[1.0, -5.0]], [[2.0, 3.0]]]])  # absolutes from 1 to 5
    assert FullGrad().part(term).tolist() == [[[0 + 0.25, 1 + 0.5]]]
    by_channel = FullGrad(range_over="channel").part(term)
    assert by_channel.tolist() == [[[0 + 0, 1 + 1]]]
    shrunk = FullGrad(epsilon=1.0).part(term)
    torch.testing.assert_close(shrunk, torch.tensor([[[0 + 0.2, 0.8 + 0.4]]]))


@pytest.mark.parametrize("range_over", ["image", "channel"])
def test_a_part_depends_on_its_own_image_alone(range_over: Any) -> None:
    terms = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole = FullGrad(range_over=range_over).part(terms)
    for at in range(4):
        alone = FullGrad(range_over=range_over).part(terms[at : at + 1] * 7)
        torch.testing.assert_close(alone, whole[at : at + 1])


def test_without_any_bias_full_grad_is_input_times_gradient_in_its_range() -> None:
    weight = torch.randn(5, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)).double()
    model = Model("linear", LinearNetwork(weight))
    product = input_x_gradient(model).abs()
    expected = unit_range(product.flatten(2)).view(product.shape).sum(1)
    torch.testing.assert_close(explain(model), expected)


def test_a_bias_adds_its_product_with_the_gradient() -> None:
    """So small that it moves no ReLU, and scaled to its range all the same."""
    model = toy_model()
    bias = model.net.get_submodule("2").get_parameter("bias")
    bias.zero_()
    without = explain(model)
    with prepared(model.net):
        probe = Probe(model, toy_batch(3), target=TARGET)
        _, gradient = probe[LayerGradient("2")]
    bias.copy_(torch.arange(1, 9) * 1e-12)
    part = FullGrad().part(bias[:, None, None] * gradient)
    expected = without + upsample(part, toy_batch(3).images)
    torch.testing.assert_close(explain(model), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_gradients_scale_does_not_matter_without_an_epsilon(scale: float) -> None:
    model = toy_model()
    expected, shrunk = explain(model), explain(model, epsilon=1e-6)
    model.net.get_submodule("6").get_parameter("weight").mul_(scale)
    torch.testing.assert_close(explain(model), expected)
    assert (explain(model, epsilon=1e-6) - shrunk).abs().max() > 1e-6


def test_a_linear_layer_that_keeps_positions_has_a_part() -> None:
    """Channels last and a linear layer are a convolution of one pixel."""

    class Last(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]

    convolution, linear = nn.Conv2d(6, 7, 1), nn.Linear(6, 7)
    linear.weight.data = convolution.weight.data.flatten(1)
    linear.bias.data = convolution.bias.data  # type: ignore[union-attr]
    maps = []
    for inner in (convolution, Last(linear)):
        net = nn.Sequential(*list(toy_model().net.children())[:2], inner, nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5))  # fmt: skip
        torch.manual_seed(0)
        net[-1].reset_parameters()
        maps.append(explain(Model("one", net.double().eval(), (0.5,) * 3, (0.2,) * 3)))
    torch.testing.assert_close(*maps)


def test_scaled_as_pytorch_grad_cam_the_map_reaches_from_zero_to_almost_one() -> None:
    flat = explain(preset="pgc-1.5").flatten(1)
    assert torch.equal(flat.amin(1), torch.zeros(3, dtype=torch.float64))
    assert ((flat.amax(1) < 1) & (flat.amax(1) > 1 - 1e-6)).all()


def test_without_any_gradient_the_map_is_zero() -> None:
    model = toy_model()
    model.net.get_submodule("6").get_parameter("weight").zero_()
    for params in ({}, {"preset": "pgc-1.5"}, {"preset": "fullgrad-2019"}):
        assert not explain(model, **params).any()


def test_an_image_with_nan_spoils_its_own_map_alone() -> None:
    batch = toy_batch(3)
    images = batch.images.clone()
    images[1, 0, 5, 5] = torch.nan
    broken = explain(batch=replace(batch, images=images))
    assert torch.equal(broken[[0, 2]], explain()[[0, 2]])
    assert broken[1].isnan().all()


def test_the_predicted_class_is_found_before_any_part_is_counted() -> None:
    """A pass of its own among the hooks would add its layers' parts once more."""
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(3), meter=meter)
        method = registry.make("methods", "full_grad")
        needs = registry.make("methods", "grad_cam").needs
        late = Probe(model, toy_batch(3), needs=needs, meter=meter).explain(method).raw
        known = Probe(model, toy_batch(3), target=probe.target).explain(method).raw
    assert torch.equal(late, known)
