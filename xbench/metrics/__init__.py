"""Metrics: each is one class whose body is its formula."""

from . import complexity, curves, faithfulness, localisation, rcap

__all__ = ["complexity", "curves", "faithfulness", "localisation", "rcap"]
