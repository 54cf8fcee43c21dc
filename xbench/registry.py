"""Names: which methods, metrics, models, data sets and regularisers there are, and whose they are.

A plug-in uses the decorators that the built-ins use::

    @xbench.method("my_method")
    class MyMethod:
        strength: float = 1.0
        def __call__(self, probe): ...

The decorator makes the class a frozen, strictly validated dataclass: its fields are its
hyper-parameters, its YAML keys and, with its name and ``version``, its identity. A class may name
sets of them in ``presets``: ``preset: NAME`` then stands for these parameters, and is none itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as validated
from typing_extensions import dataclass_transform

from .errors import UsageError

KINDS = ("methods", "metrics", "models", "datasets", "regularisers")
_HOMES = {"regularisers": "xbench.training.regularisers"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Args:
        kind: one of :data:`KINDS`.
        name: what a suite writes.
        origin: module, file or distribution that provides it.
        load: gives the class; an installed plug-in is imported only here.
        package: first part of the class's module path.
        installed: whether an entry point promises it; its decorator then adds nothing.
        summary: of an entry whose class is made on first use, so that listing need not make it.
    """

    kind: str
    name: str
    origin: str
    load: Callable[[], type]
    package: str
    installed: bool = False
    summary: str = ""


@dataclass(frozen=True)
class Family:
    """Names of a library under one prefix, which are too many to list or unknown before asked for.

    Args:
        kind, origin: as of an :class:`Entry`.
        prefix: such as ``torchvision/``.
        load: the class behind a name, which comes without the prefix.
        names: without the prefix, for suggestions; empty where nobody can tell.
        summary: for the list of entries.
    """

    kind: str
    prefix: str
    origin: str
    load: Callable[[str], type]
    names: Callable[[], Iterable[str]]
    summary: str


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_families: dict[str, list[Family]] = {kind: [] for kind in KINDS}
_broken: dict[str, str] = {}
_refused: dict[tuple[str, str], str] = {}
_scanned: set[str] = set()


@dataclass_transform(frozen_default=True)
def method(name: str) -> Callable[[T], T]:
    """Register a method: called with a Probe, it returns saliency maps (N, H, W)."""
    return lambda cls: _register("methods", name, cls)


@dataclass_transform(frozen_default=True)
def metric(name: str) -> Callable[[T], T]:
    """Register a metric: called with an Explanation, it returns one score per image, (N,)."""
    return lambda cls: _register("metrics", name, cls)


@dataclass_transform(frozen_default=True)
def model(name: str) -> Callable[[T], T]:
    """Register a model: ``describe(data)`` returns a :class:`xbench.types.Network`."""
    return lambda cls: _register("models", name, cls)


@dataclass_transform(frozen_default=True)
def dataset(name: str) -> Callable[[T], T]:
    """Register a data set: ``open(data)`` returns a :class:`xbench.types.Source`."""
    return lambda cls: _register("datasets", name, cls)


@dataclass_transform(frozen_default=True)
def regulariser(name: str) -> Callable[[T], T]:
    """Register a regulariser: called with a training step, it returns a scalar to be added.

    Its field ``weight`` is the factor in the loss.
    """
    return lambda cls: _register("regularisers", name, cls)


def provide(kind: str, name: str, load: Callable[[], type], *, origin: str, summary: str) -> None:
    """Register a name whose class is made, with :func:`declared`, when somebody asks for it."""
    _add(Entry(kind, name, origin, load, origin.partition(".")[0], summary=summary))


def provide_family(family: Family) -> None:
    """Register all names under a prefix; a name that is registered itself comes before them."""
    _families[family.kind].append(family)


def provide_under(kind: str, prefix: str, base: type, key: str) -> None:
    """Register a class under every name with a prefix: what follows it is the parameter ``key``.

    Args:
        kind: of the entries.
        prefix: such as ``huggingface/``.
        base: a frozen dataclass that is not registered itself.
        key: its first field.
    """

    @functools.cache
    def load(rest: str) -> type:
        name = prefix + rest

        def reduce(entry: Any) -> tuple[Any, ...]:
            # the class is made on first use, so pickle cannot find it by its name
            return make, (kind, name, parameters(entry))

        namespace = {
            "__annotations__": {key: base.__annotations__[key]},
            key: rest,
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "__reduce__": reduce,
        }
        return declared(name, type(base.__name__, (base,), namespace))

    summary = (base.__doc__ or "").split("\n")[0]
    provide_family(Family(kind, prefix, base.__module__, load, tuple, summary))


def families(kind: str) -> tuple[Family, ...]:
    """All families of a kind."""
    entries(kind)
    return tuple(_families[kind])


