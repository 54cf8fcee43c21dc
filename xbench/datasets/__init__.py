"""Data sets: images in [0, 1] with labels, stable keys and, where there are any, object masks."""

from . import cifar, folder, shapes

__all__ = ["cifar", "folder", "shapes"]
