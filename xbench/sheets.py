"""Tables of text and how they are written: terminal, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Form = Literal["terminal", "md", "csv", "json", "latex"]


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a sheet.

    Args:
        text: perhaps of two lines.
        mark: behind the first line, such as "=".
        style: "best" is bold, "second" underlined in LaTeX.
    """

    text: str
    mark: str = ""
    style: Literal["", "best", "second"] = ""

    @property
    def plain(self) -> str:
        first, newline, rest = self.text.partition("\n")
        return f"{first}{self.mark}{newline}{rest}"


@dataclass(frozen=True)
class Sheet:
    """One table.

    Args:
        title: a line above it.
        headings: of its columns; a second line has details.
        rows: cells, as many as headings.
        stub: how many columns on the left say what a row is; they repeat where a table is split.
        notes: lines below it.
        records: the same as data, one flat mapping per number.
        rules: rows with a line above them.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    stub: int
    notes: tuple[str, ...]
    records: tuple[Mapping[str, Any], ...]
    rules: frozenset[int] = frozenset()


def write(
    sheets: Sequence[Sheet], form: Form, width: int | None = None, colour: bool = False
) -> str:
    """All sheets as text; CSV and JSON hold their records, LaTeX is for the package booktabs."""
    records = [dict(record) for sheet in sheets for record in sheet.records]
    if form == "csv":
        frame = pd.DataFrame(records)
        return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    if form == "json":
        for record in records:
            record |= {k: None for k, v in record.items() if isinstance(v, float) and math.isnan(v)}
        return json.dumps(records, indent=1, allow_nan=False) + "\n"
    if form == "md":
        return "\n".join(_markdown(sheet) for sheet in sheets)
    if form == "latex":
        return "\n".join(_latex(sheet) for sheet in sheets)
    out = io.StringIO()
    console = Console(
        file=out, width=width or 200, force_terminal=colour, no_color=not colour, highlight=False
    )
    for sheet in sheets:
        console.print(sheet.title, markup=False)
        for table in _fitting(sheet, console):
            console.print(table)
        for note in sheet.notes:
            console.print(note, markup=False)
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


def _fitting(sheet: Sheet, console: Console) -> Iterator[Table]:
    """As many tables as it takes to show every column whole."""
    unlimited = console.options.update(max_width=100_000)
    part: list[int] = []
    for at in range(sheet.stub, len(sheet.headings)):
        table = _terminal(sheet, [*part, at], console.width)
        if part and Measurement.get(console, unlimited, table).maximum > console.width:
            yield _terminal(sheet, part, console.width)
            part = []
        part.append(at)
    yield _terminal(sheet, part, console.width)


def _terminal(sheet: Sheet, columns: Sequence[int], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [*range(sheet.stub), *columns]
    for at in shown:
        justify: Literal["left", "right"] = "left" if at < sheet.stub else "right"
        is_label = at < sheet.stub  # sentences may be broken, numbers may not
        most = max(LONG, int(0.45 * width)) if is_label else None
        heading = Text(sheet.headings[at])
        table.add_column(heading, justify=justify, no_wrap=not is_label, max_width=most)
    wide = {at: max((len(row[at].mark) for row in sheet.rows), default=0) for at in shown}
    for number, row in enumerate(sheet.rows):
        texts = []
        for at in shown:
            first, newline, rest = row[at].text.partition("\n")
            room = " " * (wide[at] - len(row[at].mark))  # digits below digits
            beneath = f"{newline}{rest}" + (" " * wide[at] if newline else "")
            style = "bold green" if row[at].style == "best" else ""
            texts.append(Text(f"{first}{row[at].mark}{room}{beneath}", style=style))
        table.add_row(*texts, end_section=number + 1 in sheet.rules)
    return table


_STEERS = re.compile(r"[\\`]|<(?=[A-Za-z/!?])|(?<=\])\(")


def markdown(text: str) -> str:
    """Text that stays text in Markdown: no element, link, picture or code begins in it."""
    return _STEERS.sub(r"\\\g<0>", text)


def code(text: str) -> str:
    """A name in Markdown, as code unless it could end that."""
    return markdown(text) if {"`", "\\"} & {*text} else f"`{text}`"


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table; cells are Markdown already."""
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", "<br>") for c in cells) + " |"


def _markdown(sheet: Sheet) -> str:
    headings = [markdown(heading.replace("\n", " ")) for heading in sheet.headings]
    rows = [f"**{markdown(sheet.title)}**", "", markdown_row(headings)]
    rows.append("|" + ":--|" * sheet.stub + "--:|" * (len(sheet.headings) - sheet.stub))
    for row in sheet.rows:
        texts = []
        for at, cell in enumerate(row):
            text = markdown(cell.plain).replace("*", "\\*")
            if at < sheet.stub and cell.text:
                text = code(cell.text)
            texts.append(f"**{text}**" if cell.style == "best" else text)
        rows.append(markdown_row(texts))
    notes = [markdown(note).replace("*", "\\*") for note in sheet.notes]
    return "\n\n".join(["\n".join(rows), *notes]) + "\n"


