"""Laws of leaderboards: every number whole at any width, every warning beside what it is about."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import suite_of
from test_tables import Scores, plan_of, stored

import xbench
from xbench.errors import UsageError
from xbench.leaderboard import leaderboards, render
from xbench.plan import make_plan
from xbench.suite import FACTS
from xbench.tables import Results

pytestmark = pytest.mark.usefixtures("plugin")


@xbench.metric("leaderboard-test/gate")
class Gate:
    """Passed below one half."""

    symbol: ClassVar[str] = "Gate"
    better: ClassVar[str] = "lower"
    family: ClassVar[str] = "sanity"
    gate: ClassVar[float] = 0.5

    def __call__(self, explanation: xbench.Explanation) -> None:
        raise AssertionError


FAMILIES = {
    "faithfulness": ["average_drop", "average_gain", "average_increase", "insertion", "deletion"],
    "localisation": ["mae", "log_cosh_dice", "pixel_ap"],
    "robustness": ["coherency"],
    "complexity": ["sparseness", "entropy", "effective_complexity"],
    "sanity": ["leaderboard-test/gate"],
    "facts about maps": [*FACTS],
}
METRICS = [name for names in FAMILIES.values() for name in names]
METHODS = ["gradient", "smooth_grad", {"name": "guided_absolute_grad", "percentile": [50.0, 85.0]},
           "grad_cam", "random", "fake_cam", "oracle"]  # fmt: skip


Wide = tuple[Results, dict[tuple[str, str], float]]


@pytest.fixture(scope="module")
def wide(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """Many methods and metrics, each mean another number."""
    plan = plan_of(methods=METHODS, metrics=METRICS[::-1])
    means = {
        (cell.method.label, cell.metric.label): round(0.1 + at * 0.0037, 4)
        for at, cell in enumerate(plan.cells)
    }
    scores = {cell: [mean] * 4 for cell, mean in means.items()}
    return stored(plan, tmp_path_factory.mktemp("wide"), scores), means


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200, 400])
def test_every_number_stands_whole_once_at_any_width(width: int, wide: Wide) -> None:
    results, means = wide
    text = render(results, "terminal", width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = re.findall(r"\d\.\d{4}", text)
    assert sorted(found) == sorted(f"{mean:.4f}" for mean in means.values())


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_columns_stand_family_by_family_under_their_names(width: int, wide: Wide) -> None:
    """Whatever the suite's order is: this one's is reversed."""
    results, _ = wide
    (board,) = leaderboards(results)
    families = [board.families[metric] for metric in board.metrics]
    named = ["diagnostics" if name == "facts about maps" else name for name in FAMILIES]
    assert list(dict.fromkeys(families)) == named
    assert len([a for a, b in itertools.pairwise(families) if a != b]) == 5
    lines = render(results, "terminal", width).splitlines()
    captions = [line for line in lines if line and set(line.split(", ")) <= set(FAMILIES)]
    words = [word for caption in captions for word in caption.split(", ")]
    assert list(dict.fromkeys(words)) == [*FAMILIES]
    if width == 400:
        assert captions == [", ".join(FAMILIES)]


def test_markdown_says_which_columns_are_of_which_family(wide: Wide) -> None:
    results, _ = wide
    assert (
        "Columns: faithfulness Del, Ins, AI, AG, AD; localisation AP, LCD, MAE; robustness Coh; "
        "complexity EC, Ent, Gini; sanity Gate; facts about maps mass, ties, flat."
    ) in render(results, "md")


def test_digits_stand_below_digits_whatever_is_marked(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "grad_cam", "random"], metrics=["deletion"])
    scores: Scores = {
        ("gradient", "deletion"): [0.8, 0.9, 0.8, 0.9],
        ("grad_cam", "deletion"): [0.1, 0.2, "failed: mask", 0.1],
        ("random", "deletion"): [0.5] * 4,
    }
    lines = render(stored(plan, tmp_path, scores), "terminal").splitlines()
    rows = {found[0]: line for line in lines if (found := re.search(r"0\.\d{4}[r*]?", line))}
    assert [*rows] == ["0.8500r", "0.1333*", "0.5000"]
    assert len({line.index(number) for number, line in rows.items()}) == 1


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "first", "over"),
    [
        ("", "gradient", "Del"),
        ("faithfulness", "gradient", "Del"),
        ("localisation", "grad_cam", "MAE, LCD"),
        ("log_cosh_dice", "smooth_grad", "LCD"),
        ("LCD", "smooth_grad", "LCD"),
    ],
)
def test_the_order_is_by_the_metric_or_family_asked_for(
    by: str, first: str, over: str, tmp_path: Path
) -> None:
    scores: Scores = {
        ("gradient", "deletion"): [0.1] * 4,
        ("grad_cam", "deletion"): [0.2] * 4,
        ("smooth_grad", "deletion"): [0.3] * 4,
        ("gradient", "mae"): [0.9] * 4,
        ("grad_cam", "mae"): [0.1] * 4,
        ("smooth_grad", "mae"): [0.8] * 4,
        ("gradient", "log_cosh_dice"): [0.9] * 4,
        ("grad_cam", "log_cosh_dice"): [0.2] * 4,
        ("smooth_grad", "log_cosh_dice"): [0.1] * 4,
    }
    plan = plan_of(
        methods=["gradient", "grad_cam", "smooth_grad"],
        metrics=["deletion", "mae", "log_cosh_dice"],
    )
    results = replace(stored(plan, tmp_path, scores), by=by)
    (board,) = leaderboards(results)
    assert board.methods[0] == first
    assert f"Ordered by the mean rank over {over}." in render(results, "terminal")


def test_what_orders_nothing_is_an_error_with_a_suggestion(wide: Wide) -> None:
    results, _ = wide
    with pytest.raises(UsageError, match=r"'robustnes' is no metric .* did you mean 'robustness'"):
        leaderboards(replace(results, by="robustnes"))
    with pytest.raises(UsageError, match="neither high nor low is better"):
        leaderboards(replace(results, by=FACTS[0]))


# --- warnings -------------------------------------------------------------------------------------


def test_warnings_stand_in_the_tables_for_people_with_their_legends(tmp_path: Path) -> None:
    plan = plan_of(
        methods=["gradient", "grad_cam", "random", "fake_cam", {"name": "inverted"}],
        metrics=["average_drop", "deletion"],
    )
    scores: Scores = {
        ("gradient", "average_drop"): [90.0, 91.0, 92.0, 93.0],
        ("grad_cam", "average_drop"): [20.0, 21.0, 22.0, 23.0],
        ("random", "average_drop"): [70.0, 71.0, 72.0, 73.5],
        ("fake_cam", "average_drop"): [0.0] * 4,
        ("inverted(grad_cam)", "average_drop"): [10.0, 11.0, 12.0, 13.5],
        ("gradient", "deletion"): [0.1] * 4,
        ("grad_cam", "deletion"): [0.2] * 4,
        ("random", "deletion"): [0.3] * 4,
        ("fake_cam", "deletion"): [0.3] * 4,
    }
    results = stored(plan, tmp_path, scores)
    for form in ("terminal", "md"):
        text = render(results, form)  # type: ignore[arg-type]
        assert "AD ↓!" in text
        assert "Del ↓!" not in text
        assert "91.50r" in text
        assert "21.50i" in text
        assert "! won by a control that knows nothing of the network: AD by fake_cam." in text
        assert "r worse than random maps on the same images" in text
        assert "i worse than the same map upside down" in text
        assert "\x1b" not in text


def test_where_nothing_is_wrong_no_legend_stands(tmp_path: Path) -> None:
    plan = plan_of(methods=["gradient", "random"], metrics=["deletion"])
    scores: Scores = {("gradient", "deletion"): [0.1] * 4, ("random", "deletion"): [0.3] * 4}
    text = render(stored(plan, tmp_path, scores), "terminal")
    assert "random maps" not in text
    assert "won by" not in text


def test_without_the_control_random_the_table_says_that_nothing_can_be_marked(
    tmp_path: Path,
) -> None:
    plan = plan_of(methods=["gradient", "fake_cam"], metrics=["deletion"])
    scores: Scores = {("gradient", "deletion"): [0.1] * 4, ("fake_cam", "deletion"): [0.3] * 4}
    line = "Nothing is marked as worse than random maps: the suite has no control 'random'."
    for form in ("terminal", "md"):
        text = render(stored(plan, tmp_path / form, scores), form)  # type: ignore[arg-type]
        assert line in text


def test_metrics_of_one_symbol_are_told_apart_in_sentences(tmp_path: Path) -> None:
    plan = plan_of(
        methods=["gradient", "random", "fake_cam"],
        metrics=[{"name": "average_drop", "baseline": ["black", "blur"]}, "deletion"],
    )
    scores: Scores = {
        (method, metric): [value] * 4
        for metric in ("average_drop", "average_drop(baseline=blur)", "deletion")
        for method, value in (("gradient", 20.0), ("random", 30.0))
    }
    won: Scores = {("fake_cam", "average_drop(baseline=blur)"): [0.0] * 4}
    text = render(stored(plan, tmp_path, {**scores, **won}), "md")
    assert "Ordered by the mean rank over AD black, AD blur, Del." in text
    assert "network: AD blur by fake_cam." in text


# --- gates ----------------------------------------------------------------------------------------


def test_a_gate_says_passed_or_failed_and_who_fails_is_marked_by_name(tmp_path: Path) -> None:
    plan = plan_of(
        methods=["gradient", "grad_cam", "smooth_grad", "random"],
        metrics=["deletion", "leaderboard-test/gate"],
    )
    scores: Scores = {
        **{(m, "deletion"): [0.1] * 4 for m in ("gradient", "grad_cam", "smooth_grad")},
        ("random", "deletion"): [0.3] * 4,
        ("gradient", "leaderboard-test/gate"): [0.2] * 4,
        ("grad_cam", "leaderboard-test/gate"): [0.4, 0.6] * 2,
        ("random", "leaderboard-test/gate"): [1.0] * 4,
    }
    results = stored(plan, tmp_path, scores)
    for form in ("terminal", "md"):
        text = render(results, form)  # type: ignore[arg-type]
        assert "0.2000 passed" in text
        assert "0.5000 failed" in text, "no better than the gate is not better"
        assert "1.0000 failed" in text
        assert "grad_cam (fails)" in text
        assert "gradient (fails)" not in text
        assert "random (fails)" not in text
        assert "(fails) a gate, so that its ranks mean little: grad_cam: Gate." in text
        assert "smooth_grad (fails)" not in text, "what is not computed has not failed"


# --- what was added, and the model ----------------------------------------------------------------


def test_the_table_says_which_metric_was_added_and_why(tmp_path: Path) -> None:
    from xbench.document import Document
    from xbench.suite import load_suite

    suite = load_suite(Document(suite_of(metrics=["average_drop"]).resolved(), "s", {}))
    results = stored(make_plan(suite, None), tmp_path, {("gradient", "average_drop"): [1.0] * 4})
    text = render(results, "md")
    assert "average_gain was added: average_drop is not shown without it." in text
    assert "AG ↑ black" in text


CARD = "accuracy 50.0 %, mean confidence 50.0 %, calibration error 0.0 % (ECE, 15 bins)"


def test_the_models_card_stands_below_the_title(tmp_path: Path) -> None:
    """Two of four hand-made rows are right, each with a probability of one half."""
    scores: Scores = {("gradient", "mae"): [0.5] * 4}
    results = stored(plan_of(), tmp_path, scores)
    lines = render(results, "terminal", 80).splitlines()
    assert lines[:2] == ["plug/noise x plug/tiny, 4 images, target predicted", CARD]
    first = render(results, "md").splitlines()[0]
    assert first == f"**plug/noise x plug/tiny, 4 images, target predicted**: {CARD}"


def test_what_is_not_known_of_the_model_is_left_out(tmp_path: Path) -> None:
    (board,) = leaderboards(stored(plan_of(), tmp_path, {}))
    assert board.card == ""


# --- on a network ---------------------------------------------------------------------------------


def test_on_shapes_fake_cam_and_the_image_itself_win_what_can_be_gamed(
    run: Any, tmp_path: Path
) -> None:
    """Masking by ones, or by brightness, explains nothing and beats Grad-CAM++ there."""
    outcome = run(
        datasets=[{"name": "shapes", "images": 16}],
        models=["shapes/resnet"],
        methods=["gradient", "grad_cam_plus_plus", "random", "fake_cam", "identity", "oracle"],
        metrics=["average_drop", "average_gain", "average_increase", "insertion"],
        run={"batch_size": 16, "slice": 16},
    )
    flags = outcome.table.groupby("metric")["flags"].agg(
        lambda column: {word for words in column.fillna("") for word in words.split(";") if word}
    )
    assert "won_by_fake_cam" in flags["average_drop"]
    assert "won_by_identity" in flags["average_gain"]
    assert {"won_by_fake_cam", "won_by_identity"} <= flags["average_increase"]
    assert not any(word.startswith("won_by_") for word in flags["insertion"])
    assert not any("won_by_oracle" in words for words in flags)
    means = outcome.table.pivot(index="method", columns="metric", values="mean")
    assert means["average_gain"].idxmax() == "oracle", "the best map here, and no warning"
    for heading in ("AD ↓!", "AG ↑!", "AI ↑!", "Ins ↑ "):
        assert heading in outcome.out
