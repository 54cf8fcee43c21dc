"""Laws of views: differences by hand, ranks that move, files that say what the store said."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_tables import FACTS_OF_PART, Scores, plan_of, stored

from xbench import run as runs
from xbench.compare import read_results
from xbench.leaderboard import leaderboards, render
from xbench.plan import Plan, make_plan
from xbench.sheets import Cell, Sheet, write
from xbench.store import COLUMNS, Store
from xbench.tables import Results, collect, from_files, to_csv
from xbench.views import View, sheets

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
            (
                cell.id,
                key,
                0,
                int(at in wrong.get(label, set())),
                0.5,
                *((math.nan, value) if isinstance(value, str) else (value, "ok")),
            )
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


def test_where_both_are_right_on_all_images_one_sheet_is_enough(tmp_path: Path) -> None:
    plan = plan_of(models=TWO, methods=["gradient"], metrics=["deletion"])
    scores: dict[str, Scores] = {
        model: {("gradient", "deletion"): [0.1, 0.2, 0.3, 0.4]} for model in ("plug/tiny", "other")
    }
    (sheet,) = sheets(stored_by_model(plan, tmp_path, scores, {}), "between-models")
    assert sheet.title == "plug/noise: other minus plug/tiny, all 4 images"


# --- effects over pairs of networks ---------------------------------------------------------------

ARMS = [
    {"name": "plug/tiny", "seed": 2 * pair + at, "label": f"{arm} {pair}", "arm": arm, "pair": pair}
    for pair in range(3) for at, arm in enumerate(("plain", "smooth"))
]  # fmt: skip


def trained(folder: Path) -> Results:
    """Deletion of the smooth networks is less by 0.1, 0.2 and 0.6; one image of theirs failed."""
    plan = plan_of(models=ARMS, methods=["gradient", "grad_cam"], metrics=["deletion"])
    scores: dict[str, Scores] = {}
    for pair, gain in enumerate((0.1, 0.2, 0.6)):
        before = [0.7, 0.8, 0.9, 0.8 + 0.01 * pair]
        scores[f"plain {pair}"] = {("gradient", "deletion"): before}
        after: list[float | str] = [value - gain for value in before]
        scores[f"smooth {pair}"] = {("gradient", "deletion"): [*after[:3], "failed: mask"]}
    return stored_by_model(plan, folder, scores, {"smooth 0": {0}, "plain 2": {1, 2}})


def test_an_effect_is_a_mean_over_pairs_of_networks_by_hand(tmp_path: Path) -> None:
    found = sheets(trained(tmp_path), "effect")
    assert found[0].title == "plug/noise: smooth minus plain, 3 pairs of networks, all 4 images"
    rows = records(found[:1]).set_index("metric")
    deletion = rows.loc["deletion"]
    assert deletion[["pair_0", "pair_1", "pair_2"]].tolist() == pytest.approx([-0.1, -0.2, -0.6])
    assert deletion["difference"] == pytest.approx(-0.3)
    assert deletion["base_mean"] == pytest.approx(0.8), "on images that both have scores of"
    error = math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2 / 3)
    assert deletion["ci_high"] == pytest.approx(-0.3 + 4.302653 * error), "t of 2 degrees"
    sigmas = 0.3 / error
    assert deletion["p"] == pytest.approx(1 - sigmas / math.sqrt(2 + sigmas**2)), "its closed form"
    accuracy = rows.loc["accuracy"]
    assert accuracy[["pair_0", "pair_1", "pair_2"]].tolist() == [-25, 0, 50]
    assert "The network is the unit" in found[0].notes[0]
    assert found[1].title.endswith("2 to 4 images that both classify correctly")


def test_networks_of_a_pair_are_compared_with_each_other(tmp_path: Path) -> None:
    titles = [sheet.title.split(",")[0] for sheet in sheets(trained(tmp_path), "between-models")]
    assert list(dict.fromkeys(titles)) == [
        f"plug/noise: smooth {pair} minus plain {pair}" for pair in range(3)
    ]


def test_without_a_whole_pair_there_is_no_effect(tmp_path: Path) -> None:
    assert sheets(stored(plan_of(), tmp_path, {}), "effect") == []
    trained(tmp_path)
    suite = plan_of(models=ARMS, methods=["gradient", "grad_cam"], metrics=["deletion"]).suite
    for kept, pairs in (
        (["plain*"], []),
        (["plain 0", "smooth 1"], []),
        (["plain*", "smooth 1"], [1]),
    ):
        results = collect(make_plan(suite.narrowed(models=kept), None), Store(tmp_path))
        found = records(sheets(results, "effect"))
        assert [name for name in found if name.startswith("pair_")] == [f"pair_{p}" for p in pairs]


def test_one_pair_has_no_interval(tmp_path: Path) -> None:
    plan = plan_of(models=ARMS[:2], methods=["gradient"], metrics=["deletion"])
    scores: dict[str, Scores] = {
        "plain 0": {("gradient", "deletion"): [0.5] * 4},
        "smooth 0": {("gradient", "deletion"): [0.4] * 4},
    }
    never = {"plain 0": {0, 1, 2, 3}}  # so that no image is left that both classify correctly
    (sheet,) = sheets(stored_by_model(plan, tmp_path, scores, never), "effect")
    assert math.isnan(records([sheet])["ci_low"][0])
    assert "without an interval" in sheet.notes[0]
    assert "nan" not in write([sheet], "terminal")


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
    assert "method & model & Del $\\downarrow$ \\\\\n &  & black \\\\[2pt]\n\\midrule" in text
    assert text.count(r"\midrule") == 3
    assert text.count("{") == text.count("}")
    for word in (r"\toprule", r"\bottomrule", r"\begin{table}", r"\end{table}"):
        assert text.count(word) == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the path")
def test_latex_compiles_with_booktabs_alone_and_fits_the_page(tmp_path: Path) -> None:
    plan = plan_of(models=ARMS, methods=["gradient", "grad_cam", "smooth_grad", "random"],
                   metrics=["deletion", "average_drop", "insertion", "rcap"])  # fmt: skip
    scores: Scores = {
        (m, k): [0.1 + 0.2 * at, 0.2 + at * 0.3, 0.15, 0.1]
        for at, m in enumerate(("gradient", "grad_cam", "random")) for k in ("deletion", "rcap")
    }  # fmt: skip
    by_model = {str(model["label"]): scores for model in ARMS}
    results = stored_by_model(plan, tmp_path / "store", by_model, {})
    views: tuple[View, ...] = ("leaderboard", "pivot", "pairs", "between-models", "effect",
                               "agreement")  # fmt: skip
    found = [sheet for view in views for sheet in sheets(results, view)]
    odd = "a_b & 50% of {x} <y> #1 ~z^2 ▲"
    found.append(
        Sheet(odd, ("[a]", "b"), tuple((Cell("[0]"), Cell(f"[{n}]\n[2]", "▼")) for n in range(60)),
              1, (odd,), ())
    )  # fmt: skip
    text = "\\clearpage\n".join(write([sheet], "latex") for sheet in found)
    path = tmp_path / "tables.tex"
    lines = (r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", text)
    path.write_text("\n".join([*lines, r"\end{document}"]))
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", path.name],
        cwd=tmp_path, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    log = (tmp_path / "tables.log").read_text(errors="replace")
    assert done.returncode == 0, [line for line in log.splitlines() if line.startswith("!")]
    assert "Overfull" not in log


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