# --- LaTeX ----------------------------------------------------------------------------------------

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "▲": r"$\triangle$",
    "▼": r"$\bigtriangledown$", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
}  # fmt: skip


PAGE = 83, 45
"""Digits beside one another, and lines, that a page of an article has room for in small print."""
NARROW, WIDE = frozenset(" .,:;!|/'[]()fijlt"), frozenset("+-=%mwABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Characters that are about half, and a third more, as wide as a digit."""
SENTENCE = 40
"""A label wider than so many digits gets that much room, in as many lines as it takes."""
LONG = 24
"""Characters of a label before its parameters go to a second line."""


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    plain = "".join(_SPECIAL.get(character, character) for character in text)
    plain = re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", plain)
    return re.sub(r"^\[", "{[}", plain)  # behind the end of a row it would be read as a length


def _latex(sheet: Sheet) -> str:
    """As many tables as it takes to show every column and row on pages; notes below the last."""
    parts = list(_pages(sheet))
    tables = []
    for at, (columns, rows) in enumerate(parts, 1):
        title = sheet.title + (f" ({at} of {len(parts)})" if len(parts) > 1 else "")
        lines = [
            r"\begin{table}",
            r"\centering",
            r"\scriptsize",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escaped(title)}}}",
            r"\smallskip",
            rf"\begin{{tabular}}{{{''.join(_side(sheet, c) for c in columns)}}}",
            r"\toprule",
            *_beneath([list(map(escaped, sheet.headings[c].splitlines())) for c in columns]),
            r"\midrule",
        ]
        for row in rows:
            if row in sheet.rules and row != rows[0]:
                lines.append(r"\midrule")
            cells = ((sheet.rows[row][c], c < sheet.stub) for c in columns)
            lines += _beneath([_latex_cell(cell, is_label=is_label) for cell, is_label in cells])
        lines += [r"\bottomrule", r"\end{tabular}"]
        if at == len(parts):
            lines += [rf"\par\raggedright {escaped(note)}" for note in sheet.notes]
        lines.append(r"\end{table}")
        if rows[-1] + 1 < len(sheet.rows):
            lines.append(r"\clearpage")  # it is full; LaTeX keeps few floats waiting
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _pages(sheet: Sheet) -> Iterator[tuple[list[int], range]]:
    """Columns and rows of each table."""
    room, most = PAGE

    def wide(column: int) -> float:
        return min(_wide(sheet, column), SENTENCE)

    stub = list(range(sheet.stub))
    parts: list[list[int]] = [[]]
    for column in range(sheet.stub, len(sheet.headings)):
        if parts[-1] and sum(map(wide, [*stub, *parts[-1], column])) > room:
            parts.append([])
        parts[-1].append(column)
    heights = [
        max(len(_lines(cell, is_label=at < sheet.stub)) for at, cell in enumerate(row))
        for row in sheet.rows
    ]
    for columns in parts:
        start, tall = 0, 0
        for row, height in enumerate(heights):
            if tall + height > most:
                yield [*stub, *columns], range(start, row)
                start, tall = row, 0
            tall += height
        yield [*stub, *columns], range(start, len(heights))


def _wide(sheet: Sheet, column: int) -> float:
    """The width of a column, in digits."""
    texts = sheet.headings[column].splitlines()
    for row in sheet.rows:
        first, *rest = _lines(row[column], is_label=column < sheet.stub)
        texts += [first + row[column].mark, *rest]
    return 1.5 + max(map(_digits, texts), default=0.0)


def _side(sheet: Sheet, column: int) -> str:
    """Labels stand left, numbers right; sentences are broken into lines."""
    if column < sheet.stub and _wide(sheet, column) > SENTENCE:
        return r"p{.45\textwidth}"
    return "l" if column < sheet.stub else "r"


def _digits(text: str) -> float:
    """How wide it is printed, in digits."""
    return sum(0.5 if c in NARROW else 1.35 if c in WIDE else 1.0 for c in text)


def _lines(cell: Cell, *, is_label: bool) -> list[str]:
    """A cell's text; a long label's parameters have a line of their own."""
    if is_label and len(cell.text) > LONG:
        return cell.text.replace("(", "\n(", 1).splitlines()
    return [*cell.text.splitlines()] or [""]


def _beneath(cells: Sequence[Sequence[str]]) -> list[str]:
    """A row whose cells have one line or more, as that many rows."""
    tall = max(map(len, cells))
    rows = [
        " & ".join(cell[at] if at < len(cell) else "" for cell in cells) + r" \\"
        for at in range(tall)
    ]
    return rows if tall == 1 else [*rows[:-1], f"{rows[-1]}[2pt]"]


def _latex_cell(cell: Cell, *, is_label: bool) -> list[str]:
    """Its lines."""
    command = {"best": r"\textbf", "second": r"\underline", "": ""}[cell.style]
    first, *rest = map(escaped, _lines(cell, is_label=is_label))
    text = rf"{command}{{{first}}}" if command else first
    if cell.mark:
        text += rf"$^{{\mathrm{{{escaped(cell.mark).replace('$', '')}}}}}$"
    return [text, *rest]
