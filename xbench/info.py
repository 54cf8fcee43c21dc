"""What is registered, what an entry is, and whether this machine is fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import platform
import shutil
import textwrap
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from . import registry
from .errors import UsageError, XbenchError
from .suite import builtin_suites, read_suite


def listing(kind: str, *, as_json: bool = False) -> str:
    """One line per entry: name and the first sentence of its docstring."""
    rows = _rows(kind)
    if as_json:
        return json.dumps([{"name": name, "summary": words} for name, words in rows], indent=1)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  {words}" for name, words in rows) or f"no {kind}"


def _rows(kind: str) -> list[tuple[str, str]]:
    if kind == "suites":
        return [
            (name, str(read_suite(name).value.get("description", ""))) for name in builtin_suites()
        ]
    if kind == "plugins":
        found = [
            (f"{entry.kind}/{name}", entry.origin)
            for group in registry.KINDS
            for name, entry in registry.entries(group).items()
            if not entry.origin.startswith("xbench.")
        ]
        return found + [(origin, f"broken: {words}") for origin, words in _broken_plugins()]
    rows = []
    for name, entry in registry.entries(kind).items():
        if entry.installed:  # its module is imported only where a suite names it
            rows.append((name, f"provided by {entry.origin}"))
            continue
        if entry.summary:
            rows.append((name, entry.summary))
            continue
        try:
            rows.append((name, summary(entry.load())))
        except UsageError as error:
            rows.append((name, f"broken: {' '.join(str(error).split())}"))
    rows += [(f"{family.prefix}<name>", family.summary) for family in registry.families(kind)]
    return sorted(rows)


def _broken_plugins() -> list[tuple[str, str]]:
    """Origin and error of each, in one line: an import error may have many."""
    return [(origin, " ".join(e.split())) for origin, e in registry.broken_plugins().items()]


def summary(cls: type) -> str:
    """First sentence of a docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def description(name: str) -> str:
    """Everything a user asks of an entry.

    Raises:
        UsageError: if no entry of any kind has that name.
    """
    for kind in registry.KINDS:
        for family in registry.families(kind):
            if name in (family.prefix, family.prefix.rstrip("/"), f"{family.prefix}<name>"):
                return _describe_family(family)
    found = [(kind, entry) for kind in registry.KINDS if (entry := registry.entry_of(kind, name))]
    if not found:
        for kind in registry.KINDS:
            if reason := registry.refusal(kind, name):
                raise UsageError(reason)
        known = [known for kind in registry.KINDS for known in registry.entries(kind)]
        hint = registry.suggestion(name, known)
        hints = [hint, *(registry.suggestion_of(kind, name) for kind in registry.KINDS)]
        raise UsageError(f"nothing is registered as {name!r}{next(filter(None, hints), '')}")
    return "\n\n".join(_describe(entry) for _, entry in found)


def _describe_family(family: registry.Family) -> str:
    names = sorted(family.names())
    lines = [f"{family.kind} {family.prefix}<name>", "", family.summary]
    if names:
        rows = textwrap.fill(", ".join(names), 100, break_on_hyphens=False)
        lines += ["", f"{len(names)} names:", rows]
    return "\n".join(lines)


def _describe(entry: registry.Entry) -> str:
    cls: Any = entry.load()
    lines = [f"{entry.kind[:-1]} {entry.name}", "", inspect.getdoc(cls) or "(no docstring)", ""]
    fields = registry.fields(cls)
    if fields:
        lines.append("Parameters:")
        types = get_type_hints(cls, include_extras=True)
        for field in fields:
            default = "required" if _is_required(field) else f"default {_default(cls, field)!r}"
            lines.append(f"  {field.name}: {_type_words(types[field.name])}, {default}")
    for preset, params in getattr(cls, "presets", {}).items():
        stands_for = ", ".join(f"{key}={value}" for key, value in params.items())
        lines.append(f"Preset {preset}: {stands_for}")
    for fact in ("better", "range", "family", "control", "class_agnostic", "undefined"):
        value = getattr(cls, fact, None)
        if value is not None and not isinstance(value, property):
            lines.append(f"{fact.replace('_', ' ').capitalize()}: {value}")
    passes = _passes(cls) if entry.kind == "methods" else ""
    if passes:
        lines.append(f"Passes per image on shapes/resnet, alone: {passes}")
    lines.append(f"Version: {getattr(cls, 'version', 1)}")
    lines.append(f"Provided by: {entry.origin}")
    lines.append(f"Source file: {inspect.getsourcefile(cls)}")
    return "\n".join(lines)


