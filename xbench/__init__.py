"""xbench: evaluate explanations of image classifiers.

Three functions for notebooks (:func:`attribute`, :func:`score`, :func:`evaluate`), five decorators
for plug-ins (:func:`method`, :func:`metric`, :func:`model`, :func:`dataset`, :func:`regulariser`),
and the types that they meet. Names are loaded on first use, so that importing the package costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attribute, evaluate, score
    from .errors import BadImage, Unsupported, XbenchError
    from .masking import masked_probabilities
    from .probe import Explanation, ImageGradient, LayerGradient, Logits, Need, Probe
    from .registry import dataset, method, metric, model, regulariser
    from .sweeps import GuidedGradient, NoisyGradients
    from .types import Batch, Model, Network, Passes, Sample

_HOMES = {
    "api": ("attribute", "evaluate", "score"),
    "errors": ("BadImage", "Unsupported", "XbenchError"),
    "masking": ("masked_probabilities",),
    "probe": ("Explanation", "ImageGradient", "LayerGradient", "Logits", "Need", "Probe"),
    "registry": ("dataset", "method", "metric", "model", "regulariser"),
    "sweeps": ("GuidedGradient", "NoisyGradients"),
    "types": ("Batch", "Model", "Network", "Passes", "Sample"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "BadImage",
    "Explanation",
    "GuidedGradient",
    "ImageGradient",
    "LayerGradient",
    "Logits",
    "Model",
    "Need",
    "Network",
    "NoisyGradients",
    "Passes",
    "Probe",
    "Sample",
    "Unsupported",
    "XbenchError",
    "attribute",
    "dataset",
    "evaluate",
    "masked_probabilities",
    "method",
    "metric",
    "model",
    "regulariser",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'xbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
