"""Laws of tables: numbers by hand, counts that add up, and an order that silence cannot improve."""

from __future__ import annotations

import functools
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from conftest import suite_of
from hypothesis import given, settings
from hypothesis import strategies as st

import xbench
from xbench import registry
from xbench.leaderboard import leaderboards, render
from xbench.plan import Plan, make_plan
from xbench.statistics import bca_intervals
from xbench.store import COLUMNS, Store
from xbench.suite import FACTS
from xbench.tables import (
    CALIBRATION_BINS,
    TABLE_COLUMNS,
    ModelCard,
    Results,
    calibration_error,
    collect,
    flags_of,
    to_csv,
    to_json,
)

pytestmark = pytest.mark.usefixtures("plugin")

FACTS_OF_PART = {"provenance": {"made": "by hand"}}
NAN = float("nan")

Scores = Mapping[tuple[str, str], list[float | str]]
"""By method and metric: a value per image, or the status of an image without one."""


def plan_of(**changes: Any) -> Plan:
    images = {"datasets": [{"name": "plug/noise", "images": 4}]}
    return make_plan(suite_of(**{**images, **changes}), None)


def stored(plan: Plan, folder: Path, scores: Scores) -> Results:
    """The results of a plan whose store holds these scores and nothing else."""
    store = Store(folder)
    (group,) = plan.groups
    rows = []
    for cell in plan.cells:
        found = scores.get((cell.method.label, cell.metric.label), [])
        for at, ((_, key), score) in enumerate(zip(group.images, found, strict=False)):
            value, status = (NAN, score) if isinstance(score, str) else (score, "ok")
            rows.append((cell.id, key, at % 2, 0, 0.5, value, status))
    if rows:
        store.group(*group.folder).write(
            "0", pd.DataFrame(rows, columns=list(COLUMNS)), FACTS_OF_PART
        )
    return collect(plan, store)


def row_of(results: Results, method: str = "gradient", metric: str = "mae") -> dict[str, Any]:
    table = results.table
    (row,) = table[(table["method"] == method) & (table["metric"] == metric)].to_dict("records")
    return dict(row)


# --- numbers --------------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_of_the_textbook_and_the_interval_that_of_the_bootstrap(
    tmp_path: Path,
) -> None:
    plan = plan_of()
    values = [0.1, 0.2, 0.3, 0.8]
    row = row_of(stored(plan, tmp_path, {("gradient", "mae"): values}))
    deviation = math.sqrt((0.25**2 + 0.15**2 + 0.05**2 + 0.45**2) / 3)
    assert row["mean"] == pytest.approx(0.35, abs=1e-15)
    assert row["std"] == pytest.approx(deviation, abs=1e-15)
    by_key = dict(sorted(zip((key for _, key in plan.groups[0].images), values, strict=True)))
    low, high = bca_intervals(np.array([*by_key.values()])[:, None], [*by_key])
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low[0], high[0]), rel=1e-12)
    assert 0.1 <= row["ci_low"] < 0.35 < row["ci_high"] <= 0.8
    assert (row["images"], row["failed"], row["degenerate"]) == (4, 0, 0)
    assert (row["status"], row["reason"], row["better"]) == ("ok", "", "lower")


def test_an_interval_depends_on_no_other_method(tmp_path: Path) -> None:
    """Neither on one that is there, nor on which images it has scores of."""
    scores: Scores = {("gradient", "mae"): [0.1, 0.2, "failed: mask", 0.8]}
    other: Scores = {("random", "mae"): [0.5, "failed: mask", 0.1, 0.2]}
    alone = row_of(stored(plan_of(methods=["gradient"]), tmp_path / "1", scores))
    beside = row_of(stored(plan_of(), tmp_path / "2", {**scores, **other}))
    for end in ("ci_low", "ci_high"):
        assert alone[end] == pytest.approx(beside[end], rel=1e-12)


def test_one_image_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    plan = plan_of(datasets=[{"name": "plug/noise", "images": 1}])
    row = row_of(stored(plan, tmp_path, {("gradient", "mae"): [0.25]}))
    assert row["mean"] == 0.25
    assert math.isnan(row["std"])
    assert math.isnan(row["ci_low"])


