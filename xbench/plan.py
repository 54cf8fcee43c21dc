"""From a suite to cells and units of work, with their passes; weights are only hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from . import noise, registry
from .autograd import module_at
from .errors import Unpriced, Unsupported, UsageError
from .models.loading import describe_layers, weights_hash
from .probe import Logits, MapOf, Need, closure, cost, method_cost, needs_of, stops_early
from .store import Group as StoredGroup
from .store import Store
from .suite import Choice, Suite, canonical
from .types import Model, Network, Passes, Source


@dataclass(frozen=True)
class Cell:
    """One score of a table: a method and a metric on a data set and a model.

    Args:
        id: 16 hex digits of the SHA-256 of everything that makes its numbers.
        dataset, model, method, metric: what was chosen.
        skipped: why it cannot be computed, or empty.
    """

    id: str
    dataset: Choice
    model: Choice
    method: Choice
    metric: Choice
    skipped: str = ""


@dataclass(frozen=True)
class Job:
    """A unit of work: a slice of a group's images and what is missing there. Plain data, picklable.

    Args:
        dataset, model: what to load.
        layers: the model's roles, resolved.
        classes: that the network tells apart.
        weights: their hash, as in the cells' ids.
        target, seed: of the suite.
        rows: fixed forward shape.
        threads: of the process, pinned with the shape.
        device: such as "cpu" or "cuda:0".
        data: data directory.
        store, group: where the part file goes.
        number: of the slice.
        portions: cells, as (id, method, metric), with the images that lack just these, as (position
            in the data set, key).
    """

    dataset: Choice
    model: Choice
    layers: tuple[tuple[str, str], ...]
    classes: int
    weights: str
    target: Literal["predicted", "label"]
    seed: int
    rows: int
    threads: int
    device: str
    data: Path | None
    store: Path
    group: tuple[str, str]
    number: int
    portions: tuple[tuple[tuple[tuple[str, Choice, Choice], ...], tuple[tuple[int, str], ...]], ...]

    @property
    def images(self) -> int:
        return sum(len(images) for _, images in self.portions)

    @property
    def name(self) -> str:
        return f"{self.dataset.label} x {self.model.label} [{self.number}]"


@dataclass(frozen=True)
class Outlay:
    """Passes of a plan.

    Args:
        passes: what is declared.
        unknown: methods that do not declare theirs.
        is_bound: whether some method may stop before it has spent its passes.
    """

    passes: Passes = field(default_factory=Passes)
    unknown: int = 0
    is_bound: bool = False

    def plus(self, other: Outlay) -> Outlay:
        return Outlay(
            self.passes.plus(other.passes),
            self.unknown + other.unknown,
            self.is_bound or other.is_bound,
        )


@dataclass(frozen=True)
class Group:
    """One data set and one model: what is loaded together and shares passes.

    Args:
        images: (position in the data set, key) of the selected images, in order.
        sketch: the model without weights, which is enough to ask needs for their cost.
        classes: that the network tells apart.
        weights: hash of the model's weights.
        folder: of the store, for data set and model.
        identity: what all cells of the group share.
    """

    dataset: Choice
    model: Choice
    source: Source
    sketch: Model
    classes: int
    weights: str
    images: tuple[tuple[int, str], ...]
    cells: tuple[Cell, ...]
    folder: tuple[str, str]
    identity: Mapping[str, Any]

    @cached_property
    def active(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if not cell.skipped)

    def outlay(self, cells: Iterable[Cell]) -> Outlay:
        """Passes per image of computing these cells together."""
        cells = tuple(cells)
        if not cells:
            return Outlay()
        by_method: dict[Choice, list[Any]] = {}
        for cell in cells:
            by_method.setdefault(cell.method, []).append(_made(cell.metric))
        methods = {choice: _made(choice) for choice in by_method}
        told = {c: m for c, m in methods.items() if method_cost(m, self.sketch) is not None}
        asked = batch_needs(told.values(), by_method.values())
        total = Outlay(cost(asked, self.sketch), len(methods) - len(told), stops_early(asked))
        for choice, metrics in by_method.items():
            asked = map_needs(metrics, told.get(choice))
            total = total.plus(Outlay(cost(asked, self.sketch)))
        return total


def batch_needs(methods: Iterable[Any], metrics: Iterable[Iterable[Any]]) -> tuple[Need[Any], ...]:
    """What a batch computes once for these methods and their metrics; always the logits."""
    asked: list[Need[Any]] = [Logits(), *(MapOf(method) for method in methods)]
    asked += [need for group in metrics for metric in group for need in needs_of(metric)]
    return tuple(need for need in closure(asked) if need.scope == "batch")


def map_needs(metrics: Iterable[Any], method: Any = None) -> tuple[Need[Any], ...]:
    """What each map of a method computes once for these metrics.

    Without the method, what would run it again costs nothing, since it cannot.
    """
    asked = closure((need for metric in metrics for need in needs_of(metric)), method)
    return tuple(need for need in asked if need.scope == "map")


_cache: dict[Choice, Any] = {}


def _made(choice: Choice) -> Any:
    if choice not in _cache:
        _cache[choice] = choice.make()
    return _cache[choice]


@dataclass(frozen=True)
class Plan:
    """Everything a suite asks for, resolved against data and weights."""

    suite: Suite
    groups: tuple[Group, ...]
    device: str
    data: Path | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for group in self.groups for cell in group.cells)

    @property
    def notices(self) -> tuple[str, ...]:
        """What data sets say of themselves, such as a checksum that is not the official one."""
        found = (getattr(group.source, "notice", None) for group in self.groups)
        return tuple(dict.fromkeys(notice for notice in found if notice))

    def jobs(self, store: Store) -> Iterator[tuple[Job, Outlay]]:
        """What the store lacks, unit by unit, each with the passes that it will take."""
        for group in self.groups:
            stored = store.group(*group.folder)
            done = stored.done()
            pinned = self._pinned(stored)
            size = self.suite.run.slice
            for number, start in enumerate(range(0, len(group.images), size)):
                portions = _portions(group.active, group.images[start : start + size], done)
                if not portions:
                    continue
                job = Job(
                    dataset=group.dataset,
                    model=group.model,
                    layers=tuple(sorted(group.sketch.layers.items())),
                    classes=group.classes,
                    weights=group.weights,
                    target=self.suite.target,
                    seed=self.suite.seed,
                    rows=pinned["rows"],
                    threads=pinned["threads"],
                    device=self.device,
                    data=self.data,
                    store=store.root,
                    group=group.folder,
                    number=number,
                    portions=tuple(
                        (tuple((c.id, c.method, c.metric) for c in cells), images)
                        for cells, images in portions
                    ),
                )
                outlay = Outlay()
                for cells, images in portions:
                    each = group.outlay(cells)
                    outlay = outlay.plus(replace(each, passes=each.passes.times(len(images))))
                yield job, outlay

    def shape(self) -> dict[str, Any]:
        """The conditions that a new group is created with."""
        asked = self.suite.run.batch_size
        auto = 32 if self.device == "cpu" else 128
        rows = min(auto, self.suite.run.slice) if asked == "auto" else asked
        return {"rows": rows, "threads": 1}

    def _pinned(self, stored: StoredGroup) -> dict[str, Any]:
        """A group's own conditions once it has any; else those that it would be created with."""
        return dict(stored.pinned() or self.shape())

    def pin(self, store: Store) -> list[str]:
        """Fixes the conditions of every group before its first unit; notices where they differ."""
        notices = []
        for group in self.groups:
            wanted = self.shape()
            pinned = store.group(*group.folder).manifest(wanted)
            asked = self.suite.run.batch_size
            if asked not in ("auto", pinned["rows"]):
                notices.append(
                    f"{group.dataset.label} x {group.model.label} was begun with batch size "
                    f"{pinned['rows']}, which stays, so that its numbers stay equal bit by bit"
                )
        return notices


