"""Attribution methods: each is one class whose body is its formula."""

from . import cams, controls, full_grad, gradients, opti_cam

__all__ = ["cams", "controls", "full_grad", "gradients", "opti_cam"]