def test_means_do_not_depend_on_the_order_of_the_images(tmp_path: Path) -> None:
    hard = [1e16, 1.0, -1e16, 1.0]
    one = row_of(stored(plan_of(), tmp_path / "1", {("gradient", "mae"): hard}))
    two = row_of(stored(plan_of(), tmp_path / "2", {("gradient", "mae"): hard[::-1]}))
    assert one["mean"] == two["mean"] == 0.5


def test_images_without_a_score_are_counted_with_their_reasons(tmp_path: Path) -> None:
    statuses = [0.5, "failed: nonfinite", "undefined: p < 1e-6", "failed: nonfinite"]
    row = row_of(stored(plan_of(), tmp_path, {("gradient", "mae"): statuses}))
    assert (row["images"], row["failed"], row["mean"]) == (1, 3, 0.5)
    assert row["status"] == "partial"
    assert row["reason"] == "2 x failed: nonfinite; 1 x undefined: p < 1e-6"


@pytest.mark.parametrize("status", ["error: ValueError: x", "failed: mask", "skipped: no ReLU"])
def test_a_cell_without_any_score_says_what_became_of_it(status: str, tmp_path: Path) -> None:
    row = row_of(stored(plan_of(), tmp_path, {("gradient", "mae"): [status] * 4}))
    assert row["status"] == status.split(":")[0]
    assert row["reason"] == f"4 x {status}"
    assert math.isnan(row["mean"])


def test_degenerate_maps_are_scored_and_counted(tmp_path: Path) -> None:
    plan = plan_of()
    (group,) = plan.groups
    cell = next(c for c in plan.cells if c.method.name == "gradient" and c.metric.name == "mae")
    rows = [(cell.id, key, 0, 0, 0.5, 0.5, "degenerate") for _, key in group.images]
    store = Store(tmp_path)
    store.group(*group.folder).write("0", pd.DataFrame(rows, columns=list(COLUMNS)), FACTS_OF_PART)
    results = collect(plan, store)
    row = row_of(results)
    assert (row["images"], row["degenerate"], row["failed"]) == (4, 4, 0)
    assert (row["status"], row["mean"]) == ("ok", 0.5)


def test_what_is_not_computed_yet_is_missing_and_makes_a_run_fail(tmp_path: Path) -> None:
    results = stored(plan_of(), tmp_path, {("gradient", "mae"): [0.5, 0.5]})
    assert row_of(results)["reason"] == "2 not computed yet"
    assert row_of(results)["status"] == "partial"
    assert row_of(results, "random")["status"] == "missing"
    assert results.failing > 0


