"""The notebook's door: the runner's probe, needs and metrics for a network and images at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from . import registry
from .autograd import Meter, last_feature_map, prepared
from .errors import UsageError
from .plan import batch_needs
from .probe import Explanation, Probe
from .scoring import evaluated
from .types import Batch, Model

ROWS = 32
"""Forward shape where none is asked for, as in a run on a CPU."""

Entries = Sequence[str | Mapping[str, Any]]


def attribute(
    net: nn.Module,
    images: Tensor,
    method: str,
    *,
    target: Tensor | Sequence[int] | None = None,
    layer: str | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int | None = None,
    **params: Any,
) -> Tensor:
    """Saliency maps of images, raw and signed where the method is, shape (N, H, W).

    Args:
        net: classifier from normalised images to logits (N, K); left as it was found.
        images: (N, 3, H, W) in [0, 1], of the network's dtype and on its device.
        method: registered name, such as "guided_absolute_grad".
        target: class to explain, one per image; None means the predicted class.
        layer: module path for methods that read a layer; None means the last feature map.
        mean: of the normalisation, per channel on the [0, 1] scale; 0 where the net normalises
            itself.
        std: of the normalisation, as ``mean``.
        seed: of all noise.
        keys: stable ids, on which noise hangs; None means a hash of each image's content.
        batch_size: rows of every forward, the last filled up; None means 32, or the number of
            images if there are fewer.
        **params: hyper-parameters of the method.

    Raises:
        UsageError: on a wrong name, parameter, layer or tensor.
        Unsupported: if the method cannot work on this network.
    """
    chosen = registry.make("methods", method, params)
    found = []
    with _opened(net, images, mean, std, layer) as (model, meter):
        for batch, wanted in _batches(images, target, None, keys, batch_size):
            probe = _probe(model, batch, wanted, seed, batch_size, images, meter, [chosen], [[]])
            found.append(probe.explain(chosen).raw[: probe.real])
    return torch.cat(found)


def score(
    net: nn.Module,
    images: Tensor,
    maps: Tensor,
    metric: str,
    *,
    target: Tensor | Sequence[int] | None = None,
    masks: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int | None = None,
    **params: Any,
) -> Tensor:
    """Scores of given maps, shape (N,) float64 on the CPU; NaN where a score is undefined or
    failed.

    Args:
        net, images, target, mean, std, seed, keys, batch_size: as in :func:`attribute`.
        maps: (N, H, W), raw.
        metric: registered name, such as "rcap".
        masks: (N, H, W) object masks in {0, 1}, for metrics that need them.
        **params: hyper-parameters of the metric.

    Raises:
        UsageError: on a wrong name, parameter or tensor.
        Unsupported: if the metric needs masks and none are given.
    """
    chosen = registry.make("metrics", metric, params)
    wanted_shape = (images.shape[0], *images.shape[-2:])
    if tuple(maps.shape) != wanted_shape:
        raise UsageError(f"maps have the shape {tuple(maps.shape)}, expected {wanted_shape}")
    found: list[float] = []
    start = 0
    with _opened(net, images, mean, std, None) as (model, meter):
        for batch, wanted in _batches(images, target, masks, keys, batch_size):
            probe = _probe(model, batch, wanted, seed, batch_size, images, meter, [], [[chosen]])
            part = maps[start : start + probe.real]
            start += probe.real
            filled = torch.cat((part, part[-1:].expand(probe.rows - probe.real, -1, -1)))
            found += [value for value, _ in evaluated(chosen, Explanation(probe, filled))]
    return torch.tensor(found, dtype=torch.float64)


def evaluate(
    net: nn.Module,
    images: Tensor,
    methods: Entries,
    metrics: Entries,
    *,
    target: Tensor | Sequence[int] | None = None,
    masks: Tensor | None = None,
    layer: str | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Every metric of every method: one row per image x method x metric, passes shared as in a run.

    Args:
        net, images, target, masks, layer, mean, std, seed, keys, batch_size: as in
            :func:`attribute` and :func:`score`.
        methods: names, or mappings with a key ``name`` and hyper-parameters.
        metrics: as ``methods``.

    Returns:
        Columns image (key), method, metric, value, status.

    Raises:
        UsageError: on a wrong name, parameter, layer or tensor.
        Unsupported: if a method cannot work on this network, or a metric lacks masks.
    """
    chosen = [_entry("methods", item) for item in methods]
    asked = [_entry("metrics", item) for item in metrics]
    rows = []
    with _opened(net, images, mean, std, layer) as (model, meter):
        for batch, wanted in _batches(images, target, masks, keys, batch_size):
            probe = _probe(model, batch, wanted, seed, batch_size, images, meter, chosen, [asked])
            for method in chosen:
                explanation = probe.explain(method)
                for metric in asked:
                    names = (registry.label(method), registry.label(metric))
                    rows += [
                        (key, *names, *outcome)
                        for key, outcome in zip(
                            batch.keys, evaluated(metric, explanation), strict=True
                        )
                    ]
    return pd.DataFrame(rows, columns=["image", "method", "metric", "value", "status"])


