"""The contract, over every built-in entry."""

from __future__ import annotations

from typing import Any

import pytest

from xbench import registry, testing

CHEAP: dict[str, dict[str, Any]] = {
    "captum/FeatureAblation": {"patches": 2},
    "captum/IntegratedGradients": {"n_steps": 3},
    "captum/InternalInfluence": {"n_steps": 3},
    "captum/KernelShap": {"patches": 2, "n_samples": 8},
    "captum/LayerConductance": {"n_steps": 3},
    "captum/LayerFeatureAblation": {"patches": 2},
    "captum/LayerIntegratedGradients": {"n_steps": 3},
    "captum/Lime": {"patches": 2, "n_samples": 8, "alpha": 1e-6},  # else it weighs nothing here
    "captum/Occlusion": {"window": 5, "stride": 4},
    "captum/ShapleyValueSampling": {"patches": 2, "n_samples": 2},
    "gradcam/SESS": {"num_scales": 2},
    "rise": {"samples": 5},
}
"""Parameters for methods whose defaults are dear."""


@pytest.mark.parametrize("name", registry.entries("methods"))
def test_method_keeps_the_contract(name: str) -> None:
    testing.check_method(name, CHEAP.get(name))


@pytest.mark.parametrize("name", registry.entries("metrics"))
def test_metric_keeps_the_contract(name: str) -> None:
    testing.check_metric(name)


def test_embedded_model_keeps_the_contract() -> None:
    testing.check_model("shapes/resnet", side=64)


def test_generated_data_set_keeps_the_contract() -> None:
    testing.check_dataset("shapes")
