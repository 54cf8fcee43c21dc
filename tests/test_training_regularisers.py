"""Laws of the regularisers, on toy networks in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xbench import registry
from xbench.autograd import fused_batch_norm
from xbench.training.step import Step


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
