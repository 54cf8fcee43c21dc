"""Progress on standard error: one bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .runner import Report

HEARTBEAT = 30.0
"""Seconds of silence after which a log gets a sign of life."""


class Reporter:
    """Told of every finished unit.

    Args:
        console: on standard error.
        units: how many there will be.
        quiet: say nothing.
    """

    def __init__(self, console: Console, units: int, *, quiet: bool = False) -> None:
        self.console, self.units, self.quiet = console, units, quiet
        self.reports: list[Report] = []
        self._spoke = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("units, left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not units or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=units)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def tell(self, report: Report) -> None:
        """A unit has finished."""
        self.reports.append(report)
        self._bar.update(self._task, advance=1, description=report.name)
        problems = sum(count for word, count in report.rows.items() if word in ("failed", "error"))
        if not self.quiet and not self.console.is_terminal:
            words = f", {problems} rows failed" if problems else ""
            self._say(
                f"[{len(self.reports)}/{self.units}] {report.name}: {report.images} images, "
                f"{report.passes.forward:,} forwards in {report.seconds:.1f} s{words}"
            )
        for event in report.events:
            self._say(f"{report.name}: {event}")

    def beat(self) -> None:
        """A sign of life after a long silence, where there is no bar."""
        if time.monotonic() - self._spoke > HEARTBEAT and not self.console.is_terminal:
            self._say(f"{len(self.reports)} of {self.units} units done, still working")

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
