"""Laws of workers: whatever ends one, costs the cells that it was at, and nobody else a bit.

Each test with workers pays for importing torch in each, so that few of them say much.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, finish, members, start, suite_file, suite_of

from xbench import engines
from xbench.errors import StoreError, XbenchError
from xbench.plan import Job, make_plan
from xbench.runner import Report
from xbench.store import Store
from xbench.suite import FACTS

pytestmark = pytest.mark.usefixtures("saboteurs")

GOOD = ["gradient", "grad_cam", "random"]


def jobs_of(store: Path, **changes: Any) -> list[Job]:
    plan = make_plan(suite_of(**changes), None)
    return [job for job, _ in plan.jobs(Store(store))]


def statuses(outcome: Outcome) -> dict[str, set[str]]:
    grouped = outcome.scores.groupby("method")["status"]
    return {str(name): set(found) for name, found in grouped}


def test_two_workers_give_the_bits_of_one(run: Callable[..., Outcome], tmp_path: Path) -> None:
    source = {"datasets": [{"name": "plug/noise", "images": 24}]}
    one = run(out=tmp_path / "one", **source)
    two = run(out=tmp_path / "two", **source, run={"workers": 2})
    assert one.csv == two.csv
    assert one.values() == two.values()
    assert one.run["passes"] == two.run["passes"]
    assert (one.status, two.status) == (0, 0)


def test_the_dead_cost_their_own_cells_and_the_next_run_tries_them_again(
    run: Callable[..., Outcome], saboteurs: Path, tmp_path: Path
) -> None:
    """Silent ends (exit code 0 too), a segmentation fault, and a metric that ends its process."""
    changes: dict[str, Any] = {
        "datasets": [{"name": "plug/noise", "images": 8}],
        "methods": ["gradient", "sabotage/os_exit", "sabotage/segfault", "random"],
        "metrics": ["average_drop", "mae"],
    }
    outcome = run(plugins=[saboteurs], **changes, run={"workers": 2, "slice": 4})
    whole = run(
        out=tmp_path / "whole", **{**changes, "methods": ["gradient", "random"]}, run={"slice": 4}
    )
    assert outcome.status == 3
    assert statuses(outcome) == {
        "gradient": {"ok"},
        "random": {"ok"},
        "sabotage/os_exit": {"error: worker died (exit code 0)"},
        "sabotage/segfault": {"error: worker died (signal 11)"},
    }
    found = outcome.values()
    assert {key: found[key] for key in whole.values()} == whole.values()
    assert "sabotage/segfault, metric" in outcome.errors
    assert "worker died (signal 11)" in outcome.err
    assert "Traceback" not in outcome.err
    again = jobs_of(tmp_path / "out" / "store", **changes)
    tried = {method.name for job in again for cells, _ in job.portions for _, method, _ in cells}
    assert tried == {"sabotage/os_exit", "sabotage/segfault"}


def test_a_metric_that_ends_its_process_costs_its_own_cells(
    run: Callable[..., Outcome], saboteurs: Path
) -> None:
    outcome = run(
        plugins=[saboteurs],
        datasets=[{"name": "plug/noise", "images": 8}],
        methods=["gradient"],
        metrics=["mae", "sabotage/metric_dies", "average_drop"],
        run={"workers": 2, "slice": 4},
    )
    assert outcome.status == 3
    found = outcome.scores.groupby("metric")["status"].agg(set).to_dict()
    assert found == {
        "average_drop": {"ok"}, "mae": {"ok"},
        "sabotage/metric_dies": {"error: worker died (exit code 5)"},
    }  # fmt: skip


def test_workers_killed_from_outside_change_no_bit(
    run: Callable[..., Outcome], plugin: Path, tmp_path: Path
) -> None:
    """Two while they start, two more at work."""
    source = {
        "datasets": [{"name": "plug/noise", "count": 128, "images": 128}],
        "metrics": [
            "average_drop",
            "average_gain",
            {"name": "deletion", "steps": 4},
            "mae",
            *FACTS,
        ],
    }
    whole = run(out=tmp_path / "whole", **source)
    suite = suite_file(tmp_path / "s.yaml", **source, run={"workers": 2})
    process = start("run", suite, "--plugin", plugin, folder=tmp_path)
    killed = 0
    deadline = time.monotonic() + 60
    while killed < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.7)
        workers = [pid for pid in members(process.pid) if is_worker(pid)]
        if workers and (killed < 2 or list(tmp_path.glob("results/store/*/*/0*.parquet"))):
            os.kill(workers[-1], signal.SIGKILL)
            killed += 1
    answer = finish(process)
    assert killed >= 2
    assert answer.status == 0, answer.err
    assert whole.csv in {path.read_bytes() for path in tmp_path.glob("results/runs/*/table.csv")}


def is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"spawn_main" in words


def test_no_worker_outlives_a_coordinator_that_is_killed(plugin: Path, tmp_path: Path) -> None:
    source = {"datasets": [{"name": "plug/noise", "count": 2000, "images": 2000}]}
    suite = suite_file(tmp_path / "s.yaml", **source, run={"workers": 2})
    process = start("run", suite, "--plugin", plugin, folder=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("results/store/*/*/0*.parquet")):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while (left := members(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


# --- without processes ----------------------------------------------------------------------------


def test_no_more_workers_than_units_and_one_by_default_without_any() -> None:
    assert engines.worker_count(8, "cpu", 3) == 3
    assert engines.worker_count("auto", "cpu", 0) == 1
    assert engines.worker_count(2, "cuda:0", 8) == 2


def test_units_take_turns_on_all_gpus_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tmp_path, run={"slice": 3})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert engines.worker_count("auto", "cuda", 8) == 2
    assert engines.worker_count("auto", "cuda:1", 8) == 1
    spread = engines._over_devices([replace(job, device="cuda") for job in jobs])
    assert [job.device for job in spread] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    named = [replace(job, device="cuda:1") for job in jobs]
    assert engines._over_devices(named) == named
    assert engines._over_devices(jobs) == jobs


def test_fail_fast_stops_after_the_first_unit_with_an_error(tmp_path: Path) -> None:
    reports: list[Report] = []
    jobs = jobs_of(tmp_path, methods=["sabotage/raise"], run={"slice": 3})
    assert len(jobs) == 4
    engines.run(jobs, workers=1, tell=reports.append, fail_fast=True)
    assert len(reports) == 1


def test_signal_handlers_are_as_before_a_run(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    engines.run(jobs_of(tmp_path), workers=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_after_the_score_at_hand_and_the_second_at_once(
    number: signal.Signals, tmp_path: Path
) -> None:
    reports: list[Report] = []

    def once(report: Report) -> None:
        reports.append(report)
        os.kill(os.getpid(), number)

    jobs = jobs_of(tmp_path, run={"slice": 3})
    assert not engines.run(jobs, workers=1, tell=once)
    assert len(reports) == 1

    def twice(report: Report) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        engines.run(jobs, workers=1, tell=twice)


def test_a_store_that_cannot_be_written_ends_the_run_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr("xbench.store.Group.write", full)
    with pytest.raises(StoreError, match="the disk is full"):
        engines.run(jobs_of(tmp_path), workers=1)


def test_a_death_divides_the_unit_until_every_other_cell_is_done(tmp_path: Path) -> None:
    """What is tried after each death, without a process."""
    (job,) = jobs_of(tmp_path, run={"slice": 64, "examples": 0})
    ((cells, images),) = job.portions
    ids = [cell for cell, _, _ in cells]

    def after(task: engines._Task, at: tuple[str, ...] | None) -> list[tuple[list[str], bool, int]]:
        class Process:
            exitcode = -9

        pool = engines._Pool(None, None, (), deque())
        report = pool._after_death(engines._Worker(Process(), task, at))
        assert (report is None) == bool(pool.todo)
        if report is not None:
            lost = [cell for cells, _ in task.job.portions for cell in cells]
            assert report.rows["error"] == len(images) * len(lost)
        return [
            ([c for cells, _ in part.job.portions for c, _, _ in cells], part.alone, part.lives)
            for part in pool.todo
        ]

    whole = engines._Task(job)
    assert after(whole, None) == [(ids, False, 3)]
    assert after(whole, ()) == [(ids, False, 2)]
    assert after(whole, tuple(ids[:3])) == [(ids[:3], True, 3), (ids[3:], False, 3)]
    assert after(whole, (ids[4],)) == [([ids[4]], True, 3), (ids[:4] + ids[5:], False, 3)]
    assert after(whole, tuple(ids)) == [(ids, True, 3)]
    assert after(engines._Task(job, alone=True), (ids[0],)) == []
    assert after(engines._Task(job, alone=True), ()) == [(ids, True, 2)]
    assert after(engines._Task(job, lives=1), ()) == []


def test_workers_that_cannot_start_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    class Process:
        exitcode = 1

    (job,) = jobs_of(tmp_path, run={"slice": 64})
    pool = engines._Pool(None, None, (), deque())
    stillborn = engines._Worker(Process(), engines._Task(job))
    for _ in range(engines.STILLBORN - 1):
        assert pool._after_death(stillborn) is None
    with pytest.raises(XbenchError, match=r"died as they started \(exit code 1\)"):
        pool._after_death(stillborn)
