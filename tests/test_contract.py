"""The contract, over every built-in entry."""

from __future__ import annotations

import pytest

from xbench import registry, testing


@pytest.mark.parametrize("name", registry.entries("methods"))
def test_method_keeps_the_contract(name: str) -> None:
    testing.check_method(name)


@pytest.mark.parametrize("name", registry.entries("metrics"))
def test_metric_keeps_the_contract(name: str) -> None:
    testing.check_metric(name)


def test_embedded_model_keeps_the_contract() -> None:
    testing.check_model("shapes/resnet", side=64)


def test_generated_data_set_keeps_the_contract() -> None:
    testing.check_dataset("shapes")
