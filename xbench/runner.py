"""One unit of work, from images to a part file."""

from __future__ import annotations

import functools
import math
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .autograd import Meter, prepared
from .errors import BadImage, Unsupported
from .models.loading import load_model
from .plan import Job, batch_needs
from .probe import Explanation, Logits, Probe, probability
from .scoring import evaluated
from .store import COLUMNS, Store
from .suite import Choice
from .types import Batch, Model, Passes, Sample, Source

Stop = Callable[[], bool]
Mark = Callable[[tuple[str, ...]], object]
Row = tuple[str, str, int, int, float, float, str]
"""The columns of a part file, in order."""


@dataclass
class Report:
    """What became of a unit.

    Args:
        name: of the unit.
        images: how many it was asked for.
        rows: rows written, by the first word of their status.
        passes: rows of the network forward and backward, without padding.
        padding, retried: forward rows apart from those.
        seconds: from first to last.
        part: file written, if any.
        smallest_rows: the smallest forward shape that was used, less than planned only where
            memory ran out.
        events: what had to change on the way.
        errors: a traceback for each distinct failure.
        stopped: whether it was interrupted; what it had is stored.
        confidence: probability of the predicted class by image, where that is not the target's.
    """

    name: str
    images: int
    rows: Counter[str] = field(default_factory=Counter)
    passes: Passes = field(default_factory=Passes)
    padding: int = 0
    retried: int = 0
    seconds: float = 0.0
    part: str = ""
    smallest_rows: int = 0
    events: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    confidence: dict[str, float] = field(default_factory=dict)

    def failure(self, error: BaseException, where: str) -> str:
        """The status of a row that an error cost; the traceback is kept once."""
        if isinstance(error, Unsupported):
            return f"skipped: {_plain(error)}"
        words = _plain(error)
        status = f"error: {type(error).__name__}: {words}"
        self.errors.setdefault(f"{where}: {status}", "".join(traceback.format_exception(error)))
        return status


def _plain(error: BaseException) -> str:
    """An error's message on one line, without what could steer a terminal."""
    printable = (char if char.isprintable() else " " for char in str(error))
    return " ".join("".join(printable).split())[:300]


@functools.lru_cache(maxsize=1)
def _source(dataset: Choice, data: Path | None) -> Source:
    source: Source = dataset.make().open(data)
    return source


@functools.lru_cache(maxsize=1)
def _model(
    choice: Choice,
    layers: tuple[tuple[str, str], ...],
    weights: str,
    data: Path | None,
    device: str,
) -> Model:
    network = choice.make().describe(data)
    return load_model(network, choice.label, dict(layers), device, planned=weights)


