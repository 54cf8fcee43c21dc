"""What a training tells: a table with one row per epoch, a figure of it, and progress."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import atomic_write

COLUMNS = (
    "epoch",
    "learning_rate",
    "loss",
    "classification_loss",
    "regulariser_loss",
    "cosine",
    "zero_gradients",
    "train_accuracy",
    "test_accuracy",
    "test_cosine",
    "test_zero_gradients",
    "seconds",
)
"""``loss`` is classification plus weight times regulariser; ``cosine`` is the mean cosine of the
loss's gradient and the guided one, over training images of a run that computes both, and over held
out images of any run; ``zero_gradients`` is the share of images without a gradient, which it leaves
out; accuracies are shares. What a run does not compute is empty."""

HEARTBEAT = 30.0
"""Seconds of silence after which a log gets a sign of life."""

Row = Mapping[str, Any]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        table.writerow([_cell(row.get(column)) for column in COLUMNS])
    atomic_write(path, text.getvalue().encode())


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def write_figure(path: Path, rows: Sequence[Row], title: str) -> None:
    """Losses, accuracies and cosines over epochs, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = (
        ("loss", ("loss", "classification_loss", "regulariser_loss")),
        ("accuracy", ("train_accuracy", "test_accuracy")),
        ("cosine to the guided gradient", ("cosine", "test_cosine")),
    )
    for axes, (label, columns) in zip(figure.subplots(1, 3), panels, strict=True):
        for column in columns:
            known = [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker=".", label=column.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    atomic_write(path, picture.getvalue())


class Reporter:
    """A bar in a terminal; elsewhere one line per epoch, and a sign of life in between.

    Args:
        console: on standard error.
        epochs, steps: of the training, and of an epoch.
        quiet: say nothing.
    """

    def __init__(self, console: Console, epochs: int, steps: int, *, quiet: bool) -> None:
        self.console, self.epochs, self.steps, self.quiet = console, epochs, steps, quiet
        self._spoke = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=epochs * steps)

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

    def step(self, epoch: int, step: int) -> None:
        """A step has ended, counted from 0."""
        self._bar.update(
            self._task,
            completed=epoch * self.steps + step + 1,
            description=f"epoch {epoch + 1} of {self.epochs}",
        )
        silent = time.monotonic() - self._spoke
        if silent > HEARTBEAT and not self.console.is_terminal:
            self.say(f"epoch {epoch + 1} of {self.epochs}: step {step + 1} of {self.steps}")

    def epoch(self, row: Row) -> None:
        """An epoch has ended."""
        parts = [f"loss {row['loss']:.4f}", f"train {100 * row['train_accuracy']:.2f} %"]
        parts.append(f"test {100 * row['test_accuracy']:.2f} %")
        if row["test_cosine"] is not None:
            parts.append(f"cosine {row['test_cosine']:.4f}")
        words = ", ".join(parts)
        self.say(f"[{row['epoch']}/{self.epochs}] {words}, {row['seconds']:.0f} s")

    def say(self, line: str) -> None:
        """One line, at once."""
        self._spoke = time.monotonic()
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
