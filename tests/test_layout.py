"""The architecture, as a list: a module imports only from lines above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import xbench

ROOT = Path(xbench.__file__).parent

ORDER = (
    # what everything may use
    "errors",
    "files",
    "downloads",
    "offline",
    "types",
    "noise",
    "maps",
    "mapfiles",
    "similarity",
    "features",
    "imputation",
    "document",
    "registry",
    # one network and one batch
    "autograd",
    "layers",
    "replay",
    "calls",
    "probe",
    "baselines",
    "orders",
    "masking",
    "sweeps",
    "randomisation",
    "adapters",
    # entries: each is one class whose body is its formula
    "methods",
    "metrics",
    "models",
    "datasets",
    # one cell
    "scoring",
    # a suite, its plan, its units of work
    "suite",
    "store",
    "keep",
    "selection",
    "plan",
    "runner",
    "engines",
    "bar",
    "progress",
    # recipe -> weights; knows nothing of methods, metrics or the runner
    "training",
    # what users meet
    "statistics",
    "plot",
    "captions",
    "tables",
    "gallery",
    "sheets",
    "leaderboard",
    "views",
    "published",
    "provenance",
    "storekeeping",
    "storetext",
    "report",
    "compare",
    "run",
    "info",
    "api",
    "explain",
    "testing",
    "cli",
)
"""Packages stand for all their files. ``xbench/__init__.py`` names lazily what ``api``, ``errors``
and others hold; ``registry.entries`` imports the four packages of entries by name on first use.
"""

LIGHT = (
    "__init__",
    "errors",
    "document",
    "registry",
    "suite",
    "info",
    "storekeeping",
    "storetext",
    "cli",
)
"""Modules that import no torch when they are imported."""

HEAVY = {"torch", "torchvision", "captum", "pytorch_grad_cam", "quantus", "matplotlib", "timm"}


def sources() -> list[Path]:
    """Modules of the package; a wheel also carries the folder of suites, with its scripts."""
    return sorted(p for p in ROOT.rglob("*.py") if (ROOT / "benchmarks") not in p.parents)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """What a file imports, absolute names as they are, its own package's as ``.probe``."""
    for node in nodes or ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert node.module is not None
                yield node.module
                continue
            package = [*path.relative_to(ROOT).parts[:-1]]
            base = package[: len(package) - node.level + 1]
            inside = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                longer = ROOT.joinpath(*inside, alias.name)
                is_module = longer.with_suffix(".py").exists() or longer.is_dir()
                yield "." + ".".join([*inside, alias.name] if is_module else inside)


def at_import(path: Path) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported, whatever is imported for types alone aside."""
    waiting: list[ast.AST] = list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def places(word: str) -> set[str]:
    return {module_of(path) for path in sources() if word in path.read_text(encoding="utf-8")}


def test_every_module_has_its_place_in_the_order() -> None:
    tops = {module_of(path).split(".")[0] for path in sources()} - {"__init__"}
    assert tops == set(ORDER)


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    here = module_of(path).split(".")[0]
    if here == "__init__":
        return
    rank = ORDER.index(here)
    for name in imports(path):
        assert not name.startswith("xbench"), f"{here} imports {name} by its absolute name"
        if name.startswith("."):
            there = name.split(".")[1]
            assert there == here or ORDER.index(there) < rank, f"{here} imports {there}"


@pytest.mark.parametrize("package", ["methods", "metrics"])
def test_entries_never_import_a_neighbour_or_the_other_kind(package: str) -> None:
    for path in sorted((ROOT / package).glob("*.py")):
        if path.name == "__init__.py":
            continue
        for name in imports(path):
            kind = name.split(".")[1] if name.startswith(".") else ""
            assert kind not in ("methods", "metrics", "models", "datasets"), f"{path}: {name}"


def test_only_autograd_has_hooks_or_the_autograd_engine() -> None:
    for word in ("register_forward", "register_full_backward", "register_hook", "torch.autograd"):
        assert places(word) <= {"autograd"}, word


def test_torch_load_has_one_home_and_reads_weights_only() -> None:
    calls = [
        (module_of(path), node)
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [module for module, _ in calls] == ["models.loading"]
    (_, call) = calls[0]
    assert "weights_only=True" in ast.unparse(call)
    assert places("weights_only=False") == set()


def test_pickle_is_read_by_the_allow_listed_unpickler_alone() -> None:
    users = {
        module_of(path)
        for path in sources()
        if {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle"}
    }
    assert users <= {"datasets.cifar", "testing"}
    cifar = (ROOT / "datasets" / "cifar.py").read_text(encoding="utf-8")
    assert "pickle.load" not in cifar


def test_nothing_evaluates_text() -> None:
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module: str) -> None:
    path = ROOT / f"{module}.py"
    seen = {module}
    waiting = [path]
    while waiting:  # what they import of xbench counts as theirs
        for name in imports(here := waiting.pop(), at_import(here)):
            assert name.split(".")[0] not in HEAVY, f"{here.name} imports {name}"
            if name.startswith(".") and name.split(".")[1] not in seen:
                seen.add(name.split(".")[1])
                waiting.append(ROOT / f"{name.split('.')[1]}.py")


def test_public_names_are_complete_and_answer() -> None:
    assert sorted(xbench.__all__) == sorted(
        name for names in xbench._HOMES.values() for name in names
    )
    assert dir(xbench) == sorted(xbench.__all__)
    for name in xbench.__all__:
        assert getattr(xbench, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'attributes'"):
        _ = xbench.attributes
