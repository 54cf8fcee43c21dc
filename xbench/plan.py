"""From a suite to cells and units of work, with their passes; weights are only hashed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from . import noise, registry
from .autograd import module_at
from .errors import Unpriced, Unsupported, UsageError
from .keep import Kept
from .mapfiles import images_done
from .models.loading import describe_layers, weights_hash
from .probe import (
    Logits,
    MapOf,
    Need,
    closure,
    cost,
    method_cost,
    needs_of,
    runnable,
    stops_early,
)
from .selection import Chosen, candidates, judged
from .store import Group as StoredGroup
from .store import Store
from .suite import Choice, Suite, canonical
from .types import Model, Network, Passes, Source

T = TypeVar("T")


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
class Artefact:
    """What is kept beside the scores: stands where a cell stands.

    Args:
        id: of a cell for its curves; else of everything that makes the map or the picture.
        method: None for pictures.
        metric: what is read, in a metric's place.
        beside: ids of the cells that compute all it needs anyway.
    """

    id: str
    method: Choice | None
    metric: Kept
    beside: frozenset[str]


Entry = tuple[str, Choice | None, Choice | Kept]
"""Id, method and metric of a cell, or of what is kept beside."""

Portions = tuple[tuple[tuple[Entry, ...], tuple[tuple[int, str], ...]], ...]
"""Entries with the images that lack just these cells, as (position in the data set, key)."""


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
        portions: entries with the images that lack just these cells; what is kept says by itself
            which of the images lack it.
        purpose: of the unit, where it is not the suite's own cells.
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
    portions: Portions
    purpose: str = ""

    @property
    def scores(self) -> int:
        """That are to be computed."""
        return sum(
            len(images) * sum(isinstance(metric, Choice) for _, _, metric in entries)
            for entries, images in self.portions
        )

    @property
    def images(self) -> int:
        return sum(len(images) for _, images in self.portions)

    @property
    def name(self) -> str:
        which = f"{self.purpose} {self.number}".strip()
        return f"{self.dataset.label} x {self.model.label} [{which}]"


@dataclass(frozen=True)
class Outlay:
    """Passes of a plan.

    Args:
        passes: what is declared.
        unknown: methods that do not declare theirs, and needs of maps that cannot tell.
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
        notice: what the model says of these images, or empty.
        candidates: positions of the images that may be selected, in order.
        look: cell whose rows hold what the network says of candidates; empty where the selection
            does not ask.
        chosen: how the selection stands, where it asks the network.
        artefacts: all that can be kept beside the cells.
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
    notice: str = ""
    candidates: tuple[int, ...] = ()
    look: str = ""
    chosen: Chosen | None = None
    artefacts: tuple[Artefact, ...] = ()

    @property
    def count(self) -> int:
        """Images that are selected, or may be as long as the network has not been asked."""
        if self.chosen is None or not self.chosen.waiting:
            return len(self.images)
        asked = self.dataset.selection.images
        return len(self.candidates) if asked is None else asked

    @cached_property
    def active(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if not cell.skipped)

    def outlay(self, cells: Iterable[Cell | Artefact]) -> Outlay:
        """Passes per image of computing these cells together."""
        cells = tuple(cells)
        if not cells:
            return Outlay()
        by_method: dict[Choice | None, list[Any]] = {}
        for cell in cells:
            by_method.setdefault(cell.method, []).append(_made(cell.metric))
        methods = {choice: _made(choice) for choice in by_method if choice is not None}
        told = {c: m for c, m in methods.items() if method_cost(m, self.sketch) is not None}
        asked = batch_needs(told.values(), by_method.values())
        total = Outlay(cost(asked, self.sketch), len(methods) - len(told), stops_early(asked))
        for choice, metrics in by_method.items():
            asked = map_needs(metrics, runnable(told.get(choice)) if choice else None)
            priced = tuple(need for need in asked if _is_priced(need, self.sketch))
            unknown = len(asked) - len(priced)
            total = total.plus(Outlay(cost(priced, self.sketch), unknown))
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


