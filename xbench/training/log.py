"""What a training tells: a table with one row per epoch, a figure of it, and progress."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..bar import Bar
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


class Reporter(Bar):
    """A bar in a terminal; elsewhere one line per epoch, and a sign of life in between.

    Args:
        console: on standard error.
        epochs, steps: of the training, and of an epoch.
        quiet: say nothing.
    """

    def __init__(self, console: Console, epochs: int, steps: int, *, quiet: bool) -> None:
        super().__init__(console, epochs * steps, "steps", "training", quiet=quiet)
        self.epochs, self.steps = epochs, steps

    def step(self, epoch: int, step: int) -> None:
        """A step has ended, counted from 0."""
        words = f"epoch {epoch + 1} of {self.epochs}"
        self.move(epoch * self.steps + step + 1, words)
        if self.is_overdue:
            self.say(f"{words}: step {step + 1} of {self.steps}")

    def epoch(self, row: Row) -> None:
        """An epoch has ended."""
        parts = [f"loss {row['loss']:.4f}", f"train {100 * row['train_accuracy']:.2f} %"]
        parts.append(f"test {100 * row['test_accuracy']:.2f} %")
        if row["test_cosine"] is not None:
            parts.append(f"cosine {row['test_cosine']:.4f}")
        words = ", ".join(parts)
        self.say(f"[{row['epoch']}/{self.epochs}] {words}, {row['seconds']:.0f} s")
