"""Metrics: each is one class whose body is its formula."""

from . import curves, faithfulness, localisation, rcap

__all__ = ["curves", "faithfulness", "localisation", "rcap"]