def _is_priced(need: Need[Any], sketch: Model) -> bool:
    try:
        need.passes(sketch)
    except Unsupported:
        return False
    return True


def _default(kind: str, name: str) -> Choice:
    entry = registry.make(kind, name)
    return Choice(kind, name, tuple(sorted(registry.parameters(entry).items())), name)


_cache: dict[Choice | Kept, Any] = {}


def _made(choice: Choice | Kept) -> Any:
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
        """What data sets say of themselves, such as a checksum that is not the official one, and
        models of their images.
        """
        found = [getattr(group.source, "notice", None) for group in self.groups]
        found += [group.notice for group in self.groups]
        return tuple(dict.fromkeys(notice for notice in found if notice))

    def jobs(self, store: Store) -> Iterator[tuple[Job, Outlay]]:
        """What the store lacks, unit by unit, each with the passes that it will take."""
        for group in self.groups:
            stored = store.group(*group.folder)
            done = stored.done()
            lacking = self._lacking(group, stored)
            pinned = self._pinned(stored)
            size = self.suite.run.slice
            for number, start in enumerate(range(0, len(group.images), size)):
                images = group.images[start : start + size]
                portions = _portions(group.active, images, done, lacking)
                if not portions:
                    continue
                asked = tuple(
                    (tuple((c.id, c.method, c.metric) for c in cells), images)
                    for cells, images in portions
                )
                job = self._job(group, store, pinned, number, self.suite.target, asked)
                outlay = Outlay()
                for cells, images in portions:
                    each = group.outlay(cells)
                    outlay = outlay.plus(replace(each, passes=each.passes.times(len(images))))
                yield job, outlay

    def _lacking(self, group: Group, stored: StoredGroup) -> dict[Artefact, frozenset[str]]:
        """What is to be kept and is not yet, and of which images."""
        options, found = self.suite.run, {}
        done = stored.kept.done()
        for artefact in group.artefacts:
            kind, folder = artefact.metric.kind, artefact.metric.folder
            # pictures are kept wherever maps are
            everywhere = folder or ("maps" if kind == "pictures" else kind) in options.keep
            count = len(group.images) if everywhere else options.examples
            have = images_done(folder, artefact.id) if folder else done.get(artefact.id, set())
            found[artefact] = frozenset(key for _, key in group.images[:count]) - have
        return {artefact: keys for artefact, keys in found.items() if keys}

    def _job(
        self,
        group: Group,
        store: Store,
        pinned: Mapping[str, Any],
        number: int,
        target: Literal["predicted", "label"],
        portions: Portions,
    ) -> Job:
        return Job(
            dataset=group.dataset,
            model=group.model,
            layers=tuple(sorted(group.sketch.layers.items())),
            classes=group.classes,
            weights=group.weights,
            target=target,
            seed=self.suite.seed,
            rows=pinned["rows"],
            threads=pinned["threads"],
            device=self.device,
            data=self.data,
            store=store.root,
            group=group.folder,
            number=number,
            portions=portions,
        )

    def selected(self, store: Store, tried: Container[str] = ()) -> Plan:
        """With the images that are selected, as far as the store tells what the network says.

        Args:
            store: holds what was asked before.
            tried: keys of images that are not to be asked for again if they ended in an error.
        """
        groups = []
        for group in self.groups:
            if group.look:
                rows = store.group(*group.folder).rows()
                chosen = judged(
                    group.source,
                    group.dataset.selection,
                    group.candidates,
                    rows[rows["cell"] == group.look],
                    at_once=self.suite.run.slice,
                    tried=tried,
                )
                group = replace(group, images=chosen.images, chosen=chosen)
            groups.append(group)
        return replace(self, groups=tuple(groups))

    def looks(self, store: Store) -> Iterator[tuple[Job, Outlay]]:
        """What :meth:`selected` waits for, at one forward per image.

        A row of the store has the label's probability and the prediction beside any score, so the
        cell is that of a method and a metric which need no pass.
        """
        size = self.suite.run.slice
        for group in self.groups:
            waiting = group.chosen.waiting if group.chosen is not None else ()
            for number, start in enumerate(range(0, len(waiting), size)):
                images = waiting[start : start + size]
                cell = (group.look, _default("methods", "centre"), _default("metrics", "entropy"))
                pinned = self._pinned(store.group(*group.folder))
                job = self._job(group, store, pinned, number, "label", (((cell,), images),))
                yield replace(job, purpose="selection"), Outlay(Passes(forward=len(images)))

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


