"""Needs and the probe: how methods and metrics share passes without knowing of one another.

A need is a small hashable value that knows how to compute itself from a probe and what it costs. A
probe holds one batch and computes each need at most once. Planning, sharing and counting are this
one dictionary, keyed by needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from . import noise
from .autograd import Meter, Objective, class_gradient, recording
from .errors import Unpriced, Unsupported, UsageError
from .features import FeatureLayout
from .layers import layout_of
from .maps import all_finite
from .types import Batch, Model, Passes

T = TypeVar("T")
N = TypeVar("N", bound="Need[Any]")
Target = Literal["predicted", "label"]


class Need(Generic[T]):
    """Something that can be computed once and used by many; subclass as a frozen dataclass.

    ``scope`` is "batch" for what depends on model and batch alone, "map" for what depends on a
    saliency map too.
    """

    scope: ClassVar[Literal["batch", "map"]] = "batch"

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        """The needs that computing this one asks for."""
        return ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Roles or module paths that must exist; a plan resolves them before anything runs."""
        return ()

    @property
    def rides(self) -> Hashable:
        """The pass that it shares: needs of equal rides cost the larger of their passes, once."""
        return self

    def passes(self, model: Model) -> Passes:
        """Forward and backward passes per image."""
        return Passes()

    def for_method(self, method: Any) -> Need[T]:
        """This need of the maps of ``method``: one that runs the method again keeps it as a field,
        and so knows what that costs. All others stay as they are.
        """
        return self

    def compute(self, on: Any) -> T:
        """The value, from a Probe, or from an Explanation where ``scope`` is "map"."""
        raise NotImplementedError


class Method(Protocol):
    """What is registered under ``methods``; plain plug-ins may leave out ``needs``."""

    name: ClassVar[str]

    def __call__(self, probe: Probe, /) -> Tensor: ...


class Metric(Protocol):
    """What is registered under ``metrics``.

    One that runs the method again, and so cannot score maps that are given without it, declares
    ``needs_method = True``. One that is made of points has ``curves(explanation)``, a
    :class:`xbench.types.Line` by name ("" if there is only one), from the needs of its score.
    """

    name: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]

    def __call__(self, explanation: Explanation, /) -> Tensor: ...


def needs_of(entry: object) -> tuple[Need[Any], ...]:
    """The declared needs of a method or metric; none where it declares nothing."""
    return tuple(getattr(entry, "needs", ()))


def closure(needs: Iterable[Need[Any]], method: Any = None) -> tuple[Need[Any], ...]:
    """These needs, of the maps of a method, and all that they ask for; no duplicates, in order."""
    found: dict[Need[Any], None] = {}
    waiting = deque(needs)
    while waiting:
        need = waiting.popleft().for_method(method)
        if need not in found:
            found[need] = None
            waiting.extend(need.needs)
    return tuple(found)


def cost(needs: Iterable[Need[Any]], model: Model) -> Passes:
    """Passes per image of needs computed together: over distinct rides, the largest of each."""
    rides: dict[Hashable, Passes] = {}
    for need in needs:
        rides[need.rides] = rides.get(need.rides, Passes()).together(need.passes(model))
    total = Passes()
    for passes in rides.values():
        total = total.plus(passes)
    return total


