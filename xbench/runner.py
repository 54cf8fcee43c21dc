"""One unit of work, from images to a part file."""

from __future__ import annotations

import functools
import math
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .autograd import Meter, prepared
from .errors import BadImage, Unsupported, printable
from .keep import Kept, pieces
from .mapfiles import write_maps
from .models.loading import load_model
from .plan import Entry, Job, batch_needs
from .probe import Explanation, Logits, Probe, probability
from .scoring import evaluated
from .store import COLUMNS, Piece, Store, kept_table
from .suite import Choice
from .types import Batch, Model, Passes, Sample, Source

Stop = Callable[[], bool]
Mark = Callable[[tuple[str, ...]], object]
Row = tuple[str, str, int, int, float, float, str]
"""The columns of a part file, in order."""

Found = Row | Piece


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
        kept: bytes of each file that was written beside it, by its name.
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
    kept: dict[str, int] = field(default_factory=dict)
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


MAX_WORDS = 1000
"""Characters of a message that a row keeps: a command that is the way out has to fit."""


def _plain(error: BaseException) -> str:
    """An error's message on one line, without what could steer a terminal."""
    return " ".join(printable(str(error)).split())[:MAX_WORDS]


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
        "device": torch.cuda.get_device_name(job.device) if "cuda" in job.device else processor(),
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


def processor() -> str:
    """The kind of the CPU, as far as rounding depends on it."""
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
    """Computes what a job lacks and writes it as one part file, and another for what is kept.

    A method or metric that raises fails its own cells, with the error stored. When ``stop`` becomes
    true, what is finished is written and the report says ``stopped``. ``mark`` is told the cells
    that are about to be computed, or none of them for what all share, in case it ends the process.
    """
    report = Report(job.name, job.images)
    began = time.monotonic()
    with on_threads(job.threads):
        found = [one for batch in _batches(job, report, stop, mark) for one in batch]
    report.seconds = time.monotonic() - began
    rows = [row for row in found if not isinstance(row, Piece)]
    report.rows.update(row[-1].split(":")[0] for row in rows)
    conditions = {**provenance(job), "smallest_rows": report.smallest_rows or job.rows}
    facts = {**facts_of(job, Choice), "provenance": conditions, "events": report.events}
    if report.confidence:
        facts["confidence"] = report.confidence
    if rows:
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        group = Store(job.store).group(*job.group)
        report.part = group.write(f"{job.number:07d}", frame, facts).name
    kept = [one for one in found if isinstance(one, Piece) and not one.status.startswith("error")]
    for path in _write_kept(job, kept, {**facts, **facts_of(job, Kept)}):
        report.kept[path.name] = path.stat().st_size
    return report


def facts_of(job: Job, kind: type[Choice | Kept]) -> dict[str, Any]:
    """What a part of this unit says of itself: whose it is, and its cells by method and metric.

    Args:
        job: the unit.
        kind: Choice for a part of scores, Kept for one of what is kept beside them.
    """
    cells: dict[str, dict[str, str]] = {}
    for cell, method, metric in (entry for entries, _ in job.portions for entry in entries):
        if isinstance(metric, kind):
            own = "" if method is None or job.purpose else method.label
            cells.setdefault(own, {})[job.purpose or metric.label] = cell
    return {"group": list(job.group), "slice": job.number, "cells": cells}


def _write_kept(job: Job, kept: Sequence[Piece], facts: dict[str, Any]) -> Iterator[Path]:
    """One part for the store, and one file for each folder of maps."""
    stored = [piece for piece in kept if piece.folder is None]
    if stored:
        group = Store(job.store).group(*job.group).kept
        yield group.write(f"{job.number:07d}", kept_table(stored), facts)
    folders: dict[Path, list[Piece]] = {}
    for piece in kept:
        if piece.folder is not None:
            folders.setdefault(piece.folder, []).append(piece)
    for folder, found in folders.items():
        maps = {p.image: torch.from_numpy(p.array) for p in found if p.array is not None}
        absent = {p.image: p.status for p in found if p.array is None}
        said = {**facts, "made_by": found[0].id, "absent": absent}
        yield write_maps(folder, f"{job.number:07d}", maps, said)


