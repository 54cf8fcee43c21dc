"""Laws of the regularisers, on toy networks in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xbench import registry
from xbench.autograd import frozen_statistics, fused_batch_norm
from xbench.errors import Unsupported, UsageError
from xbench.training import regularisers
from xbench.training.step import Step, cosine


def network(activation: Callable[[], nn.Module] = nn.ReLU, *, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), activation(),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6) if norm else nn.Identity(), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).double().train()  # fmt: skip


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=generator)
    return inputs, torch.arange(count) % 5


def step_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> Step:
    inputs = inputs.detach().requires_grad_()
    with fused_batch_norm():
        logits = net(inputs)
    mean, std = inputs.new_full((1, 3, 1, 1), 0.5), inputs.new_full((1, 3, 1, 1), 0.25)
    losses = criterion(logits, labels)
    return Step(net, net, inputs, labels, logits, losses, criterion, mean, std)


GRADIENT_TYPE = [
    {"name": "interpretable_gradients"},
    {"name": "interpretable_gradients", "error": "mae"},
    {"name": "interpretable_gradients", "error": "mse"},
    {"name": "interpretable_gradients", "error": "histogram"},
    {"name": "interpretable_gradients", "error": "histogram", "normalised": True},
    {"name": "interpretable_gradients", "error": "mse", "scaling": "batch"},
    {"name": "double_backpropagation", "weight": 1.0},
    {"name": "double_backpropagation", "weight": 1.0, "norm": "l1"},
    {"name": "input_gradient_norm", "weight": 1.0},
    {"name": "input_gradient_norm", "weight": 1.0, "norm": "l1"},
]


def made(params: dict[str, Any]) -> Any:
    rest = {key: value for key, value in params.items() if key != "name"}
    return registry.make("regularisers", params["name"], rest)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6], ids=["ReLU", "ReLU6"])
@pytest.mark.parametrize("params", GRADIENT_TYPE, ids=lambda p: "-".join(map(str, p.values())))
def test_weight_gradients_are_finite_differences_with_the_teacher_held_fixed(
    params: dict[str, Any], activation: Callable[[], nn.Module]
) -> None:
    """Central differences along random directions; 1e-6 is what their own error leaves."""
    net, regulariser = network(activation), made(params)
    inputs, labels = batch()
    step = step_of(net, inputs, labels)
    value = regulariser(step)
    weights = list(net.parameters())
    gradients = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
    teacher = vars(step).get("guided_gradient")

    def at(shift: float, directions: list[Tensor]) -> float:
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += shift * direction
        moved = step_of(net, inputs, labels)
        if teacher is not None:
            vars(moved)["guided_gradient"] = teacher
        found = regulariser(moved).item()
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight -= shift * direction
        return float(found)

    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        directions = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in weights]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        measured = (at(1e-6, directions) - at(-1e-6, directions)) / 2e-6
        assert measured == pytest.approx(slope, rel=1e-5, abs=1e-7 * abs(value.item()))
        assert abs(slope) > 1e-9


# --- error functions ------------------------------------------------------------------------------


def pair(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, count, 48, dtype=dtype, generator=generator)
    return one, other


@pytest.mark.parametrize(
    ("error", "power"),
    [("mae", 1), ("mse", 2), ("cosine", 0), ("histogram", -1), ("histogram_normalised", 0)],
)
@pytest.mark.parametrize("scale", [1 / 128, 1e-30, 1e4])
def test_an_error_scales_with_the_gradients_as_specified(
    error: str, power: int, scale: float
) -> None:
    one, other = pair()
    before = regularisers.ERRORS[error](one, other)
    after = regularisers.ERRORS[error](scale * one, scale * other)
    torch.testing.assert_close(after, before * scale**power, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1e-30, 1.0, 1e12])
def test_cosine_holds_for_tiny_and_huge_gradients_in_float32(scale: float) -> None:
    one, other = pair(dtype=torch.float32)
    expected = functional.cosine_similarity(one.double(), other.double(), dim=1)
    found = cosine(scale * one, scale * other).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_errors_of_a_gradient_with_itself() -> None:
    one, _ = pair()
    norm1 = one.abs().sum(1)
    ones = torch.ones_like(norm1)
    expected = {
        "cosine": -ones,
        "mae": 0 * ones,
        "mse": 0 * ones,
        "histogram": -1 / norm1,
        "histogram_normalised": -ones,
    }
    for error, value in expected.items():
        torch.testing.assert_close(regularisers.ERRORS[error](one, one), value)


def test_errors_by_hand() -> None:
    one = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    other = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    expected = {
        "cosine": 0.0,
        "mae": (1 + 7) / 2,
        "mse": (1 + 49) / 2,
        "histogram": -(3 + 3) / 49,
        "histogram_normalised": -(3 / 7 + 3 / 7),
    }
    for error, value in expected.items():
        assert regularisers.ERRORS[error](one, other).item() == pytest.approx(value), error


@pytest.mark.parametrize("error", ["cosine", "histogram", "histogram_normalised"])
@pytest.mark.parametrize("zero", ["gradient", "guided", "both"])
def test_a_zero_gradient_adds_nothing_and_sends_nothing_back(error: str, zero: str) -> None:
    one, other = pair(2)
    one[0] *= zero == "guided"
    other[0] *= zero == "gradient"
    one.requires_grad_()
    values = regularisers.ERRORS[error](one, other)
    values.sum().backward()
    assert values[0] == 0
    assert values[1] != 0
    assert one.grad is not None
    assert one.grad.isfinite().all()
    assert (one.grad[0] == 0).all()


def test_a_step_counts_images_without_gradient() -> None:
    net = network(norm=False)
    inputs, labels = batch()
    step = step_of(net, inputs, labels)
    assert step.alignment is None
    assert step.gradient.shape == step.guided_gradient.shape
    vars(step)["gradient"] = step.gradient.detach().clone()
    step.gradient[1] = 0
    assert step.alignment is not None
    assert step.alignment.isnan().tolist() == [False, True, False, False, False]


# --- the guided gradient of the loss --------------------------------------------------------------


class Guided(torch.autograd.Function):
    """The rule written out; ``ceiling`` is 6 for ReLU6."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.ceiling = ceiling
        return u.clamp(0, ceiling)

    @staticmethod
    def backward(ctx: Any, dv: Tensor) -> Any:
        (u,) = ctx.saved_tensors
        return ((u > 0) & (u < ctx.ceiling)) * dv.clamp_min(0), None


