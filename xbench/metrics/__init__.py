"""Metrics: each is one class whose body is its formula."""

from . import (
    complexity,
    composites,
    curves,
    faithfulness,
    from_quantus,
    localisation,
    rcap,
    road,
    robustness,
    sanity,
)

__all__ = [
    "complexity",
    "composites",
    "curves",
    "faithfulness",
    "from_quantus",
    "localisation",
    "rcap",
    "road",
    "robustness",
    "sanity",
]