def _entry(kind: str, item: str | Mapping[str, Any]) -> Any:
    params = {"name": item} if isinstance(item, str) else dict(item)
    return registry.make(kind, params.pop("name"), params)


@contextmanager
def _opened(
    net: nn.Module,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layer: str | None,
) -> Iterator[tuple[Model, Meter]]:
    """The network as a model, for as long as the block lasts."""
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise UsageError(
            f"images must be a float tensor (N, C, H, W) in [0, 1], but are {tuple(images.shape)} "
            f"{images.dtype}"
        )
    for parameter in net.parameters():
        if parameter.dtype != images.dtype or parameter.device != images.device:
            raise UsageError(
                f"images are {images.dtype} on {images.device}, the network's weights "
                f"{parameter.dtype} on {parameter.device}; convert one of them"
            )
        break
    with prepared(net) as meter:
        path = layer or last_feature_map(net, images[:1])
        meter.reset()
        roles = {"last_conv": path} if path else {}
        yield Model(type(net).__name__, net, tuple(mean), tuple(std), roles), meter


def _batches(
    images: Tensor,
    target: Tensor | Sequence[int] | None,
    masks: Tensor | None,
    keys: Sequence[str] | None,
    batch_size: int | None,
) -> Iterator[tuple[Batch, Tensor | None]]:
    count, size = len(images), batch_size or ROWS
    wanted = None if target is None else torch.as_tensor(target, device=images.device).long()
    for name, given in (("target", wanted), ("masks", masks), ("keys", keys)):
        if given is not None and len(given) != count:
            raise UsageError(f"{name} has {len(given)} entries for {count} images")
    for start in range(0, count, size):
        part = slice(start, start + size)
        chosen = None if wanted is None else wanted[part]
        here = images[part]
        batch = Batch(
            here,
            here.new_full((len(here),), -1, dtype=torch.int64) if chosen is None else chosen,
            tuple(keys[part]) if keys is not None else content_keys(here),
            None if masks is None else masks[part].to(images.device),
        )
        yield batch, chosen


def content_keys(images: Tensor) -> tuple[str, ...]:
    """A key for each image (N, C, H, W) from its pixels as float32."""
    return tuple(
        hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        for image in images
    )


def _probe(
    model: Model,
    batch: Batch,
    target: Tensor | None,
    seed: int,
    batch_size: int | None,
    images: Tensor,
    meter: Meter,
    methods: Sequence[Any],
    metrics: Sequence[Sequence[Any]],
) -> Probe:
    return Probe(
        model,
        batch,
        needs=batch_needs(methods, metrics),
        seed=seed,
        target="predicted" if target is None else target,
        rows=batch_size or min(ROWS, len(images)),
        meter=meter,
    )