def _portions(
    cells: Sequence[Cell], images: Sequence[tuple[int, str]], done: Mapping[str, set[str]]
) -> list[tuple[tuple[Cell, ...], tuple[tuple[int, str], ...]]]:
    """Images by the set of cells that they lack."""
    found: dict[tuple[Cell, ...], list[tuple[int, str]]] = {}
    for image in images:
        missing = tuple(cell for cell in cells if image[1] not in done.get(cell.id, ()))
        if missing:
            found.setdefault(missing, []).append(image)
    return [(cells, tuple(images)) for cells, images in found.items()]


def make_plan(suite: Suite, data: Path | None) -> Plan:
    """Opens data sets, hashes weights, resolves layers, names every cell.

    Raises:
        UsageError: on missing data or weights, a network that cannot take the images, or a layer
            that it does not have.
    """
    device = suite.run.device
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    elif device.startswith("cuda") and int(device.partition(":")[2] or 0) >= gpus:
        seen = f"only {gpus} GPUs, cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU"
        raise UsageError(
            f"device {device!r} was asked for, but torch sees {seen}; use --device cpu"
        )
    sources = [(choice, choice.make().open(data)) for choice in suite.datasets]
    networks = [(choice, choice.make().describe(data)) for choice in suite.models]
    hashes = {choice: weights_hash(network) for choice, network in networks}
    groups = tuple(
        _group(suite, dataset, source, model, network, hashes[model])
        for dataset, source in sources
        for model, network in networks
    )
    if not any(group.cells for group in groups):
        raise UsageError(f"suite {suite.name!r}: no cell is left after 'exclude'")
    return Plan(suite, groups, device, data)


