"""What the commands that look after a store say: for a terminal, and as JSON can hold it."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import printable
from .store import KEPT, SCORES, Part, compared
from .storekeeping import (
    HARMLESS,
    Audit,
    Merged,
    Waste,
    cells_of,
    conditions_in_words,
)


def contents(found: Audit) -> dict[str, Any]:
    """What stands in a store, as JSON can hold it."""
    return {
        "store": str(found.root),
        "counts": found.counts(),
        "problems": sum(f.kind not in HARMLESS for f in found.findings),
        "groups": [_group_facts(found, group) for group in found.groups],
    }


def _group_facts(found: Audit, group: Path) -> dict[str, Any]:
    scores, kept = ([one.part for one in found.of(group, form)] for form in (SCORES, KEPT))
    frame, failed, *_ = compared(scores, SCORES)
    final = frame[~failed].drop_duplicates(["cell", "image"])
    done = final.groupby("cell").size()
    keys = frame["cell"] + "\n" + frame["image"]
    wrong = frame[failed & ~keys.isin(final["cell"] + "\n" + final["image"])]
    errors = wrong.drop_duplicates(["cell", "image"]).groupby("cell").size()
    names = _names(scores)
    cells = [
        {
            "cell": cell,
            "method": names.get(cell, ("", ""))[0],
            "metric": names.get(cell, ("", ""))[1],
            "images": int(done.get(cell, 0)),
            "errors": int(errors.get(cell, 0)),
        }
        for cell in sorted(set(frame["cell"]))
    ]
    labels = _names(kept)
    arrays = Counter(
        labels.get(cell, ("", ""))[1].partition(" of ")[0] or "not told"
        for part in kept
        for cell in part.rows["cell"].to_pylist()
    )
    told = [part.facts["group"] for part in (*scores, *kept) if "group" in part.facts]
    dataset, model = told[0] if told else group.parts
    sizes = [one.size for form in (SCORES, KEPT) for one in found.of(group, form)]
    return {
        "dataset": dataset,
        "model": model,
        "folder": str(group),
        "images": int(frame["image"].nunique()),
        "rows": len(frame),
        "parts": len(sizes),
        "bytes": sum(sizes),
        "kept": dict(sorted(arrays.items())),
        "pinned": found.pinned.get(found.root / group),
        "versions": _versions([*scores, *kept]),
        "cells": sorted(cells, key=lambda cell: (cell["method"], cell["metric"], cell["cell"])),
    }


def _names(parts: Iterable[Part]) -> dict[str, tuple[str, str]]:
    """Method and metric of each cell: several labels of one cell in one word."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for part in parts:
        for cell, (method, metric) in cells_of(part).items():
            methods, metrics = found.setdefault(cell, (set(), set()))
            methods.add(method)
            metrics.add(metric)
    return {
        cell: (" or ".join(sorted(methods)), " or ".join(sorted(metrics)))
        for cell, (methods, metrics) in found.items()
    }


def _versions(parts: Iterable[Part]) -> dict[str, list[str]]:
    """Versions of each package that parts were made with; several where they are mixed."""
    found: dict[str, set[str]] = {}
    for part in parts:
        for package, version in (part.facts.get("provenance") or {}).get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
    return {package: sorted(versions) for package, versions in sorted(found.items())}


def show_contents(found: Audit, *, cells: bool, width: int | None = None) -> str:
    """What stands in a store, for a terminal: methods with their metrics, or a line per cell."""
    out = io.StringIO()
    console = Console(file=out, width=width or 100, no_color=True, highlight=False)
    facts = contents(found)
    console.print(printable(f"{found.root}: {_sum(facts['counts'])}"), markup=False, soft_wrap=True)
    for group in facts["groups"]:
        words = [_count(group["images"], "image"), _count(len(group["cells"]), "cell")]
        words += [_count(group["rows"], "row"), _count(group["parts"], "part"),
                  size_words(group["bytes"])]  # fmt: skip
        title = f"{group['dataset']} x {group['model']}: {', '.join(words)}"
        console.print(Text(f"\n{printable(title)}"), soft_wrap=True)
        if group["kept"]:
            kept = ", ".join(f"{count:,} {kind}" for kind, count in group["kept"].items())
            console.print(Text(f"kept beside: {printable(kept)}"), soft_wrap=True)
        made = [
            f"{package} {' and '.join(versions)}"
            for package, versions in group["versions"].items()
            if versions != ["not installed"]
        ]
        pinned = f"; {conditions_in_words(group['pinned'])}" if group["pinned"] else ""
        console.print(Text(printable(f"made by {', '.join(made) or 'an unknown version'}{pinned}")))
        if cells:
            console.print(_cell_table(group["cells"]))
        else:
            console.print(Text("\n".join(_method_lines(group["cells"], console.width))))
    if facts["problems"]:
        console.print(
            f"\n{_count(facts['problems'], 'problem')}; 'xbench store verify' says which",
            markup=False,
        )
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _cell_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("method", "metric", "images", "errors", "cell"):
        is_name = heading in ("method", "metric")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold")
    for cell in cells:
        errors = str(cell["errors"] or "")
        row = (cell["method"], cell["metric"], str(cell["images"]), errors, cell["cell"])
        table.add_row(*(Text(printable(text)) for text in row))
    return table