def refuse(kind: str, name: str, reason: str) -> None:
    """Give the reason for which a name that users may expect stands for nothing."""
    _refused[kind, name] = reason


def refusal(kind: str, name: str) -> str | None:
    """The reason why a name stands for nothing, if somebody gave one."""
    entries(kind)
    reason = _refused.get((kind, name))
    return None if reason is None else f"{kind[:-1]} {name!r} is not offered: it {reason}"


def declared(name: str, cls: T) -> T:
    """The class as a frozen, strictly validated dataclass of that name."""
    made: Any = validated(frozen=True, config=_STRICT)(cls)
    made.name = name
    return made  # type: ignore[no-any-return]


def _register(kind: str, name: str, cls: T) -> T:
    made: Any = declared(name, cls)
    package = cls.__module__.partition(".")[0]
    _add(Entry(kind, name, _origin(cls), lambda: made, package))
    return made  # type: ignore[no-any-return]


def _origin(cls: type) -> str:
    """Module of a built-in, file of a plug-in, or the module of what was typed at a prompt."""
    if cls.__module__.startswith("xbench."):
        return cls.__module__
    try:
        return inspect.getsourcefile(cls) or cls.__module__
    except (OSError, TypeError):  # a notebook or "python -c" has no file
        return cls.__module__


def _add(entry: Entry) -> None:
    if not NAME.fullmatch(entry.name):
        raise UsageError(
            f"{entry.origin} registers {entry.kind[:-1]} {entry.name!r}; names are slash-separated "
            f"segments of letters, digits, '.', '_' and '-'"
        )
    known = _entries[entry.kind].get(entry.name)
    if known is not None:
        if known.installed != entry.installed and known.package == entry.package:
            return  # an entry point and the decorator behind it: whoever comes first
        # one class defined again is a notebook's cell run again
        same = known.origin == entry.origin and (
            entry.installed or known.load().__qualname__ == entry.load().__qualname__
        )
        if not same:
            raise UsageError(
                f"{entry.kind[:-1]} {entry.name!r} is provided twice, by {known.origin} and by "
                f"{entry.origin}; rename or uninstall one of them"
            )
    _entries[entry.kind][entry.name] = entry


def entries(kind: str) -> dict[str, Entry]:
    """All entries of a kind by name; installed plug-ins are listed without being imported."""
    if kind not in _scanned:
        _scanned.add(kind)
        importlib.import_module(_HOMES.get(kind, f"xbench.{kind}"))
        for point in entry_points(group=f"xbench.{kind}"):
            _add_installed(kind, point)
    return dict(sorted(_entries[kind].items()))


def _add_installed(kind: str, point: EntryPoint) -> None:
    owner = point.dist.name if point.dist is not None else point.value
    origin = f"{owner} ({point.value})"

    def load() -> type:
        try:
            cls: type = point.load()
        except (Exception, SystemExit) as error:
            _broken[origin] = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"plug-in {origin} provides {kind[:-1]} {point.name!r} but fails to import: "
                f"{type(error).__name__}: {error}"
            ) from error
        if getattr(cls, "name", None) != point.name or not dataclasses.is_dataclass(cls):
            raise UsageError(
                f"plug-in {origin} provides {kind[:-1]} {point.name!r}, but that is not a class "
                f"with the decorator @xbench.{kind[:-1]}({point.name!r})"
            )
        return cls

    package = point.module.partition(".")[0]
    try:
        _add(Entry(kind, point.name, origin, load, package, installed=True))
    except UsageError as error:
        message = _broken[origin] = str(error)
        known = _entries[kind].get(point.name)
        if known is not None:

            def refuse() -> type:
                raise UsageError(message)

            _entries[kind][point.name] = dataclasses.replace(known, load=refuse)


def broken_plugins() -> dict[str, str]:
    """Origin and error of each installed plug-in that cannot be imported or registered."""
    for kind in KINDS:
        for entry in entries(kind).values():
            if entry.summary:
                continue  # a library's, which is imported only where a suite names it
            try:
                entry.load()
            except UsageError as error:
                _broken.setdefault(entry.origin, str(error))
    return dict(_broken)


def load_plugin(name: str) -> None:
    """Import a file (``my_method.py``) or a module (``my_package.methods``) of decorated classes.

    Raises:
        UsageError: if it is not there or fails to import.
    """
    for kind in KINDS:
        entries(kind)  # built-ins first, so that a clash names the newcomer
    path = Path(name)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise UsageError(f"plug-in file {name!r} does not exist")
            module_name = f"xbench_plugin_{path.stem}"
            known = sys.modules.get(module_name)
            if known is not None and known.__file__ == str(path.resolve()):
                return
            spec = importlib.util.spec_from_file_location(module_name, path.resolve())
            if spec is None or spec.loader is None:
                raise UsageError(f"plug-in file {name!r} cannot be read as Python")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[module_name]  # half of a module must not pass for it
                raise
        else:
            importlib.import_module(name)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"plug-in {name!r} fails to import: {type(error).__name__}: {error}"
        ) from error


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the whole short list, for the end of a message."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, n=2, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; known are " + ", ".join(known) if len(known) <= 12 else ""