def _batches(job: Job, report: Report, stop: Stop, mark: Mark) -> Iterator[list[Found]]:
    try:
        source = _source(job.dataset, job.data)
        model = _model(job.model, job.layers, job.weights, job.data, job.device)
        model = replace(model, size=source.size)
    except Exception as error:  # NaN weights, a plug-in's network that cannot be built
        status = report.failure(error, f"model {job.model.label}")
        for entries, images in job.portions:
            yield _blank(entries, [(key, status) for _, key in images])
        return
    with prepared(model.net) as meter:
        for entries, images in job.portions:
            work = _Work(job, entries, model, meter, report, stop, mark)
            for start in range(0, len(images), job.rows):
                report.stopped = report.stopped or stop()
                if report.stopped:
                    break
                mark(())
                chosen = images[start : start + job.rows]
                batch, failed = _load(source, chosen, report, job)
                yield _blank(entries, failed)
                if batch is not None:
                    yield from work.rows(batch, job.rows)
        report.passes = Passes(meter.forward, meter.backward)
        report.padding, report.retried = meter.padding, meter.retried


def _blank(entries: Iterable[Entry], failed: Sequence[tuple[str, str]]) -> list[Found]:
    """What stands in the place of scores, and of what is kept, of these (key, status)."""
    found: list[Found] = []
    for cell, _, metric in entries:
        if isinstance(metric, Kept):
            found += [
                Piece(cell, key, "", status, folder=metric.folder)
                for key, status in failed
                if key in metric.images
            ]
        else:
            found += [(cell, key, -1, -1, math.nan, math.nan, status) for key, status in failed]
    return found


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
    entries: Sequence[Entry]
    model: Model
    meter: Meter
    report: Report
    stop: Stop
    mark: Mark

    @functools.cached_property
    def by_method(self) -> dict[Choice | None, list[tuple[Entry, Any]]]:
        """Entries with what reads their explanations; pictures have no method."""
        found: dict[Choice | None, list[tuple[Entry, Any]]] = {}
        for entry in self.entries:
            found.setdefault(entry[1], []).append((entry, entry[2].make()))
        return found

    @functools.cached_property
    def methods(self) -> dict[Choice, Any]:
        return {choice: choice.make() for choice in self.by_method if choice is not None}

    def rows(self, batch: Batch, rows: int) -> Iterator[list[Found]]:
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

    def _all(self, batch: Batch, status: str) -> list[Found]:
        return _blank(self.entries, [(key, status) for key in batch.keys])

    def _rows(self, batch: Batch, rows: int) -> Iterator[Found]:
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
            asked = [one for one in asked if _concerns(one[0], batch)]
            if not asked:
                continue
            self.mark(tuple(dict.fromkeys(cell for (cell, _, _), _ in asked)))
            explanation = self._explanation(probe, choice)
            for entry, metric in asked:
                if self.stop():
                    self.report.stopped = True
                    return
                self.mark((entry[0],))
                if isinstance(entry[2], Kept):
                    yield from self._kept(entry, entry[2], metric, explanation, batch)
                    continue
                outcomes = self._outcomes(metric, explanation, place(entry), len(clean))
                for known, outcome in zip(clean, outcomes, strict=True):
                    yield (entry[0], *known, *outcome)
        self.report.events.extend(probe.events)
        self.report.smallest_rows = min(self.report.smallest_rows or rows, probe.chunk)

    def _explanation(self, probe: Probe, choice: Choice | None) -> Explanation | Probe | str:
        if choice is None:
            return probe
        try:
            return probe.explain(self.methods[choice])
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            return self.report.failure(error, f"method {choice.label}")

    def _kept(
        self, entry: Entry, kept: Kept, reader: Any, explanation: Any, batch: Batch
    ) -> list[Found]:
        """What is kept of the images that want it."""
        status = explanation if isinstance(explanation, str) else ""
        if not status:
            try:
                return [*pieces(entry[0], kept, reader(explanation), batch.keys)]
            except torch.OutOfMemoryError:
                raise
            except (Exception, SystemExit) as error:
                status = self.report.failure(error, place(entry))
        return _blank([entry], [(key, status) for key in batch.keys])

    def _outcomes(
        self, metric: Any, explanation: Explanation | Probe | str, where: str, count: int
    ) -> list[tuple[float, str]]:
        """(value, status) of each image."""
        if not isinstance(explanation, Explanation):
            return [(math.nan, str(explanation))] * count
        try:
            return evaluated(metric, explanation)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            return [(math.nan, self.report.failure(error, where))] * count


def _concerns(entry: Entry, batch: Batch) -> bool:
    """Whether any image of the batch lacks the entry: a cell's images lack it all."""
    return not isinstance(entry[2], Kept) or not entry[2].images.isdisjoint(batch.keys)


def place(entry: Entry) -> str:
    """An entry in words, for messages."""
    _, method, metric = entry
    what = metric.label if isinstance(metric, Kept) else f"metric {metric.label}"
    return what if method is None else f"method {method.label}, {what}"