def _method_lines(cells: Sequence[Mapping[str, Any]], width: int) -> Iterator[str]:
    """Methods that have the same metrics of as many images, together."""
    by_method: dict[str, list[tuple[str, int, int]]] = {}
    for cell in cells:
        one = (cell["metric"] or "not told", cell["images"], cell["errors"])
        by_method.setdefault(cell["method"], []).append(one)
    alike: dict[tuple[tuple[str, int, int], ...], list[str]] = {}
    for method, own in by_method.items():
        alike.setdefault(tuple(own), []).append(method or "not told")
    for found, methods in alike.items():
        metrics = list(dict.fromkeys(metric for metric, _, _ in found))
        counts = sorted({images for _, images, _ in found})
        images = f"{counts[0]}-{counts[-1]} images" if counts[1:] else _count(counts[0], "image")
        errors = sum(errors for _, _, errors in found) * len(methods)
        words = f", and {_count(errors, 'error')}" if errors else ""
        yield f"  {images} of {_count(len(found) * len(methods), 'cell')}{words}"
        for heading, names in (("methods", methods), ("metrics", metrics)):
            text = printable(f"{heading}: {', '.join(names)}")
            yield textwrap.fill(
                text, max(width, 40), initial_indent=" " * 4, subsequent_indent=" " * 6,
                break_on_hyphens=False,
            )  # fmt: skip


def show_findings(found: Audit) -> str:
    """What is wrong with a store, or that nothing is."""
    lines = [printable(str(finding)) for finding in found.findings]
    counts = found.counts()
    notes = {
        "duplicates": "{} only repeat another, which is harmless",
        "mixed": "{} differ from another that was made under other conditions: the first counts",
    }
    words = [text.format(_count(counts[key], "row")) for key, text in notes.items() if counts[key]]
    if found.untold:
        words.append(f"{_count(found.untold, 'part')} of earlier versions do not name their cells")
    if found.writing:
        words.append(f"{_count(found.writing, 'file')} being written")
    verdict = _count(len(found.findings), "problem") if found.findings else "no problem"
    lines.append(printable(f"{found.root}: {verdict} in {_sum(counts)}"))
    return "\n".join([*lines, *words]) + "\n"


def findings_facts(found: Audit) -> dict[str, Any]:
    """Likewise as JSON can hold it."""
    findings = [asdict(finding) | {"path": str(finding.path)} for finding in found.findings]
    return {"store": str(found.root), "findings": findings, "counts": found.counts()}


def show_waste(files: Sequence[Waste], *, is_gone: bool) -> str:
    """What was removed, or would be."""
    verb = "removed" if is_gone else "would remove"
    lines = [printable(f"{verb} {f.path} ({size_words(f.size)}): {f.why}") for f in files]
    total = size_words(sum(file.size for file in files))
    lines.append(f"{verb} {_count(len(files), 'file')}, {total}" if files else "nothing to remove")
    return "\n".join(lines) + "\n"


def waste_facts(files: Sequence[Waste], *, is_gone: bool) -> dict[str, Any]:
    """Likewise as JSON can hold it."""
    rows = [asdict(file) | {"path": str(file.path)} for file in files]
    return {"removed": is_gone, "bytes": sum(file.size for file in files), "files": rows}


def show_merged(done: Merged) -> str:
    """What a merge has done."""
    words = [f"{_count(len(done.copied), 'part')} copied, {size_words(done.size)}"]
    if done.skipped:
        words.append(f"{_count(done.skipped, 'part')} brought nothing new")
    if done.mixed:
        words.append(
            f"{_count(done.mixed, 'row')} differ from another that was made under other "
            f"conditions: the first counts, and tables say so"
        )
    return printable(f"{done.root}: {'; '.join(words)}") + "\n"


def merged_facts(done: Merged) -> dict[str, Any]:
    """Likewise as JSON can hold it."""
    return {
        "store": str(done.root),
        "copied": [str(path) for path in done.copied],
        "bytes": done.size,
        "skipped": done.skipped,
        "mixed": done.mixed,
    }


def _sum(facts: Mapping[str, Any]) -> str:
    words = [_count(facts[key], key.removesuffix("s")) for key in ("groups", "parts", "rows")]
    words += [_count(facts["arrays"], "array")] if facts["arrays"] else []
    return ", ".join([*words, size_words(facts["bytes"])])


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def size_words(count: int) -> str:
    """Bytes as people read them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return _count(count, "byte")
