"""Attribution methods: each is one class whose body is its formula."""

from . import cams, controls, gradients

__all__ = ["cams", "controls", "gradients"]
