"""Attribution methods: each is one class whose body is its formula."""

from . import (
    attention,
    cams,
    controls,
    from_captum,
    from_gradcam,
    full_grad,
    gradient_free,
    gradients,
    opti_cam,
    paths,
    perturbation,
    precomputed,
)

__all__ = [
    "attention",
    "cams",
    "controls",
    "full_grad",
    "gradient_free",
    "gradients",
    "from_captum",
    "from_gradcam",
    "opti_cam",
    "paths",
    "perturbation",
    "precomputed",
]