Portion = tuple[tuple[Cell | Artefact, ...], tuple[tuple[int, str], ...]]


def _portions(
    cells: Sequence[Cell],
    images: Sequence[tuple[int, str]],
    done: Mapping[str, set[str]],
    lacking: Mapping[Artefact, frozenset[str]],
) -> list[Portion]:
    """Images by the set of cells that they lack, and by what is to be kept at a cost of its own.

    What costs nothing beside these cells parts no images, since smaller batches cost more.
    """
    found: dict[tuple[tuple[Cell, ...], tuple[Artefact, ...]], list[tuple[int, str]]] = {}
    for image in images:
        missing = tuple(cell for cell in cells if image[1] not in done.get(cell.id, ()))
        ids = {cell.id for cell in missing}
        alone = tuple(a for a, k in lacking.items() if image[1] in k and a.beside.isdisjoint(ids))
        if missing or alone:
            found.setdefault((missing, alone), []).append(image)
    portions: list[Portion] = []
    for (missing, alone), chosen in found.items():
        keys, ids = frozenset(key for _, key in chosen), {cell.id for cell in missing}
        kept = [
            replace(artefact, metric=replace(artefact.metric, images=wanted & keys))
            for artefact, wanted in lacking.items()
            if wanted & keys and (artefact in alone or not artefact.beside.isdisjoint(ids))
        ]
        portions.append(((*missing, *kept), tuple(chosen)))
    return portions


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
    pairs = [(d, m) for d in suite.datasets for m in suite.models if suite.pairs(d, m)]

    def opened(dataset: Choice) -> tuple[Source, tuple[int, ...]]:
        source = dataset.make().open(data)
        return source, candidates(source, dataset.selection, dataset.label, data)

    def described(model: Choice) -> tuple[Network, str]:
        network = model.make().describe(data)
        return network, weights_hash(network)

    problems: list[str] = []
    sources = _each((dataset for dataset, _ in pairs), opened, problems)
    networks = _each((model for _, model in pairs), described, problems)
    if problems:
        raise UsageError("\n".join(problems))
    groups = tuple(
        _group(suite, dataset, *sources[dataset], model, *networks[model])
        for dataset in sources
        for model in networks
        if (dataset, model) in pairs
    )
    if not any(group.cells for group in groups):
        raise UsageError(f"suite {suite.name!r}: no cell is left after 'exclude'")
    _refuse_shared_folders(groups)
    return Plan(suite, groups, device, data)


def _each(
    choices: Iterable[Choice], make: Callable[[Choice], T], problems: list[str]
) -> dict[Choice, T]:
    """What is made of each choice once; what keeps one away joins the others' problems."""
    found = {}
    for choice in dict.fromkeys(choices):
        try:
            found[choice] = make(choice)
        except UsageError as error:
            problems.append(str(error))
    return found


def _refuse_shared_folders(groups: Iterable[Group]) -> None:
    taken: dict[Path, str] = {}
    for artefact in (artefact for group in groups for artefact in group.artefacts):
        folder = artefact.metric.folder
        if folder is not None and taken.setdefault(folder, artefact.id) != artefact.id:
            raise UsageError(
                f"--save-maps: two of the suite's entries would share the folder {folder}; "
                "give one of them another label"
            )


