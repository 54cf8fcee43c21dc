"""Laws of a unit of work: a failure costs its own cells, and a score is its own image's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import suite_of

from xbench.engines import _restricted
from xbench.plan import Job, make_plan
from xbench.runner import Report, collate, run_unit
from xbench.store import Store
from xbench.types import Sample

pytestmark = pytest.mark.usefixtures("saboteurs")

METHODS = ["gradient", "grad_cam", "random"]


def unit(store: Path, **changes: Any) -> Job:
    """The one unit of a suite whose slice holds all images; scores alone."""
    options = {"run": {"slice": 64, "examples": 0}}
    ((job, _),) = make_plan(suite_of(**{**options, **changes}), None).jobs(Store(store))
    return job


def computed(job: Job) -> tuple[Report, pd.DataFrame]:
    """Report and rows, with the names of methods and metrics."""
    report = run_unit(job)
    names = pd.DataFrame(
        [(cell, method.name, metric.name) for cells, _ in job.portions
         for cell, method, metric in cells],
        columns=["cell", "method", "metric"],
    )  # fmt: skip
    return report, Store(job.store).group(*job.group).rows().merge(names, on="cell")


def values(rows: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    keys = zip(rows["method"], rows["metric"], rows["image"], strict=True)
    return dict(zip(keys, rows["value"].tolist(), strict=True))


def words(rows: pd.DataFrame, method: str) -> set[str]:
    return set(rows.loc[rows["method"] == method, "status"])


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[tuple[str, str, str], float]:
    _, rows = computed(unit(tmp_path / "undisturbed"))
    return values(rows)


@pytest.mark.parametrize(
    ("method", "status"),
    [
        ("sabotage/raise", "error: ValueError: the method's own words"),
        ("sabotage/sys_exit", "error: SystemExit: 0"),
        ("sabotage/shape", "error: ValueError: a method must return maps of shape"),
        ("sabotage/unsuitable", "skipped: it wants another network"),
        ("sabotage/global_state", "ok"),
    ],
)
def test_a_bad_method_costs_its_own_cells_and_no_bit_of_the_others(
    method: str, status: str, tmp_path: Path, undisturbed: dict[tuple[str, str, str], float]
) -> None:
    report, rows = computed(unit(tmp_path / "store", methods=[method, *METHODS]))
    assert all(found.startswith(status) for found in words(rows, method))
    others = rows[rows["method"] != method]
    assert values(others) == undisturbed
    assert bool(report.errors) == status.startswith("error")


def test_the_traceback_of_a_failure_is_kept_once(tmp_path: Path) -> None:
    report, _ = computed(unit(tmp_path, methods=["sabotage/raise"]))
    ((where, trace),) = report.errors.items()
    assert where == "method sabotage/raise: error: ValueError: the method's own words"
    assert "in __call__" in trace
    assert report.rows["error"] == 30


@pytest.mark.parametrize(
    ("metric", "status"),
    [
        ("sabotage/metric_raise", "error: ValueError: the metric's own words"),
        ("sabotage/metric_shape", "error: ValueError: metric 'sabotage/metric_shape' must return"),
    ],
)
def test_a_bad_metric_costs_its_own_cells(
    metric: str, status: str, tmp_path: Path, undisturbed: dict[tuple[str, str, str], float]
) -> None:
    metrics = [metric, "average_drop", {"name": "deletion", "steps": 4}, "mae"]
    _, rows = computed(unit(tmp_path / "store", metrics=metrics))
    bad = rows["metric"] == metric
    assert rows.loc[bad, "status"].str.startswith(status).all()
    assert values(rows[~bad]) == undisturbed


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_map_that_is_not_finite_fails_its_own_image_alone(value: str, tmp_path: Path) -> None:
    bad = {"name": "sabotage/nonfinite", "key": "noise/3", "value": value}
    good = {"name": "sabotage/nonfinite", "key": "nobody"}
    source = {"datasets": [{"name": "plug/noise", "count": 10}]}
    report, rows = computed(unit(tmp_path / "bad", methods=[bad], **source))
    _, fine = computed(unit(tmp_path / "good", methods=[good], **source))
    hit = rows["image"] == "noise/3"
    assert set(rows.loc[hit, "status"]) == {"failed: nonfinite"}
    assert rows.loc[hit, "value"].isna().all()
    whole = values(fine)
    assert all(whole[key] == value for key, value in values(rows[~hit]).items())
    assert report.rows == {"ok": 27, "failed": 3}
    assert report.errors == {}


def test_a_constant_map_is_scored_and_called_degenerate(tmp_path: Path) -> None:
    report, rows = computed(unit(tmp_path, methods=["constant"]))
    assert set(rows["status"]) == {"degenerate"}
    assert rows["value"].notna().all()
    assert report.errors == {}


def test_a_picture_that_cannot_be_read_fails_alone_and_is_named(tmp_path: Path) -> None:
    job = unit(tmp_path, datasets=["sabotage/pictures"], metrics=["average_drop"])
    report, rows = computed(job)
    assert set(rows.loc[rows["image"] == "c", "status"]) == {"failed: decode"}
    assert set(rows.loc[rows["image"] != "c", "status"]) <= {"ok", "degenerate"}
    assert list(report.errors) == ["image c: it is no picture"]


def test_a_data_set_that_raises_fails_its_images_with_the_reason(tmp_path: Path) -> None:
    source = {"name": "sabotage/pictures", "how": "raise"}
    report, rows = computed(unit(tmp_path, datasets=[source], metrics=["average_drop"]))
    assert set(rows["status"]) == {"error: RuntimeError: the disk is gone"}
    assert len(rows) == 12
    assert len(report.errors) == 1


def test_weights_that_hold_nan_fail_every_cell_with_the_reason(tmp_path: Path) -> None:
    report, rows = computed(
        unit(tmp_path, models=["sabotage/nan_weights"], methods=["random"], metrics=["mae"])
    )
    (status,) = set(rows["status"])
    assert status.startswith("error: BadWeights: weights of 'sabotage/nan_weights' hold NaN")
    assert report.passes == (0, 0)


def test_weights_other_than_the_planned_ones_are_never_scored(tmp_path: Path) -> None:
    """A score under another network's name is the worst failure of a benchmark."""
    job = unit(tmp_path, models=["sabotage/unseeded"], methods=["random"], metrics=["mae"])
    _, rows = computed(job)
    (status,) = set(rows["status"])
    assert "draws other weights than the run was planned with: seed them" in status


