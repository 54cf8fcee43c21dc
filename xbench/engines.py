"""Who runs the units: this process, or spawned workers that may die without taking the run
along.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pandas as pd

from . import registry
from .plan import Job
from .runner import Report, provenance, run_unit
from .store import COLUMNS, Store

Tell = Callable[[Report], None]
Beat = Callable[[], None]

_stop: Any = None  # a worker's copy of the coordinator's event


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
    """Processes to use: one per CPU core or GPU where nothing is asked for, at most one per
    unit.
    """
    if asked == "auto":
        if device == "cpu":
            asked = (
                len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else os.cpu_count() or 1
            )
        else:
            import torch

            asked = torch.cuda.device_count() if device == "cuda:0" else 1
    return max(1, min(int(asked), units))


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
        beat: called at least once a second while waiting.
        fail_fast: stop after the first unit with an error.
    """
    if workers == 1:
        keep_freed_memory()
        return _here(jobs, tell, fail_fast)
    return _pool(jobs, workers, plugins, tell, beat, fail_fast)


@contextmanager
def _interrupts(stop: Any) -> Iterator[None]:
    """First signal sets the event, second raises."""

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _here(jobs: Sequence[Job], tell: Tell, fail_fast: bool) -> bool:
    stop = threading.Event()
    with _interrupts(stop):
        for job in jobs:
            if stop.is_set():
                break
            report = run_unit(job, stop.is_set)
            tell(report)
            if fail_fast and report.rows["error"]:
                return True
    return not stop.is_set()


def _start(plugins: Sequence[str], stop: Any) -> None:
    global _stop
    _stop = stop
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides, and sets the event
    for plugin in plugins:
        registry.load_plugin(plugin)


def _work(job: Job) -> Report:
    return run_unit(job, _stop.is_set)


def _pool(
    jobs: Sequence[Job],
    workers: int,
    plugins: Sequence[str],
    tell: Tell,
    beat: Beat,
    fail_fast: bool,
) -> bool:
    from pebble import ProcessPool

    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    spread = _over_devices(jobs, workers)
    with (
        _interrupts(stop),
        ProcessPool(
            workers, context=context, initializer=_start, initargs=(tuple(plugins), stop)
        ) as pool,
    ):
        try:
            waiting: dict[Future[Report], tuple[Job, int]] = {
                pool.schedule(_work, args=[job]): (job, 1) for job in spread
            }
            while waiting:
                finished, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                beat()
                for future in finished:
                    job, attempt = waiting.pop(future)
                    if future.cancelled():
                        continue
                    error = future.exception()
                    if error is None:
                        report = future.result()
                    elif attempt == 1 and not stop.is_set():
                        waiting[pool.schedule(_work, args=[job])] = (job, 2)
                        continue
                    else:
                        report = _lost(job, error)
                    tell(report)
                    if fail_fast and report.rows["error"]:
                        pool.stop()  # type: ignore[no-untyped-call]
                        return True
                if stop.is_set():
                    for future in list(waiting):
                        if future.cancel():
                            del waiting[future]
        except KeyboardInterrupt:
            pool.stop()  # type: ignore[no-untyped-call]
            stop.set()
    return not stop.is_set()


def _over_devices(jobs: Sequence[Job], workers: int) -> list[Job]:
    """With several GPUs, units take turns; a CPU is one device."""
    if not jobs or jobs[0].device == "cpu" or workers == 1:
        return list(jobs)
    return [replace(job, device=f"cuda:{at % workers}") for at, job in enumerate(jobs)]


def _lost(job: Job, error: BaseException) -> Report:
    """The report of a unit whose worker died twice; its rows say so and are tried again next
    time.
    """
    report = Report(job.name, job.images)
    code = getattr(error, "exitcode", None)
    words = (
        f"worker died (exit code {code})"
        if code is not None
        else f"{type(error).__name__}: {error}"
    )
    status = f"error: {words}"
    rows = [
        (cell, key, -1, -1, float("nan"), float("nan"), status)
        for cells, images in job.portions
        for cell, _, _ in cells
        for _, key in images
    ]
    report.errors[f"unit {job.name}"] = status
    report.rows["error"] = len(rows)
    facts = {"provenance": provenance(job), "slice": job.number, "events": []}
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    report.part = Store(job.store).group(*job.group).write(f"{job.number:07d}", frame, facts).name
    return report
