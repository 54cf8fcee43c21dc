"""Classes of libraries as entries: what an adapter of any library needs.

A library is imported when a suite names a class of it. What an adapter must know of a class beyond
its signature stands in a table; the class behind a name is made on first use. Its parameters are
the library's own, with their defaults, where a suite can write them down: numbers, words, yes or
no. Functions cannot be given.

An image's numbers are its own: what draws random numbers, or would mix the images of a batch, sees
them one by one, each with its own stream.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from . import noise, registry
from .autograd import recording, untouched
from .errors import Unsupported, UsageError
from .features import FeatureLayout
from .layers import layout_of
from .probe import Logits, Need, Probe, filled
from .types import Model, Passes

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Parameter(NamedTuple):
    """Of an entry: its type, with the bounds outside which the library would fail, its default, and
    words for the docstring.
    """

    kind: Any
    default: Any
    words: str


@dataclass(frozen=True)
class Facts:
    """What the signature of a library's class does not tell.

    Args:
        what: the map or the score in words, for the first line of the docstring.
        source: who published it.
        without: parameters that have no effect here, fail, or that another one covers.
        fields: parameters of the adapter's, or with another type or default than the library's.
        remark: a paragraph of the docstring.
    """

    what: str
    source: str
    _: KW_ONLY
    without: tuple[str, ...] = ()
    fields: Mapping[str, Parameter] = field(default_factory=dict)
    remark: str = ""

    @property
    def returns(self) -> str:
        """Shape of the result, and what values it cannot have."""
        return "(N,)"


@dataclass(frozen=True)
class Library:
    """Where classes come from.

    Args:
        kind: of the entries, "methods" or "metrics".
        prefix: of their names, as in ``captum/DeepLift``.
        title: what people call it.
        module: that exports its classes.
        handled: parameters that the adapter fills in, or that change no number.
        types: of its parameters, with words for the docstrings; the others have the type of their
            default.
        way_out: from an error of its import, for the end of the message.
    """

    kind: str
    prefix: str
    title: str
    module: str
    handled: tuple[str, ...]
    types: Mapping[str, tuple[Any, str]]
    way_out: Callable[[Exception], str] = lambda error: ""

    def theirs(self, name: str) -> Any:
        """A class of the library, which is imported here.

        Raises:
            UsageError: if it cannot be imported, or is of a version without the class.
        """
        try:
            module = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise UsageError(
                f"{self.prefix}/{name} needs {self.title}, which cannot be imported: {error}"
                + self.way_out(error)
            ) from error
        if not hasattr(module, name):
            raise UsageError(f"the installed version of {self.title} has no class {name}")
        return getattr(module, name)

    def summary(self, name: str, facts: Facts) -> str:
        """First line of an entry's docstring."""
        return f"{name} of {self.title}: {facts.what}; {facts.returns}."

    def offer(
        self,
        classes: Mapping[str, Facts],
        make: Callable[[str], type],
        refused: Mapping[str, str],
        origin: str,
    ) -> None:
        """Register classes by name, each made once, and give the reasons against the others."""
        for name, facts in classes.items():
            registry.provide(
                self.kind,
                f"{self.prefix}/{name}",
                functools.cache(functools.partial(make, name)),
                origin=origin,
                summary=self.summary(name, facts),
            )
        for name, reason in refused.items():
            registry.refuse(self.kind, f"{self.prefix}/{name}", reason)

    def plain(self, takes: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a class's parameters, with their defaults, that a suite can write down."""
        return {
            name: default.__name__ if isinstance(default, type) else default
            for name, default in takes.items()
            if name not in self.handled
            and (name in self.types or type(default) in (bool, int, float, str))
        }

    def parameters(self, defaults: Mapping[str, Any], facts: Facts) -> dict[str, Parameter]:
        """An entry's, by name, from the defaults of those that may be offered."""
        usual = f"as in {self.title}"
        found = {
            name: Parameter(kind, default, words)
            for name, default in defaults.items()
            for kind, words in [self.types.get(name, (type(default), usual))]
            if name not in facts.without
        }
        return {**found, **facts.fields}

    def absent(self, takes: Iterable[str], parameters: Iterable[str]) -> str:
        """Sentence on what the library's class takes and the entry does not, if there is any."""
        names = sorted({*takes} - {*parameters, *self.handled})
        return f"Not offered: {', '.join(names)}." if names else ""


def signature(function: Any) -> dict[str, Any]:
    """Name to default of a function's parameters; :data:`REQUIRED` where there is none."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


REQUIRED = inspect.Parameter.empty


def docstring(paragraphs: Iterable[str], parameters: Mapping[str, Parameter], *last: str) -> str:
    """Paragraphs that are not empty, arguments, and sections that stand as they are."""
    parts = [textwrap.fill(paragraph, 100) for paragraph in paragraphs if paragraph]
    lines = [
        textwrap.fill(f"{key}: {words}.", 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for key, (_, _, words) in parameters.items()
    ]
    if lines:
        parts.append("\n".join(("Args:", *lines)))
    return "\n\n".join((*parts, *last))


class Adapter:
    """A library's class as an entry; :func:`declared` adds the name, the parameters and the facts.

    Attributes:
        name: such as "captum/DeepLift".
    """

    name: ClassVar[str]
    library: ClassVar[Library]

    def theirs(self) -> Any:
        """The library's class."""
        return self.library.theirs(self.name.partition("/")[2])

    def __reduce__(self) -> Any:
        # the class is made on first use, so pickle cannot find it by its name
        return registry.make, (self.library.kind, self.name, registry.parameters(self))


def declared(
    name: str, base: type[Adapter], words: str, parameters: Mapping[str, Parameter], **facts: Any
) -> type:
    """The registered class of a library's.

    Args:
        name: that the library gives it.
        base: what its calls do.
        words: the docstring.
        facts: class attributes.
    """
    full = f"{base.library.prefix}/{name}"
    namespace = {
        "__module__": base.__module__,
        "__doc__": words,
        "__annotations__": {key: kind for key, (kind, _, _) in parameters.items()},
        **{key: default for key, (_, default, _) in parameters.items()},
        **facts,
    }
    return registry.declared(full, type(full.replace("/", "_"), (base,), namespace))


def one_by_one(
    name: str, probe: Probe, finite: Tensor, value: Callable[[int], Any], values: Tensor
) -> Tensor:
    """Fills in the values (N, ...) of images that are finite, (N,), each from its own stream.

    While one is computed, by its place in the batch, the global generators are at the image's own
    stream, and the passes that are counted are its own.
    """
    streams = noise.stream_keys(probe.seed, probe.batch.keys[: probe.real], name)
    known = finite.tolist()
    for at, stream in enumerate(streams.tolist()):
        if known[at]:
            with noise.seeded(stream, probe.inputs.device), probe.meter.padded(1, 1):
                values[at] = value(at)
    return filled(values[: probe.real], probe.rows)


# --- methods --------------------------------------------------------------------------------------

Cost = Callable[[Any, Model], tuple[int, int]]
"""Forward and backward passes per image, of a method and a model."""


def fixed(forward: int, backward: int) -> Cost:
    """The same for any parameters and any model."""
    return lambda method, model: (forward, backward)


@dataclass(frozen=True)
class MethodFacts(Facts):
    """Of a method.

    Args:
        passes: forward and backward passes per image.
        at_most: whether ``passes`` are an upper bound.
        alone: whether images are explained one by one.
        is_signed: whether maps have both signs by default.
        maps_only: whether a layer must return feature maps, not tokens.
        class_agnostic: whether all classes get the same map.
        tolerance: between batch sizes, where the library computes in float32.
    """

    passes: Cost
    _: KW_ONLY
    at_most: bool = False
    alone: bool = False
    is_signed: bool = False
    maps_only: bool = False
    class_agnostic: bool = False
    tolerance: float | None = None

    @property
    def returns(self) -> str:
        return "(N, H, W)" if self.is_signed else "(N, H, W), >= 0"


class MethodAdapter(Adapter):
    """A library's class as a method.

    Attributes:
        made: defaults of what the library's constructor takes.
        called: defaults of what its call takes.
    """

    facts: ClassVar[MethodFacts]
    made: ClassVar[Mapping[str, Any]]
    called: ClassVar[Mapping[str, Any]]

    @property
    def takes(self) -> set[str]:
        """All that the library's class takes."""
        return {*self.made, *self.called}

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def passes(self, model: Model) -> Passes:
        return Passes(*self.facts.passes(self, model))

    def given(self, takes: Iterable[str]) -> dict[str, Any]:
        """Those of the parameters here that the library's constructor, or its call, takes."""
        params = registry.parameters(self)
        return {name: params[name] for name in params.keys() & {*takes}}

    def layout(self, probe: Probe, path: str) -> FeatureLayout:
        """How to read the output of a layer; the first image's forward that tells is padding.

        Raises:
            Unsupported: if the layer does not run exactly once, or holds no grid of positions, or
                the library's class cannot read it.
        """
        with (
            recording(probe.model.net, [path]) as (kept, refused),
            probe.meter.padded(0, 1),
            torch.no_grad(),
        ):
            probe.model.logits(probe.inputs[:1])
        layout = layout_of(path, kept, refused, probe.inputs[:1].shape)
        if self.facts.maps_only and layout.kind != "maps":
            raise Unsupported(
                f"{self.name} reads feature maps (N, C, h, w), and layer {path!r} returns "
                f"{'tokens' if layout.kind == 'tokens' else '(N, h, w, C)'}"
            )
        return layout

    def explained(self, probe: Probe, explain: Callable[[slice], Tensor], alone: bool) -> Tensor:
        """Maps of the whole batch at once, or one by one.

        One by one, an image without finite logits gets a map of NaN, and the library never sees it.
        """
        if not alone:
            return explain(slice(None)).detach()
        return one_by_one(
            self.name,
            probe,
            probe[Logits()].isfinite().all(1),
            lambda at: explain(slice(at, at + 1)).detach()[0],
            torch.full_like(probe.inputs[:, 0], torch.nan),
        )

    @contextlib.contextmanager
    def at_work(self, probe: Probe) -> Iterator[None]:
        """The library with gradients, without a word, on a network that is left as it was.

        Raises:
            Unsupported: where the library refuses the network, in its own words.
        """
        with (
            untouched(probe.model.net),
            torch.enable_grad(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            try:
                yield
            except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
                raise Unsupported(f"{self.name} refuses: {error}") from error
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                raise Unsupported(
                    f"{self.name} needs a layer that the network does not change in place "
                    f"afterwards; name one before it ({error})"
                ) from error


def method(
    name: str,
    base: type[MethodAdapter],
    facts: MethodFacts,
    defaults: Mapping[str, Any],
    signatures: tuple[Mapping[str, Any], Mapping[str, Any]],
    words: Sequence[str],
) -> type:
    """The registered class of a method.

    Args:
        name: that the library gives it.
        defaults: of the parameters that may be offered.
        signatures: of the library's constructor and call.
        words: paragraphs that follow the docstring's first.
    """
    library, (made, called) = base.library, signatures
    parameters = library.parameters(defaults, facts)
    layered = ", or a layer has no feature maps" if {"layer", "layers"} & {*parameters} else ""
    alone = "Images are explained one by one, random numbers being each image's own."
    lines = docstring(
        (
            library.summary(name, facts),
            *words,
            facts.remark,
            alone if facts.alone else "",
            library.absent((*made, *called), parameters),
        ),
        parameters,
        f"Raises:\n    Unsupported: if {library.title} cannot explain the network{layered}.",
        f"Source: {facts.source}.",
    )
    known: dict[str, Any] = {"facts": facts, "made": made, "called": called}
    if "layer" in parameters:
        known["layers"] = property(lambda self: (self.layer,))
    if facts.at_most:
        known["passes_bound"] = True
    if facts.class_agnostic:
        known["class_agnostic"] = True
    if facts.tolerance:
        known["tolerance"] = facts.tolerance
    return declared(name, base, lines, parameters, **known)
