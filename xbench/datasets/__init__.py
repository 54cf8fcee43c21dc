"""Data sets: images in [0, 1] with labels, stable keys and, where there are any, object masks."""

from . import cifar, cub, folder, huggingface, imagenet, imagenet_s, isic, pet, places365, shapes

__all__ = [
    "cifar",
    "cub",
    "folder",
    "huggingface",
    "imagenet",
    "imagenet_s",
    "isic",
    "pet",
    "places365",
    "shapes",
]
