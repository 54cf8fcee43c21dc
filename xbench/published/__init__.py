"""Numbers that papers printed, beside what is measured, and whether what they claim holds."""

from .claims import Verdict, printed_verdicts, verdicts
from .measured import Value, values
from .printed import Claim, Table, deviations, row_of, table_of, tables
from .text import render, sheets

__all__ = [
    "Claim", "Table", "Value", "Verdict", "deviations", "printed_verdicts", "render", "row_of",
    "sheets", "table_of", "tables", "values", "verdicts",
]  # fmt: skip
