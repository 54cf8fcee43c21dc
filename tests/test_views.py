"""Laws of views: differences by hand, ranks that move, files that say what the store said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_tables import FACTS_OF_PART, Scores, plan_of, stored

from xbench import run as runs
from xbench.compare import read_results
from xbench.leaderboard import leaderboards, render
from xbench.plan import Plan
from xbench.sheets import Sheet, write
from xbench.store import COLUMNS, Store
from xbench.tables import Results, collect, from_files, to_csv
from xbench.views import sheets

pytestmark = pytest.mark.usefixtures("plugin")

IMAGES = 12
DATA = [{"name": "plug/noise", "images": IMAGES}]
TWO = ["plug/tiny", {"name": "plug/tiny", "seed": 1, "label": "other"}]


def stored_by_model(
    plan: Plan, folder: Path, scores: Mapping[str, Scores], wrong: Mapping[str, set[int]]
) -> Results:
    """Of several models: by model, then as in ``stored``; ``wrong`` are places of images."""
    store = Store(folder)
    for group in plan.groups:
        label = group.model.label
        rows = [
            (cell.id, key, 0, int(at in wrong.get(label, set())), 0.5, value, "ok")
            for cell in group.cells
            for at, ((_, key), value) in enumerate(
                zip(
                    group.images,
                    scores[label].get((cell.method.label, cell.metric.label), []),
                    strict=False,
                )
            )
        ]
        store.group(*group.folder).write(
            "0", pd.DataFrame(rows, columns=list(COLUMNS)), FACTS_OF_PART
        )
    return collect(plan, store)


def records(found: list[Sheet]) -> pd.DataFrame:
    return pd.DataFrame([record for sheet in found for record in sheet.records])


# --- the order and how sure it is -----------------------------------------------------------------


def test_letters_join_methods_whose_order_is_not_sure_and_no_others(tmp_path: Path) -> None:
    """Two differ by noise, the third by much more than that."""
    plan = plan_of(datasets=DATA, methods=["gradient", "grad_cam", "smooth_grad"],
                   metrics=["deletion"])  # fmt: skip
    swing = [(-1) ** at * 0.01 for at in range(IMAGES)]
    scores: Scores = {
        ("gradient", "deletion"): [0.2 + 0.001 * at for at in range(IMAGES)],
        ("grad_cam", "deletion"): [0.2001 + 0.001 * at + s for at, s in enumerate(swing)],
        ("smooth_grad", "deletion"): [0.6 + 0.001 * at for at in range(IMAGES)],
    }
    results = stored(plan, tmp_path, scores)
    (board,) = leaderboards(results)
    assert board.groups == {"gradient": "a", "grad_cam": "a", "smooth_grad": ""}
    assert board.level == {("gradient", "deletion"), ("grad_cam", "deletion")}
    assert board.best == {("gradient", "deletion")}
    assert board.second == {("grad_cam", "deletion")}
    assert board.intervals["smooth_grad"] == (3.0, 3.0)
    assert board.intervals["gradient"] == (1.0, 2.0)
    text = render(results, "md")
    assert "**0.2055=**" in text
    assert "0.6055 |" in text
    assert "methods that share a letter" in text
    assert "Holm over 3 tests" in text


def test_few_images_separate_nothing_and_the_table_says_so(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "grad_cam"], metrics=["deletion"])
    scores: Scores = {("gradient", "deletion"): [0.1, 0.2, 0.1, 0.2],
                      ("grad_cam", "deletion"): [0.6, 0.7, 0.7, 0.6]}  # fmt: skip
    text = render(stored(plan, tmp_path, scores), "terminal")
    assert "No two methods are separable in any column" in text
    assert "=" not in text


def test_a_mean_over_fewer_images_is_never_the_best(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "grad_cam"], metrics=["deletion"])
    scores: Scores = {("gradient", "deletion"): [0.3] * 4,
                      ("grad_cam", "deletion"): [0.1, 0.1, 0.1, "failed: mask"]}  # fmt: skip
    (board,) = leaderboards(stored(plan, tmp_path, scores))
    assert board.best == {("gradient", "deletion")}
    assert board.methods[0] == "gradient"


# --- pairs and models -----------------------------------------------------------------------------


def test_pairs_are_differences_on_the_images_that_both_have_scores_of(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "grad_cam", "random"], metrics=["deletion"])
    scores: Scores = {
        ("gradient", "deletion"): [0.1, 0.2, 0.3, "failed: mask"],
        ("grad_cam", "deletion"): [0.2, 0.4, 0.6, 0.9],
        ("random", "deletion"): [0.5] * 4,
    }
    found = records(sheets(stored(plan, tmp_path, scores), "pairs"))
    assert len(found) == 1, "controls are in no pair"
    assert found["images"][0] == 3
    assert found["difference"][0] == pytest.approx(-0.2)
    assert -0.3 <= found["ci_low"][0] < -0.2 < found["ci_high"][0] <= -0.1
    assert found["p_holm"][0] == pytest.approx(2 / 8), "two of the eight patterns of signs"


def test_models_differ_on_all_images_and_on_those_that_both_classify_correctly(
    tmp_path: Path,
) -> None:
    plan = plan_of(datasets=DATA, models=TWO, methods=["gradient"], metrics=["deletion"])
    name = ("gradient", "deletion")
    before = [0.50 + 0.01 * at for at in range(IMAGES)]
    after = [v - 0.1 - 0.001 * at for at, v in enumerate(before)]
    after[0], after[1] = 0.9, 0.9
    scores: dict[str, Scores] = {"plug/tiny": {name: before}, "other": {name: after}}
    results = stored_by_model(plan, tmp_path, scores, {"plug/tiny": {0}, "other": {1}})
    found = sheets(results, "between-models")
    everywhere, right = records(found).query("metric == 'deletion'").to_dict("records")
    moved = [b - a for a, b in zip(before, after, strict=True)]
    assert everywhere["images"] == IMAGES
    assert everywhere["difference"] == pytest.approx(math.fsum(moved) / IMAGES)
    assert right["images_are"] == "images that both classify correctly"
    assert right["images"] == IMAGES - 2
    assert right["difference"] == pytest.approx(math.fsum(moved[2:]) / (IMAGES - 2))
    assert right["ci_low"] < right["difference"] < right["ci_high"] < 0
    text = write(found, "terminal", 100)
    assert "other minus plug/tiny, 10 images that both classify correctly" in text
    assert "-0.106▲" in text, "a lower deletion is better, and it is sure"


def test_one_model_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    assert sheets(stored(plan_of(), tmp_path, {}), "between-models") == []


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_that_order_alike_agree_and_opposite_ones_disagree(tmp_path: Path) -> None:
    methods = ["gradient", "grad_cam", "smooth_grad"]
    plan = plan_of(methods=methods, metrics=["deletion", "average_drop", "insertion"])
    scores: Scores = {
        **{(m, "deletion"): [0.1 + at, 0.2 + at, 0.15 + at, 0.1 + at]
           for at, m in enumerate(methods)},
        **{(m, "average_drop"): [9.0 + 10 * at] * 4 for at, m in enumerate(methods)},
        **{(m, "insertion"): [0.1 + at] * 4 for at, m in enumerate(methods)},
    }  # fmt: skip
    found = records(sheets(stored(plan, tmp_path, scores), "agreement"))
    tau = found[found["statistic"] == "kendall_tau"].set_index(["metric", "other"])["value"]
    assert tau["average_drop", "deletion"] == 1
    assert tau["insertion", "deletion"] == -1, "insertion is better high"
    alpha = found[found["statistic"] == "krippendorff_alpha"].set_index("metric")["value"]
    assert alpha["deletion"] == 1, "each image has the same order"


def test_ranks_move_over_baselines(tmp_path: Path) -> None:
    methods = ["gradient", "grad_cam", "smooth_grad"]
    plan = plan_of(methods=methods,
                   metrics=[{"name": "deletion", "baseline": ["black", "blur"]}])  # fmt: skip
    means = {"deletion": (0.1, 0.2, 0.3), "deletion(baseline=blur)": (0.3, 0.1, 0.2)}
    scores: Scores = {
        (method, metric): [value] * 4
        for metric, column in means.items()
        for method, value in zip(methods, column, strict=True)
    }
    (sheet,) = sheets(stored(plan, tmp_path, scores), "sensitivity")
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows[:3]}
    assert rows == {"gradient": ["2", "1", "3"], "grad_cam": ["1", "2", "1"],
                    "smooth_grad": ["1", "3", "2"]}  # fmt: skip
    found = records([sheet]).set_index("statistic")["value"]
    assert found["kendall_tau"] == pytest.approx(-1 / 3), "one of three pairs keeps its order"


# --- pivot and LaTeX ------------------------------------------------------------------------------


def test_a_pivot_has_methods_by_models_and_latex_its_marks(tmp_path: Path) -> None:
    plan = plan_of(models=TWO, methods=["gradient", "grad_cam", "random"], metrics=["deletion"])
    scores: dict[str, Scores] = {
        "plug/tiny": {("gradient", "deletion"): [0.2] * 4, ("grad_cam", "deletion"): [0.1] * 4},
        "other": {("gradient", "deletion"): [0.3] * 4, ("grad_cam", "deletion"): [0.4] * 4},
    }
    results = stored_by_model(plan, tmp_path, scores, {})
    (sheet,) = sheets(results, "pivot")
    assert [(row[0].text, row[1].text, row[2].plain) for row in sheet.rows[:4]] == [
        ("grad_cam", "plug/tiny", "0.1000"), ("grad_cam", "other", "0.4000"),
        ("gradient", "plug/tiny", "0.2000"), ("gradient", "other", "0.3000"),
    ]  # fmt: skip
    for model, note in zip(("plug/tiny", "other"), sheet.notes, strict=False):
        assert re.match(rf"{model}: accuracy [0-9.]+ %, .*calibration error", note)
    text = write([sheet], "latex")
    assert r"grad\_cam & plug/tiny & \textbf{0.1000}" in text
    assert r"grad\_cam & other & \underline{0.4000}" in text
    assert r"\shortstack{Del $\downarrow$ \\ black}" in text
    assert text.count(r"\midrule") == 3
    assert text.count("{") == text.count("}")
    for word in (r"\toprule", r"\bottomrule", r"\begin{table}", r"\end{table}"):
        assert text.count(word) == 1


# --- the files of a run ---------------------------------------------------------------------------


def test_a_folder_of_results_prints_what_the_store_prints(run: Any, tmp_path: Path) -> None:
    outcome = run(methods=["gradient", "grad_cam", "random"], metrics=["average_drop", "deletion"])
    (folder,) = (
        (tmp_path / "results" / "runs").iterdir()
        if (tmp_path / "results" / "runs").exists()
        else [next(tmp_path.rglob("table.csv")).parent]
    )
    found = read_results(folder)
    results = from_files(found.table, found.per_image, found.provenance)
    assert render(results, "terminal") == outcome.out
    assert to_csv(results.table) == (folder / "table.csv").read_text()


def with_versions(plan: Plan, folder: Path, *versions: str) -> Results:
    """Half of the images from each."""
    store = Store(folder)
    (group,) = plan.groups
    keys = [key for _, key in group.images]
    for number, version in enumerate(versions):
        part = keys[number * 2 : number * 2 + 2]
        rows = [(cell.id, key, 0, 0, 0.5, 0.5, "ok") for cell in group.cells for key in part]
        facts = {"provenance": {"versions": {"torch": version, "xbench": "1"}}}
        store.group(*group.folder).write(
            str(number), pd.DataFrame(rows, columns=list(COLUMNS)), facts
        )
    return collect(plan, store)


def test_a_table_of_mixed_versions_is_refused_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of()
    assert with_versions(plan, tmp_path / "same", "2.14", "2.14").mixed == ()
    results = with_versions(plan, tmp_path / "mixed", "2.13", "2.14")
    assert results.mixed == ("plug/noise x plug/tiny: torch 2.13 and 2.14",)
    assert runs._print_view(results, "md", "leaderboard", mixed=False) == 5
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "torch 2.13 and 2.14" in refused.err
    assert "--mixed" in refused.err
    assert runs._print_view(results, "md", "leaderboard", mixed=True) == 0
    assert "| method |" in capsys.readouterr().out


def test_a_part_that_no_cell_of_the_table_needs_mixes_nothing(tmp_path: Path) -> None:
    with_versions(plan_of(), tmp_path, "2.13", "2.14")
    plan = plan_of(datasets=[{"name": "plug/noise", "images": 2}])
    assert collect(plan, Store(tmp_path)).mixed == ()


def test_json_and_csv_of_a_view_hold_its_records(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "grad_cam"], metrics=["deletion"])
    scores: Scores = {("gradient", "deletion"): [0.1, 0.2, 0.1, 0.2]}
    found = sheets(stored(plan, tmp_path, scores), "pairs")
    (record,) = json.loads(write(found, "json"))
    assert record["difference"] is None
    assert record["method"] == "gradient"
    assert write(found, "csv").splitlines()[0].startswith("dataset,model,metric,better,method")
