"""Laws of class activation maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import is_constant, unit_range, upsample
from xbench.probe import LayerGradient, Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Model

CAMS = ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam")
TARGET = torch.tensor([4, 0, 2])


def explain(name: str, model: Model | None = None, **params: Any) -> Tensor:
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(3), target=TARGET, meter=meter)
        return probe.explain(registry.make("methods", name, params)).raw


def layer(model: Model | None = None, path: str = "last_conv") -> tuple[Tensor, Tensor]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        return Probe(model, toy_batch(3), target=TARGET, meter=meter)[LayerGradient(path)]


def cam(name: str, activation: Tensor, gradient: Tensor) -> Tensor:
    found: Tensor = registry.make("methods", name).cam(activation, gradient)
    return found


# --- by hand --------------------------------------------------------------------------------------

A = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]], dtype=torch.float64)  # two channels of 1 x 2
G = torch.tensor([[[[2.0, -1.0]], [[-4.0, 1.0]]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grad_cam", [0.5 * 1 - 1.5 * 2, 0.5 * 3]),  # mean gradients 0.5 and -1.5
        # 1 / (2 + g sum A) = 1/10 and 1/4 for the positive gradients 2 and 1
        ("grad_cam_plus_plus", [0.2 * 1 + 0.25 * 2, 0.2 * 3]),
        ("xgrad_cam", [-0.25 * 1 - 4 * 2, -0.25 * 3]),  # (2 - 3) / 4 and -8 / 2
        ("hires_cam", [2 - 8, -3]),
        ("layer_cam", [2, 0]),
    ],
)
def test_a_cam_of_two_channels_is_known_by_hand(name: str, expected: list[float]) -> None:
    found = cam(name, A, G)
    torch.testing.assert_close(found, torch.tensor([[expected]], dtype=torch.float64))


def test_grad_cam_plus_plus_is_the_printed_equation() -> None:
    """w = g^2 / (2 g^2 + g^3 sum A), zero where g = 0, times the positive part of g."""
    activation, gradient = layer(path="1")
    gradient = gradient.clone()
    gradient[0, 0, :3] = 0
    square, cube = gradient**2, gradient**3
    share = square / (2 * square + cube * activation.sum((2, 3), keepdim=True))
    share[gradient == 0] = 0
    weight = (share * gradient.clamp(min=0)).sum((2, 3), keepdim=True)
    expected = (weight * activation).sum(1)
    torch.testing.assert_close(cam("grad_cam_plus_plus", activation, gradient), expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30])
def test_grad_cam_plus_plus_has_no_smallest_gradient(scale: float) -> None:
    """Where sum A is small, w tends to 1/2: no square underflows and nothing is added to it."""
    activation, gradient = layer()
    found = cam("grad_cam_plus_plus", activation * 1e-60, gradient * scale)
    weight = (gradient * scale).clamp(min=0).sum((2, 3), keepdim=True) / 2
    torch.testing.assert_close(found * 1e60 / scale, (weight / scale * activation).sum(1))


def test_an_xgrad_cam_channel_that_adds_up_to_zero_has_no_weight() -> None:
    activation = A.clone()
    activation[0, 0] = torch.tensor([[2.0, -2.0]])
    expected = -4 * activation[0, 1]
    torch.testing.assert_close(cam("xgrad_cam", activation, G)[0], expected)


# --- by property ----------------------------------------------------------------------------------


def test_before_pooling_and_a_linear_layer_cam_is_grad_xgrad_and_hires_cam() -> None:
    """CAM itself: the classifier's weights of the target, over the feature maps."""
    model = toy_model()
    activation, gradient = layer(model)
    weight = model.net.get_submodule("6").get_parameter("weight")[TARGET]
    by_classifier = torch.einsum("nc,nchw->nhw", weight, activation) / activation[0, 0].numel()
    for name in ("grad_cam", "xgrad_cam", "hires_cam"):
        torch.testing.assert_close(cam(name, activation, gradient), by_classifier)
    maps = [explain(name) for name in ("grad_cam", "xgrad_cam", "hires_cam")]
    expected = upsample(by_classifier.relu(), like=toy_batch(3).images)
    for found in maps:
        torch.testing.assert_close(unit_range(found), unit_range(expected))


def test_elsewhere_they_differ() -> None:
    maps = [unit_range(explain(name, layer="1")) for name in CAMS]
    for at, one in enumerate(maps):
        for other in maps[at + 1 :]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", CAMS)
def test_a_cam_is_the_upsampled_positive_part_of_its_sum(name: str) -> None:
    small = cam(name, *layer(path="1")).relu()
    found = explain(name, layer="1")
    assert torch.equal(found, upsample(small, like=toy_batch(3).images))
    assert found.min() >= 0
    assert found.shape == (3, 16, 16)


@pytest.mark.parametrize("name", CAMS)
def test_the_layer_is_a_role_or_a_path(name: str) -> None:
    assert torch.equal(explain(name), explain(name, layer="3"))
    assert not torch.equal(explain(name), explain(name, layer="1"))


@pytest.mark.parametrize("name", ["grad_cam", "xgrad_cam", "hires_cam", "layer_cam"])
def test_a_cam_grows_with_the_gradient(name: str) -> None:
    activation, gradient = layer(path="1")
    torch.testing.assert_close(
        cam(name, activation, 3 * gradient), 3 * cam(name, activation, gradient)
    )


def test_xgrad_cam_conserves_the_sum_of_gradient_times_activation() -> None:
    """Fu et al.'s axiom: a channel's map adds up to its part of the first-order expansion."""
    activation, gradient = layer(path="1")
    total = cam("xgrad_cam", activation, gradient).sum((1, 2))
    torch.testing.assert_close(total, (gradient * activation).sum((1, 2, 3)))


def test_layer_cam_of_positive_gradients_is_hires_cam() -> None:
    activation, gradient = layer(path="1")
    gradient = gradient.abs()
    assert torch.equal(
        cam("layer_cam", activation, gradient), cam("hires_cam", activation, gradient)
    )


def test_layer_cam_cuts_negative_gradients_not_negative_activations() -> None:
    activation, gradient = A.clone(), G.clone()
    activation[0, 0, 0, 0] = -3
    assert cam("layer_cam", activation, gradient).tolist() == [[[2 * -3, 0]]]
    assert cam("hires_cam", activation, gradient).tolist() == [[[2 * -3 - 8, -3]]]


@pytest.mark.parametrize("name", CAMS)
def test_without_any_gradient_a_cam_is_zero(name: str) -> None:
    model = toy_model()
    head = model.net.get_submodule("6")
    assert isinstance(head, nn.Linear)
    head.weight.zero_()
    assert not explain(name, model).any()


@pytest.mark.parametrize("name", CAMS)
def test_the_cam_of_a_single_position_is_constant(name: str) -> None:
    """Rounding of the upsampling must not look like a map."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)
    ).double().requires_grad_(False)  # fmt: skip
    for parameter in net.parameters():
        parameter.abs_().add_(0.1)  # so that no map is zero
    found = explain(name, Model("narrow", net, layers={"last_conv": "1"}))
    assert found.min() > 0
    assert is_constant(found).all()
