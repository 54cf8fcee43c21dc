"""Models: architectures, weights, and what normalisation they want."""

from . import entries

__all__ = ["entries"]
