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
        table = _terminal(sheet, [*part, at])
        if part and Measurement.get(console, unlimited, table).maximum > console.width:
            yield _terminal(sheet, part)
            part = []
        part.append(at)
    yield _terminal(sheet, part)


def _terminal(sheet: Sheet, columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [*range(sheet.stub), *columns]
    for at in shown:
        justify: Literal["left", "right"] = "left" if at < sheet.stub else "right"
        table.add_column(Text(sheet.headings[at]), justify=justify, no_wrap=True)
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
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _latex(sheet: Sheet) -> str:
    columns = "l" * sheet.stub + "r" * (len(sheet.headings) - sheet.stub)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(sheet.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_stacked(heading) for heading in sheet.headings) + r" \\",
        r"\midrule",
    ]
    for at, row in enumerate(sheet.rows):
        if at in sheet.rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(_latex_cell(cell) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {escaped(note)}" for note in sheet.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _stacked(text: str) -> str:
    if "\n" not in text:
        return escaped(text)
    lines = r" \\ ".join(escaped(line) for line in text.splitlines())
    return rf"\shortstack{{{lines}}}"


def _latex_cell(cell: Cell) -> str:
    command = {"best": r"\textbf", "second": r"\underline", "": ""}[cell.style]
    text = escaped(cell.text.replace("\n", " "))
    text = rf"{command}{{{text}}}" if command else text
    return text + (rf"$^{{\mathrm{{{escaped(cell.mark).replace('$', '')}}}}}$" if cell.mark else "")
