"""Progress on standard error: one bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console

from .bar import Bar
from .runner import Report


class Reporter(Bar):
    """Told of every finished unit.

    Args:
        console: on standard error.
        units: how many there will be.
        quiet: say nothing.
    """

    def __init__(self, console: Console, units: int, *, quiet: bool = False) -> None:
        super().__init__(console, units, "units", "starting", quiet=quiet)
        self.units = units
        self.reports: list[Report] = []

    def tell(self, report: Report) -> None:
        """A unit has finished."""
        self.reports.append(report)
        self.move(len(self.reports), report.name)
        problems = sum(count for word, count in report.rows.items() if word in ("failed", "error"))
        if not self.quiet and not self.console.is_terminal:
            words = f", {problems} rows failed" if problems else ""
            self.say(
                f"[{len(self.reports)}/{self.units}] {report.name}: {report.images} images, "
                f"{report.passes.forward:,} forwards in {report.seconds:.1f} s{words}"
            )
        for event in report.events:
            self.say(f"{report.name}: {event}")

    def beat(self) -> None:
        """A sign of life after a long silence, where there is no bar."""
        if self.is_overdue:
            self.say(f"{len(self.reports)} of {self.units} units done, still working")
