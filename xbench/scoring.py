"""From a metric and an explanation to one value and one status per image."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .maps import is_constant, with_sign
from .probe import Explanation


def evaluated(metric: Any, explanation: Explanation) -> list[tuple[float, str]]:
    """(value, status) of each image, without the probe's filling.

    * ``ok``.
    * ``degenerate``: scored, but the map is constant as the metric reads it.
    * ``failed: nonfinite``, or the method's word for it: the map holds NaN or infinity and is not
      scored.
    * the metric's ``undefined``: it returned NaN, its word for "undefined here"; where it declares
      none, or returns infinity, ``failed: nonfinite score``.

    Raises:
        ValueError: if the metric does not return one score per image.
    """
    probe = explanation.probe
    with probe.meter.padded(probe.real, probe.rows):
        values = metric(explanation)
    if not isinstance(values, Tensor) or tuple(values.shape) != (probe.rows,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"metric {metric.name!r} must return one score per image, shape ({probe.rows},), "
            f"but got {got}"
        )
    undefined = getattr(metric, "undefined", "failed: nonfinite score")
    constant = is_constant(with_sign(explanation.saliency, getattr(metric, "sign", "signed")))
    outcomes = []
    for value, finite, is_flat in zip(
        values.detach().double()[: probe.real].tolist(),
        explanation.finite.tolist(),
        constant.tolist(),
        strict=False,
    ):
        if not finite:
            outcomes.append((math.nan, explanation.nonfinite))
        elif math.isnan(value):
            outcomes.append((math.nan, undefined))
        elif math.isinf(value):
            outcomes.append((math.nan, "failed: nonfinite score"))
        else:
            outcomes.append((value, "degenerate" if is_flat else "ok"))
    return outcomes
