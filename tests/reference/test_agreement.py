"""Every method beside an independent implementation; ``python benchmarks/agreement`` prints it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

AGREEMENT = Path(__file__).parents[2] / "benchmarks" / "agreement"
sys.path.insert(0, str(AGREEMENT))

COMPARISONS = [
    comparison
    for path in sorted(AGREEMENT.glob("against_*.py"))
    for comparison in importlib.import_module(path.stem).COMPARISONS
]


@pytest.mark.parametrize(
    "comparison", COMPARISONS, ids=[f"{c.label} - {c.reference}" for c in COMPARISONS]
)
def test_an_entry_agrees_with_its_reference(comparison) -> None:
    assert comparison.difference() <= comparison.tolerance
