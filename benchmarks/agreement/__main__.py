"""Every entry beside independent implementations, as tables: ``python benchmarks/agreement``.

Writes ``results/agreement/methods.md`` and ``metrics.md``: for each entry its parameters, for each
method the passes that it declares and those that a toy network counts; for each comparison the
largest relative difference, and why any remains. ``tests/reference/test_agreement.py`` holds the
same comparisons to their tolerances.
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
from xbench.probe import MapOf, Probe, closure, method_cost, stops_early
from xbench.testing import toy_batch, toy_model_for
from xbench.types import Passes

HERE = Path(__file__).parent
LIBRARIES = ("torch", "captum", "grad-cam", "saliency", "quantus", "scikit-learn", "timm")


def comparisons(kind: str) -> list[Comparison]:
    found = [
        comparison
        for path in sorted(HERE.glob("against_*.py"))
        for comparison in importlib.import_module(path.stem).COMPARISONS
    ]
    return sorted((c for c in found if c.kind == kind), key=lambda comparison: comparison.name)


def passes_of(method: Any) -> tuple[str, str]:
    """Declared and counted passes per image on the toy network, of the method alone."""
    model, batch = toy_model_for(method), toy_batch(4)
    declared = method_cost(method, model)
    bound = "at most " if stops_early(closure([MapOf(method)])) else ""
    with prepared(model.net) as meter:
        probe = Probe(model, batch, needs=batch_needs([method], []), meter=meter)
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


Measured = list[tuple[Comparison, float]]


def measured(kind: str) -> Measured:
    return [(comparison, comparison.difference()) for comparison in comparisons(kind)]


def _worst(name: str, found: Measured) -> str:
    own = [difference for comparison, difference in found if comparison.name == name]
    return f"{max(own):.0e} ({len(own)})" if own else "none"


def _compared(kind: str, found: Measured, remark: str) -> list[str]:
    """The end of a page: all comparisons, and what has none."""
    lines = [
        "",
        "## Comparisons",
        "",
        "The difference is max |ours - theirs| / max |theirs| over four images or more, in",
        f"float64. {remark}".rstrip(),
        "",
    ]
    rows = [(f"`{c.label}`", c.reference, f"{worst:.1e}", c.reason) for c, worst in found]
    lines += _rows((kind[:-1], "compared with", "difference", "what remains"), rows)
    missing = registry.entries(kind).keys() - {comparison.name for comparison, _ in found}
    if missing:
        lines += ["", f"Without a comparison: {', '.join(sorted(missing))}."]
    return lines


def _title(kind: str) -> list[str]:
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return [
        f"# {kind.capitalize()} beside independent implementations",
        "",
        f"Made by `python benchmarks/agreement`, with {versions}.",
        "",
    ]


def methods_page() -> list[str]:
    found = measured("methods")
    lines = [
        *_title("methods"),
        "## Methods",
        "",
        "Passes are forward + backward per image at the defaults, each method alone, on a toy",
        "network (8 channels in its last layer, images of 16 x 16): what a plan declares, and",
        "what was counted at the network. Worst is the largest difference among the comparisons",
        "below, and their number.",
        "",
    ]
    rows = []
    for name in registry.entries("methods"):
        method = registry.make("methods", name)
        passes = passes_of(method)
        rows.append((f"`{name}`", *passes, _worst(name, found), _parameters(method)))
    lines += _rows(("method", "declared", "counted", "worst", "parameters"), rows)
    remark = "Methods of libraries are compared with the library called by hand."
    return lines + _compared("methods", found, remark)


def metrics_page() -> list[str]:
    found = measured("metrics")
    lines = [*_title("metrics"), "## Metrics", ""]
    rows = []
    for name in registry.entries("metrics"):
        metric = registry.make("metrics", name)
        family = getattr(metric, "family", "")
        facts = (family, metric.better, _worst(name, found), _parameters(metric))
        rows.append((f"`{name}`", *facts))
    lines += _rows(("metric", "family", "better", "worst", "parameters"), rows)
    return lines + _compared("metrics", found, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("results/agreement"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for kind, page in (("methods", methods_page), ("metrics", metrics_page)):
        (out / f"{kind}.md").write_text("\n".join(page()) + "\n", encoding="utf-8")
        print(out / f"{kind}.md")


if __name__ == "__main__":
    main()
