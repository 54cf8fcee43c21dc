"""Attribution methods: each is one class whose body is its formula."""

from . import cams, controls, gradients, paths

__all__ = ["cams", "controls", "gradients", "paths"]
