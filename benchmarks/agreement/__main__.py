"""Every method beside independent implementations, as tables: ``python benchmarks/agreement``.

Writes ``results/agreement/methods.md``: for each method its parameters, the passes that it declares
and those that a toy network counts; for each comparison the largest relative difference, and why
any remains. ``tests/reference/test_agreement.py`` holds the same comparisons to their tolerances.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comparison import Comparison

from xbench import registry
from xbench.autograd import prepared
from xbench.plan import batch_needs
from xbench.probe import Logits, MapOf, Probe, closure, method_cost, stops_early
from xbench.testing import toy_batch, toy_model_for
from xbench.types import Passes

HERE = Path(__file__).parent
LIBRARIES = ("torch", "captum", "grad-cam", "saliency", "timm")


def comparisons(kind: str) -> list[Comparison]:
    found = [
        comparison
        for path in sorted(HERE.glob("against_*.py"))
        for comparison in importlib.import_module(path.stem).COMPARISONS
    ]
    return sorted((c for c in found if c.kind == kind), key=lambda comparison: comparison.name)


def passes_of(method: Any) -> tuple[str, str]:
    """Declared and counted passes per image on the toy network, the clean forward included."""
    model, batch = toy_model_for(method), toy_batch(4)
    declared = method_cost(method, model, beside=(Logits(),))
    bound = "at most " if stops_early(closure([MapOf(method)])) else ""
    with prepared(model.net) as meter:
        probe = Probe(model, batch, needs=batch_needs([method], []), meter=meter)
        assert probe.probability.isfinite().all()
        probe.explain(method)
        counted = probe.spent
    return "unknown" if declared is None else bound + _words(declared), _words(counted)


def _words(passes: Passes) -> str:
    return f"{passes.forward} + {passes.backward}"


def _parameters(method: Any) -> str:
    return ", ".join(
        f"`{key}={registry.label(v.make()) if isinstance(v, registry.Nested) else v}`"
        for key, v in registry.parameters(method).items()
    )


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def methods_page() -> str:
    compared = comparisons("methods")
    measured = [(comparison, comparison.difference()) for comparison in compared]
    methods = {name: registry.make("methods", name) for name in registry.entries("methods")}
    missing = methods.keys() - {comparison.name for comparison in compared}
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    lines = [
        "# Methods beside independent implementations",
        "",
        f"Made by `python benchmarks/agreement`, with {versions}.",
        "",
        "## Methods",
        "",
        "Passes are forward + backward per image at the defaults, the clean forward included, on a",
        "toy network (8 channels in its last layer, images of 16 x 16): what a plan declares, and",
        "what was counted at the network. Worst is the largest difference among the comparisons",
        "below, and their number.",
        "",
    ]
    rows = []
    for name, method in methods.items():
        own = [difference for comparison, difference in measured if comparison.name == name]
        worst = f"{max(own):.0e} ({len(own)})" if own else "none"
        rows.append((f"`{name}`", *passes_of(method), worst, _parameters(method)))
    lines += _rows(("method", "declared", "counted", "worst", "parameters"), rows)
    lines += [
        "",
        "## Comparisons",
        "",
        "The difference is max |ours - theirs| / max |theirs| over the maps of four images, in",
        "float64. Methods of libraries are compared with the library called by hand.",
        "",
    ]
    lines += _rows(
        ("method", "compared with", "difference", "what remains"),
        [
            (f"`{c.label}`", c.reference, f"{difference:.1e}", c.reason)
            for c, difference in measured
        ],
    )
    if missing:
        lines += ["", f"Without a comparison: {', '.join(sorted(missing))}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("results/agreement"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "methods.md").write_text(methods_page(), encoding="utf-8")
    print(out / "methods.md")


if __name__ == "__main__":
    main()
