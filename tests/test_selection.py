"""Laws of selection: nested, by shares of classes, and asked of the network once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Outcome, suite_of

from xbench import registry
from xbench.errors import SuiteError, UsageError
from xbench.models.loading import load_model
from xbench.run import describe_plan
from xbench.selection import candidates, judged, select
from xbench.suite import Selection

Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Labelled:
    """Ids and labels, which is what an order of selection looks at."""

    labels: tuple[int, ...]
    classes: tuple[str, ...] = ()
    revision: str = "1"
    size: tuple[int, int] = (1, 1)
    has_masks: bool = False

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"image {at}" for at in range(len(self.labels)))

    def key(self, index: int) -> str:
        return f"key {index}"

    def load(self, indices: Any) -> Any:
        raise AssertionError("nothing is loaded to select")


SKEWED = Labelled((0,) * 60 + (1,) * 30 + (2,) * 10)


def ordered(source: Labelled = SKEWED, data: Path | None = None, **rule: Any) -> list[int]:
    return list(candidates(source, Selection(**rule), "d", data))


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 20, 50, 100])
def test_the_classes_shares_are_those_of_all_images(count: int) -> None:
    found = Counter(SKEWED.labels[at] for at in ordered()[:count])
    assert found == {0: 6 * count // 10, 1: 3 * count // 10, 2: count // 10}


def test_every_class_of_equal_size_comes_before_any_comes_again() -> None:
    source = Labelled(tuple(at // 10 for at in range(50)))
    order = ordered(source)
    for start in range(0, 50, 5):
        assert {source.labels[at] for at in order[start : start + 5]} == set(range(5))


def test_more_images_continue_the_order_of_fewer() -> None:
    ten, all_of_them = select(SKEWED, Selection(images=10), "d"), select(SKEWED, Selection(), "d")
    assert ten == all_of_them[:10]
    assert sorted(at for at, _ in all_of_them) == list(range(100))


def test_within_a_class_the_order_is_drawn_by_id_and_another_seed_draws_anew() -> None:
    plain, strata = ordered(stratified=False), ordered()
    for label in range(3):
        kept = [at for at in strata if SKEWED.labels[at] == label]
        assert kept == [at for at in plain if SKEWED.labels[at] == label]
    other = ordered(images_seed=1, stratified=False)
    assert other != plain
    assert sorted(other) == sorted(plain)


# --- an explicit list -----------------------------------------------------------------------------


def test_only_takes_ids_and_positions() -> None:
    assert sorted(ordered(only=("image 3", 7, "12"))) == [3, 7, 12]
    assert len(ordered(only=(1, 2, 3), images=2)) == 3  # all stay candidates


@pytest.mark.parametrize("home", ["data", "here"])
def test_only_reads_a_file_of_ids_or_positions(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(tmp_path)
    folder = data if home == "data" else tmp_path
    (folder / "list.txt").write_text("# chosen by hand\nimage 4\n\n9\n")
    np.save(folder / "list.npy", np.array([4, 9]))
    assert sorted(ordered(only="list.txt", data=data)) == [4, 9]
    assert sorted(ordered(only="list.npy", data=data)) == [4, 9]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (("image 3", 3), "'only' lists image 'image 3' of data set 'd' twice"),
        (("image 100",), "'only' lists 'image 100', which is neither an id of data set 'd'"),
        ((100,), "nor a position from 0 to 99"),
        ("absent.txt", "the list of images 'absent.txt' is not there"),
        ("objects.npy", "objects.npy cannot be read"),
        ("flags.npy", "flags.npy cannot be read: it holds bool"),
    ],
)
def test_a_wrong_list_says_what_is_wrong(only: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flags.npy", np.array([True]))
    with pytest.raises(UsageError, match=message):
        ordered(only=only, data=tmp_path)


def test_more_images_than_candidates_are_refused() -> None:
    with pytest.raises(UsageError, match="has 100 images, but 101 were asked for"):
        ordered(images=101)
    with pytest.raises(UsageError, match="has 2 images in 'only', but 3 were asked for"):
        ordered(images=3, only=(1, 2))


@pytest.mark.parametrize(
    "wrong",
    [{"min_confidence": 1.5}, {"min_confidence": 0}, {"correct": 1}, {"stratified": "yes"},
     {"images_seed": -1}],
)  # fmt: skip
def test_a_wrong_rule_is_found_in_the_suite(wrong: dict[str, Any], plugin: Path) -> None:
    (key,) = wrong
    with pytest.raises(SuiteError, match=rf"datasets\[0\].{key}\): {key}: input"):
        suite_of(datasets=[{"name": "plug/noise", **wrong}])


# --- a rule, judged by rows -----------------------------------------------------------------------


def rows(*said: tuple[int, int, int, float, str]) -> pd.DataFrame:
    frame = pd.DataFrame(said, columns=["image", "label", "predicted", "probability", "status"])
    return frame.assign(image=[f"key {at}" for at in frame["image"]])


def verdict(frame: pd.DataFrame, tried: tuple[str, ...] = (), **rule: Any) -> Any:
    selection = Selection(**{"min_confidence": 0.9, **rule})
    return judged(SKEWED, selection, [5, 6, 7, 8], frame, at_once=2, tried=tried)


def test_candidates_are_judged_in_order_until_enough_satisfy_the_rule() -> None:
    frame = rows((5, 0, 0, 0.95, "ok"), (6, 0, 0, 0.5, "ok"), (7, 0, 0, 0.9, "degenerate"))
    found = verdict(frame, images=2)
    assert (found.images, found.judged, found.failed) == (((5, "key 5"), (7, "key 7")), 3, 0)
    assert found.waiting == ()
    assert found.confidence == pytest.approx(0.925)


def test_what_nobody_has_asked_yet_waits_as_many_as_are_lacking() -> None:
    assert [at for at, _ in verdict(rows(), images=3).waiting] == [5, 6, 7]
    assert [at for at, _ in verdict(rows(), images=1).waiting] == [5, 6]  # at once
    assert [at for at, _ in verdict(rows()).waiting] == [5, 6, 7, 8]
    later = rows((7, 0, 0, 0.95, "ok"))  # of a run with another order; nothing is skipped
    assert verdict(later, images=3).images == ()
    assert [at for at, _ in verdict(later, images=3).waiting] == [5, 6]


def test_correct_asks_for_the_prediction_and_confidence_for_the_label() -> None:
    frame = rows(
        (5, 0, 1, 0.45, "ok"), (6, 0, 0, 0.5, "ok"), (7, 0, 0, 0.95, "ok"), (8, 1, 0, 0.1, "ok")
    )
    assert [at for at, _ in verdict(frame, correct=True, min_confidence=None).images] == [6, 7]
    assert [at for at, _ in verdict(frame, min_confidence=0.45).images] == [5, 6, 7]
    assert [at for at, _ in verdict(frame, correct=True).images] == [7]


def test_a_failure_is_counted_and_an_error_is_asked_again_in_another_run() -> None:
    frame = rows(
        (5, -1, -1, float("nan"), "failed: decode"),
        (6, -1, -1, float("nan"), "error: OSError"),
        (7, 0, 0, 1.0, "ok"),
        (8, 0, 0, 1.0, "ok"),
    )
    again = verdict(frame)
    assert (again.judged, again.failed) == (1, 1)
    assert again.waiting == ((6, "key 6"),)
    done = verdict(frame, tried=("key 6",))
    assert (done.judged, done.failed, done.waiting) == (4, 2, ())
    assert [at for at, _ in done.images] == [7, 8]


# --- in a run -------------------------------------------------------------------------------------


def confidences() -> dict[str, tuple[float, bool]]:
    """Label's probability and correctness of every picture of ``plug/noise``, by definition."""
    source = registry.make("datasets", "plug/noise").open(None)
    network = registry.make("models", "plug/tiny").describe(None)
    model = load_model(network, "tiny", {}, "cpu")
    found = {}
    for at in range(64):
        (sample,) = source.load([at])
        with torch.inference_mode():
            shares = model.logits(model.normalise(sample.image[None])).double().softmax(1)[0]
        correct = int(shares.argmax()) == sample.label
        found[source.key(at)] = (float(shares[sample.label]), correct)
    return found


