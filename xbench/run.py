"""A whole run: plan, compute what is missing, tables, provenance."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import engines, registry
from .files import atomic_write, sweep
from .leaderboard import render
from .plan import Outlay, Plan, make_plan
from .progress import Reporter
from .provenance import provenance
from .runner import Report, versions
from .store import Store
from .suite import Suite
from .tables import Results, collect, to_csv


def run_suite(
    suite: Suite,
    *,
    data: Path | None,
    out: Path,
    plugins: Sequence[str] = (),
    fresh: bool = False,
    fail_fast: bool = False,
    form: Any = "terminal",
    quiet: bool = False,
) -> int:
    """Runs what a suite lacks and prints its table; the exit status of ``xbench run``.

    Raises:
        UsageError: if data or weights are not there, or a layer is unknown.
        StoreError: if the store cannot be written or contradicts itself.
    """
    console = Console(stderr=True)
    began = time.monotonic()
    plan = make_plan(suite, data)
    store = Store(out / "store")
    if fresh and store.root.exists():
        aside = store.root.rename(out / f"store-{_stamp()}")
        _notice(console, f"what was stored is now in {aside}")
    store.sweep()
    sweep(out / "runs")
    for notice in (*plan.notices, *plan.pin(store)):
        _notice(console, notice)
    work = list(plan.jobs(store))
    jobs = [job for job, _ in work]
    workers = engines.worker_count(suite.run.workers, plan.device, len(jobs))
    with Reporter(console, len(jobs), quiet=quiet) as reporter:
        finished = engines.run(
            jobs,
            workers=workers,
            plugins=plugins,
            tell=reporter.tell,
            beat=reporter.beat,
            fail_fast=fail_fast,
        )
    results = collect(plan, store)
    for notice in results.notices:
        _notice(console, notice)
    folder = out / "runs" / _stamp()
    _write_run(
        folder, plan, store, results, work, reporter.reports, time.monotonic() - began, finished
    )
    _show(results, form)
    if not quiet:
        _notice(console, _closing(reporter.reports, len(jobs), folder, time.monotonic() - began))
    if not finished:
        _notice(console, "interrupted: what was finished is stored; the same command goes on")
        return 130
    errors = {text for report in reporter.reports for text in report.errors}
    for text in sorted(errors)[:10]:
        _notice(console, text)
    if len(errors) > 10:
        _notice(console, f"and {len(errors) - 10} more; all are in {folder / 'errors'}")
    return 3 if results.failing else 0


def _show(results: Results, form: Any) -> None:
    """The result on standard output, as wide as the terminal, if it is one."""
    is_terminal = sys.stdout.isatty()
    width = Console().width if is_terminal else None
    sys.stdout.write(render(results, form, width, is_terminal and "NO_COLOR" not in os.environ))


def _notice(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _closing(reports: Sequence[Report], units: int, folder: Path, seconds: float) -> str:
    if not units:
        return f"all stored, nothing to do; {folder}"
    forward = sum(report.passes.forward for report in reports)
    backward = sum(report.passes.backward for report in reports)
    return f"{forward:,} forwards and {backward:,} backwards in {seconds:.1f} s; {folder}"


def _stamp() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def _write_run(
    folder: Path,
    plan: Plan,
    store: Store,
    results: Results,
    work: Sequence[tuple[Any, Outlay]],
    reports: Sequence[Report],
    seconds: float,
    finished: bool,
) -> None:
    planned = Outlay()
    for _, outlay in work:
        planned = planned.plus(outlay)
    rows: Counter[str] = sum((report.rows for report in reports), Counter())
    facts = {
        "suite": plan.suite.resolved(),
        "arguments": sys.argv[1:],
        "finished": finished,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "hardware": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "device": plan.device,
        },
        "git": _git_state(),
        "notices": list(plan.notices),
        "cells": dict(Counter(results.table["status"])),
        "rows": dict(rows),
        "passes": {
            "planned": planned.passes._asdict()
            | {"methods_unknown": planned.unknown, "is_bound": planned.is_bound},
            "forward": sum(report.passes.forward for report in reports),
            "backward": sum(report.passes.backward for report in reports),
            "padding": sum(report.padding for report in reports),
            "retried": sum(report.retried for report in reports),
        },
        "units": [
            {
                "name": report.name,
                "seconds": round(report.seconds, 3),
                "part": report.part,
                "events": report.events,
            }
            for report in reports
        ],
    }
    origin = json.dumps(provenance(plan, store), indent=1, sort_keys=True, default=registry.plain)
    atomic_write(folder / "provenance.json", origin.encode() + b"\n")
    atomic_write(folder / "run.json", json.dumps(facts, indent=1, allow_nan=False).encode())
    atomic_write(folder / "table.csv", to_csv(results.table).encode())
    atomic_write(folder / "table.md", render(results, "md").encode())
    atomic_write(folder / "per_image.parquet", results.per_image.to_parquet())
    errors = {key: text for report in reports for key, text in report.errors.items()}
    for at, (key, text) in enumerate(sorted(errors.items())):
        atomic_write(folder / "errors" / f"{at:04d}.txt", f"{key}\n\n{text}\n".encode())


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory, if it is a checkout."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "clean": not changes}


def describe_plan(suite: Suite, data: Path | None, out: Path) -> str:
    """What ``xbench plan`` prints: cells, units, passes per image and in all, what is stored."""
    plan = make_plan(suite, data)
    store = Store(out / "store")
    lines = [f"suite {suite.name}: {len(plan.cells)} cells on {plan.device}, target {suite.target}"]
    for group in plan.groups:
        skipped = len(group.cells) - len(group.active)
        lines += [
            "",
            f"{group.dataset.label} x {group.model.label}: {len(group.images)} images, "
            f"{len(group.active)} cells" + (f", {skipped} skipped" if skipped else ""),
        ]
        for choice in dict.fromkeys(cell.method for cell in group.active):
            alone = [cell for cell in group.active if cell.method == choice]
            lines.append(
                f"  {choice.label:40} {_passes(group.outlay(alone))} alone, with its metrics"
            )
        lines.append(f"  {'all together, per image':40} {_passes(group.outlay(group.active))}")
    work = list(plan.jobs(store))
    total = Outlay()
    for _, outlay in work:
        total = total.plus(outlay)
    planned = sum(len(group.active) * len(group.images) for group in plan.groups)
    missing = sum(len(cells) * len(images) for job, _ in work for cells, images in job.portions)
    shapes = sorted({job.rows for job, _ in work} or {plan.shape()["rows"]})
    lines += [
        "",
        f"scores: {planned:,} planned, {planned - missing:,} stored, {missing:,} missing",
        f"units of work: {len(work)}, of up to {suite.run.slice} images; "
        f"forward shape {' and '.join(map(str, shapes))} rows",
        f"passes to run: {_passes(total)}",
    ]
    return "\n".join(lines) + "\n"


def _passes(outlay: Outlay) -> str:
    unknown = f" and those of {outlay.unknown} methods that declare none" if outlay.unknown else ""
    bound = "at most " if outlay.is_bound else ""
    return (
        f"{bound}{outlay.passes.forward:,} forward + {outlay.passes.backward:,} backward{unknown}"
    )


def print_table(suite: Suite, data: Path | None, out: Path, form: Any) -> int:
    """Prints the table of what is stored; 5 if nothing is."""
    results = collect(make_plan(suite, data), Store(out / "store"))
    if results.per_image.empty:
        Console(stderr=True).print(
            f"nothing of suite {suite.name!r} is stored in {out / 'store'}; "
            "'xbench run' computes it",
            markup=False,
            soft_wrap=True,
        )
        return 5
    _show(results, form)
    return 0
