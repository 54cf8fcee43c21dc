"""Laws of interruption: a run that is cut at any moment and begun again ends as an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Outcome, finish, last_run, members, start, suite_file

from xbench.store import Store
from xbench.suite import FACTS

SUITE: dict[str, Any] = {
    "name": "cut",
    "datasets": [{"name": "shapes", "images": 48}],
    "models": ["shapes/resnet"],
    "methods": ["gradient", "grad_cam", {"name": "smooth_grad", "samples": 60}],
    "metrics": ["average_drop", "average_gain", {"name": "deletion", "steps": 200}, "mae", *FACTS],
    "run": {"batch_size": 4, "slice": 8, "workers": 2},
}
CELLS, IMAGES, UNITS = 21, 48, 6


@pytest.fixture
def whole(run: Callable[..., Outcome], tmp_path: Path) -> Outcome:
    return run(out=tmp_path / "whole", **{**SUITE, "run": {**SUITE["run"], "workers": 1}})


def begin(folder: Path) -> subprocess.Popen[str]:
    return start("run", suite_file(folder / "cut.yaml", **SUITE), folder=folder)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("results/store/*/*/*.parquet"))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def stored_rows(folder: Path) -> list[tuple[str, str]]:
    """(cell, image) of every row of every part."""
    found: list[tuple[str, str]] = []
    for group in Store(folder / "results" / "store").groups():
        for part in group.parts():
            columns: pa.Table = part.rows.select(["cell", "image"])
            found += zip(*(column.to_pylist() for column in columns.columns), strict=True)
    return found


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(
    whole: Outcome, tmp_path: Path
) -> None:
    """Kill -9 of all its processes: while they start, and at random moments of their work."""
    draw = random.Random(0)
    early = begin(tmp_path)
    time.sleep(1.5)
    os.killpg(early.pid, signal.SIGKILL)
    early.communicate()
    for _ in range(3):
        before = len(parts(tmp_path))
        if before == UNITS:
            break  # a fast machine was done before the kill
        process = begin(tmp_path)
        wait_for(lambda before=before: len(parts(tmp_path)) > before, process)
        time.sleep(draw.random() * 0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        rows = stored_rows(tmp_path)
        assert len(rows) == len(set(rows)), "something was computed twice"
        assert len(parts(tmp_path)) >= before + 1
    last = finish(begin(tmp_path))
    assert last.status == 0, last.err
    folder = last_run(tmp_path / "results")
    assert (folder / "table.csv").read_bytes() == whole.csv
    rows = stored_rows(tmp_path)
    assert len(rows) == len(set(rows)) == CELLS * IMAGES
    assert len(parts(tmp_path)) == UNITS
    assert not list(tmp_path.glob("results/**/*.tmp"))
    assert not list(tmp_path.glob("results/**/*.bad"))


def gone(process: subprocess.Popen[str]) -> bool:
    """Whether nobody of its group is left, or only for a moment: Python's own tracker ends last."""
    deadline = time.monotonic() + 3
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not members(process.pid)


def interrupted(process: subprocess.Popen[str]) -> str:
    """What a run says after Ctrl-C, which a terminal sends to all its processes."""
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    answer = finish(process, 30)
    assert answer.status == 130, answer.err
    assert time.monotonic() - began < 10
    assert "interrupted" in answer.err
    assert "Traceback" not in answer.err
    assert gone(process), "a worker outlives the run"
    return answer.err


def test_the_first_interrupt_stores_what_is_finished_and_the_same_command_goes_on(
    run: Callable[..., Outcome], whole: Outcome, tmp_path: Path
) -> None:
    """Once while the workers start, once at work."""
    process = begin(tmp_path)
    wait_for(lambda: len(members(process.pid)) >= 3, process)
    interrupted(process)
    process = begin(tmp_path)
    before = len(stored_rows(tmp_path))
    wait_for(lambda: len(parts(tmp_path)) > 0, process)
    if process.poll() is None:
        said = interrupted(process)
        assert "the same command goes on" in said
    kept = len(stored_rows(tmp_path))
    assert kept > before
    rest = run(out=tmp_path / "results", **{**SUITE, "run": {**SUITE["run"], "workers": 1}})
    assert rest.status == 0
    assert sum(rest.run["rows"].values()) == CELLS * IMAGES - kept
    assert rest.csv == whole.csv
    rows = stored_rows(tmp_path)
    assert len(rows) == len(set(rows)) == CELLS * IMAGES


def test_a_second_interrupt_ends_at_once_and_leaves_nobody(plugin: Path, tmp_path: Path) -> None:
    source = {"datasets": [{"name": "shapes", "images": 2000}]}
    suite = suite_file(tmp_path / "s.yaml", **{**SUITE, **source, "run": {"slice": 1000}})
    process = start("run", suite, "--workers", 2, folder=tmp_path)
    wait_for(lambda: len(members(process.pid)) >= 3, process)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    answer = finish(process, 15)
    assert answer.status == 130, answer.err
    assert "Traceback" not in answer.err
    assert gone(process)
