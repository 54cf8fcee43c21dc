"""Laws of the sensitivities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported, UsageError
from xbench.metrics.robustness import relative_change
from xbench.probe import Explanation, Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Model

BOTH = ("max_sensitivity", "avg_sensitivity")


def scores(
    method: str, metric: str = "max_sensitivity", *, model: Model | None = None, count: int = 4,
    method_params: dict[str, Any] | None = None, **params: Any,
) -> Tensor:  # fmt: skip
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(count), meter=meter)
        explanation = probe.explain(registry.make("methods", method, method_params))
        return registry.make("metrics", metric, params)(explanation)


# --- by hand --------------------------------------------------------------------------------------


def test_the_brightness_of_the_image_changes_by_the_noise_itself() -> None:
    """Its map is the mean over channels, so that the change is that of the perturbation."""
    batch, model = toy_batch(3), toy_model()
    probe = Probe(model, batch)
    changes = []
    for draw in range(2):
        channels = [probe.uniform("perturbation", 3 * draw + at) for at in range(3)]
        noise = 0.1 * (2 * sum(channels) / 3 - 1)
        changes.append(noise.flatten(1).norm(dim=1) / batch.images.mean(1).flatten(1).norm(dim=1))
    worst = scores("identity", count=3, radius=0.1, samples=2)
    mean = scores("identity", "avg_sensitivity", count=3, radius=0.1, samples=2)
    assert torch.allclose(worst, torch.maximum(*changes), rtol=1e-9)
    assert torch.allclose(mean, sum(changes) / 2, rtol=1e-9)
    assert (worst > mean).all()


def test_relative_changes_by_hand() -> None:
    maps = torch.tensor([[3, 4], [0, 0], [0, 0], [1e-300, 0], [1e300, 1e300]], dtype=torch.float64)
    others = torch.tensor(
        [[3, -6], [0, 2], [0, 0], [3e-300, 0], [1e300, -1e300]], dtype=torch.float64
    )
    found = relative_change(maps[:, None], others[:, None])
    assert found.tolist() == pytest.approx([10 / 5, 1, 0, 2, 2**0.5])


@given(st.floats(1e-200, 1e200), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_maps_does_not_matter(scale: float, seed: int) -> None:
    one, other = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose(relative_change(one, other), relative_change(scale * one, scale * other))


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", BOTH)
@pytest.mark.parametrize("control", ["random", "centre", "constant", "fake_cam", "oracle"])
def test_a_map_that_ignores_the_image_is_not_sensitive(control: str, metric: str) -> None:
    assert scores(control, metric, samples=2).tolist() == [0] * 4


def test_the_noise_of_the_method_is_not_counted() -> None:
    """Two draws of SmoothGrad of one image differ by far more than a tiny change of the image."""
    params = {"samples": 3}
    near = scores("smooth_grad", method_params=params, radius=1e-7, samples=2)
    model, batch = toy_model(), toy_batch(4)
    with prepared(model.net):
        one, other = (
            Probe(model, batch, seed=seed).explain(registry.make("methods", "smooth_grad", params))
            for seed in (0, 1)
        )
    assert relative_change(one.saliency, other.saliency).min() > 0.05
    assert near.max() < 1e-3


def test_more_samples_never_lower_the_maximum() -> None:
    found = [scores("input_x_gradient", samples=samples) for samples in (1, 2, 5)]
    assert (found[0] <= found[1]).all()
    assert (found[1] <= found[2]).all()
    assert (found[0] < found[2]).any()
    first = scores("input_x_gradient", "avg_sensitivity", samples=1)
    assert torch.equal(first, found[0])


def test_spaces_differ_by_the_deviation_of_the_colours() -> None:
    toy = toy_model()
    grey = Model("grey", toy.net, toy.mean, (0.25,) * 3, toy.layers, toy.size)
    pixels = scores("input_x_gradient", model=grey, radius=0.02, samples=2)
    same = scores("input_x_gradient", model=grey, radius=0.08, samples=2, space="normalised")
    assert torch.allclose(pixels, same, rtol=1e-6)


def test_the_target_stays_where_the_prediction_changes() -> None:
    """The perturbation changes what this network predicts, but not which class is explained."""
    model, batch = toy_model(), toy_batch(32)
    model.net[6].bias -= model.net(model.normalise(batch.images)).mean(0)  # no class stands out
    metric = registry.make("metrics", "max_sensitivity", {"radius": 0.5, "samples": 1})
    gradient = registry.make("methods", "gradient")
    with prepared(model.net):
        probe = Probe(model, batch)
        near = metric.changes.near(probe, 0)
        assert (model.logits(near.inputs).argmax(1) != probe.target).any()
        expected = Probe(model, near.batch, target=probe.target).explain(gradient).saliency
        found = metric(explanation := probe.explain(gradient))
        assert torch.allclose(found, relative_change(explanation.saliency, expected))


def test_an_image_has_its_own_perturbation_whatever_stands_beside_it() -> None:
    found, alone = (scores("input_x_gradient", count=count, samples=2) for count in (4, 1))
    assert torch.allclose(found[:1], alone, rtol=1e-10)


# --- what goes wrong, presets ---------------------------------------------------------------------


@pytest.mark.parametrize("metric", BOTH)
def test_maps_without_their_method_are_unsupported(metric: str) -> None:
    model = toy_model()
    with prepared(model.net):
        given = Explanation(Probe(model, toy_batch(2)), torch.rand(2, 16, 16).double())
        with pytest.raises(Unsupported, match="runs the method again"):
            registry.make("metrics", metric)(given)


def test_both_share_their_perturbed_maps() -> None:
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(2), meter=meter)
        explanation = probe.explain(registry.make("methods", "gradient"))
        registry.make("metrics", "max_sensitivity")(explanation)
        before = probe.spent
        registry.make("metrics", "avg_sensitivity")(explanation)
        assert probe.spent == before


def test_presets_are_their_sources_numbers() -> None:
    for metric, preset, expected in (
        ("max_sensitivity", "captum-0.9", ("normalised", 0.02, 10)),
        ("max_sensitivity", "latec-2024", ("normalised", 0.2, 10)),
        ("max_sensitivity", "quantus-0.6", ("normalised", 0.2, 200)),
        ("avg_sensitivity", "quantus-0.6", ("normalised", 0.2, 200)),
    ):
        made = registry.make("metrics", metric, {"preset": preset})
        assert (made.space, made.radius, made.samples) == expected


def test_wrong_parameters_are_named() -> None:
    for params in ({"radius": 0.0}, {"samples": 0}, {"space": "hsv"}):
        with pytest.raises(UsageError, match=next(iter(params))):
            registry.make("metrics", "max_sensitivity", params)
