"""A bar of progress in a terminal; elsewhere lines, and a sign of life after a long silence."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

HEARTBEAT = 30.0
"""Seconds of silence after which a log gets a sign of life."""


class Bar:
    """Runs while it is entered; subclass it for what it tells.

    Args:
        console: on standard error.
        total, unit: how many of what there will be; nothing moves where there are none.
        begin: what is told before the first.
        quiet: say nothing.
    """

    def __init__(self, console: Console, total: int, unit: str, begin: str, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self._spoke = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not total or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(begin, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def move(self, completed: int, words: str) -> None:
        """So many are done, and this is told beside."""
        self._bar.update(self._task, completed=completed, description=words)

    @property
    def is_overdue(self) -> bool:
        """Whether a log wants a sign of life."""
        return time.monotonic() - self._spoke > HEARTBEAT and not self.console.is_terminal

    def say(self, line: str) -> None:
        """One line, at once."""
        self._spoke = time.monotonic()
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
