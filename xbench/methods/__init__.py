"""Attribution methods: each is one class whose body is its formula."""

from . import (
    attention,
    cams,
    channels,
    controls,
    full_grad,
    gradients,
    libraries,
    opti_cam,
    paths,
    perturbation,
)

__all__ = [
    "attention",
    "cams",
    "channels",
    "controls",
    "full_grad",
    "gradients",
    "libraries",
    "opti_cam",
    "paths",
    "perturbation",
]
