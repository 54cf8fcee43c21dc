"""Attribution methods: each is one class whose body is its formula."""

from . import cams, channels, controls, gradients, perturbation

__all__ = ["cams", "channels", "controls", "gradients", "perturbation"]
