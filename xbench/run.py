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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from . import engines, published, registry, report
from .captions import captions
from .compare import read_results
from .downloads import Tell, fetch
from .errors import UsageError
from .files import atomic_write, sweep
from .keep import Kept
from .leaderboard import check_order, render
from .models.loading import weights_hash
from .plan import Group, Job, Outlay, Plan, make_plan
from .progress import Reporter
from .provenance import provenance
from .runner import Report, processor, versions
from .sheets import write
from .store import Store
from .suite import Choice, Suite
from .tables import Results, card_facts, collect, from_files, to_csv
from .views import LACKING, View, sheets


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
    page: bool = False,
    by: str = "",
) -> int:
    """Runs what a suite lacks and prints its table; the exit status of ``xbench run``.

    With ``page``, the run's folder gets its ``index.html`` too, which takes some seconds. ``by``
    is a metric or family to order leaderboards by, instead of faithfulness.

    Raises:
        UsageError: if data or weights are not there, or a layer or what to order by is unknown.
        StoreError: if the store cannot be written or contradicts itself.
    """
    console = Console(stderr=True)
    began = time.monotonic()
    plan = make_plan(suite, data)
    check_order(captions(plan), by)
    store = Store(out / "store")
    if fresh and store.root.exists():
        aside = store.root.rename(out / f"store-{_stamp()}")
        _notice(console, f"what was stored is now in {aside}")
    store.sweep()
    sweep(out / "runs")
    if suite.run.save_maps is not None:
        sweep(Path(suite.run.save_maps))
    for notice in (*plan.notices, *plan.pin(store)):
        _notice(console, notice)

    def compute(jobs: Sequence[Job]) -> tuple[list[Report], bool]:
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
        return reporter.reports, finished

    plan, work, reports, finished = _selected(plan, store, compute)
    for group in plan.groups:
        if group.chosen is not None:
            _notice(console, _selection(group))
    if finished:
        jobs = list(plan.jobs(store))
        found, finished = compute([job for job, _ in jobs])
        work, reports = [*work, *jobs], [*reports, *found]
    results = replace(collect(plan, store), by=by)
    for notice in (*results.notices, *(f"versions are mixed: {m}" for m in results.mixed)):
        _notice(console, notice)
    folder = out / "runs" / _stamp()
    _write_run(folder, plan, store, results, work, reports, time.monotonic() - began, finished)
    _show(results, form)
    if page and not results.per_image.empty:
        _write_page(folder / "index.html", results, store, folder)
    if not quiet:
        _notice(console, _closing(reports, len(work), folder, time.monotonic() - began))
    if not finished:
        _notice(console, "interrupted: what was finished is stored; the same command goes on")
        return 130
    errors = {text for report in reports for text in report.errors}
    for text in sorted(errors)[:10]:
        _notice(console, text)
    if len(errors) > 10:
        _notice(console, f"and {len(errors) - 10} more; all are in {folder / 'errors'}")
    return 3 if results.failing else 0


def _selected(
    plan: Plan, store: Store, compute: Callable[[Sequence[Job]], tuple[list[Report], bool]]
) -> tuple[Plan, list[tuple[Job, Outlay]], list[Report], bool]:
    """The plan with its images selected; what was computed for that, and whether it is complete.

    The network is asked for as many candidates as are lacking, until enough satisfy the rule.
    """
    work: list[tuple[Job, Outlay]] = []
    reports: list[Report] = []
    tried: set[str] = set()
    plan = plan.selected(store)
    while wave := list(plan.looks(store)):
        found, finished = compute([job for job, _ in wave])
        work += wave
        reports += found
        if not finished:
            return plan.selected(store, tried), work, reports, False
        tried.update(key for job, _ in wave for _, images in job.portions for _, key in images)
        plan = plan.selected(store, tried)
        if all(set(report.rows) <= {"error"} for report in found):
            break  # no further candidate will do better
    return plan, work, reports, True


def _selection(group: Group) -> str:
    """How the selection of a group stands, where the network was asked."""
    chosen = group.chosen
    assert chosen is not None
    failed = f", {chosen.failed} of them unusable" if chosen.failed else ""
    asked = group.dataset.selection.images
    short = asked is not None and len(chosen.images) < asked
    return (
        f"{group.dataset.label} x {group.model.label}: {len(chosen.images)}"
        f"{f' of the {asked} asked for' if short else ''} images ({group.dataset.selection.rule()}"
        f"{f', mean {chosen.confidence:.4f}' if chosen.images else ''}) "
        f"out of {chosen.judged} candidates{failed}"
    )


def _show(results: Results, form: Any, as_text: Callable[..., str] = render) -> None:
    """The result on standard output, as wide as the terminal, if it is one."""
    is_terminal = sys.stdout.isatty()
    width = Console().width if is_terminal else None
    sys.stdout.write(as_text(results, form, width, is_terminal and "NO_COLOR" not in os.environ))


