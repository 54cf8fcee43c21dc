"""Attribution methods: each is one class whose body is its formula."""

from . import cams, channels, controls, full_grad, gradients, opti_cam, perturbation

__all__ = ["cams", "channels", "controls", "full_grad", "gradients", "opti_cam", "perturbation"]
