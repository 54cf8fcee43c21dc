"""Who runs the units: this process, or spawned workers that may die without taking the run along.

Each worker has a pipe to itself and shares no lock with anybody, so a death at any moment, by any
signal or exit code, shows as the end of its pipe, and costs nobody else a thing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import pandas as pd
import torch

from . import offline, registry
from .errors import XbenchError
from .plan import Job
from .runner import Report, facts_of, place, provenance, run_unit
from .store import COLUMNS, Store
from .suite import Choice

Tell = Callable[[Report], None]
Beat = Callable[[], None]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Lets glibc hand the memory of one activation to the next instead of to the system.

    By default each large tensor is a mapping of its own, and zeroing its fresh pages can take as
    long as the convolution that fills it. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GiB


def worker_count(asked: int | str, device: str, units: int) -> int:
    """Processes to use, at most one per unit; by default one per CPU core or GPU."""
    if asked == "auto":
        asked = len(_devices(device)) if device != "cpu" else _cores()
    return max(1, min(int(asked), units))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices(device: str) -> list[str]:
    """The devices that a suite's word stands for: "cuda" is every GPU."""
    return (
        [f"cuda:{at}" for at in range(torch.cuda.device_count())] if device == "cuda" else [device]
    )


def run(
    jobs: Sequence[Job],
    *,
    workers: int,
    plugins: Sequence[str] = (),
    tell: Tell = lambda report: None,
    beat: Beat = lambda: None,
    fail_fast: bool = False,
) -> bool:
    """Runs all jobs; true unless it was interrupted.

    The first interrupt (Ctrl-C or SIGTERM) lets each worker finish the score it is at and store
    what it has; the second ends at once.

    Args:
        jobs: units of work.
        workers: processes; 1 works in this one.
        plugins: to import in each worker.
        tell: called with the report of each finished unit.
        beat: called now and then: each second, or before each score in this process.
        fail_fast: stop after the first unit with an error.
    """
    if workers == 1:
        keep_freed_memory()
        return _here(jobs, tell, beat, fail_fast)
    return _pool(jobs, workers, plugins, tell, beat, fail_fast)


@contextmanager
def _interrupts(stop: Any) -> Iterator[None]:
    """First signal sets the flag's value, second raises."""

    def handle(number: int, frame: Any) -> None:
        if stop.value:
            raise KeyboardInterrupt
        stop.value = 1

    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _here(jobs: Sequence[Job], tell: Tell, beat: Beat, fail_fast: bool) -> bool:
    stop = ctypes.c_byte(0)
    with _interrupts(stop):
        for job in jobs:
            if stop.value:
                break
            report = run_unit(job, lambda: bool(stop.value), lambda cells: beat())
            tell(report)
            if fail_fast and report.rows["error"]:
                return True
    return not stop.value


# --- workers --------------------------------------------------------------------------------------

STILLBORN = 10
"""Workers in a row that may die before they begin a unit."""


@dataclass(frozen=True)
class _Task:
    """A unit for a worker.

    Args:
        job: what to compute.
        alone: whether it holds only cells at which a worker has died before.
        lives: deaths that it may still see between its begin and its first cell.
    """

    job: Job
    alone: bool = False
    lives: int = 3


@dataclass
class _Worker:
    """A process and its task; the cells that it is at, once it has begun."""

    process: Any
    task: _Task
    at: tuple[str, ...] | None = None


def _pool(
    jobs: Sequence[Job],
    workers: int,
    plugins: Sequence[str],
    tell: Tell,
    beat: Beat,
    fail_fast: bool,
) -> bool:
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)  # without a lock, which a worker could take to its grave
    todo = deque(_Task(job) for job in _over_devices(jobs))
    pool = _Pool(context, stop, tuple(plugins), todo)
    with _interrupts(stop):
        try:
            while pool.team or (todo and not stop.value):
                while todo and len(pool.team) < workers and not stop.value:
                    pool.hire(todo.popleft())
                for pipe in wait(list(pool.team), timeout=1):
                    assert isinstance(pipe, Connection)
                    report = pool.hear(pipe)
                    if report is not None:
                        tell(report)
                        if fail_fast and report.rows["error"]:
                            return True
                beat()
        except KeyboardInterrupt:
            stop.value = 1
        finally:
            pool.kill()
    return not stop.value