def _default(cls: Any, field: dataclasses.Field[Any]) -> Any:
    """However it was written: pydantic's Field holds one too."""
    return cls.__pydantic_fields__[field.name].default


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _type_words(kind: Any) -> str:
    """``int >= 1``, ``'black' | 'mean'``, ``tuple of 3 float``: a type as a user reads it."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        bounds = [
            f"{sign} {getattr(bound, name)}"
            for info in arguments[1:]
            for bound in getattr(info, "metadata", [])
            for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if hasattr(bound, name)
        ]
        return " ".join([_type_words(arguments[0]), " and ".join(bounds)]).strip()
    if kind is registry.Nested:
        return "a method, by name or as a mapping"
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, arguments))
    if get_origin(kind) is tuple and arguments[-1] is ...:
        return f"tuple of {_type_words(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"tuple of {len(arguments)} {_type_words(arguments[0])}"
    if arguments:
        return " | ".join(map(_type_words, arguments))
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))


def _passes(cls: Any) -> str:
    """Of an entry at its defaults, on the embedded network, whose layers some costs depend on."""
    from .models.entries import ShapesResNet
    from .models.loading import describe_layers
    from .probe import method_cost
    from .types import Model

    network = ShapesResNet().describe(None)
    net, layers, _ = describe_layers(network, (64, 64))
    model = Model("shapes/resnet", net, network.mean, network.std, layers, (64, 64))
    try:
        passes = method_cost(cls(), model)
    except (TypeError, ValueError):  # a parameter is required
        return ""
    if passes is None:
        return "not known before, or not possible there"
    bound = "at most " if getattr(cls, "passes_bound", False) else ""
    return f"{bound}{passes.forward} forward, {passes.backward} backward"


def diagnosis() -> tuple[str, bool]:
    """What ``xbench doctor`` prints, and whether all is well."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    problems: list[str] = []
    for package in ("xbench", "torch", "torchvision", "numpy", "pandas", "pyarrow", "pillow",
                    "captum", "grad-cam", "quantus", "timm", "ray"):  # fmt: skip
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
            if package in ("torch", "torchvision"):
                problems.append(f"{package} is missing: pip install -c constraints.txt .")
    problems += _torch_problems(lines)
    problems += _opencv_problems()
    home = Path.cwd()
    lines.append(f"disk: {shutil.disk_usage(home).free >> 30} GiB free at {home}")
    data = os.environ.get("XBENCH_DATA")
    lines.append(f"XBENCH_DATA: {data or 'not set'}")
    if data and not Path(data).is_dir():
        problems.append(f"XBENCH_DATA names {data!r}, which is no directory")
    try:
        problems += [f"plug-in {origin}: {words}" for origin, words in _broken_plugins()]
    except (ImportError, XbenchError) as error:
        problems.append(f"the built-in entries cannot be imported: {error}")
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["no problems found"]
    return "\n".join(lines), not problems


def _torch_problems(lines: list[str]) -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported: {error}"]
    if torch.cuda.is_available():
        lines.append(f"device: {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    else:
        lines.append(
            f"device: CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        )
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return [
            f"torchvision does not fit this torch ({error}); install the pair that "
            "constraints.txt names, both from the same index (a CPU-only torch does not go with a "
            "plain torchvision)"
        ]
    return []


def _opencv_problems() -> list[str]:
    owners = sorted(
        name
        for item in distributions()
        if (name := (item.metadata["Name"] or "").lower()).startswith("opencv-")
    )
    if importlib.util.find_spec("cv2") is None:
        return []
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        return [
            f"cv2 cannot be imported ({error}); {' and '.join(owners)} own the same folder: "
            "pip uninstall opencv-python, then pip install --force-reinstall opencv-python-headless"
        ]
    return []
