"""The contract, over every built-in entry."""

from __future__ import annotations

from typing import Any

import pytest

from xbench import registry, testing

CHEAP: dict[str, dict[str, Any]] = {"rise": {"samples": 5}}
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