def _notice(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _closing(reports: Sequence[Report], units: int, folder: Path, seconds: float) -> str:
    if not units:
        return f"all stored, nothing to do; {folder}"
    forward = sum(report.passes.forward for report in reports)
    backward = sum(report.passes.backward for report in reports)
    kept = sum(size for report in reports for size in report.kept.values())
    beside = f", {_bytes(kept)} of curves, maps and pictures" if kept else ""
    return f"{forward:,} forwards and {backward:,} backwards in {seconds:.1f} s{beside}; {folder}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


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
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("XBENCH_")},
        "finished": finished,
        "seconds": round(seconds, 3),
        "versions": versions(),
        "hardware": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "processor": processor(),
            "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
            "device": plan.device,
        },
        "git": _git_state(),
        "notices": list(plan.notices),
        "selection": [_selection_facts(group) for group in plan.groups],
        "models": [
            {"dataset": dataset, "model": model, **card_facts(card)}
            for (dataset, model), card in results.cards.items()
        ],
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
                "kept": report.kept,
                "events": report.events,
            }
            for report in reports
        ],
    }
    origin = json.dumps(
        provenance(plan, store) | results.facts(), indent=1, sort_keys=True, default=registry.plain
    )
    atomic_write(folder / "provenance.json", origin.encode() + b"\n")
    atomic_write(folder / "run.json", json.dumps(facts, indent=1, allow_nan=False).encode())
    atomic_write(folder / "table.csv", to_csv(results.table).encode())
    atomic_write(folder / "table.parquet", results.table.to_parquet())
    atomic_write(folder / "table.md", render(results, "md").encode())
    atomic_write(folder / "per_image.parquet", results.per_image.to_parquet())
    errors = {key: text for report in reports for key, text in report.errors.items()}
    for at, (key, text) in enumerate(sorted(errors.items())):
        atomic_write(folder / "errors" / f"{at:04d}.txt", f"{key}\n\n{text}\n".encode())


def _write_page(
    path: Path, results: Results, store: Store, folder: Path | None, examples: int = 4
) -> None:
    """The page of a table; with what a run says of itself, if it is of one."""
    facts = json.loads((folder / "run.json").read_bytes()) if folder else None
    atomic_write(path, report.html(results, store, facts, examples).encode())


def _selection_facts(group: Group) -> dict[str, Any]:
    chosen = group.chosen
    facts: dict[str, Any] = {
        "dataset": group.dataset.label,
        "model": group.model.label,
        **group.dataset.selection.given(),
        "selected": len(group.images),
        "candidates": len(group.candidates),
    }
    if chosen is not None:
        facts |= {
            "judged": chosen.judged,
            "unusable": chosen.failed,
            "complete": not chosen.waiting,
            "mean_confidence": chosen.confidence if chosen.images else None,
        }
    return facts


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
    store = Store(out / "store")
    plan = make_plan(suite, data).selected(store)
    lines = [f"suite {suite.name}: {len(plan.cells)} cells on {plan.device}, target {suite.target}"]
    lines += [
        f"{metric.label} was added: {metric.beside} is not shown without it"
        for metric in suite.metrics
        if metric.beside
    ]
    for group in plan.groups:
        skipped = len(group.cells) - len(group.active)
        lines += [
            "",
            f"{group.dataset.label} x {group.model.label}: {group.count} images, "
            f"{len(group.active)} cells" + (f", {skipped} skipped" if skipped else ""),
            *([f"  note: {group.notice}"] if group.notice else []),
        ]
        if group.chosen is not None:
            lines += _selection_plan(group)
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
    planned = sum(len(group.active) * group.count for group in plan.groups)
    missing = sum(job.scores for job, _ in work)
    unknown = 0
    for group in plan.groups:  # images that are still to be selected
        open_ = group.count - len(group.images)
        unknown += open_
        missing += len(group.active) * open_
        each = group.outlay(group.active)
        total = total.plus(replace(each, passes=each.passes.times(open_)))
    shapes = sorted({job.rows for job, _ in work} or {plan.shape()["rows"]})
    lines += [
        "",
        f"scores: {planned:,} planned, {planned - missing:,} stored, {missing:,} missing",
        _kept(plan, [job for job, _ in work]),
        f"units of work: {len(work)}{' so far' if unknown else ''}, of up to {suite.run.slice} "
        f"images; forward shape {' and '.join(map(str, shapes))} rows",
        f"passes to run: {_passes(total)}",
    ]
    return "\n".join(lines) + "\n"


def _kept(plan: Plan, jobs: Sequence[Job]) -> str:
    """What is to be kept beside the scores and is missing, and how large that is."""
    sizes = {group.folder: group.source.size for group in plan.groups}
    counts: Counter[str] = Counter()
    total = 0
    for job in jobs:
        height, width = sizes[job.group]
        for entries, _ in job.portions:
            for _, _, metric in entries:
                if isinstance(metric, Kept):
                    counts[metric.kind] += len(metric.images)
                    pixels = {"maps": 4, "pictures": 7}.get(metric.kind, 0)
                    total += len(metric.images) * height * width * pixels
    if not counts:
        return "to keep beside them: nothing is missing"
    words = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return f"to keep beside them: {words} missing; maps and pictures take up to {_bytes(total)}"


