"""One comparison of a method with an independent implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.probe import Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

TARGET = torch.tensor([4, 0, 2, 2])
"""Classes that are explained, one for each of the four images of :func:`explained`."""


@dataclass(frozen=True)
class Comparison:
    """A method or metric beside somebody else's result.

    Args:
        name: as registered.
        reference: what it is compared with, such as "captum Saliency" or "definition, by a loop".
        compute: gives (ours, theirs), tensors of one shape, preferably float64.
        params: of the method, where they are not the defaults.
        tolerance: largest relative difference that the test allows.
        reason: why any difference beyond rounding remains; empty where none does.
        kind: "methods" or "metrics".
    """

    name: str
    reference: str
    compute: Callable[[], tuple[Tensor, Tensor]]
    params: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9
    reason: str = ""
    kind: str = "methods"

    @property
    def label(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}({given})" if given else self.name

    def difference(self) -> float:
        """Largest absolute difference, relative to the reference's largest absolute value.

        Of maps, the worst image counts; a reference map of zeros must be met exactly.
        """
        ours, theirs = (tensor.detach().double() for tensor in self.compute())
        if ours.shape != theirs.shape:
            raise ValueError(f"{self.label}: {tuple(ours.shape)} against {tuple(theirs.shape)}")
        if not theirs.any():
            raise ValueError(f"{self.label}: the reference is zero everywhere and shows nothing")
        if ours.ndim < 2:
            ours, theirs = ours[None], theirs[None]
        apart, scale = (values.abs().flatten(1).amax(1) for values in (ours - theirs, theirs))
        return float(torch.where(apart == 0, 0, apart / scale).max())


def explained(
    method: str,
    params: Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    batch: Batch | None = None,
    target: Tensor = TARGET,
    seed: int = 0,
) -> Tensor:
    """Our maps (N, H, W) of four toy images on the toy network, in float64."""
    model, batch = model or toy_model(), batch or toy_batch(len(target))
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=target, seed=seed, meter=meter)
        return probe.explain(registry.make("methods", method, params)).raw