def test_a_weight_file_that_changes_after_planning_is_never_scored(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from xbench.models.resnet import resnet20

    torch.manual_seed(0)
    state = {key: value.contiguous() for key, value in resnet20().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = {"name": "checkpoint", "architecture": "resnet20", "classes": 10,
             "weights": str(tmp_path / "w.safetensors")}  # fmt: skip
    job = unit(tmp_path / "store", models=[model], methods=["random"], metrics=["mae"])
    state["linear.bias"] = state["linear.bias"] + 1
    save_file(state, tmp_path / "w.safetensors")
    _, rows = computed(job)
    (status,) = set(rows["status"])
    assert "have changed since the run was planned" in status


def test_a_stop_keeps_what_is_finished_and_begins_nothing_new(
    tmp_path: Path, undisturbed: dict[tuple[str, str, str], float]
) -> None:
    job = unit(tmp_path / "store")
    for allowed in (0, 1, 5, 9, 10):
        asked = iter(range(1000))
        report = run_unit(job, lambda asked=asked, allowed=allowed: next(asked) > allowed)
        assert report.stopped
        done = Store(job.store).group(*job.group).rows()
        assert len(done) == report.rows.total()  # more is allowed each time
    _, rows = computed(job)
    assert values(rows) == undisturbed


def test_a_stop_before_the_first_batch_costs_no_pass(tmp_path: Path) -> None:
    report = run_unit(unit(tmp_path), lambda: True)
    assert (report.stopped, report.part, report.passes) == (True, "", (0, 0))


def test_the_cells_about_to_be_computed_are_announced(tmp_path: Path) -> None:
    job = unit(tmp_path, methods=["gradient", "random"], metrics=["average_drop", "mae"],
               run={"batch_size": 64, "slice": 64, "examples": 0})  # fmt: skip
    said: list[tuple[str, ...]] = []
    run_unit(job, mark=said.append)
    ((cells, _),) = job.portions
    a, b, c, d = (cell for cell, _, _ in cells)
    assert said == [(), (a, b), (a,), (b,), (c, d), (c,), (d,)]


def test_the_threads_of_the_process_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_unit(unit(tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_out_of_memory_halves_the_batch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    job = unit(tmp_path / "small", methods=["gradient"])
    _, rows = computed(job)
    whole = values(rows)
    build = torch.nn.Linear.forward
    large = 3  # rows that are too many

    def starved(self: torch.nn.Linear, images: torch.Tensor) -> torch.Tensor:
        if images.shape[0] > large:
            raise torch.OutOfMemoryError("no memory")
        return build(self, images)

    monkeypatch.setattr(torch.nn.Linear, "forward", starved)
    report, rows = computed(unit(tmp_path / "starved", methods=["gradient"]))
    found = values(rows)
    assert any("out of memory: batch halved to 2" in event for event in report.events)
    assert found.keys() == whole.keys()
    assert max(abs(found[key] - whole[key]) for key in whole) < 1e-3
    assert report.retried > 0


def test_a_restricted_unit_gives_the_same_bits(
    tmp_path: Path, undisturbed: dict[tuple[str, str, str], float]
) -> None:
    job = unit(tmp_path)
    for at in range(9):
        (cells, _), *_ = job.portions
        chosen = cells[at][0]
        run_unit(_restricted(job, chosen.__eq__))
    _, rows = computed(job)  # rows of equal provenance that differed would be refused
    assert values(rows) == undisturbed


def test_an_image_whose_label_the_network_does_not_know_fails_alone(tmp_path: Path) -> None:
    whole = unit(tmp_path / "whole", target="label")
    _, expected = computed(whole)
    report, found = computed(replace(whole, classes=2, store=tmp_path / "two"))
    strange = found["status"] == "failed: label"
    assert set(expected.loc[expected["label"] == 2, "image"]) == set(found.loc[strange, "image"])
    assert "label 2 is not among the 2 classes" in " ".join(report.errors)
    known = values(found[~strange])
    assert known
    assert known.items() <= values(expected).items()


def test_a_missing_mask_among_masks_is_unknown_throughout() -> None:
    image, mask = torch.rand(3, 4, 4), torch.ones(4, 4)
    batch = collate([("a", Sample(image, 0, mask)), ("b", Sample(image, 1))], "cpu", True)
    assert batch.masks is not None
    assert torch.equal(batch.masks[0], mask)
    assert batch.masks[1].isnan().all()
    assert collate([("b", Sample(image, 1))], "cpu", False).masks is None


def test_a_part_says_the_smallest_forward_shape_that_made_it(tmp_path: Path) -> None:
    job = unit(tmp_path)
    computed(job)
    (part,) = Store(tmp_path).group(*job.group).parts()
    assert part.facts["provenance"]["smallest_rows"] == part.facts["provenance"]["rows"] == job.rows


def test_a_unit_loads_each_image_once_and_a_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So data sets larger than memory run, and decoding is paid for once."""
    job = unit(tmp_path)
    kind = type(job.dataset.make().open(None))
    asked: list[list[int]] = []
    load = kind.load

    def watched(self: Any, indices: list[int]) -> Any:
        asked.append(list(indices))
        return load(self, indices)

    monkeypatch.setattr(kind, "load", watched)
    run_unit(job)
    images = [at for _, portion in job.portions for at, _ in portion]
    assert len(job.portions) == 1
    assert len(images) > job.rows
    assert [at for batch in asked for at in batch] == images
    assert max(map(len, asked)) == job.rows
