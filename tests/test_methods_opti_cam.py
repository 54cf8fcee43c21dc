"""Laws of Opti-CAM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.baselines import baseline_image
from xbench.errors import UsageError
from xbench.maps import is_constant, unit_range, upsample
from xbench.methods.opti_cam import OptiCAM
from xbench.probe import LayerGradient, Logits, Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model, Passes

TARGET = torch.tensor([4, 0, 2, 2])
FAST = {"iterations": 20, "learning_rate": 1.0}
"""The four toy images stop at their 9th, 5th, 7th and 7th iteration."""


def run(
    model: Model | None = None,
    batch: Batch | None = None,
    target: Tensor = TARGET,
    **params: Any,
) -> tuple[Tensor, Probe]:
    model, batch = model or toy_model(), batch or toy_batch(4)
    method = registry.make("methods", "opti_cam", params)
    with prepared(model.net) as meter:
        probe = Probe(model, batch, needs=method.needs, target=target, meter=meter)
        return probe.explain(method).raw, probe


def explain(model: Model | None = None, batch: Batch | None = None, **params: Any) -> Tensor:
    return run(model, batch, **params)[0]


def masked_logit(probe: Probe, maps: Tensor) -> Tensor:
    black = baseline_image("black", probe.model, probe.inputs)
    masked = torch.lerp(black, probe.inputs, maps[:, None])
    return probe.at(masked)[Logits()].gather(1, probe.target[:, None])[:, 0]


def mean_feature(probe: Probe, upsampling: Any = "bilinear") -> Tensor:
    """The map of equal weights."""
    features = probe[LayerGradient()][0].relu()
    return unit_range(upsample(features.mean(1), probe.inputs, upsampling))


@pytest.mark.parametrize("upsampling", ["bilinear", "corners", "nearest"])
def test_without_any_gradient_all_weights_stay_equal(upsampling: str) -> None:
    model = toy_model()
    model.net.get_submodule("6").get_parameter("weight").zero_()
    found, probe = run(model, upsampling=upsampling)
    torch.testing.assert_close(found, mean_feature(probe, upsampling), rtol=1e-12, atol=1e-14)


def test_with_one_channel_there_is_nothing_to_optimise() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 1, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(1, 5),
    ).double().eval().requires_grad_(False)  # fmt: skip
    model = Model("one channel", net, (0.5,) * 3, (0.2,) * 3, {"last_conv": "1"})
    found, probe = run(model)
    torch.testing.assert_close(found, mean_feature(probe))


def test_the_masked_images_logit_rises() -> None:
    found, probe = run()
    before = masked_logit(probe, mean_feature(probe))
    assert (masked_logit(probe, found) > before + 1e-3).all()
    assert torch.equal(found.flatten(1).amin(1), torch.zeros(4).double())
    assert torch.equal(found.flatten(1).amax(1), torch.ones(4).double())


def test_with_a_small_step_more_iterations_raise_it_further() -> None:
    logits = []
    for iterations in (1, 5, 20):
        found, probe = run(iterations=iterations, learning_rate=0.01)
        logits.append(masked_logit(probe, found))
    assert (logits[0] < logits[1]).all()
    assert (logits[1] < logits[2]).all()


def test_each_image_stops_by_itself() -> None:
    """A loss added up over the batch would stop all of them at once."""
    batch = toy_batch(4)
    together, whole = run(batch=batch, **FAST)
    spent = []
    for at in range(4):
        copies = Batch(batch.images[[at] * 4], batch.labels[[at] * 4], tuple("abcd"))
        alone, probe = run(batch=copies, target=TARGET[[at] * 4], **FAST)
        spent.append(probe.spent)
        assert torch.equal(alone[0], together[at])  # at one forward shape, to the last bit
    # the clean forward, and each iteration up to the one that finds that the loss has risen
    assert spent == [Passes(1 + steps, steps) for steps in (9, 5, 7, 7)]
    # a batch goes on until its last image has stopped
    assert whole.spent == spent[0]


@pytest.mark.parametrize("iterations", [1, 7, 10, 25])
def test_passes_are_never_more_than_declared(iterations: int) -> None:
    method = registry.make("methods", "opti_cam", {"iterations": iterations, "learning_rate": 3.0})
    model = toy_model()
    assert method.passes(model) == Passes(iterations, iterations)
    _, probe = run(model, iterations=iterations, learning_rate=3.0)
    assert probe.spent.forward <= iterations + 1
    assert probe.spent.backward <= iterations
    assert probe.spent.forward == probe.spent.backward + 1


def test_baselines_differ() -> None:
    maps = [explain(baseline=name) for name in ("black", "mean", "white", "blur")]
    for at, one in enumerate(maps):
        for other in maps[at + 1 :]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("side", [1, 2, 5, 16])
@pytest.mark.parametrize("upsampling", ["bilinear", "corners", "nearest"])
def test_upsampling_by_matrices_is_upsampling(upsampling: Any, side: int) -> None:
    small = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0)).double()
    grow = OptiCAM(upsampling=upsampling).growth
    found = grow(side, 16, small) @ small @ grow(side, 9, small).mT
    expected = upsample(small, torch.empty(2, 3, 16, 9), upsampling)
    torch.testing.assert_close(found, expected)


def test_constant_feature_maps_give_zeros() -> None:
    """Not rounding that min-max has blown up."""
    model = toy_model()
    model.net.get_submodule("2").get_parameter("weight").zero_()  # biases alone
    model.net.get_submodule("2").get_parameter("bias").copy_(torch.rand(8) + 0.1)
    assert not explain(model, iterations=5).any()


def test_a_single_position_gives_zeros() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)
    ).double().requires_grad_(False)  # fmt: skip
    found = explain(Model("narrow", net, layers={"last_conv": "1"}), iterations=5)
    assert is_constant(found).all()
    assert not found.any()


def test_channels_without_features_change_nothing() -> None:
    model, wide = toy_model(), toy_model()
    convolution, head = nn.Conv2d(6, 16, 3, 2, 1).double(), nn.Linear(16, 5).double()
    for new, old in ((convolution, "2"), (head, "6")):
        for name, value in new.named_parameters():
            value.data.zero_()
            own = wide.net.get_submodule(old).get_parameter(name)
            value.data[tuple(slice(0, side) for side in own.shape)] = own
    wide.net[2], wide.net[6] = convolution, head  # type: ignore[index]
    torch.testing.assert_close(explain(wide, iterations=9), explain(model, iterations=9))


def test_an_image_with_nan_spoils_its_own_map_alone() -> None:
    batch = toy_batch(4)
    images = batch.images.clone()
    images[1, 0, 5, 5] = torch.nan
    broken = explain(batch=replace(batch, images=images), **FAST)
    kept = [0, 2, 3]
    assert torch.equal(broken[kept], explain(**FAST)[kept])
    assert broken[1].isnan().all()


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"iterations": 0}, "iterations = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"baseline": "grey"}, "baseline = 'grey'"),
    ],
)
def test_a_wrong_parameter_is_named(params: dict[str, Any], shown: str) -> None:
    with pytest.raises(UsageError, match=shown):
        registry.make("methods", "opti_cam", params)