CHEAP: dict[str, Any] = {"methods": ["random"], "metrics": ["plug/brightness"]}


def selecting(**rule: Any) -> dict[str, Any]:
    return {**CHEAP, "datasets": [{"name": "plug/noise", **rule}]}


def selected(outcome: Outcome) -> set[str]:
    return set(outcome.scores["image"])


@pytest.mark.parametrize("target", ["predicted", "label"])
def test_a_run_takes_just_the_images_that_satisfy_its_rule(run: Run, target: str) -> None:
    known = confidences()
    threshold = float(np.median([share for share, _ in known.values()])) + 1e-9
    outcome = run(target=target, **selecting(min_confidence=threshold))
    wanted = {key for key, (share, _) in known.items() if share >= threshold}
    assert selected(outcome) == wanted
    assert outcome.status == 0
    (facts,) = outcome.run["selection"]
    mean = np.mean([known[key][0] for key in wanted])
    assert facts["mean_confidence"] == pytest.approx(mean, rel=1e-5)
    assert (facts["selected"], facts["judged"], facts["candidates"]) == (len(wanted), 64, 64)
    assert facts["complete"]
    assert f"{len(wanted)} images (confidence of the label >= " in outcome.err
    assert f"mean confidence {facts['mean_confidence']:.4f}" in outcome.out