def test_undefined_skipped_and_degenerate_rows_fail_no_run(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient"], metrics=["mae"])
    scores: Scores = {("gradient", "mae"): [0.5, "undefined: p < 1e-6", "skipped: x", 0.1]}
    assert stored(plan, tmp_path / "fine", scores).failing == 0
    for status in ("failed: decode", "error: ValueError"):
        bad: Scores = {("gradient", "mae"): [0.5, status, 0.1, 0.1]}
        assert stored(plan, tmp_path / status[:5], bad).failing == 1


# --- warnings -------------------------------------------------------------------------------------


@xbench.metric("tables-test/up")
class Up:
    """Higher is better."""

    better: ClassVar[str] = "higher"

    def __call__(self, explanation: xbench.Explanation) -> None:
        raise AssertionError


@xbench.metric("tables-test/down")
class Down(Up):
    """Lower is better."""

    better: ClassVar[str] = "lower"


@xbench.metric("tables-test/gate")
class Gate(Up):
    """Passed above 0.3."""

    gate: ClassVar[float] = 0.3


def flags(
    metric: str, columns: Mapping[str, Sequence[float]], methods: Sequence[Any] = ()
) -> dict[str, list[str]]:
    """By label of the method, of scores per image; NaN is an image without one."""
    plan = _planned(metric, json.dumps(list(methods or columns)))
    scores = {cell.id: np.array(columns[cell.method.label]) for cell in plan.cells}
    keys = [f"image {at}" for at in range(len(next(iter(columns.values()))))]
    found = flags_of(plan.cells, scores, keys)
    return {cell.method.label: sorted(found[cell.id]) for cell in plan.cells}


@functools.cache
def _planned(metric: str, methods: str) -> Plan:
    return plan_of(methods=json.loads(methods), metrics=[metric])


LOSES = ["loses_to_random"]


def test_a_method_loses_to_random_by_the_interval_of_the_paired_difference() -> None:
    """Differences of 2, 2.1, 1.9, 2 are sure; of 9, -8, 9, -8 they are not."""
    random = [10.0, 30.0, 50.0, 70.0]
    worse = [8.0, 27.9, 48.1, 68.0]
    unsure = [1.0, 38.0, 41.0, 78.0]
    better = [12.0, 32.1, 51.9, 72.0]
    columns = {"gradient": worse, "grad_cam": unsure, "layer_cam": better, "random": random}
    assert flags("tables-test/up", columns) == {
        "gradient": LOSES, "grad_cam": [], "layer_cam": [], "random": [],
    }  # fmt: skip
    assert flags("tables-test/down", columns) == {
        "gradient": [], "grad_cam": [], "layer_cam": LOSES, "random": [],
    }  # fmt: skip


def test_the_interval_of_the_difference_is_that_of_the_bootstrap() -> None:
    """Differences 0, 1, ..., 7, moved until the end of their interval reaches zero, or does not."""
    keys = [f"image {at}" for at in range(8)]
    low, _ = bca_intervals(np.arange(8.0)[:, None], keys)
    assert 1.0 < low[0] < 2.5, "or nothing is shown here"
    for shift, expected in ((low[0] - 0.01, LOSES), (low[0] + 0.01, [])):
        random = [at - shift + 5 for at in range(8)]
        found = flags("tables-test/up", {"gradient": [5.0] * 8, "random": random})["gradient"]
        assert found == [*expected, "won_by_random"]


def test_only_images_that_both_have_scores_of_are_compared() -> None:
    """The last image alone would turn it, and it has no score of the other."""
    ours = {"gradient": [1.0, 2.0, 3.1, NAN], "random": [2.0, 3.0, 4.0, -900.0]}
    assert "loses_to_random" in flags("tables-test/up", ours)["gradient"]
    theirs = {"gradient": [1.0, 2.0, 3.1, 900.0], "random": [2.0, 3.0, 4.0, NAN]}
    assert "loses_to_random" in flags("tables-test/up", theirs)["gradient"]
    apart = {"gradient": [1.0, 1.0, NAN, NAN], "random": [NAN, NAN, 4.0, 4.0]}
    assert flags("tables-test/up", apart)["gradient"] == []


def test_rounding_and_a_single_image_are_no_evidence() -> None:
    near = {"gradient": [1.0, 1.0, 1.0], "random": [1.00001] * 3, "fake_cam": [1.00001] * 3}
    assert not any(flags("tables-test/up", near).values())
    assert flags("tables-test/up", {"gradient": [1.0], "random": [9.0]})["gradient"] == [
        "won_by_random"
    ]


def test_a_metric_is_won_by_controls_whose_mean_is_better_than_that_of_every_method() -> None:
    columns = {
        "gradient": [1.0, 1.0],
        "grad_cam": [3.0, 5.0],
        "identity": [0.0, 9.0],
        "fake_cam": [9.0, 9.0],
        "constant": [3.0, 4.0],
        "sobel": [4.0, 4.0],
        "random": [0.0, 0.0],
    }
    found = flags("tables-test/up", columns)
    assert set(map(tuple, found.values())) == {("won_by_fake_cam", "won_by_identity")}
    turned = flags("tables-test/down", columns)
    assert all([word for word in words if "won" in word] == ["won_by_random"]
               for words in turned.values())  # fmt: skip


def test_what_knows_the_object_or_the_network_may_win_without_a_warning() -> None:
    inverted = [{"name": "inverted", "of": "grad_cam"}]
    methods = ["gradient", "oracle", "random", *inverted]
    columns = {"gradient": [1.0] * 2, "oracle": [9.0] * 2, "inverted(grad_cam)": [8.0] * 2,
               "random": [0.0] * 2}  # fmt: skip
    assert not any(flags("tables-test/up", columns, methods).values())


def test_a_method_that_loses_to_its_own_map_upside_down_is_marked_and_no_other() -> None:
    methods = ["grad_cam", "gradient", {"name": "inverted", "of": "grad_cam"}]
    columns = {"grad_cam": [1.0, 2.0], "gradient": [1.0, 2.0], "inverted(grad_cam)": [5.0, 6.0]}
    assert flags("tables-test/up", columns, methods) == {
        "grad_cam": ["loses_to_inverted"], "gradient": [], "inverted(grad_cam)": [],
    }  # fmt: skip


def test_no_control_is_warned_of_beside_other_controls_alone() -> None:
    assert not any(flags("tables-test/up", {"constant": [1.0] * 3, "random": [9.0] * 3}).values())


def test_a_fact_about_maps_is_neither_won_nor_lost() -> None:
    columns = {"gradient": [1.0] * 3, "random": [9.0] * 3}
    for fact in FACTS:
        assert not any(flags(fact, columns).values())


def test_a_gate_is_passed_by_a_mean_beyond_it_by_methods_and_controls() -> None:
    columns = {"gradient": [0.2, 0.5], "grad_cam": [0.3, 0.3], "random": [0.0, 0.1]}
    assert flags("tables-test/gate", columns) == {
        "gradient": [], "grad_cam": ["fails_gate"], "random": ["fails_gate"],
    }  # fmt: skip


score = st.one_of(st.just(NAN), st.integers(-4, 4).map(float))
columns = st.lists(st.lists(score, min_size=5, max_size=5), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(columns=columns, order=st.permutations(range(5)))
def test_flags_depend_neither_on_the_order_of_images_nor_on_the_sign_of_what_is_better(
    columns: list[list[float]], order: list[int]
) -> None:
    names = ("gradient", "grad_cam", "random", "fake_cam")
    given = dict(zip(names, columns, strict=True))
    found = flags("tables-test/up", given)
    shuffled = {name: [column[at] for at in order] for name, column in given.items()}
    assert flags("tables-test/up", shuffled) == found
    turned = {name: [-value for value in column] for name, column in given.items()}
    assert flags("tables-test/down", turned) == found


def test_flags_are_the_last_column_of_the_file_as_sorted_words(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "random", "fake_cam"], metrics=["average_drop"])
    scores: Scores = {
        ("gradient", "average_drop"): [90.0] * 4,
        ("random", "average_drop"): [50.0] * 4,
        ("fake_cam", "average_drop"): [0.0] * 4,
    }
    table = pd.read_csv(io.StringIO(to_csv(stored(plan, tmp_path, scores).table)))
    assert table.columns[-1] == "flags"
    assert table.set_index("method")["flags"].to_dict() == {
        "gradient": "loses_to_random;won_by_fake_cam;won_by_random",
        "random": "won_by_fake_cam;won_by_random",
        "fake_cam": "won_by_fake_cam;won_by_random",
    }


# --- the model ------------------------------------------------------------------------------------


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    assert calibration_error([0.75] * 4, [True, True, True, False]) == 0
    assert calibration_error([1.0, 1.0], [True, True]) == 0


def test_calibration_error_by_hand() -> None:
    """Three of 0.95, one right: a gap of 0.95 - 1/3; one of 0.5, wrong: 0.5; weights 3/4, 1/4."""
    found = calibration_error([0.95, 0.95, 0.95, 0.5], [True, False, False, False])
    assert found == pytest.approx(0.75 * (0.95 - 1 / 3) + 0.25 * 0.5, abs=1e-15)


def test_a_bin_holds_its_upper_end() -> None:
    """2/15 and 0.14 are of two bins, and 0.1 and 2/15 of one, where their gaps cancel."""
    apart = calibration_error([2 / 15, 0.14], [True, False])
    assert apart == pytest.approx((1 - 2 / 15 + 0.14) / 2)
    together = calibration_error([0.1, 2 / 15], [True, False])
    assert together == pytest.approx((1 - 0.1 - 2 / 15) / 2)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error_is_that_of_numpy_bins(rows: list[tuple[float, bool]]) -> None:
    sure, right = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    inside = np.digitize(sure, np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS, right=True)
    expected = sum(
        (inside == at).mean() * abs(right[inside == at].mean() - sure[inside == at].mean())
        for at in set(inside.tolist())
    )
    assert calibration_error(sure.tolist(), [bool(r) for r in right]) == pytest.approx(expected)


def test_of_no_images_or_unknown_confidence_there_is_no_calibration_error() -> None:
    assert math.isnan(calibration_error([], []))
    assert math.isnan(calibration_error([0.5, NAN], [True, False]))


def card_of(results: Results) -> ModelCard:
    (card,) = results.cards.values()
    return card


def test_the_card_is_the_same_whichever_class_is_explained(run: Any, tmp_path: Path) -> None:
    """The target's probability is stored either way; the predicted class is not always it."""
    found = [
        run(out=tmp_path / target, target=target, methods=["random"], metrics=["mae"]).run["models"]
        for target in ("predicted", "label")
    ]
    assert found[0] == found[1]
    (card,) = found[0]
    assert card["images"] == card["labelled"] == 10
    assert 0 < card["accuracy"] < 1, "or nothing is shown here"
    assert 0 < card["confidence"] < 1
    assert card["calibration_bins"] == 15


def test_parts_of_an_earlier_version_leave_the_confidence_open_where_the_label_is_explained(
    tmp_path: Path,
) -> None:
    """Where the predicted class is the label, its probability is the target's."""
    plan = plan_of(target="label", methods=["random"], metrics=["mae"])
    card = card_of(stored(plan, tmp_path, {("random", "mae"): [0.1] * 4}))
    assert (card.images, card.accuracy) == (4, 0.5)
    assert math.isnan(card.confidence)
    assert math.isnan(card.calibration_error)
    right = stored(plan, tmp_path / "right", {("random", "mae"): [0.1]})
    assert card_of(right).confidence == 0.5


def test_images_without_a_label_count_for_confidence_alone(tmp_path: Path) -> None:
    plan = plan_of(methods=["random"], metrics=["mae"])
    (group,) = plan.groups
    labels = [0, 1, -1, -1]
    rows = [
        (plan.cells[0].id, key, label, 0, 0.25 * at + 0.1, 0.5, "ok")
        for at, (label, (_, key)) in enumerate(zip(labels, group.images, strict=True))
    ]
    store = Store(tmp_path)
    store.group(*group.folder).write("0", pd.DataFrame(rows, columns=list(COLUMNS)), FACTS_OF_PART)
    card = card_of(collect(plan, store))
    assert (card.images, card.labelled, card.accuracy) == (4, 2, 0.5)
    assert card.confidence == pytest.approx(0.475)
    assert card.calibration_error == pytest.approx((0.9 + 0.35) / 2)


def test_json_rows_carry_the_card(tmp_path: Path) -> None:
    results = stored(plan_of(), tmp_path, {("gradient", "mae"): [0.5] * 4})
    row = json.loads(to_json(results))[0]
    assert row["model_accuracy"] == 0.5
    assert row["model_calibration_error"] == 0
    empty = json.loads(to_json(stored(plan_of(), tmp_path / "empty", {})))[0]
    assert empty["model_accuracy"] is None


# --- the files ------------------------------------------------------------------------------------


def test_csv_is_sorted_with_fixed_decimals_and_plain_line_ends(tmp_path: Path) -> None:
    results = stored(plan_of(), tmp_path, {("gradient", "mae"): [1 / 3] * 4})
    text = to_csv(results.table)
    assert "\r" not in text
    assert text.endswith("\n")
    assert text.splitlines()[0] == ",".join(TABLE_COLUMNS)
    assert "0.333333,0.000000,0.333333,0.333333" in text
    again = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    names = list(zip(again["method"], again["metric"], strict=True))
    assert names == sorted(names)
    assert len(again) == 9
    assert set(again.loc[again["status"] == "missing", "mean"]) == {""}


def test_json_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    results = stored(plan_of(), tmp_path, {("gradient", "mae"): [0.5] * 4})
    found = json.loads(render(results, "json"))
    assert found == json.loads(to_json(results))
    assert [row["mean"] for row in found].count(None) == 8
    assert list(found[0])[: len(TABLE_COLUMNS)] == list(TABLE_COLUMNS)


def test_markdown_has_one_row_per_method_and_equal_columns(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", {"name": "grad_cam", "label": "a|b"}, "random"])
    lines = render(stored(plan, tmp_path, {("gradient", "mae"): [0.5] * 4}), "md").splitlines()
    rows = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert len({row.count("|") for row in rows}) == 1
    assert lines[0].startswith("**plug/noise x plug/tiny, 4 images, target predicted**")


def test_a_line_of_the_terminal_table_is_never_cut(tmp_path: Path) -> None:
    results = stored(plan_of(), tmp_path, {("gradient", "mae"): [0.123456] * 4})
    for width in (60, 80, 200):
        text = render(results, "terminal", width)
        assert "0.1235" in text
        assert "…" not in text
        assert "\x1b" not in text


# --- the order ------------------------------------------------------------------------------------

RANKED = ["gradient", "input_x_gradient", "grad_cam"]
METRICS = ["average_drop", {"name": "insertion", "steps": 4, "label": "insertion"}, "mae"]


def test_the_order_is_the_mean_rank_over_the_faithfulness_metrics(tmp_path: Path) -> None:
    """Average drop is better low, insertion better high; MAE is of another family."""
    scores: Scores = {
        ("gradient", "average_drop"): [10.0] * 4,
        ("input_x_gradient", "average_drop"): [20.0] * 4,
        ("grad_cam", "average_drop"): [30.0] * 4,
        ("gradient", "insertion"): [0.1] * 4,
        ("input_x_gradient", "insertion"): [0.9] * 4,
        ("grad_cam", "insertion"): [0.5] * 4,
        ("grad_cam", "mae"): [0.0] * 4,
    }
    (board,) = leaderboards(stored(plan_of(methods=RANKED, metrics=METRICS), tmp_path, scores))
    assert board.ranks == {"gradient": 2.0, "input_x_gradient": 1.5, "grad_cam": 2.5}
    assert board.methods == ("input_x_gradient", "gradient", "grad_cam")


def test_equal_means_share_their_places(tmp_path: Path) -> None:
    scores: Scores = {
        ("gradient", "average_drop"): [10.0] * 4,
        ("input_x_gradient", "average_drop"): [10.0] * 4,
        ("grad_cam", "average_drop"): [30.0] * 4,
    }
    plan = plan_of(methods=RANKED, metrics=["average_drop"])
    (board,) = leaderboards(stored(plan, tmp_path, scores))
    assert board.ranks == {"gradient": 1.5, "input_x_gradient": 1.5, "grad_cam": 3.0}


def test_control_maps_stand_apart_and_take_no_rank(tmp_path: Path) -> None:
    plan = plan_of(methods=["random", "gradient", "centre", "grad_cam"], metrics=["average_drop"])
    scores: Scores = {
        ("random", "average_drop"): [0.0] * 4,
        ("centre", "average_drop"): [0.0] * 4,
        ("gradient", "average_drop"): [50.0] * 4,
        ("grad_cam", "average_drop"): [40.0] * 4,
    }
    results = stored(plan, tmp_path, scores)
    (board,) = leaderboards(results)
    assert board.methods == ("grad_cam", "gradient", "random", "centre")
    assert board.ranks == {"grad_cam": 1.0, "gradient": 2.0}
    text = render(results, "md")
    assert "**40.00r**" in text
    assert "**0.00**" not in text


def test_a_suite_of_controls_alone_ranks_them(tmp_path: Path) -> None:
    plan = plan_of(methods=["random", "centre"], metrics=["average_drop"])
    scores: Scores = {("random", "average_drop"): [2.0] * 4, ("centre", "average_drop"): [1.0] * 4}
    (board,) = leaderboards(stored(plan, tmp_path, scores))
    assert board.methods == ("centre", "random")


FACTS_ALONE = ["tied_pixels", "mean_mass"]


def test_a_fact_about_maps_is_a_column_without_arrow_best_value_or_say_in_the_order(
    tmp_path: Path,
) -> None:
    plan = plan_of(methods=RANKED, metrics=["mae", "tied_pixels"])
    scores: Scores = {
        (method, metric): [value] * 4
        for metric, column in (("mae", (0.1, 0.2, 0.3)), ("tied_pixels", (0.6, 0.5, 0.4)))
        for method, value in zip(RANKED, column, strict=True)
    }
    results = stored(plan, tmp_path, scores)
    (board,) = leaderboards(results)
    assert board.ranked_by == ("MAE",)
    assert board.methods == tuple(RANKED)
    assert board.headings == {"mae": "MAE ↓", "tied_pixels": "ties"}
    text = render(results, "md")
    assert "**0.1000**" in text
    assert "| 0.6000 |" in text
    assert "**0.4000**" not in text


def test_facts_alone_order_nothing(tmp_path: Path) -> None:
    scores: Scores = {(method, "mean_mass"): [0.5] * 4 for method in RANKED}
    results = stored(plan_of(methods=RANKED, metrics=FACTS_ALONE), tmp_path, scores)
    (board,) = leaderboards(results)
    assert board.methods == tuple(RANKED)
    for form in ("md", "terminal"):
        text = render(results, form)  # type: ignore[arg-type]
        assert "Not ordered: no metric here says which is better." in text
        assert "control maps" not in text
        assert "0.5000" in text


statuses = st.sampled_from([1.0, 2.0, 3.0, "failed: nonfinite", "error: ValueError"])


@settings(max_examples=10, deadline=None)
@given(
    columns=st.lists(st.lists(statuses, min_size=4, max_size=4), min_size=6, max_size=6),
    cell=st.integers(0, 5),
    image=st.integers(0, 3),
    status=st.sampled_from(["failed: nonfinite", "error: ValueError", "not computed"]),
)
def test_a_score_that_goes_missing_never_improves_a_rank(
    columns: list[list[float | str]], cell: int, image: int, status: str
) -> None:
    plan = plan_of(methods=RANKED, metrics=["average_drop", "insertion"])

    def ranks() -> Mapping[str, float]:
        scores = dict(zip(((c.method.label, c.metric.label) for c in plan.cells
                           if c.metric.name in ("average_drop", "insertion")), columns,
                          strict=False))  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            (board,) = leaderboards(stored(plan, Path(folder), scores))
        return board.ranks

    method = [c for c in plan.cells if c.metric.name in ("average_drop", "insertion")][cell].method
    before = ranks()
    if status == "not computed":
        del columns[cell][image:]
    else:
        columns[cell][image] = status
    after = ranks()
    assert after[method.label] >= before[method.label] - 1e-12
    assert sum(after.values()) == pytest.approx(6)


def test_each_data_set_and_model_has_a_leaderboard_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(models=["plug/tiny", {"name": "plug/tiny", "seed": 1}])
    boards = leaderboards(collect(plan, Store(tmp_path)))
    assert [board.title.split(",")[0] for board in boards] == [
        "plug/noise x plug/tiny", "plug/noise x plug/tiny(seed=1)",
    ]  # fmt: skip


def test_a_stored_row_that_no_cell_or_image_of_the_plan_asks_for_is_left_out(
    tmp_path: Path,
) -> None:
    more = plan_of(datasets=[{"name": "plug/noise", "images": 8}])
    stored(more, tmp_path, {("gradient", "mae"): [0.0] * 4 + [1.0] * 4})
    results = collect(plan_of(methods=["gradient"]), Store(tmp_path))
    assert row_of(results)["mean"] == 0.0
    assert len(results.per_image) == 4


def test_columns_name_every_metric_once_with_its_direction() -> None:
    for name, entry in registry.entries("metrics").items():
        if entry.origin.startswith("xbench."):
            assert entry.load().better in ("higher", "lower", "neither"), name
            assert getattr(entry.load(), "family", ""), name


def test_means_that_agree_to_four_digits_share_a_rank(tmp_path: Path) -> None:
    means = dict(zip(RANKED, (11.889283, 11.889287, 11.90), strict=True))
    plan = plan_of(methods=RANKED, metrics=["average_drop"])
    scores: Scores = {(name, "average_drop"): [mean] * 4 for name, mean in means.items()}
    (board,) = leaderboards(stored(plan, tmp_path, scores))
    assert board.ranks == dict(zip(RANKED, (1.5, 1.5, 3.0), strict=True))
