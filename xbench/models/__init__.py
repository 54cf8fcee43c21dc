"""Models: architectures, weights, and what normalisation they want."""

from . import entries, pretrained

__all__ = ["entries", "pretrained"]
