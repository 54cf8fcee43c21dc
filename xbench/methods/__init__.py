"""Attribution methods: each is one class whose body is its formula."""

from . import attention, cams, controls, gradients

__all__ = ["attention", "cams", "controls", "gradients"]