def _group(
    suite: Suite,
    dataset: Choice,
    source: Source,
    order: tuple[int, ...],
    model: Choice,
    network: Network,
    weights: str,
) -> Group:
    notice = ""
    if network.size not in (None, source.size):
        assert network.size is not None
        notice = (
            f"the weights of model {model.label!r} are for images of {network.size[0]} x "
            f"{network.size[1]}; data set {dataset.label!r} gives {source.size[0]} x "
            f"{source.size[1]}"
        )
    try:
        net, layers, classes = describe_layers(network, source.size)
    except Exception as error:  # whatever the network's own forward raises
        raise UsageError(
            f"model {model.label!r} cannot take images of {source.size[0]} x {source.size[1]}, as "
            f"data set {dataset.label!r} gives them: {type(error).__name__}: {error}"
            + (f"; {notice}" if notice else "")
        ) from error
    sketch = Model(model.label, net, network.mean, network.std, layers, source.size)
    needs_model = dataset.selection.needs_model
    taken = () if needs_model else order[: dataset.selection.images]
    images = tuple((at, source.key(at)) for at in taken)
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
    artefacts = _artefacts(facts, sketch, cells, suite.run.save_maps) if cells else ()
    clean = {key: facts[key] for key in ("dataset", "model", "precision")}
    look = _id({"selection": 1, **clean}) if needs_model else ""
    return Group(
        dataset, model, source, sketch, classes, weights, images, cells, folder, facts, notice,
        order, look, artefacts=artefacts,
    )  # fmt: skip


def _artefacts(
    facts: Mapping[str, Any], sketch: Model, cells: Sequence[Cell], save_maps: str | None
) -> tuple[Artefact, ...]:
    """Pictures, maps and curves of these cells, as far as they can be computed."""
    by_method: dict[Choice, list[Cell]] = {}
    for cell in cells:
        if not cell.skipped:
            by_method.setdefault(cell.method, []).append(cell)
    every = frozenset(cell.id for own in by_method.values() for cell in own)
    found = [Artefact(_id({"pictures": facts["dataset"]}), None, Kept("pictures"), every)]
    for method, own in by_method.items():
        ids = frozenset(cell.id for cell in own)
        name = _id({**facts, "method": _chosen(sketch, method, own[0].model)})
        found.append(Artefact(name, method, Kept("maps"), ids))
        if save_maps is not None:
            labels = (own[0].dataset.label, own[0].model.label, method.label)
            folder = Path(save_maps, *map(_slug, labels))
            found.append(Artefact(name, method, Kept("maps", folder=folder), ids))
        found += [
            Artefact(cell.id, method, Kept("curves", cell.metric), frozenset({cell.id}))
            for cell in own
            if hasattr(_made(cell.metric), "curves")
        ]
    return tuple(found)


def _slug(label: str) -> str:
    """A label as a segment of a name, so that ``maps/<DIR>`` can follow it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("._-")
    is_short = 0 < len(plain) <= 80
    return plain if is_short else f"{plain[:80]}-{_short(label)}".strip("-")


def _id(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


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
    chosen = _chosen(sketch, method, model)
    reason = _unsupported(_made(method), _made(metric), sketch)
    wants_masks = any(getattr(_made(entry), "needs_masks", False) for entry in (method, metric))
    if wants_masks and not source.has_masks:
        reason = f"data set {dataset.label!r} has no object masks"
    if getattr(_made(metric), "needs_method", False) and runnable(_made(method)) is None:
        reason = f"{metric.name} runs the method again, but its maps were made before"
    return Cell(
        _id({**facts, "method": chosen, "metric": metric.identity()}),
        dataset,
        model,
        method,
        metric,
        reason,
    )


def _chosen(sketch: Model, method: Choice, model: Choice) -> dict[str, Any]:
    """A method's identity, layers resolved."""
    asked = {layer for need in closure([MapOf(_made(method))]) for layer in need.layers}
    layers = {layer: _resolved_layer(layer, sketch, method, model) for layer in sorted(asked)}
    return {**method.identity(), "layers": layers}


def _unsupported(method: Any, metric: Any, sketch: Model) -> str:
    """Why a method or a metric cannot work on this model, as far as one without weights tells; or
    empty.
    """
    for asked in (closure([MapOf(method)]), map_needs([metric])):
        try:
            cost(asked, sketch)
        except Unpriced:
            continue
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