class GuidedModule(nn.Module):
    def __init__(self, ceiling: float) -> None:
        super().__init__()
        self.ceiling = ceiling

    def forward(self, u: Tensor) -> Tensor:
        return Guided.apply(u, self.ceiling)


@pytest.mark.parametrize(
    ("activation", "ceiling"), [(nn.ReLU, math.inf), (nn.ReLU6, 6.0)], ids=["ReLU", "ReLU6"]
)
def test_the_guided_gradient_of_the_loss_is_the_rule_written_out(
    activation: Callable[[], nn.Module], ceiling: float
) -> None:
    net, written = network(activation), network(lambda: GuidedModule(ceiling))
    for one in (net, written):  # so that ReLU6 reaches its ceiling
        one[1].weight.data.fill_(4.0)
    inputs, labels = batch()
    inputs = inputs.requires_grad_()
    expected = torch.autograd.grad(criterion(written(inputs), labels).sum(), inputs)[0]
    step = step_of(net, inputs, labels)
    torch.testing.assert_close(step.guided_gradient, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(step.gradient, expected)
    assert not step.guided_gradient.requires_grad


def test_the_guided_gradient_agrees_with_captum() -> None:
    """Captum differentiates one output of a module: the loss is made one."""
    from captum.attr import GuidedBackprop

    net = network().eval()
    inputs, labels = batch()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return criterion(self.net(x), labels)[:, None]

    with pytest.warns(UserWarning, match="backward hooks"):
        theirs = GuidedBackprop(Loss()).attribute(inputs.clone().requires_grad_(), target=0)
    ours = step_of(net, inputs, labels).guided_gradient
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_functional_and_in_place_relus_are_guided_too() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(x)

    inputs, labels = batch()
    expected = step_of(network(), inputs, labels).guided_gradient
    for activation in (Functional, lambda: nn.ReLU(inplace=True)):
        found = step_of(network(activation), inputs, labels).guided_gradient
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", [nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Hardtanh])
def test_a_network_without_relu_is_refused_and_leaves_nothing_behind(
    activation: Callable[[], nn.Module],
) -> None:
    net = network(activation)
    inputs, labels = batch()
    step = step_of(net, inputs, labels)
    with pytest.raises(Unsupported, match="ReLU"):
        made({"name": "interpretable_gradients"})(step)
    assert all(not module._forward_hooks and not module._backward_hooks for module in net.modules())


def test_an_error_inside_leaves_the_graph_with_its_own_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, labels = batch()
    step = step_of(network(), inputs, labels)
    expected = step.gradient.detach().clone()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("inside the rule")

    with monkeypatch.context() as patch:
        patch.setattr("xbench.training.step.loss_gradient", fail)
        with pytest.raises(RuntimeError, match="inside the rule"):
            _ = step.guided_gradient
    again = torch.autograd.grad(step.losses.sum(), step.inputs, retain_graph=True)[0]
    assert torch.equal(again, expected)


def test_in_evaluation_mode_an_image_does_not_feel_its_neighbours() -> None:
    net = network().eval()
    inputs, labels = batch()
    whole = step_of(net, inputs, labels)
    regulariser = made({"name": "interpretable_gradients"})
    alone = [regulariser(step_of(net, inputs[i : i + 1], labels[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(regulariser(whole), torch.stack(alone).mean())


def test_batch_scaling_divides_both_gradients_by_the_number_of_images() -> None:
    inputs, labels = batch()
    net = network()
    for error, power in (("mae", 1), ("mse", 2), ("cosine", 0), ("histogram", -1)):
        own = made({"name": "interpretable_gradients", "error": error})
        mean = made({"name": "interpretable_gradients", "error": error, "scaling": "batch"})
        expected = own(step_of(net, inputs, labels)) * 5.0**-power
        torch.testing.assert_close(mean(step_of(net, inputs, labels)), expected)


def test_only_the_histogram_can_be_normalised() -> None:
    with pytest.raises(UsageError, match="option of the error histogram"):
        made({"name": "interpretable_gradients", "normalised": True})


# --- sizes of gradients ---------------------------------------------------------------------------


def test_sizes_of_gradients_on_a_linear_network_are_those_of_its_weights() -> None:
    """The logit's gradient is the weight row; the loss's is the rows' mixture by p - onehot."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    inputs, labels = batch()
    step = step_of(net, inputs, labels)
    rows = net[1].weight.detach()
    chosen = rows[labels]
    mixed = (step.logits.detach().softmax(1) - functional.one_hot(labels, 5)) @ rows
    for name, vectors in (("input_gradient_norm", chosen), ("double_backpropagation", mixed)):
        l2 = made({"name": name, "weight": 1.0})(step)
        l1 = made({"name": name, "weight": 1.0, "norm": "l1"})(step)
        torch.testing.assert_close(l2, vectors.square().sum(1).mean())
        torch.testing.assert_close(l1, vectors.abs().sum(1).mean())


# --- adversarial ----------------------------------------------------------------------------------


def adversarial_step(net: nn.Module) -> Step:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=generator)
    return step_of(net, (pixels - 0.5) / 0.25, torch.arange(5))


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_adversarial_image_is_near_valid_and_worse(attack: str) -> None:
    net = network()
    step = adversarial_step(net)
    statistics = net[1].running_mean.clone()
    regulariser = made({"name": "adversarial", "attack": attack, "radius": 0.05})
    found = regulariser._worst(step)
    pixels = found * step.std + step.mean
    clean = step.inputs.detach() * step.std + step.mean
    assert (pixels - clean).abs().max() <= 0.05 + 1e-12
    assert pixels.min() >= -1e-12
    assert pixels.max() <= 1 + 1e-12
    assert torch.equal(net[1].running_mean, statistics)
    assert net.training
    with frozen_statistics(net):
        assert step.losses_at(found).mean() > step.losses_at(step.inputs).mean()


def test_fgsm_on_a_linear_network_moves_every_pixel_by_the_sign_of_its_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    step = adversarial_step(net)
    inside = ((step.inputs * step.std + step.mean) * 0.8 + 0.1 - step.mean) / step.std
    step = step_of(net, inside, step.labels)
    found = made({"name": "adversarial", "attack": "fgsm", "radius": 0.05})._worst(step)
    expected = step.inputs + 0.05 / 0.25 * step.gradient.sign()
    torch.testing.assert_close(found, expected)


def test_weight_one_leaves_the_adversarial_loss_alone() -> None:
    net = network(norm=False)
    step = adversarial_step(net)
    regulariser = made({"name": "adversarial", "attack": "fgsm"})
    total = step.losses.mean() + regulariser(step)
    torch.testing.assert_close(total, step.losses_at(regulariser._worst(step)).mean())


def test_random_starts_of_pgd_follow_the_seed() -> None:
    step = adversarial_step(network())
    regulariser = made({"name": "adversarial", "steps": 1})
    torch.manual_seed(4)
    one = regulariser._worst(step)
    torch.manual_seed(4)
    assert torch.equal(regulariser._worst(step), one)
    assert not torch.equal(regulariser._worst(step), one)
