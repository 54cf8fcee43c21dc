"""Laws of coherency, complexity and the harmonic means that they are part of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import unit_range
from xbench.metrics.composites import correlation, harmonic_mean
from xbench.probe import Explanation, MapOf, Probe, method_cost
from xbench.scoring import evaluated
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model, Passes

TARGET = torch.tensor([4, 0, 2, 2])


def scores(method: str, *metrics: Any, model: Model | None = None) -> list[Tensor]:
    """Of four toy images; a metric is a name, or a name and its parameters."""
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), target=TARGET, meter=meter)
        explanation = probe.explain(registry.make("methods", method))
        pairs = [metric if isinstance(metric, tuple) else (metric, {}) for metric in metrics]
        return [registry.make("metrics", name, params)(explanation) for name, params in pairs]


# --- by hand --------------------------------------------------------------------------------------


def test_complexity_is_the_mean_of_the_scaled_map() -> None:
    model, batch = toy_model(), toy_batch(2, side=2)
    maps = torch.tensor([[[1, 3], [5, -1]], [[2, 2], [2, 2]]], dtype=torch.float64)
    with prepared(model.net):
        explanation = Explanation(Probe(model, batch), maps)
        for sign, expected in (
            ("signed", [0.5, 0]),  # 2, 4, 6, 0 of 6
            ("magnitude", [(0 + 2 + 4 + 0) / 4 / 4, 0]),
            ("positive", [(1 + 3 + 5) / 5 / 4, 0]),
        ):
            found = registry.make("metrics", "complexity", {"sign": sign})(explanation)
            assert found.tolist() == pytest.approx(expected)


def test_harmonic_means_are_known_by_hand_and_zero_where_a_part_is() -> None:
    parts = [torch.tensor(part).double() for part in ([1.0, 0.5], [1.0, 0.25], [1.0, 0.0])]
    assert harmonic_mean(*parts).tolist() == [1, 0]
    assert float(harmonic_mean(*(part[1:] for part in parts[:2]))) == pytest.approx(1 / 3)


def test_correlation_is_numpys_and_zero_beside_a_constant_map() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4, 5, 5, generator=generator).double() for _ in range(2))
    expected = [
        np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(correlation(one, other), expected, rtol=1e-12)
    torch.testing.assert_close(correlation(one, 3 * one + 7), torch.ones(4).double())
    torch.testing.assert_close(correlation(one * 1e-200, -one), -torch.ones(4).double())
    flat = torch.full((4, 5, 5), 0.1).double()
    assert correlation(one, flat).tolist() == correlation(flat, flat).tolist() == [0] * 4


# --- by property ----------------------------------------------------------------------------------


def test_a_method_that_ignores_the_image_is_perfectly_coherent() -> None:
    for control in ("random", "centre"):
        (found,) = scores(control, "coherency")
        torch.testing.assert_close(found, torch.ones(4).double())
    (constant,) = scores("constant", "coherency")
    assert constant.tolist() == [0.5] * 4


def test_coherency_compares_with_the_map_of_the_masked_image() -> None:
    model, batch = toy_model(), toy_batch(4)
    method = registry.make("methods", "gradient")
    (found,) = scores("gradient", "coherency")
    with prepared(model.net):
        maps = Probe(model, batch, target=TARGET).explain(method).raw
        masked = Batch(unit_range(maps)[:, None] * batch.images, batch.labels, batch.keys)
        again = Probe(model, masked, target=TARGET).explain(method).raw
    expected = [
        (np.corrcoef(a.flatten(), b.flatten())[0, 1] + 1) / 2
        for a, b in zip(maps, again, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_class_that_is_explained_stays_that_of_the_clean_image() -> None:
    """Black may look like another class; the map of the masked image is of the first one."""
    model = toy_model()
    seen = []

    class Watches:
        name = "watches"

        def passes(self, model: Model) -> Passes:
            return Passes()

        def __call__(self, probe: Probe) -> Tensor:
            seen.append(probe.target.clone())
            return probe.inputs.abs().sum(1)

    with prepared(model.net):
        probe = Probe(model, toy_batch(4))
        explanation = probe.explain(Watches())
        registry.make("metrics", "coherency")(explanation)
    assert torch.equal(seen[0], seen[1])


def test_adcc_is_the_harmonic_mean_of_its_parts() -> None:
    adcc, coherency, complexity, drop = scores(
        "grad_cam", "adcc", "coherency", "complexity", "average_drop"
    )
    expected = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop / 100))
    torch.testing.assert_close(adcc, expected)
    assert ((adcc > 0) & (adcc < 1)).all()


def test_arcc_is_the_harmonic_mean_of_its_parts_and_no_other_mean() -> None:
    levels = {"levels": (0.2, 0.4, 0.6, 0.8), "sign": "magnitude"}
    arcc, coherency, complexity, road = scores(
        "integrated_gradients", "arcc", "coherency", "complexity", ("road", levels)
    )
    third = (2 * road).clamp(0, 1)
    assert third.any()
    expected = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / third)
    torch.testing.assert_close(arcc, expected)
    (padded,) = scores("integrated_gradients", ("arcc", {"epsilon": 0.01}))
    parts = [part + 0.01 for part in (coherency, 1 - complexity, third)]
    torch.testing.assert_close(padded, 3 / sum(1 / part for part in parts))


@pytest.mark.parametrize("name", ["adcc", "coherency", "complexity"])
def test_adcc_2021_blends_into_the_mean_colour(name: str) -> None:
    params = registry.find("metrics", name).presets["adcc-2021"]
    assert params["sign"] == "signed"
    assert params.get("baseline", "mean") == "mean"


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("gradient", {}),
        ("grad_cam", {}),
        ("smooth_grad", {"samples": 3}),
        ("integrated_gradients", {"steps": 4}),
        ("random", {}),
        ("inverted", {"of": "grad_cam"}),
        ("score_cam", {}),
    ],
)
def test_running_the_method_again_costs_what_it_costs_alone(method: str, params: Any) -> None:
    """Beside the clean pass of the masked images; the parts of a composite share it."""
    model = toy_model()
    made = registry.make("methods", method, params)
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), needs=[MapOf(made)], target=TARGET, meter=meter)
        explanation = probe.explain(made)
        assert probe.probability.isfinite().all()
        before = probe.spent
        registry.make("metrics", "coherency")(explanation)
        alone = method_cost(made, model, beside=()) or Passes()
        spent = probe.spent
        assert spent.forward - before.forward == max(alone.forward, 1)
        assert spent.backward - before.backward == alone.backward
        registry.make("metrics", "average_drop")(explanation)
        registry.make("metrics", "adcc")(explanation)
        assert probe.spent == spent.plus(Passes(1, 0))


# --- documented values ----------------------------------------------------------------------------


def test_a_method_without_a_finite_map_of_the_masked_image_is_undefined_there() -> None:
    class Breaks:
        name = "breaks"
        calls = 0

        def passes(self, model: Model) -> Passes:
            return Passes()

        def __call__(self, probe: Probe) -> Tensor:
            self.calls += 1
            maps = probe.inputs.sum(1)
            if self.calls > 1:
                maps[1, 0, 0] = math.nan
            return maps

    for name in ("coherency", "adcc", "arcc"):
        metric = registry.make("metrics", name)
        model = toy_model()
        with prepared(model.net):
            explanation = Probe(model, toy_batch(4)).explain(Breaks())
            statuses = [status for _, status in evaluated(metric, explanation)]
        assert "the map of the masked image is not finite" in statuses[1]
        assert [statuses[at] for at in (0, 2, 3)] == ["ok"] * 3


def test_adcc_is_undefined_without_a_probability() -> None:
    model = toy_model()
    net = model.net
    net[-1].bias.data[0] -= 60  # type: ignore[index,union-attr,operator]
    with prepared(net):
        probe = Probe(model, toy_batch(4), target=torch.tensor([0, 1, 2, 3]))
        explanation = probe.explain(registry.make("methods", "gradient"))
        outcomes = evaluated(registry.make("metrics", "adcc"), explanation)
    assert outcomes[0][1].startswith("undefined: p < 1e-6")
    assert [status for _, status in outcomes[1:]] == ["ok"] * 3