@dataclass
class _Pool:
    """The workers, and what they have not begun yet.

    Args:
        context, stop, plugins: what a worker is started with.
        todo: tasks that no worker has.
        team: workers by their pipe.
        stillborn: deaths of workers before they began, in a row.
    """

    context: Any
    stop: Any
    plugins: tuple[str, ...]
    todo: deque[_Task]
    team: dict[Connection, _Worker] = field(default_factory=dict)
    stillborn: int = 0

    def hire(self, task: _Task) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_serve, args=(theirs, self.plugins, self.stop, offline.is_enforced())
        )
        resource_tracker.ensure_running()  # it would lift the mask
        # A terminal's Ctrl-C reaches every process, also one that is still importing torch.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.team[ours] = _Worker(process, task)
        with suppress(OSError):  # it is dead already, as the pipe will tell
            ours.send(task.job)

    def hear(self, pipe: Connection) -> Report | None:
        """Acts on one message of a worker, or on its death; a report if a unit has ended.

        Raises:
            XbenchError: what the worker cannot go on from, such as a full disk.
        """
        worker = self.team[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._part_from(pipe)
            return None if self.stop.value else self._after_death(worker)
        if isinstance(message, XbenchError):
            raise message
        self.stillborn = 0
        if not isinstance(message, Report):
            worker.at = message
            return None
        if self.todo and not self.stop.value:
            worker.task, worker.at = self.todo.popleft(), None
            with suppress(OSError):
                pipe.send(worker.task.job)
        else:
            self._part_from(pipe)
        return message

    def kill(self) -> None:
        for worker in self.team.values():
            worker.process.kill()
            worker.process.join()

    def _part_from(self, pipe: Connection) -> None:
        pipe.close()  # which ends a worker that is alive
        self.team.pop(pipe).process.join()

    def _after_death(self, worker: _Worker) -> Report | None:
        """Tries the unit again without the cells that the worker was at, and those once alone."""
        task, code = worker.task, worker.process.exitcode
        if worker.at is None:
            self.stillborn += 1
            if self.stillborn == STILLBORN:
                raise XbenchError(
                    f"{STILLBORN} workers in a row died as they started ({_death(code)}); "
                    "--workers 1 computes in one process, which shows where"
                )
            self.todo.appendleft(task)
            return None
        suspects = set(worker.at)
        if (suspects and task.alone) or (not suspects and task.lives == 1):
            return _lost(task.job, code)
        if not suspects:
            self.todo.appendleft(replace(task, lives=task.lives - 1))
            return None
        others = _restricted(task.job, lambda cell: cell not in suspects)
        if others.portions:
            self.todo.appendleft(replace(task, job=others))
        self.todo.appendleft(_Task(_restricted(task.job, suspects.__contains__), alone=True))
        return None


def _serve(pipe: Connection, plugins: tuple[str, ...], stop: Any, is_offline: bool) -> None:
    """A worker's life: units in; where it is, and reports or an error, out."""
    for number in _SIGNALS:  # the coordinator decides, and sets the flag
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    keep_freed_memory()
    offline.enforce(is_offline)
    with suppress(EOFError, BrokenPipeError):  # the coordinator has gone
        try:
            for plugin in plugins:
                registry.load_plugin(plugin)
            while True:
                job = pipe.recv()
                pipe.send(())  # it has begun
                pipe.send(run_unit(job, lambda: bool(stop.value), pipe.send))
        except XbenchError as error:
            pipe.send(error)


def _death(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _restricted(job: Job, keeps: Callable[[str], bool]) -> Job:
    """The same unit with some of its cells."""
    portions = (
        (tuple(cell for cell in cells if keeps(cell[0])), images) for cells, images in job.portions
    )
    return replace(job, portions=tuple(portion for portion in portions if portion[0]))


def _over_devices(jobs: Sequence[Job]) -> list[Job]:
    """The units, taking turns over the devices."""
    return [
        replace(job, device=devices[at % len(devices)])
        for at, job in enumerate(jobs)
        for devices in [_devices(job.device)]
    ]


def _lost(job: Job, code: int) -> Report:
    """The report of cells that cost a worker its life twice; the next run tries them again."""
    report = Report(job.name, job.images)
    status = f"error: worker died ({_death(code)})"
    rows = [
        (cell, key, -1, -1, float("nan"), float("nan"), status)
        for cells, images in job.portions
        for cell, _, metric in cells
        if isinstance(metric, Choice)
        for _, key in images
    ]
    places = {place(entry) for entries, _ in job.portions for entry in entries}
    report.errors.update((f"{where}: {status}", f"in unit {job.name}") for where in places)
    report.rows["error"] = len(rows)
    facts = {**facts_of(job, Choice), "provenance": provenance(job), "events": []}
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    if rows:
        group = Store(job.store).group(*job.group)
        report.part = group.write(f"{job.number:07d}", frame, facts).name
    return report
