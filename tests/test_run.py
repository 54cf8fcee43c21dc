"""Laws of a run: a score depends on its image alone, and nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Outcome
from test_contract import CHEAP

from xbench import registry
from xbench.store import Store
from xbench.tables import to_csv

Run = Callable[..., Outcome]

METHODS = ["gradient", {"name": "smooth_grad", "samples": 3}, "guided_backprop", "grad_cam",
           "layer_cam", "random", "sobel"]  # fmt: skip
METRICS = ["average_drop", "average_gain", {"name": "deletion", "steps": 4},
           {"name": "insertion", "steps": 4}, "rcap", "mae", "log_cosh_dice"]  # fmt: skip
WIDE: dict[str, Any] = {
    "datasets": [{"name": "plug/noise", "images": 24}],
    "methods": METHODS,
    "metrics": METRICS,
}
"""All kinds of needs, on a network that takes milliseconds."""


def shaped(rows: int, **options: Any) -> dict[str, Any]:
    return {"run": {"batch_size": rows, **options}}


# --- equal bit by bit -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 7, 20])
def test_no_bit_depends_on_the_order_or_the_slice_of_the_images(
    rows: int, run: Run, tmp_path: Path
) -> None:
    """Twenty rows fill no whole vector registers, where one place may round unlike another."""
    reference = run(out=tmp_path / "reference", **WIDE, **shaped(rows, slice=24))
    shuffled = [{"name": "plug/noise", "count": 24, "shuffle": "zz"}]
    straight = [{"name": "plug/noise", "count": 24}]
    for name, changes in (
        ("sliced", {**WIDE, **shaped(rows, slice=5)}),
        ("alone", {**WIDE, **shaped(rows, slice=1)}),
    ):
        other = run(out=tmp_path / name, **changes)
        assert other.values() == reference.values()
        assert other.csv == reference.csv
    one = run(out=tmp_path / "one", **{**WIDE, "datasets": straight}, **shaped(rows, slice=24))
    two = run(out=tmp_path / "two", **{**WIDE, "datasets": shuffled}, **shaped(rows, slice=24))
    order = [[key for _, key in picked(outcome)] for outcome in (one, two)]
    assert order[0] != order[1]
    assert one.values() == two.values()


def picked(outcome: Outcome) -> list[tuple[int, str]]:
    """Positions and keys in the order in which they were computed."""
    store = Store(outcome.folder.parents[1] / "store")
    (group,) = store.groups()
    (part,) = group.parts()
    return list(enumerate(dict.fromkeys(part.rows["image"].to_pylist())))


def test_no_bit_depends_on_which_other_entries_run(run: Run, tmp_path: Path) -> None:
    together = run(out=tmp_path / "together", **WIDE).values()
    for method in METHODS:
        alone = run(out=tmp_path / str(method), **{**WIDE, "methods": [method]})
        assert alone.values().items() <= together.items()
    for metric in METRICS:
        alone = run(out=tmp_path / str(metric), **{**WIDE, "metrics": [metric]})
        assert alone.values().items() <= together.items()


def test_a_run_in_pieces_equals_a_run_at_once_and_computes_nothing_twice(
    run: Run, tmp_path: Path
) -> None:
    """Methods, metrics and images arrive in turn; the last run asks for all."""
    whole = run(out=tmp_path / "whole", **WIDE)
    out = tmp_path / "pieces"
    pieces: list[dict[str, Any]] = [
        {"methods": METHODS[:2], "run": {"images": 5}},
        {"metrics": METRICS[:3], "run": {"images": 9}},
        {"methods": METHODS[3:], "run": {"images": 13, "slice": 3}},
        {},
    ]
    rows = 0
    for piece in pieces:
        outcome = run(out=out, **{**WIDE, **piece})
        passes = outcome.run["passes"]
        assert passes["planned"]["forward"] == passes["forward"]
        assert passes["planned"]["backward"] == passes["backward"]
        rows += sum(outcome.run["rows"].values())
    assert rows == 24 * len(METHODS) * len(METRICS)
    assert outcome.csv == whole.csv
    assert outcome.values() == whole.values()
    assert outcome.run["passes"]["forward"] < whole.run["passes"]["forward"]


def test_what_is_stored_costs_nothing_again(run: Run) -> None:
    first, second = run(), run()
    assert second.run["passes"] == {
        "planned": {"forward": 0, "backward": 0, "methods_unknown": 0, "is_bound": False},
        "forward": 0, "backward": 0, "padding": 0, "retried": 0,
    }  # fmt: skip
    assert "all stored, nothing to do" in second.err
    assert (first.status, second.status) == (0, 0)
    assert first.csv == second.csv
    assert first.out == second.out


def test_another_batch_size_leaves_a_group_at_its_own_and_says_so(run: Run, tmp_path: Path) -> None:
    whole = run(out=tmp_path / "whole", **WIDE, **shaped(4))
    run(out=tmp_path / "out", **WIDE, **shaped(4, images=9))
    rest = run(out=tmp_path / "out", **WIDE, **shaped(32))
    assert "was begun with batch size 4, which stays" in rest.err
    assert rest.values() == whole.values()
    assert rest.csv == whole.csv


# --- across forward shapes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes_at(tmp_path_factory: pytest.TempPathFactory) -> dict[int, pd.DataFrame]:
    """Scores of 64 images on the embedded network by batch size, float32."""
    from conftest import last_run

    from xbench.document import Document
    from xbench.run import run_suite
    from xbench.suite import suite_as_written

    found = {}
    for rows in (1, 7, 32):
        suite = {
            "version": 1, "name": "shapes-64",
            "datasets": [{"name": "shapes", "images": 64}],
            "models": ["shapes/resnet"],
            "methods": ["gradient", {"name": "smooth_grad", "samples": 3}, "layer_cam"],
            "metrics": ["average_drop", {"name": "deletion", "steps": 7}, "rcap", "mae"],
            "run": {"batch_size": rows, "slice": 64, "workers": 1, "device": "cpu"},
        }  # fmt: skip
        out = tmp_path_factory.mktemp(f"rows{rows}")
        scores = suite_as_written(Document(suite, "s", {}))  # ties are compared bit by bit
        run_suite(scores, data=None, out=out, quiet=True, form="csv")
        rows_of = pd.read_parquet(last_run(out) / "per_image.parquet")
        found[rows] = rows_of.set_index(["method", "metric", "image"])
    return found


@pytest.mark.parametrize("rows", [1, 7])
def test_another_forward_shape_moves_scores_within_the_bound_t1(
    rows: int, shapes_at: dict[int, pd.DataFrame]
) -> None:
    """T1: means within 0.2 standard errors, 80 % of the images within 1e-3 of the score's unit.

    Measured on 64 images of the whole suite ``quick`` (one thread, AVX-512): at most 0.025 standard
    errors, at least 96.9 % of the images, probabilities within 5e-8.
    """
    here = shapes_at[rows]
    reference = shapes_at[32].loc[here.index]
    assert (here["status"] == reference["status"]).all()
    assert (here["predicted"] == reference["predicted"]).all()
    assert np.abs(here["probability"] - reference["probability"]).max() < 1e-4
    for (_, metric), expected in reference.groupby(level=[0, 1]):
        moved = here.loc[expected.index, "value"] - expected["value"]
        unit = 100 if metric == "average_drop" else 1
        assert abs(moved.mean()) <= 0.2 * expected["value"].std() / np.sqrt(64)
        assert (moved.abs() <= 1e-3 * unit).mean() >= 0.8


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_run_leaves_its_table_its_scores_and_where_they_come_from(run: Run) -> None:
    outcome = run(seed=3)
    facts = outcome.run
    assert sorted(path.name for path in outcome.folder.iterdir()) == [
        "per_image.parquet", "provenance.json", "run.json", "table.csv", "table.md",
        "table.parquet",
    ]  # fmt: skip
    assert facts["suite"]["seed"] == 3
    assert facts["suite"]["methods"][0] == {
        "name": "gradient",
        "label": "gradient",
        "channels": "absolute_sum",
    }
    assert facts["finished"] is True
    assert facts["cells"] == {"ok": 9}
    (card,) = facts["models"]
    assert (card["dataset"], card["model"], card["images"]) == ("plug/noise", "plug/tiny", 10)
    assert facts["rows"] == {"ok": 90}
    assert facts["versions"].keys() >= {"python", "torch", "numpy"}
    assert facts["hardware"].keys() == {"platform", "cores", "processor", "gpus", "device"}
    assert facts.keys() >= {"arguments", "environment", "git", "seconds", "passes"}
    assert [unit["name"] for unit in facts["units"]] == [
        "plug/noise x plug/tiny [0]", "plug/noise x plug/tiny [1]",
    ]  # fmt: skip
    assert len(outcome.scores) == 90
    same = pd.read_parquet(outcome.folder / "table.parquet")
    assert to_csv(same).encode() == outcome.csv
    assert json.loads((outcome.folder / "run.json").read_text())


def test_padding_is_counted_apart(run: Run) -> None:
    """Ten images in slices of 8 and 2 and batches of 4: the last batch holds two of filling."""
    outcome = run(methods=["gradient"], metrics=["mae"])
    assert outcome.run["passes"]["forward"] == 10
    assert outcome.run["passes"]["padding"] == 2


def test_the_table_of_a_run_goes_to_standard_output_and_progress_to_standard_error(
    run: Run,
) -> None:
    outcome = run()
    assert "gradient" in outcome.out
    assert "[2/2]" not in outcome.out
    assert "[2/2] plug/noise x plug/tiny [1]: 2 images" in outcome.err


def test_methods_that_fail_are_tried_again_and_may_then_succeed(
    run: Run, saboteurs: Path, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    changes = {"methods": ["gradient", {"name": "sabotage/until", "path": str(flag), "label": "U"}]}
    failed = run(**changes)
    assert failed.status == 3
    assert failed.run["rows"] == {"ok": 30, "error": 30}
    assert "method U: error: RuntimeError: the file is still there" in failed.err
    assert "in __call__" in failed.errors
    assert "Traceback" not in failed.err
    flag.unlink()
    mended = run(**changes)
    assert mended.status == 0
    assert mended.run["rows"] == {"ok": 30}
    fresh = run(out=tmp_path / "fresh", **changes)
    assert mended.csv == fresh.csv


def test_failing_rows_that_are_final_make_every_later_run_end_alike(
    run: Run, saboteurs: Path
) -> None:
    changes = {"datasets": ["sabotage/pictures"], "metrics": ["average_drop"]}
    first, second = run(**changes), run(**changes)
    assert (first.status, second.status) == (3, 3)
    assert "image c: it is no picture" in first.err
    assert "3 x failed: decode" not in second.err
    assert second.run["rows"] == {}
    row = second.table.iloc[0]
    assert (row["images"], row["failed"], row["status"]) == (3, 1, "partial")
    assert row["reason"] == "1 x failed: decode"


def test_fail_fast_leaves_the_other_units_missing_and_the_next_run_goes_on(
    run: Run, saboteurs: Path
) -> None:
    changes = {"methods": ["sabotage/raise", "gradient"], "run": {"slice": 2}}
    outcome = run(fail_fast=True, **changes)
    assert outcome.status == 3
    assert outcome.run["rows"] == {"error": 6, "ok": 6}
    rows = outcome.table.set_index(["method", "metric"])
    assert rows.loc[("gradient", "mae"), "reason"] == "8 not computed yet"
    again = run(**changes)
    assert again.run["rows"]["ok"] == 24


def test_a_damaged_part_is_set_aside_and_its_scores_are_computed_again(
    run: Run, tmp_path: Path
) -> None:
    whole = run()
    part, *_ = sorted((tmp_path / "out" / "store").rglob("*.parquet"))
    content = bytearray(part.read_bytes())
    del content[len(content) // 2]  # a flipped bit may be one that nobody reads
    part.write_bytes(content)
    mended = run()
    assert mended.status == 0
    assert mended.csv == whole.csv
    assert mended.values() == whole.values()
    assert "is damaged" in mended.err
    assert part.with_name(f"{part.name}.bad").exists()


def test_labels_and_names_may_hold_what_markup_would_read(run: Run) -> None:
    outcome = run(
        datasets=[{"name": "plug/noise", "images": 4, "label": "data[/b]"}],
        models=[{"name": "plug/tiny", "label": "[/red]|x"}],
        methods=[{"name": "gradient", "label": "[bold]g[/]"}, "random"],
        metrics=[{"name": "average_drop", "label": "[/]AD"}],
    )
    assert outcome.status == 0
    for label in ("data[/b]", "[/red]|x", "[bold]g[/]", "[/]AD"):
        assert label in outcome.out


def built_in(kind: str, *, again: bool = False) -> list[Any]:
    """Entries of xbench itself, at parameters that are quick; ``again`` are those that run a method
    again. Library's metrics, of which some cost a forward per pixel, have tests of their own.
    """
    return [
        {"name": name, **CHEAP[name]} if name in CHEAP else name
        for name, entry in registry.entries(kind).items()
        if entry.origin.startswith("xbench.")
        and not name.startswith("quantus/")
        and getattr(entry.load(), "needs_method", False) == again
    ]


def test_metrics_that_run_a_method_again_run_on_the_embedded_network(run: Run) -> None:
    outcome = run(
        datasets=[{"name": "shapes", "images": 5}],
        models=["shapes/resnet"],
        methods=["grad_cam", {"name": "smooth_grad", "samples": 2}, "random"],
        metrics=built_in("metrics", again=True),
        run={"batch_size": 3},
    )
    assert outcome.status == 0, outcome.errors
    assert outcome.run["passes"]["planned"]["forward"] == outcome.run["passes"]["forward"]
    assert set(outcome.table["status"]) == {"ok"}


def test_every_built_in_entry_runs_on_the_embedded_network(run: Run) -> None:
    """All methods and metrics of the registry on real weights: no row fails.

    Those for transformers are skipped by the plan; Opti-CAM may stop before its bound.
    """
    outcome = run(
        datasets=[{"name": "shapes", "images": 5}],
        models=["shapes/resnet"],
        methods=built_in("methods"),
        metrics=built_in("metrics"),
        run={"batch_size": 3},
    )
    assert outcome.status == 0, outcome.errors
    passes = outcome.run["passes"]
    assert passes["planned"]["is_bound"]
    assert passes["planned"]["methods_unknown"] == 0
    assert 0 <= passes["planned"]["forward"] - passes["forward"] < 5 * 50
    assert 0 <= passes["planned"]["backward"] - passes["backward"] < 5 * 50
    skipped = outcome.table["status"] == "skipped"
    transformers = {"attention", "attention_rollout", "gradient_rollout"}
    assert set(outcome.table[skipped]["method"]) == transformers
    assert outcome.table[skipped]["reason"].str.contains("the network shows no attention").all()
    assert set(outcome.table[~skipped]["status"]) == {"ok"}