def entry_of(kind: str, name: str) -> Entry | None:
    """The entry of that name; whether a family knows the name shows when its class is loaded."""
    known = entries(kind)
    if name in known:
        return known[name]
    for family in families(kind):
        if name.startswith(family.prefix) and NAME.fullmatch(name):
            load = partial(family.load, name.removeprefix(family.prefix))
            package = family.origin.partition(".")[0]
            return Entry(kind, name, family.origin, load, package, summary=family.summary)
    return None


def suggestion_of(kind: str, wrong: str) -> str:
    """As :func:`suggestion`, of the names of a kind; those of families may lack their prefix."""
    start, slash, rest = wrong.partition("/")
    close = {name: name for name in difflib.get_close_matches(wrong, entries(kind))}
    for family in families(kind):
        if not slash or difflib.get_close_matches(f"{start}/", [family.prefix]):
            near = difflib.get_close_matches(rest or start, family.names())
            close |= {family.prefix + name: name for name in near}
    if not close:
        return suggestion(wrong, entries(kind))

    def likeness(name: str) -> float:
        asked = wrong if name == close[name] else rest or start
        return difflib.SequenceMatcher(None, asked, close[name]).ratio()

    best = sorted(close, key=likeness, reverse=True)[:2]
    if likeness(best[0]) == 1:
        best = best[:1]
    return "; did you mean " + " or ".join(map(repr, best)) + "?"


def find(kind: str, name: str) -> type:
    """The class behind a name.

    Raises:
        UsageError: if nothing has that name, or its plug-in cannot be imported.
    """
    found = entry_of(kind, name)
    if found is None:
        raise UsageError(
            refusal(kind, name)
            or f"unknown {kind[:-1]} {name!r}{suggestion_of(kind, name)} "
            f"('xbench list {kind}' shows all)"
        )
    return found.load()


def make(kind: str, name: str, params: Mapping[str, object] | None = None) -> Any:
    """An entry with these hyper-parameters.

    Raises:
        UsageError: on an unknown name or key, a wrong type or a value out of range.
    """
    for key in params or {}:
        if not isinstance(key, str):
            raise UsageError(f"{kind[:-1]} {name!r} has no parameter {key!r}")
    name, resolved = resolve(kind, name, dict(params or {}))
    try:
        return find(kind, name)(**resolved)
    except ValidationError as error:
        problems = [problem for _, problem in parameter_problems(kind, name, error)]
        raise UsageError("; ".join(problems)) from None