@dataclass(frozen=True)
class MapOf(Need[Tensor]):
    """A method's raw map (N, H, W): a need itself, so that what is made from it shares it."""

    method: Any

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return needs_of(self.method)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that the method reads by itself, without a need."""
        return tuple(getattr(self.method, "layers", ()))

    def passes(self, model: Model) -> Passes:
        """What the method spends beside its needs.

        Raises:
            Unpriced: if it declares neither needs nor passes.
        """
        own = getattr(self.method, "passes", None)
        if own is None and not hasattr(self.method, "needs"):
            raise Unpriced(f"{self.method} does not say what it costs")
        return Passes() if own is None else cast(Passes, own(model))

    def compute(self, on: Probe) -> Tensor:
        return cast(Tensor, self.method(on))


def runnable(method: Any) -> Any:
    """The method, for needs that run it again; None if its maps were made before."""
    return None if getattr(method, "precomputed", False) else method


def stops_early(needs: Iterable[Need[Any]]) -> bool:
    """Whether the cost of these needs is only a bound: some method ends on its own."""
    methods = (need.method for need in needs if isinstance(need, MapOf))
    return any(getattr(method, "passes_bound", False) for method in methods)


def method_cost(method: Any, model: Model, beside: tuple[Need[Any], ...] = ()) -> Passes | None:
    """Passes per image of a method: its needs, beside others, and its own ``passes(model)``.

    None where it declares neither, or where that cannot be told for this model.
    """
    try:
        return cost(closure((*beside, MapOf(method))), model)
    except Unsupported:
        return None


class Probe:
    """One model and one batch, and everything that was computed about them.

    Args:
        model: the network to be explained, inside :func:`xbench.autograd.prepared`.
        batch: N images.
        needs: announced needs; those that ride the clean pass are answered together. A need that
            nobody announced is still right, in a pass of its own.
        seed: of all noise.
        target: the class to explain: the predicted one, the label, or one index per image (N,).
        rows: fixed forward shape; a smaller batch is filled up with repetitions of its last image,
            since rounding differs between batch sizes. Default: the batch's own size.
        meter: counts the passes.

    Attributes:
        inputs: (N, 3, H, W), the images in the network's input space.
        rows, real: N, and how many of the N are images; the others are filling.
        chunk: rows that one masked forward takes, the same as ``rows`` until memory runs out.
        events: what had to change on the way, such as a halved chunk.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        needs: Iterable[Need[Any]] = (),
        seed: int = 0,
        target: Target | Tensor = "predicted",
        rows: int | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.model = model
        self.real = len(batch.keys)
        self.rows = self.chunk = max(rows or 0, self.real)
        self.batch = _filled_batch(batch, self.rows)
        self.seed = seed
        self.meter = meter or Meter()
        self.events: list[str] = []
        self.inputs = model.normalise(self.batch.images)
        self.announced = closure(needs)
        self._rule = filled(target, self.rows) if isinstance(target, Tensor) else target
        self._values: dict[Need[Any], Any] = {}
        self._before = (self.meter.forward, self.meter.backward)

    def __getitem__(self, need: Need[T]) -> T:
        if need not in self._values:
            with self.meter.padded(self.real, self.rows):
                self._values[need] = need.compute(self)
        return cast(T, self._values[need])

    def explain(self, method: Method) -> Explanation:
        """The method's maps of this batch, checked.

        Raises:
            ValueError: if the method returns another shape than (N, H, W).
        """
        word = getattr(method, "nonfinite", NONFINITE)
        return Explanation(self, self[MapOf(method)], runnable(method), word)

    @property
    def spent(self) -> Passes:
        """Passes per image so far, counted at the network."""
        forward, backward = self._before
        return Passes(
            (self.meter.forward - forward) // self.real,
            (self.meter.backward - backward) // self.real,
        )

    @cached_property
    def sound(self) -> Tensor:
        """(N,) bool: whether an image is finite."""
        return all_finite(self.inputs)

    @cached_property
    def target(self) -> Tensor:
        """(N,) int64, the class that maps explain and metrics read."""
        return self.target_among(self[Logits()])

    def target_among(self, logits: Tensor) -> Tensor:
        """The target under this probe's rule, given the logits of the clean images.

        Raises:
            UsageError: if a label is not one of the network's classes.
        """
        if self._rule == "predicted":
            return logits.argmax(1)
        asked = (
            self._rule.to(logits.device) if isinstance(self._rule, Tensor) else self.batch.labels
        )
        wrong = asked[(asked < 0) | (asked >= logits.shape[1])]
        if len(wrong):
            raise UsageError(
                f"target class {int(wrong[0])} is not among the network's {logits.shape[1]} "
                "classes; give labels from 0, or let the predicted class be the target"
            )
        return asked

    @cached_property
    def probability(self) -> Tensor:
        """(N,) float64: softmax probability of the target on the clean image."""
        return probability(self[Logits()], self.target)

    def halve_chunk(self) -> int:
        """After running out of memory: the new number of rows to forward at once, for the rest."""
        self.meter.retried += self.chunk
        self.chunk = (self.chunk + 1) // 2
        self.events.append(f"out of memory: chunk halved to {self.chunk}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.chunk

    def normal(self, purpose: str, draw: int) -> Tensor:
        """Standard normal noise, the shape of ``inputs``; each image has its own stream."""
        streams = noise.stream_keys(self.seed, self.batch.keys, purpose, draw, self.inputs.device)
        drawn = noise.normal(streams, self.inputs[0].numel())
        return drawn.view(self.inputs.shape).to(self.inputs.dtype)

    def uniform(self, purpose: str, draw: int = 0) -> Tensor:
        """Uniform numbers in [0, 1), one per pixel, (N, H, W)."""
        streams = noise.stream_keys(self.seed, self.batch.keys, purpose, draw, self.inputs.device)
        height, width = self.inputs.shape[-2:]
        return noise.uniform(streams, height * width).view(-1, height, width).to(self.inputs.dtype)

    def input_gradient(self, inputs: Tensor, objective: Objective = "logit") -> Tensor:
        """Gradient of the target's objective at other inputs (N, 3, H, W), the same shape.

        It costs one forward and one backward.
        """
        with self.meter.padded(self.real, self.rows), torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            logits = self.model.logits(inputs)
            (gradient,) = class_gradient(logits, self.target, (inputs,), objective)
        return gradient

    def at(self, inputs: Tensor, *needs: Need[Any]) -> Probe:
        """This probe at other inputs (N, 3, H, W), such as noisy ones, in network space.

        Target, noise and meter stay; nothing is computed yet. Its batch is still the clean one.

        Args:
            inputs: what the network is asked about.
            needs: announced there; those that ride the clean pass are answered together.
        """
        other = copy(self)
        other._rule, other.inputs, other.announced = self.target, inputs, closure(needs)
        other._values = {}
        for computed in ("target", "probability"):
            vars(other).pop(computed, None)
        return other

    def towards(self, target: Tensor) -> Probe:
        """This probe for other classes, one index per image (N,); nothing is computed yet."""
        other = self.at(self.inputs)
        other._rule = target
        return other

    def with_images(self, images: Tensor, *needs: Need[Any]) -> Probe:
        """This probe of other images (N, 3, H, W) in [0, 1], such as masked ones: a batch of them.

        Keys, hence noise, labels, masks, target and meter stay; nothing is computed yet.

        Args:
            images: one for each of its own, filling included.
            needs: announced there; those that ride the clean pass are answered together.
        """
        other = self.at(self.model.normalise(images), *needs)
        other.batch = replace(self.batch, images=images)
        return other


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) softmax probability in float64: in float32 it is 0 from a gap of 110 on."""
    return logits.double().softmax(1).gather(1, target[:, None])[:, 0]


def filled(values: Tensor, rows: int) -> Tensor:
    """The first axis brought up to ``rows`` by repeating the last entry."""
    lack = rows - values.shape[0]
    return torch.cat((values, values[-1:].expand(lack, *values.shape[1:]))) if lack else values


def _filled_batch(batch: Batch, rows: int) -> Batch:
    lack = rows - len(batch.keys)
    if not lack:
        return batch
    return replace(
        batch,
        images=filled(batch.images, rows),
        labels=filled(batch.labels, rows),
        keys=batch.keys + batch.keys[-1:] * lack,
        masks=None if batch.masks is None else filled(batch.masks, rows),
    )


NONFINITE = "failed: nonfinite"
"""Status of an image whose map holds NaN or infinity."""


class Explanation:
    """A probe and one method's maps; metrics read it.

    Args:
        probe: the model and batch that the maps belong to.
        saliency: raw maps (N, H, W), signed where the method is.
        method: whose maps they are, for needs that run it again; None for maps that were given.
        nonfinite: status of an image whose map is not finite.

    Attributes:
        raw: the maps as they came.
        saliency: the maps; one that is not finite is replaced by zeros here and marked in
            ``finite``.
        finite: (N,) bool.

    Raises:
        ValueError: if the shape is not (N, H, W).
    """

    def __init__(
        self, probe: Probe, saliency: Tensor, method: Any = None, nonfinite: str = NONFINITE
    ) -> None:
        wanted = (probe.rows, *probe.inputs.shape[-2:])
        if not isinstance(saliency, Tensor) or tuple(saliency.shape) != wanted:
            got = tuple(saliency.shape) if isinstance(saliency, Tensor) else type(saliency).__name__
            raise ValueError(
                f"a method must return maps of shape {wanted} (N, H, W), but got {got}"
            )
        self.probe = probe
        self.method = method
        self.nonfinite = nonfinite
        # an image that is not finite has no map, whatever a ReLU made of it
        self.finite = all_finite(saliency) & probe.sound
        self.raw, self.saliency = saliency.detach(), saliency.detach().clone()
        if not self.finite.all():  # where() costs more than all else here
            self.raw = self.raw.where(probe.sound[:, None, None], torch.nan)
            self.saliency = self.saliency.where(self.finite[:, None, None], 0)
        self._values: dict[Need[Any], Any] = {}

    def __getitem__(self, need: Need[T]) -> T:
        if need.scope == "batch":
            return self.probe[need]
        need = need.for_method(self.method)
        if need not in self._values:
            with self.probe.meter.padded(self.probe.real, self.probe.rows):
                self._values[need] = need.compute(self)
        return cast(T, self._values[need])

    def together(
        self, needs: Sequence[N], compute: Callable[[Sequence[N]], Iterable[Any]]
    ) -> list[Any]:
        """Values of several needs of a map; those that are not known yet are computed in one go.

        Args:
            needs: each of scope "map", and the same for every method.
            compute: values of some of them, in order.
        """
        lacking = [need for need in dict.fromkeys(needs) if need not in self._values]
        if lacking:
            with self.probe.meter.padded(self.probe.real, self.probe.rows):
                self._values.update(zip(lacking, compute(lacking), strict=True))
        return [self._values[need] for need in needs]


@dataclass(frozen=True)
class Again(Need[T]):
    """Of maps that the method of this map makes again, such as of other images; subclass it.

    It costs what the method costs alone, for each of them.

    Args:
        method: set by ``for_method``.
    """

    scope: ClassVar[Literal["batch", "map"]] = "map"
    method: Any = field(default=None, kw_only=True)

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def for_method(self, method: Any) -> Again[T]:
        return replace(self, method=method)

    def times(self, model: Model) -> int:
        """How many maps the method makes."""
        return 1

    def passes(self, model: Model) -> Passes:
        if self.method is None:
            return Passes()
        return cost(closure((Logits(), MapOf(self.method))), model).times(self.times(model))

    def explained(self, probe: Probe) -> Explanation:
        """The method's maps by a probe that has computed nothing yet.

        Raises:
            Unsupported: if maps were given, and their method is not known.
        """
        if self.method is None:
            raise Unsupported(
                "this metric runs the method again, but the maps were given without it; use "
                "xbench.evaluate, or a suite"
            )
        probe.announced = closure((Logits(), MapOf(self.method)))
        _ = probe[Logits()]  # declared, whether the method asks for it or not
        return probe.explain(self.method)


# --- the needs that ride the clean pass -----------------------------------------------------------


@dataclass(frozen=True)
class Clean:
    """What one forward of the clean images left behind; gradients are of the target logit.

    Layers that could not be recorded stand in ``refused``, with the reason.
    """

    logits: Tensor
    image_gradient: Tensor | None
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    refused: dict[str, str]


@dataclass(frozen=True)
class CleanPass(Need[Clean]):
    """One forward, and at most one backward towards the image and all wanted layers at once.

    Args:
        image: whether the gradient towards the image is wanted.
        layers: recorded, with their gradients.
        seen: further layers, recorded without.
    """

    image: bool = False
    layers: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()

    @staticmethod
    def covering(needs: Iterable[CleanNeed[Any]], model: Model) -> CleanPass:
        needs = tuple(needs)
        layers = {model.layer(need.layer) for need in needs if isinstance(need, LayerGradient)}
        seen = {model.layer(need.layer) for need in needs if isinstance(need, LayerActivation)}
        image = any(isinstance(need, ImageGradient) for need in needs)
        return CleanPass(image, tuple(sorted(layers)), tuple(sorted(seen - layers)))

    def compute(self, on: Probe) -> Clean:
        differentiate = self.image or bool(self.layers)
        inputs = on.inputs.detach().requires_grad_(self.image)
        with (
            torch.set_grad_enabled(differentiate),
            recording(on.model.net, (*self.layers, *self.seen)) as (kept, refused),
        ):
            logits = on.model.logits(inputs)
            if not differentiate:
                return Clean(logits, None, kept, {}, refused)
            layers = [path for path in kept if path in self.layers]
            wrt = ([inputs] if self.image else []) + [kept[path] for path in layers]
            target = on.target_among(logits.detach())
            found = list(class_gradient(logits, target, wrt)) if wrt else []
        image_gradient = found.pop(0) if self.image else None
        return Clean(
            logits.detach(),
            image_gradient,
            {path: activation.detach() for path, activation in kept.items()},
            dict(zip(layers, found, strict=True)),
            refused,
        )


class CleanNeed(Need[T]):
    """Answered by the clean pass."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    @property
    def rides(self) -> Hashable:
        return CleanPass

    def found(self, on: Probe) -> Clean:
        together = [need for need in on.announced if isinstance(need, CleanNeed)]
        return on[CleanPass.covering(together if self in together else (self,), on.model)]


