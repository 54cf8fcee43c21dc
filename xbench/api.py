"""The notebook's door: the runner's probe, needs and metrics for a network and images at hand."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from . import registry
from .autograd import Meter, module_at, prepared
from .errors import UsageError
from .layers import last_feature_map
from .plan import batch_needs
from .probe import Explanation, Need, Probe, filled
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
    masks: Tensor | None = None,
    layer: str | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
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
        masks: (N, H, W) object masks in {0, 1}, for ``oracle``.
        layer: module path for methods that read a layer; None means the last feature map.
        mean: of the normalisation on the [0, 1] scale, per channel or one for all; 0 where the
            net normalises itself.
        std: of the normalisation, as ``mean``.
        seed: of all noise.
        keys: stable ids, on which noise hangs; None means a hash of each image's content.
        batch_size: rows of every forward, the last filled up; None means 32, or the number of
            images if there are fewer. Numbers of one size are equal bit by bit on one thread,
            which is what a run uses (``torch.set_num_threads(1)``).
        **params: hyper-parameters of the method.

    Raises:
        UsageError: on a wrong name, parameter, layer or tensor.
        Unsupported: if the method cannot work on this network.
    """
    chosen = registry.make("methods", method, params)
    given = Given(net, images, target, masks, layer, mean, std, seed, keys, batch_size)
    with given.probes([chosen], []) as probes:
        return torch.cat([probe.explain(chosen).raw[: probe.real] for probe in probes])


def score(
    net: nn.Module,
    images: Tensor,
    maps: Tensor,
    metric: str,
    *,
    target: Tensor | Sequence[int] | None = None,
    masks: Tensor | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    batch_size: int | None = None,
    **params: Any,
) -> Tensor:
    """Scores of given maps, (N,) float64 on the CPU; NaN where a score is undefined or failed.

    Args:
        net, images, target, mean, std, seed, keys, batch_size: as in :func:`attribute`.
        maps: (N, H, W), raw.
        metric: registered name, such as "rcap".
        masks: (N, H, W) object masks in {0, 1}, for metrics that need them.
        **params: hyper-parameters of the metric.

    Raises:
        UsageError: on a wrong name, parameter or tensor.
        Unsupported: if the metric needs masks and none are given, or runs the method again, which
            these maps do not name.
    """
    chosen = registry.make("metrics", metric, params)
    if not isinstance(images, Tensor) or not isinstance(maps, Tensor):
        raise UsageError("images and maps must be torch tensors; torch.from_numpy converts arrays")
    wanted_shape = (images.shape[0], *images.shape[-2:])
    if tuple(maps.shape) != wanted_shape:
        raise UsageError(f"maps have the shape {tuple(maps.shape)}, expected {wanted_shape}")
    if not maps.is_floating_point():
        raise UsageError(f"maps are {maps.dtype}, expected floating point; maps.float() converts")
    given = Given(net, images, target, masks, None, mean, std, seed, keys, batch_size)
    found: list[float] = []
    with given.probes([], [chosen]) as probes:
        for probe in probes:
            part = maps[len(found) : len(found) + probe.real]
            explanation = Explanation(probe, filled(part, probe.rows))
            found += [value for value, _ in evaluated(chosen, explanation)]
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
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
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
    for kind, given_names in (("methods", methods), ("metrics", metrics)):
        if isinstance(given_names, str):
            raise UsageError(f"{kind} must be a list, such as [{given_names!r}]")
    chosen = [_entry("methods", item) for item in methods]
    asked = [_entry("metrics", item) for item in metrics]
    given = Given(net, images, target, masks, layer, mean, std, seed, keys, batch_size)
    rows = []
    with given.probes(chosen, asked) as probes:
        for probe in probes:
            for method in chosen:
                explanation = probe.explain(method)
                for metric in asked:
                    names = (registry.label(method), registry.label(metric))
                    outcomes = evaluated(metric, explanation)
                    for key, outcome in zip(probe.batch.keys, outcomes, strict=False):
                        rows.append((key, *names, *outcome))
    return pd.DataFrame(rows, columns=["image", "method", "metric", "value", "status"])


