"""Numbers that papers printed, beside what is measured, and whether what they claim holds."""

from .claims import Verdict, printed_verdicts, verdicts
from .measured import Value, values
from .printed import Claim, Table, deviations, row_of, table_of, tables
from .text import CLAIMS, VALUES, Comparison, comparison, render

__all__ = [
    "CLAIMS", "VALUES", "Claim", "Comparison", "Table", "Value", "Verdict", "comparison",
    "deviations", "printed_verdicts", "render", "row_of", "table_of", "tables", "values",
    "verdicts",
]  # fmt: skip