def _selection_plan(group: Group) -> list[str]:
    chosen = group.chosen
    assert chosen is not None
    if not chosen.waiting:
        return [f"  selection, stored: {_selection(group)}"]
    left = len(group.candidates) - chosen.judged
    return [
        f"  selection: {group.dataset.selection.rule()}; so far {len(chosen.images)} images out of "
        f"{chosen.judged} candidates",
        f"  which images is unknown until the network is asked: 1 forward for each of up to "
        f"{left:,} candidates, beside what follows",
    ]


def _passes(outlay: Outlay) -> str:
    unknown = f" and those of {outlay.unknown} methods that declare none" if outlay.unknown else ""
    bound = "at most " if outlay.is_bound else ""
    return (
        f"{bound}{outlay.passes.forward:,} forward + {outlay.passes.backward:,} backward{unknown}"
    )


def fetch_data(suite: Suite, data: Path) -> str:
    """What ``xbench fetch`` prints: what there is now of each data set and each model.

    Raises:
        UsageError: with what keeps some of them away, once all others are there.
    """
    lines, problems = [], []
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name)
            bar.update(tasks[name], completed=done, total=total)

        for choice in (*suite.datasets, *suite.models):
            try:
                lines.append(f"{choice.label}: {_fetched(choice, data, tell)}")
            except UsageError as error:
                problems.append(str(error))
    if problems:
        found = ["what is there:", *lines] if lines else []
        raise UsageError("\n".join([*problems, *found]))
    return "\n".join([f"in {data}:", *lines, ""])


def _fetched(choice: Choice, data: Path, tell: Tell) -> str:
    """What there is of a data set or a model, once it was downloaded and verified."""
    entry = choice.make()
    if choice.kind == "datasets":
        if hasattr(entry, "downloads"):
            fetch(entry.downloads(), data, tell)
        return f"{len(entry.open(data).ids):,} images"
    if hasattr(entry, "fetch"):
        entry.fetch(data, tell)
    network = entry.describe(data)
    if network.weights is None:
        return "fresh weights"
    return f"{network.weights}, SHA-256 {weights_hash(network)[:16]}"


def print_table(
    suite: Suite,
    data: Path | None,
    out: Path,
    form: Any,
    view: View,
    *,
    mixed: bool = False,
    by: str = "",
) -> int:
    """Prints a view of what is stored; 5 if that is nothing, or was made by several versions."""
    if view == "published":
        published.table_of(suite)  # before data are looked at
    store = Store(out / "store")
    results = replace(collect(make_plan(suite, data).selected(store), store), by=by)
    if results.per_image.empty:
        return _nothing(suite, out)
    return _print_view(results, form, view, mixed=mixed)


def print_results(path: Path, form: Any, view: View, *, mixed: bool = False, by: str = "") -> int:
    """Likewise of the files of a run, which need neither suite nor data."""
    found = read_results(path)
    try:
        results = from_files(found.table, found.per_image, found.provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{str(found.path)!r} does not say how to draw its table ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); it is of an earlier version: run its suite again, "
            "which computes nothing that is stored"
        ) from error
    return _print_view(replace(results, by=by), form, view, mixed=mixed)


def _print_view(results: Results, form: Any, view: View, *, mixed: bool) -> int:
    console = Console(stderr=True)
    if results.mixed and not mixed:
        for words in results.mixed:
            _notice(console, words)
        _notice(
            console,
            "a table of these would mix versions; --mixed prints it all the same, and "
            "'xbench run --fresh' computes everything anew",
        )
        return 5
    is_terminal = sys.stdout.isatty()
    width = Console().width if is_terminal else None
    colour = is_terminal and "NO_COLOR" not in os.environ
    if view == "published" or (view == "leaderboard" and form != "latex"):
        _show(results, form, published.render if view == "published" else render)
        return 0
    found = sheets(results, view)
    if not found:
        _notice(console, f"nothing to show: {LACKING.get(view, 'it has no cells')}")
        return 5
    sys.stdout.write(write(found, form, width, colour))
    return 0


def _nothing(suite: Suite, out: Path) -> int:
    _notice(
        Console(stderr=True),
        f"nothing of suite {suite.name!r} is stored in {out / 'store'}; 'xbench run' computes it",
    )
    return 5


def write_report(
    suite: Suite,
    data: Path | None,
    out: Path,
    *,
    folder: Path | None = None,
    path: Path | None = None,
    examples: int = 4,
    by: str = "",
) -> int:
    """Writes the page of what is stored and prints where it is; 5 if nothing is stored.

    Args:
        suite: what to show.
        data: directory of data and weights.
        out: where the store is.
        folder: of the run, if it is of one: its page stands there and says more.
        path: of the page; default ``index.html`` of the run, or ``out/<suite>.html``.
        examples: pictures in the gallery.
        by: metric or family to order leaderboards by, instead of faithfulness.
    """
    store = Store(out / "store")
    results = replace(collect(make_plan(suite, data).selected(store), store), by=by)
    if results.per_image.empty:
        return _nothing(suite, out)
    page = path or (folder / "index.html" if folder else out / f"{suite.name}.html")
    _write_page(page, results, store, folder, examples)
    sys.stdout.write(f"{page}\n")
    return 0