def _entry(kind: str, item: str | Mapping[str, Any]) -> Any:
    params = {"name": item} if isinstance(item, str) else dict(item)
    if "name" not in params:
        raise UsageError(f"an entry of {kind} needs a key 'name', but is {params}")
    return registry.make(kind, params.pop("name"), params)


@dataclass(frozen=True)
class Given:
    """What the three functions take alike; see :func:`attribute`."""

    net: nn.Module
    images: Tensor
    target: Tensor | Sequence[int] | None
    masks: Tensor | None
    layer: str | None
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    keys: Sequence[str] | None
    batch_size: int | None

    @contextmanager
    def probes(self, methods: Sequence[Any], metrics: Sequence[Any]) -> Iterator[Iterator[Probe]]:
        """One probe per batch, while the network is prepared.

        Raises:
            UsageError: on tensors that do not go together.
        """
        images = self.images
        for name, given in (("images", images), ("masks", self.masks)):
            if given is not None and not isinstance(given, Tensor):
                raise UsageError(f"{name} must be a torch.Tensor, but is {type(given).__name__}")
        if images.ndim != 4 or not images.is_floating_point() or not len(images):
            raise UsageError(
                f"images must be a float tensor (N, C, H, W) in [0, 1], but are "
                f"{tuple(images.shape)} {images.dtype}"
            )
        for weight in itertools.islice(self.net.parameters(), 1):
            if weight.dtype != images.dtype or weight.device != images.device:
                raise UsageError(
                    f"images are {images.dtype} on {images.device}, the network's weights "
                    f"{weight.dtype} on {weight.device}; convert one of them"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size must be positive, but is {self.batch_size}")
        with prepared(self.net) as meter:
            asked = None if self.layer == "last_conv" else self.layer
            if asked is not None:
                module_at(self.net, asked)
            path = asked or last_feature_map(self.net, images[:1])
            meter.reset()  # the dry run is not part of any cost
            roles = {"last_conv": path} if path else {}
            channels = images.shape[1]
            mean, std = _per_channel(self.mean, channels), _per_channel(self.std, channels)
            height, width = images.shape[-2:]
            model = Model(type(self.net).__name__, self.net, mean, std, roles, (height, width))
            needs = batch_needs(methods, [metrics])
            yield (self._probe(model, meter, needs, batch) for batch in self._batches())

    def _probe(self, model: Model, meter: Meter, needs: Sequence[Need[Any]], batch: Batch) -> Probe:
        return Probe(
            model,
            batch,
            needs=needs,
            seed=self.seed,
            target="predicted" if self.target is None else "label",
            rows=self.batch_size or min(ROWS, len(self.images)),
            meter=meter,
        )

    def _batches(self) -> Iterator[Batch]:
        count, size = len(self.images), self.batch_size or ROWS
        target = torch.full((count,), -1) if self.target is None else torch.as_tensor(self.target)
        if target.ndim != 1 or target.is_floating_point():
            raise UsageError(
                f"target must hold one class per image, as whole numbers ({count},), but is "
                f"{tuple(target.shape)} {target.dtype}"
            )
        for name, given in (("target", target), ("masks", self.masks), ("keys", self.keys)):
            if given is not None and len(given) != count:
                raise UsageError(f"{name} has {len(given)} entries for {count} images")
        wanted_shape = (count, *self.images.shape[-2:])
        if self.masks is not None and tuple(self.masks.shape) != wanted_shape:
            raise UsageError(
                f"masks have the shape {tuple(self.masks.shape)}, expected {wanted_shape}"
            )
        for start in range(0, count, size):
            part = slice(start, start + size)
            images = self.images[part]
            yield Batch(
                images,
                target[part].long().to(images.device),
                content_keys(images) if self.keys is None else tuple(self.keys[part]),
                None if self.masks is None else self.masks[part].to(images.device),
            )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel, or one for all."""
    if len(values) not in (1, channels):
        raise UsageError(f"mean and std need 1 or {channels} values, but {tuple(values)} is given")
    return tuple(values) * (channels // len(values))


def content_keys(images: Tensor) -> tuple[str, ...]:
    """A key for each image (N, C, H, W) from its pixels as float32."""
    return tuple(
        hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        for image in images
    )