def test_correct_images_are_those_that_the_network_gets_right(run: Run) -> None:
    outcome = run(**selecting(correct=True))
    assert selected(outcome) == {key for key, (_, correct) in confidences().items() if correct}


def test_planned_passes_of_a_selection_are_spent_and_a_second_run_spends_none(run: Run) -> None:
    rule = selecting(correct=True, images=6)
    first = run(**rule)
    passes = first.run["passes"]
    assert passes["forward"] == passes["planned"]["forward"] > 6
    again = run(**rule)
    assert again.run["passes"]["forward"] == 0
    assert again.csv == first.csv
    assert "all stored, nothing to do" in again.err


def test_more_images_keep_those_of_fewer_and_ask_only_for_more(run: Run) -> None:
    few = run(**selecting(correct=True, images=4))
    asked = few.run["selection"][0]["judged"]
    more = run(**selecting(correct=True, images=12))
    assert selected(few) < selected(more)
    assert more.run["selection"][0]["judged"] > asked
    fresh = run(out=few.folder.parents[1] / "fresh", **selecting(correct=True, images=12))
    assert fresh.csv == more.csv


def test_a_selection_does_not_change_what_a_score_is_known_by(run: Run) -> None:
    everything = run(**selecting())
    chosen = run(**selecting(correct=True))
    assert chosen.values().items() < everything.values().items()
    assert set(chosen.table["cell"]) == set(everything.table["cell"])


def test_when_too_few_satisfy_the_rule_the_run_says_so(run: Run) -> None:
    right = sum(correct for _, correct in confidences().values())
    outcome = run(**selecting(correct=True, images=64))
    assert len(selected(outcome)) == right
    assert f"{right} of the 64 asked for images (correct" in outcome.err


def test_when_none_satisfies_the_rule_the_cells_are_missing(run: Run) -> None:
    outcome = run(**selecting(min_confidence=1.0))
    assert outcome.status == 3
    assert set(outcome.table["status"]) == {"missing"}
    assert "0 images (confidence of the label >= 1) out of 64 candidates" in outcome.err


def test_a_plan_says_that_the_images_are_unknown_until_the_network_is_asked(
    run: Run, plugin: Path, tmp_path: Path
) -> None:
    suite, out = suite_of(**selecting(correct=True, images=6)), tmp_path / "out"
    before = describe_plan(suite, None, out)
    assert "unknown until the network is asked: 1 forward for each of up to 64" in before
    assert "scores: 6 planned, 0 stored, 6 missing" in before
    run(out=out, **selecting(correct=True, images=6))
    after = describe_plan(suite, None, out)
    assert "selection, stored: plug/noise x plug/tiny: 6 images (correct" in after
    assert "scores: 6 planned, 6 stored, 0 missing" in after


def test_workers_select_the_same_images(run: Run, tmp_path: Path) -> None:
    one = run(out=tmp_path / "one", **selecting(correct=True))
    two = run(
        out=tmp_path / "two",
        **selecting(correct=True),
        run={"workers": 2, "slice": 16, "batch_size": 4},
    )
    assert two.csv == one.csv


def test_weights_that_fail_end_a_selection_at_once(run: Run, saboteurs: Path) -> None:
    outcome = run(**{**selecting(correct=True), "models": ["sabotage/unseeded"]})
    assert outcome.status == 3
    assert set(outcome.table["status"]) == {"missing"}
    assert "each build of 'sabotage/unseeded' draws other weights" in outcome.err
