"""The comparison with a printed table as text."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from ..errors import UsageError
from ..sheets import markdown, markdown_row
from ..tables import Results
from .claims import Verdict, verdicts
from .measured import Value, values
from .printed import Table, deviations, table_of


@dataclass(frozen=True)
class Comparison:
    """Printed beside measured in words, as the terminal, Markdown and the page show it.

    Args:
        title: of the printed table.
        differs: in what the suite is not that of the table; empty where it is.
        values: rows under :data:`VALUES`.
        doubts: about printed numbers, by their numbers from 1.
        claims: rows under :data:`CLAIMS`.
        against: sentences on comparisons that contradict a claim.
    """

    title: str
    differs: str
    values: list[list[str]]
    doubts: tuple[str, ...]
    claims: list[list[str]]
    against: tuple[str, ...]


def comparison(results: Results) -> Comparison:
    """Printed beside measured.

    Raises:
        UsageError: if no printed table has the suite's name.
    """
    suite = results.planned.suite
    table = table_of(suite)
    numbers, claims, differs = values(results), verdicts(results), deviations(suite)
    notes = list(dict.fromkeys(words for value in numbers for words in value.doubts))
    more = f"; and {len(differs) - 5} more" if len(differs) > 5 else ""
    return Comparison(
        f"{table.title}: printed and measured; 95 % intervals over images",
        f"Not the suite of the table: {'; '.join(differs[:5])}{more}." if differs else "",
        _value_rows(numbers, notes),
        tuple(f"Doubt {at}: {words}." for at, words in enumerate(notes, 1)),
        _claim_rows(claims),
        tuple(_against(claims)),
    )


def render(
    results: Results,
    form: Literal["terminal", "md", "csv", "json"],
    width: int | None = None,
    colour: bool = False,
) -> str:
    """Printed beside measured, then the claims; CSV has the numbers alone.

    Raises:
        UsageError: if no printed table has the suite's name, or the form is none of these.
    """
    suite = results.planned.suite
    if form == "csv":
        return _csv(values(results))
    if form == "json":
        return _json(table_of(suite), values(results), verdicts(results), deviations(suite))
    if form not in ("terminal", "md"):
        raise UsageError(f"--published has no form {form!r}; terminal, md, csv and json are there")
    shown = comparison(results)
    head = list(filter(None, (shown.title, shown.differs)))
    if form == "md":
        words = [markdown(line) for line in head]
        parts = [f"**{words[0]}**", *words[1:], _markdown(VALUES, shown.values), *shown.doubts]
        return "\n\n".join([*parts, _markdown(CLAIMS, shown.claims), *shown.against]) + "\n"
    out = io.StringIO()
    console = Console(
        file=out, width=width or 200, force_terminal=colour, no_color=not colour, highlight=False
    )
    for line in head:
        console.print(line, markup=False)
    console.print(_grid(VALUES, shown.values))
    for line in shown.doubts:
        console.print(line, markup=False)
    console.print(_grid(CLAIMS, shown.claims))
    for line in shown.against:
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


VALUES = (
    "data set", "model", "method", "metric", "published", "doubt", "measured", "difference",
    "interval", "inside", "images", "as",
)  # fmt: skip
CLAIMS = ("claim", "printed", "measured", "for, against, open", "not measured")


def _value_rows(numbers: Iterable[Value], notes: Sequence[str]) -> list[list[str]]:
    rows = []
    for value in numbers:
        marks = ", ".join(str(notes.index(words) + 1) for words in value.doubts)
        d = value.decimals
        is_measured = not math.isnan(value.measured)
        has_interval = not math.isnan(value.low)
        rows.append(
            [
                value.dataset,
                value.model,
                value.method,
                value.metric,
                f"{value.published:.{d}f}",
                marks,
                f"{value.measured:.{d}f}" if is_measured else "-",
                f"{value.difference:+.{d}f}" if is_measured else "-",
                f"{value.low:.{d}f} to {value.high:.{d}f}" if has_interval else "-",
                "-" if value.inside is None else "yes" if value.inside else "no",
                str(value.images) if value.images else "-",
                value.label,
            ]
        )
    return rows


def _claim_rows(claims: Iterable[Verdict]) -> list[list[str]]:
    return [
        [
            claim.words,
            claim.printed,
            claim.measured,
            ", ".join(map(str, claim.measured_counts)) if claim.measured != "-" else "-",
            str(claim.missing) if claim.missing else "",
        ]
        for claim in claims
    ]


def _against(claims: Iterable[Verdict]) -> Iterator[str]:
    for claim in claims:
        for which, found in (
            ("as printed", claim.against_printed),
            ("as measured", claim.against_measured),
        ):
            if found:
                more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
                yield f"{claim.words}; {which} against it: {'; '.join(found[:3])}{more}."


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        is_number = heading in ("published", "measured", "difference") and headings is VALUES
        grid.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [markdown_row(headings), "|" + ":--|" * len(headings)]
    lines += [markdown_row(map(markdown, row)) for row in rows]
    return "\n".join(lines)


def _facts(value: Value) -> dict[str, Any]:
    facts = asdict(value) | {"difference": value.difference, "doubts": list(value.doubts)}
    del facts["decimals"]
    is_nan = {key for key, fact in facts.items() if isinstance(fact, float) and math.isnan(fact)}
    return {key: None if key in is_nan else fact for key, fact in facts.items()}


def _csv(numbers: Sequence[Value]) -> str:
    rows = [_facts(value) | {"doubts": "; ".join(value.doubts)} for value in numbers]
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.6f", lineterminator="\n")


def _json(
    table: Table, numbers: Sequence[Value], claims: Sequence[Verdict], differs: Sequence[str]
) -> str:
    facts = {
        "title": table.title,
        "deviations": list(differs),
        "values": [_facts(value) for value in numbers],
        "claims": [asdict(claim) for claim in claims],
    }
    return json.dumps(facts, indent=1, allow_nan=False) + "\n"
