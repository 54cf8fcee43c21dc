"""Every method beside independent implementations, as a table: ``python benchmarks/agreement``.

Writes ``results/agreement/methods.md``: for each method its parameters, the passes that it declares
and those that a toy network counts, what it was compared with, the largest relative difference and
why any remains. ``tests/reference/test_agreement.py`` holds the same comparisons to their
tolerances.
"""

from __future__ import annotations

import argparse
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparison import Comparison

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported
from xbench.plan import batch_needs
from xbench.probe import Logits, Probe, method_cost
from xbench.testing import toy_batch, toy_for
from xbench.types import Passes

HERE = Path(__file__).parent
LIBRARIES = ("torch", "captum", "grad-cam", "saliency")


def comparisons() -> list[Comparison]:
    return [
        comparison
        for path in sorted(HERE.glob("against_*.py"))
        for comparison in importlib.import_module(path.stem).COMPARISONS
    ]


def passes_of(method: Any) -> tuple[str, str]:
    """Declared and counted passes per image on the toy network, with the clean forward."""
    model, batch = toy_for(method), toy_batch(4)
    declared = method_cost(method, model, beside=(Logits(),))
    bound = "at most " if getattr(method, "passes_bound", False) else ""
    with prepared(model.net) as meter:
        probe = Probe(model, batch, needs=batch_needs([method], []), meter=meter)
        probe.explain(method)
        counted = probe.spent
    return "unknown" if declared is None else bound + _words(declared), _words(counted)


def _words(passes: Passes) -> str:
    return f"{passes.forward} + {passes.backward}"


def rows() -> list[tuple[str, ...]]:
    """One for each comparison, and one for each method that has none."""
    by_method: dict[str, list[Comparison]] = {}
    for comparison in comparisons():
        by_method.setdefault(comparison.name, []).append(comparison)
    found = []
    for name in registry.entries("methods"):
        for comparison in by_method.get(name, [None]):  # type: ignore[list-item]
            method = registry.make("methods", name, comparison.params if comparison else {})
            try:
                declared, counted = passes_of(method)
            except Unsupported as error:
                declared, counted = "-", f"unsupported there: {error}"
            words = ("none", "", "") if comparison is None else (
                comparison.reference, f"{comparison.difference():.1e}", comparison.reason,
            )  # fmt: skip
            found.append((registry.label(method), _parameters(method), declared, counted, *words))
    return found


def _parameters(method: Any) -> str:
    parameters = registry.parameters(method).items()
    return ", ".join(
        f"{key}={registry.label(v.make()) if isinstance(v, registry.Nested) else v}"
        for key, v in parameters
    )


HEADER = (
    "method",
    "all parameters",
    "declared",
    "counted",
    "compared with",
    "largest relative difference",
    "what remains",
)


def table() -> str:
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    lines = [
        "# Methods beside independent implementations",
        "",
        "Made by `python benchmarks/agreement`. Passes are forward + backward per image, the clean",
        "forward included, on a toy network of 16 x 16 images in float64. The difference is",
        f"max |ours - theirs| / max |theirs| over four images. With {versions}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("results/agreement/methods.md"))
    out: Path = parser.parse_args().out
    text = table()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