def select(source: Source, count: int | None, name: str) -> tuple[tuple[int, str], ...]:
    """The first ``count`` images in the order of a hash of their ids: nested for growing counts,
    and mixed over classes where files are sorted by class.

    Raises:
        UsageError: if there are fewer.
    """
    ids = source.ids
    if count is not None and count > len(ids):
        raise UsageError(f"data set {name!r} has {len(ids)} images, but {count} were asked for")
    order = sorted(
        range(len(ids)), key=lambda at: hashlib.blake2b(ids[at].encode(), digest_size=8).digest()
    )
    return tuple((at, source.key(at)) for at in order[:count])


def _group(
    suite: Suite,
    dataset: Choice,
    source: Source,
    model: Choice,
    network: Network,
    weights: str,
) -> Group:
    try:
        net, layers, classes = describe_layers(network, source.size)
    except Exception as error:  # whatever the network's own forward raises
        raise UsageError(
            f"model {model.label!r} cannot take images of {source.size[0]} x {source.size[1]}, as "
            f"data set {dataset.label!r} gives them: {type(error).__name__}: {error}"
        ) from error
    sketch = Model(model.label, net, network.mean, network.std, layers, source.size)
    images = select(source, dataset.images, dataset.label)
    facts = {
        "dataset": {**dataset.identity(), "revision": source.revision},
        "model": {
            **model.identity(),
            "weights": weights,
            "mean": network.mean,
            "std": network.std,
        },
        "target": suite.target,
        "seed": suite.seed,
        "noise": noise.VERSION,
        "precision": "fp32",
    }
    cells = tuple(
        _cell(facts, sketch, source, dataset, model, method, metric)
        for method in suite.methods
        for metric in suite.metrics
        if not suite.excludes(dataset, model, method, metric)
    )
    folder = (
        f"{dataset.name}@{_short(facts['dataset'])}",
        f"{model.name}@{_short(facts['model'])}",
    )
    return Group(dataset, model, source, sketch, classes, weights, images, cells, folder, facts)


def _short(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]


def _cell(
    facts: Mapping[str, Any],
    sketch: Model,
    source: Source,
    dataset: Choice,
    model: Choice,
    method: Choice,
    metric: Choice,
) -> Cell:
    asked = {layer for need in closure([MapOf(_made(method))]) for layer in need.layers}
    layers = {layer: _resolved_layer(layer, sketch, method, model) for layer in sorted(asked)}
    chosen = {**method.identity(), "layers": layers}
    text = canonical({**facts, "method": chosen, "metric": metric.identity()})
    reason = _unsupported(_made(method), sketch)
    wants_masks = any(getattr(_made(entry), "needs_masks", False) for entry in (method, metric))
    if wants_masks and not source.has_masks:
        reason = f"data set {dataset.label!r} has no object masks"
    return Cell(
        hashlib.sha256(text.encode()).hexdigest()[:16],
        dataset,
        model,
        method,
        metric,
        reason,
    )


def _unsupported(method: Any, sketch: Model) -> str:
    """Why a method cannot work on this model, as far as a model without weights tells; or empty."""
    try:
        cost(closure([MapOf(method)]), sketch)
    except Unpriced:
        return ""
    except Unsupported as error:
        return str(error)
    return ""


def _resolved_layer(asked: str, sketch: Model, method: Choice, model: Choice) -> str:
    path = sketch.layer(asked)
    try:
        module_at(sketch.net, path)
    except UsageError:
        roles = ", ".join(sketch.layers) or "none"
        paths = [name for name, _ in sketch.net.named_modules() if name]
        raise UsageError(
            f"model {model.label!r} has no layer {asked!r} (asked for by {method.label}); its "
            f"roles are {roles}, and any module path works{registry.suggestion(asked, paths)}"
        ) from None
    return path
