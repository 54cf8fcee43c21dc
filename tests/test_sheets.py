"""Laws of sheets: no number is cut at any width, and every writer escapes what is its own."""

from __future__ import annotations

import pytest

from xbench.sheets import Cell, Sheet, escaped, write

WIDE = Sheet(
    "wide",
    ("method", *(f"metric {at}\nblack" for at in range(12))),
    tuple(
        (Cell(name), *(Cell(f"0.{row}{at:02d}5\n[0.1, 0.2]", "=" * (at % 2)) for at in range(12)))
        for row, name in enumerate(["gradient", "grad_cam"], 1)
    ),
    1,
    ("a note",),
    (),
    frozenset({1}),
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_number_stands_whole_once_and_the_stub_in_each_part(width: int) -> None:
    text = write([WIDE], "terminal", width)
    assert max(map(len, text.splitlines())) <= width
    for row in (1, 2):
        for at in range(12):
            assert text.count(f"0.{row}{at:02d}5") == 1
    assert text.count("grad_cam") == text.count("method")
    assert "…" not in text
    assert text.endswith("a note\n")


def test_latex_escapes_all_special_characters() -> None:
    assert escaped(r"a_b % & # $ {} ~ ^ \ ↑") == (
        r"a\_b \% \& \# \$ \{\} \textasciitilde{} \textasciicircum{} \textbackslash{} $\uparrow$"
    )


def test_markdown_escapes_bars_and_stars_and_keeps_columns_equal() -> None:
    sheet = Sheet("t", ("a", "b"), ((Cell("x|y"), Cell("1", "*", "best")),), 1, ("* note",), ())
    lines = write([sheet], "md").splitlines()
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[-1].endswith("| **1\\*** |")
    assert "\\* note" in lines
