"""The comparison with a printed table as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from ..sheets import Cell, Form, Sheet, write
from ..tables import Results
from .claims import Verdict, verdicts
from .measured import Value, values
from .printed import Table, deviations, table_of


def render(
    results: Results,
    form: Form,
    width: int | None = None,
    colour: bool = False,
) -> str:
    """Printed beside measured, then the claims; CSV has the numbers alone.

    Raises:
        UsageError: if no printed table has the suite's name.
    """
    suite = results.planned.suite
    if form == "csv":
        return _csv(values(results))
    if form == "json":
        return _json(table_of(suite), values(results), verdicts(results), deviations(suite))
    return write(sheets(results), form, width, colour)


def sheets(results: Results) -> list[Sheet]:
    """Printed beside measured, and the claims, as the terminal, Markdown and the page show them.

    Raises:
        UsageError: if no printed table has the suite's name.
    """
    suite = results.planned.suite
    table = table_of(suite)
    numbers, claims, differs = values(results), verdicts(results), deviations(suite)
    notes = list(dict.fromkeys(words for value in numbers for words in value.doubts))
    more = f"; and {len(differs) - 5} more" if len(differs) > 5 else ""
    return [
        Sheet(
            f"{table.title}: printed and measured; 95 % intervals over images",
            VALUES,
            _cells(_value_rows(numbers, notes)),
            4,
            (
                *([f"Not the suite of the table: {'; '.join(differs[:5])}{more}."] * bool(differs)),
                *(f"Doubt {at}: {words}." for at, words in enumerate(notes, 1)),
            ),
            (),
        ),
        Sheet(
            f"What is claimed of {table.title}",
            CLAIMS,
            _cells(_claim_rows(claims)),
            1,
            tuple(_against(claims)),
            (),
        ),
    ]


def _cells(rows: Iterable[Sequence[str]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(tuple(map(Cell, row)) for row in rows)


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