def provenance(job: Job) -> dict[str, Any]:
    """Conditions under which equal cells promise equal bits."""
    return {
        "rows": job.rows,
        "threads": job.threads,
        "device": torch.cuda.get_device_name(job.device) if "cuda" in job.device else _processor(),
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that make numbers."""
    found = {"python": platform.python_version()}
    for package in (
        "xbench",
        "torch",
        "torchvision",
        "numpy",
        "pillow",
        "captum",
        "grad-cam",
        "quantus",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Torch on this number of threads, of which rounding depends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_unit(job: Job, stop: Stop = lambda: False, mark: Mark = lambda cells: None) -> Report:
    """Computes what a job lacks and writes it as one part file.

    A method or metric that raises fails its own cells, with the error stored. When ``stop`` becomes
    true, what is finished is written and the report says ``stopped``. ``mark`` is told the cells
    that are about to be computed, or none of them for what all share, in case it ends the process.
    """
    report = Report(job.name, job.images)
    began = time.monotonic()
    with on_threads(job.threads):
        rows = [row for batch in _batches(job, report, stop, mark) for row in batch]
    report.seconds = time.monotonic() - began
    report.rows.update(row[-1].split(":")[0] for row in rows)
    if rows:
        conditions = {**provenance(job), "smallest_rows": report.smallest_rows or job.rows}
        facts = {"provenance": conditions, "slice": job.number, "events": report.events}
        if report.confidence:
            facts["confidence"] = report.confidence
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        group = Store(job.store).group(*job.group)
        report.part = group.write(f"{job.number:07d}", frame, facts).name
    return report


def _batches(job: Job, report: Report, stop: Stop, mark: Mark) -> Iterator[list[Row]]:
    try:
        source = _source(job.dataset, job.data)
        model = _model(job.model, job.layers, job.weights, job.data, job.device)
        model = replace(model, size=source.size)
    except Exception as error:  # NaN weights, a plug-in's network that cannot be built
        status = report.failure(error, f"model {job.model.label}")
        for cells, images in job.portions:
            yield [_blank(cell, key, status) for cell, _, _ in cells for _, key in images]
        return
    with prepared(model.net) as meter:
        for cells, images in job.portions:
            work = _Work(job, cells, model, meter, report, stop, mark)
            for start in range(0, len(images), job.rows):
                report.stopped = report.stopped or stop()
                if report.stopped:
                    break
                mark(())
                chosen = images[start : start + job.rows]
                batch, failed = _load(source, chosen, report, job)
                yield [_blank(cell, *row) for cell, _, _ in cells for row in failed]
                if batch is not None:
                    yield from work.rows(batch, job.rows)
        report.passes = Passes(meter.forward, meter.backward)
        report.padding, report.retried = meter.padding, meter.retried


def _blank(cell: str, key: str, status: str) -> Row:
    return (cell, key, -1, -1, math.nan, math.nan, status)


def _load(
    source: Source, images: Sequence[tuple[int, str]], report: Report, job: Job
) -> tuple[Batch | None, list[tuple[str, str]]]:
    """The readable images as a batch, and (key, status) of the others."""
    good, failed = [], []
    try:
        samples = source.load([position for position, _ in images])
        for (_, key), sample in zip(images, samples, strict=True):
            if isinstance(sample, BadImage):
                failed.append((key, "failed: decode"))
                report.errors.setdefault(f"image {key}: {sample}", str(sample))
            elif job.target == "label" and not 0 <= sample.label < job.classes:
                failed.append((key, "failed: label"))
                words = f"label {sample.label} is not among the {job.classes} classes of the model"
                report.errors.setdefault(f"image {key}: {words}", words)
            else:
                good.append((key, sample))
        return (collate(good, job.device, source.has_masks) if good else None), failed
    except (Exception, SystemExit) as error:
        status = report.failure(error, f"data set {job.dataset.label}")
        return None, [(key, status) for _, key in images]


def collate(samples: Sequence[tuple[str, Sample]], device: str, has_masks: bool) -> Batch:
    """One batch of samples with their keys; where there are masks, a missing one is unknown."""
    images = torch.stack([sample.image for _, sample in samples])
    unknown = torch.full(images.shape[-2:], math.nan)
    masks = [unknown if sample.mask is None else sample.mask for _, sample in samples]
    return Batch(
        images.to(device),
        torch.tensor([sample.label for _, sample in samples], device=device),
        tuple(key for key, _ in samples),
        torch.stack(masks).to(device) if has_masks else None,
    )


@dataclass(frozen=True)
class _Work:
    """What a portion's batches have in common."""

    job: Job
    cells: Sequence[tuple[str, Choice, Choice]]
    model: Model
    meter: Meter
    report: Report
    stop: Stop
    mark: Mark

    @functools.cached_property
    def by_method(self) -> dict[Choice, list[tuple[str, Any]]]:
        found: dict[Choice, list[tuple[str, Any]]] = {}
        for cell, method, metric in self.cells:
            found.setdefault(method, []).append((cell, metric.make()))
        return found

    @functools.cached_property
    def methods(self) -> dict[Choice, Any]:
        return {choice: choice.make() for choice in self.by_method}

    def rows(self, batch: Batch, rows: int) -> Iterator[list[Row]]:
        """Rows of a batch, whole: out of memory begins it again in halves."""
        try:
            found = list(self._rows(batch, rows))
        except torch.OutOfMemoryError as error:
            if rows == 1:
                yield self._all(batch, self.report.failure(error, f"model {self.model.name}"))
                return
            half = (rows + 1) // 2
            self.report.events.append(f"out of memory: batch halved to {half}")
            self.meter.retried += len(batch.keys)
            torch.cuda.empty_cache()
            for start in range(0, len(batch.keys), half):
                yield from self.rows(batch.part(slice(start, start + half)), half)
        else:
            yield found

    def _all(self, batch: Batch, status: str) -> list[Row]:
        return [_blank(cell, key, status) for cell, _, _ in self.cells for key in batch.keys]

    def _rows(self, batch: Batch, rows: int) -> Iterator[Row]:
        metrics = [[metric for _, metric in asked] for asked in self.by_method.values()]
        probe = Probe(
            self.model,
            batch,
            needs=batch_needs(self.methods.values(), metrics),
            seed=self.job.seed,
            target=self.job.target,
            rows=rows,
            meter=self.meter,
        )
        try:
            predicted = probe[Logits()].argmax(1).tolist()
            clean = list(
                zip(
                    batch.keys,
                    batch.labels.tolist(),
                    predicted,
                    probe.probability.tolist(),
                    strict=False,  # the probe's filling has no keys
                )
            )
            if self.job.target != "predicted":
                sure = probability(probe[Logits()], probe[Logits()].argmax(1)).tolist()
                self.report.confidence |= {
                    key: value
                    for key, value in zip(batch.keys, sure, strict=False)
                    if math.isfinite(value)
                }
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the network itself cannot take these images
            yield from self._all(batch, self.report.failure(error, f"model {self.model.name}"))
            return
        for choice, asked in self.by_method.items():
            self.mark(tuple(cell for cell, _ in asked))
            explanation: Explanation | str = self._explanation(probe, choice)
            for cell, metric in asked:
                if self.stop():
                    self.report.stopped = True
                    return
                self.mark((cell,))
                where = f"method {choice.label}, metric {metric.name}"
                outcomes = self._outcomes(metric, explanation, where, len(clean))
                for known, outcome in zip(clean, outcomes, strict=True):
                    yield (cell, *known, *outcome)
        self.report.events.extend(probe.events)
        self.report.smallest_rows = min(self.report.smallest_rows or rows, probe.chunk)

    def _explanation(self, probe: Probe, choice: Choice) -> Explanation | str:
        try:
            return probe.explain(self.methods[choice])
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            return self.report.failure(error, f"method {choice.label}")

    def _outcomes(
        self, metric: Any, explanation: Explanation | str, where: str, count: int
    ) -> list[tuple[float, str]]:
        """(value, status) of each image."""
        if isinstance(explanation, str):
            return [(math.nan, explanation)] * count
        try:
            return evaluated(metric, explanation)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            return [(math.nan, self.report.failure(error, where))] * count