def resolve(kind: str, name: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and parameters, ``preset`` and ``reversed`` (which are none) carried out.

    ``preset: NAME`` becomes the parameters that it stands for, beneath those that are given;
    ``reversed: {l: 0.07, m: 0.1}`` makes a method the subject of the method ``reversed``.

    Raises:
        UsageError: if the entry is unknown, has no such preset, or ``reversed`` is no mapping.
    """
    cls = find(kind, name)
    own = {field.name for field in fields(cls)}
    params = {key: tuples(value) for key, value in params.items()}
    if "preset" in params and "preset" not in own:
        known: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
        chosen = params.pop("preset")
        if chosen not in known:
            hint = suggestion(str(chosen), known) if known else "; it has none"
            raise UsageError(f"{kind[:-1]} {name!r} has no preset {chosen!r}{hint}")
        params = {**known[chosen], **params}
    if kind == "methods" and "reversed" in params and "reversed" not in own:
        shares = params.pop("reversed")
        if not isinstance(shares, dict):
            raise UsageError(
                f"method {name!r}: reversed = {shares!r} must be a mapping, such as "
                "{l: 0.07, m: 0.1}; {} takes these defaults"
            )
        return "reversed", {"of": {"name": name, **params}, **shares}
    return name, params


@dataclass(frozen=True)
class Nested:
    """An entry among another's hyper-parameters: plain data, hashable and picklable.

    Args:
        kind, name: as in the registry.
        params: resolved, sorted.
    """

    kind: str
    name: str
    params: tuple[tuple[str, Any], ...]

    def make(self) -> Any:
        return make(self.kind, self.name, dict(self.params))

    def plain(self) -> dict[str, Any]:
        """As a suite would write it."""
        params = {k: v.plain() if isinstance(v, Nested) else v for k, v in self.params}
        return {"name": self.name, **params}


def _nested(kind: str, value: Any) -> Nested:
    if isinstance(value, Nested):
        return value
    params = {"name": value} if isinstance(value, str) else value
    if not isinstance(params, dict) or not isinstance(params.get("name"), str):
        raise ValueError(f"write the name of a {kind[:-1]}, or a mapping with a key 'name'")
    params = dict(params)
    try:
        entry = make(kind, params.pop("name"), params)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return Nested(kind, entry.name, tuple(sorted(parameters(entry).items())))


MethodName = Annotated[Nested, BeforeValidator(partial(_nested, "methods"))]
"""A field that takes another method: its name, or a mapping of its name and hyper-parameters."""


def plain(value: Any) -> Any:
    """What JSON can hold of a hyper-parameter that it does not know."""
    if isinstance(value, Nested):
        return value.plain()
    raise TypeError(f"{value!r} is no hyper-parameter")


def tuples(value: Any) -> Any:
    """YAML's lists as the tuples that hashable entries hold."""
    if isinstance(value, list | tuple):
        return tuple(tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return value


def parameter_problems(
    kind: str, name: str, error: ValidationError, beside: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """(key, sentence) for each problem that validation found.

    Args:
        kind, name: of the entry.
        error: of the validation.
        beside: keys that may stand beside the entry's own.
    """
    names = [*(field.name for field in fields(find(kind, name))), *beside]
    found = []
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "unexpected_keyword_argument":
            sentence = f"{kind[:-1]} {name!r} has no parameter {key!r}" + (
                suggestion(key, names) if names else "; it has none"
            )
        elif problem["type"] in ("missing", "missing_argument"):
            sentence = f"{kind[:-1]} {name!r} needs a value for {key!r}"
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            where = f": {key} = {problem['input']!r}" if key else ""
            sentence = f"{kind[:-1]} {name!r}{where}: {reason[:1].lower()}{reason[1:]}"
        found.append((key, sentence))
    return found


def fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    """The hyper-parameters of an entry's class."""
    return dataclasses.fields(cls)


def takes_a_list(cls: type, key: str) -> bool:
    """Whether a list in YAML is one value of this field (else it is a grid of values)."""
    kind = get_type_hints(cls).get(key)
    return any(get_origin(part) is tuple for part in (kind, *get_args(kind)))


def parameters(entry: Any) -> dict[str, Any]:
    """Resolved hyper-parameters; :func:`plain` makes those JSON that are not."""
    return {field.name: getattr(entry, field.name) for field in fields(type(entry))}


def identity(entry: Any) -> dict[str, Any]:
    """What makes an entry's numbers: name, version (default 1) and resolved parameters.

    Parameters that the class lists in ``places`` only say where a content is that is hashed itself,
    such as a weight file; they are left out.
    """
    places = getattr(entry, "places", ())
    return {
        "name": entry.name,
        "version": getattr(entry, "version", 1),
        "params": {
            key: identity(value.make()) if isinstance(value, Nested) else value
            for key, value in parameters(entry).items()
            if key not in places
        },
    }


def changed_parameters(entry: Any) -> dict[str, Any]:
    """The parameters that differ from their defaults, or ``preset`` and those that differ from it,
    whichever says it in fewer words.
    """
    declared = type(entry).__pydantic_fields__  # knows a default however it was written
    defaults = {key: f.get_default(call_default_factory=True) for key, f in declared.items()}

    def beside(base: Mapping[str, Any]) -> dict[str, Any]:
        return {key: getattr(entry, key) for key in declared if getattr(entry, key) != base[key]}

    shortest = beside(defaults)
    for name, params in getattr(entry, "presets", {}).items():
        differing = beside({**defaults, **tuples(params)})
        if len(differing) < len(shortest):
            shortest = {"preset": name, **differing}
    return shortest


def label(entry: Any) -> str:
    """Name and the parameters that differ from their defaults: ``smooth_grad(samples=5)``.

    An entry among them is named without its key: ``reversed(grad_cam)``. Parameters that the class
    lists in ``unnamed`` are left out.
    """
    name: str = entry.name
    nested = {key: v for key, v in parameters(entry).items() if isinstance(v, Nested)}
    parts = [label(value.make()) for value in nested.values()]
    silent = (*nested, *getattr(entry, "unnamed", ()))
    parts += [f"{k}={v}" for k, v in changed_parameters(entry).items() if k not in silent]
    return f"{name}({', '.join(parts)})" if parts else name


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that any shell pattern matches."""
    patterns = tuple(patterns)
    return {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