@dataclass(frozen=True)
class Logits(CleanNeed[Tensor]):
    """(N, K) logits of the clean images."""

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return ()

    def passes(self, model: Model) -> Passes:
        return Passes(1, 0)

    def compute(self, on: Probe) -> Tensor:
        return self.found(on).logits


@dataclass(frozen=True)
class ImageGradient(CleanNeed[Tensor]):
    """(N, 3, H, W) gradient of the target logit towards the network's input."""

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> Tensor:
        gradient = self.found(on).image_gradient
        assert gradient is not None
        return gradient


@dataclass(frozen=True)
class OfLayer(CleanNeed[T]):
    """What the clean pass tells of a layer, a role or a module path."""

    layer: str = "last_conv"

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class LayerActivation(OfLayer[Tensor]):
    """Activation of a layer, (N, C, h, w)."""

    def passes(self, model: Model) -> Passes:
        return Passes(1, 0)

    def compute(self, on: Probe) -> Tensor:
        return _feature_maps(self.found(on), on.model.layer(self.layer), on.inputs)[0]


def _feature_maps(clean: Clean, path: str, inputs: Tensor) -> tuple[Tensor, FeatureLayout]:
    """A layer's activation as (N, C, h, w), and how it was read."""
    layout = layout_of(path, clean.activations, clean.refused, inputs.shape)
    return layout.grid(clean.activations[path]), layout


@dataclass(frozen=True)
class LayerGradient(OfLayer[tuple[Tensor, Tensor]]):
    """Activation of a layer and the gradient of the target logit towards it, both (N, C, h, w).

    Whatever the layer returns, as :class:`xbench.features.FeatureLayout` reads it: prefix tokens
    are left out.

    Raises:
        Unsupported: if the layer cannot be recorded, has no grid of positions, or has a gradient at
            its prefix tokens alone.
    """

    def passes(self, model: Model) -> Passes:
        return Passes(1, 1)

    def compute(self, on: Probe) -> tuple[Tensor, Tensor]:
        clean, path = self.found(on), on.model.layer(self.layer)
        activation, layout = _feature_maps(clean, path, on.inputs)
        gradient = clean.gradients[path]
        small = layout.grid(gradient)
        if layout.prefix and gradient.any() and not small.any():
            role = on.model.layers.get("last_conv", path)
            other = f"the role last_conv ({role!r})" if role != path else "an earlier layer"
            raise Unsupported(
                f"layer {path!r} comes after the last attention: only its {layout.prefix} prefix "
                "tokens, such as the class token, carry a gradient, and every map would be zero; "
                f"name {other}"
            )
        return activation, small
