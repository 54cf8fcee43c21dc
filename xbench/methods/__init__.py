"""Attribution methods: each is one class whose body is its formula."""

from . import (
    attention,
    cams,
    controls,
    full_grad,
    gradient_free,
    gradients,
    libraries,
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
    "libraries",
    "opti_cam",
    "paths",
    "perturbation",
    "precomputed",
]
