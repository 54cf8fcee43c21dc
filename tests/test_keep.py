"""Laws of what is kept beside the scores: the very numbers, once, and at no score's expense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, suite_of
from torch import Tensor

import xbench.runner
from xbench import gallery, registry
from xbench.autograd import prepared
from xbench.errors import StoreError
from xbench.masking import Curve, reading_of, shown
from xbench.plan import Plan, make_plan
from xbench.probe import Explanation, Logits, Probe, closure, cost
from xbench.runner import run_unit
from xbench.store import Store
from xbench.testing import toy_batch, toy_model

Run = Callable[..., Outcome]

METRICS: list[Any] = [{"name": "deletion", "steps": 4}, "mae", "rcap"]
SMALL: dict[str, Any] = {"metrics": METRICS, "methods": ["gradient", "grad_cam"]}
ALL = {"keep": ["curves", "maps"]}

WITH_CURVES = [
    name
    for name, entry in registry.entries("metrics").items()
    if not entry.installed and not entry.summary and hasattr(entry.load(), "curves")
]


def keeping(**options: Any) -> dict[str, Any]:
    return {**SMALL, "run": options}


def stored(out: Path, **changes: Any) -> dict[tuple[str, ...], np.ndarray[Any, Any]]:
    """Everything that is kept, by its names."""
    plan, store = make_plan(suite_of(**changes), None), Store(out / "store")
    found: dict[tuple[str, ...], np.ndarray[Any, Any]] = {}
    for kind in ("curves", "maps", "pictures"):
        for one in gallery._kept(plan, store, kind, None):
            key = (kind, one.method, one.metric, one.name, one.image)
            assert key not in found
            found[key] = one.array
    return found


def same(one: dict[Any, np.ndarray[Any, Any]], other: dict[Any, np.ndarray[Any, Any]]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and one[key].tobytes() == other[key].tobytes()
        for key in one
    )


def count(found: dict[tuple[str, ...], Any], kind: str) -> int:
    return sum(key[0] == kind for key in found)


# --- curves of a metric ---------------------------------------------------------------------------


@pytest.fixture
def explained() -> Iterator[Callable[[], Explanation]]:
    """Explanations of three images by random maps; passes are counted."""
    model, batch = toy_model(), toy_batch(3)
    with prepared(model.net) as meter:

        def make() -> Explanation:
            probe = Probe(model, batch, meter=meter)
            return Explanation(probe, probe.uniform("random map"))

        yield make


def mean_area(line: Any) -> Tensor:
    share, values = line
    return ((values[:, 1:] + values[:, :-1]) / 2 * share.diff()).sum(1)


@pytest.mark.parametrize("name", WITH_CURVES)
def test_the_curves_of_a_metric_cost_nothing_beside_its_score_and_as_much_alone(
    name: str, explained: Callable[[], Explanation]
) -> None:
    metric = registry.make("metrics", name)
    beside = explained()
    metric(beside)
    spent = beside.probe.spent
    lines = metric.curves(beside)
    assert beside.probe.spent == spent
    alone = explained()
    again = metric.curves(alone)
    asked = closure((Logits(), *metric.needs))
    assert alone.probe.spent == spent == cost(asked, alone.probe.model)
    assert lines
    for key, (share, values) in lines.items():
        assert values.shape == (3, len(share))
        assert values.dtype == torch.float64
        assert ((share >= 0) & (share <= 1)).all()
        assert torch.equal(values, again[key].values)


@pytest.mark.parametrize("name", ["insertion", "deletion", "morf", "lerf"])
@pytest.mark.parametrize("points", ["all", "without_start", "without_end", "interior"])
def test_the_area_under_a_stored_curve_is_the_score(
    name: str, points: str, explained: Callable[[], Explanation]
) -> None:
    """But for the order in which floats are added, where a curve is read from its other end."""
    metric = registry.make("metrics", name, {"points": points})
    explanation = explained()
    (line,) = metric.curves(explanation).values()
    assert line.shares.diff().gt(0).all()
    torch.testing.assert_close(mean_area(line), metric(explanation), rtol=1e-13, atol=0)
    if points == "all":
        full = explanation.probe.probability
        starts_full = name != "insertion"
        assert torch.equal(line.values[:, 0 if starts_full else -1], full)


def test_the_curves_of_composites_give_their_scores(
    explained: Callable[[], Explanation],
) -> None:
    explanation = explained()
    abpc = registry.make("metrics", "abpc")
    lines = abpc.curves(explanation)
    between = mean_area(lines["lerf"]) - mean_area(lines["morf"])
    torch.testing.assert_close(between, abpc(explanation), rtol=1e-12, atol=1e-14)
    road = registry.make("metrics", "road")
    lines = road.curves(explanation)
    half = (lines["lerf"].values.mean(1) - lines["morf"].values.mean(1)) / 2
    assert torch.equal(half, road(explanation))
    rcap = registry.make("metrics", "rcap")
    lines = rcap.curves(explanation)
    product = (lines["saliency"].values * lines["probability"].values).mean(1)
    torch.testing.assert_close(product, rcap(explanation), rtol=1e-14, atol=0)
    assert lines["saliency"].shares.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_the_shares_of_road_say_what_goes(explained: Callable[[], Explanation]) -> None:
    explanation = explained()
    road = registry.make("metrics", "road", {"levels": (0.2, 0.7), "lerf": "complement"})
    lines = road.curves(explanation)
    assert lines["morf"].shares.tolist() == pytest.approx([0.2, 0.7])
    assert lines["lerf"].shares.tolist() == pytest.approx([0.8, 0.3])
    (at,) = road.points("salient", True)[:1]
    seen = reading_of(shown(explanation, [at]), "probability")[:, 0]
    assert torch.equal(lines["lerf"].values[:, 0], seen)


# --- a run that keeps -----------------------------------------------------------------------------


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> dict[tuple[str, ...], np.ndarray[Any, Any]]:
    """All that can be kept, from one run."""
    assert run(out=tmp_path / "whole", **keeping(**ALL)).status == 0
    return stored(tmp_path / "whole", **SMALL)


def test_what_is_kept_are_the_numbers_of_the_scores_maps_bit_by_bit_and_pictures(
    run: Run, tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    outcome = run(out=tmp_path / "whole", **SMALL)
    scores = outcome.values()
    assert count(whole, "maps") == 2 * 10
    assert count(whole, "curves") == 2 * 10 * 3  # rcap has two
    assert count(whole, "pictures") == 2 * 10
    for (kind, method, metric, name, image), array in whole.items():
        if kind == "curves" and metric.startswith("deletion"):
            share, values = array
            area = ((values[1:] + values[:-1]) / 2 * np.diff(share)).sum()
            assert area == pytest.approx(scores[method, metric, image], rel=1e-13)
        elif kind == "maps":
            assert (array.shape, array.dtype) == ((16, 16), np.float32)
        elif name == "picture":
            assert (array.shape, array.dtype) == ((16, 16, 3), np.uint8)
        elif name == "mask":
            assert array.sum() == 36
    plan = make_plan(suite_of(**SMALL), None)
    frame = gallery.curves(plan, Store(tmp_path / "whole" / "store"), images=2)
    assert list(frame.columns) == list(gallery.CURVE_COLUMNS)
    assert len(frame) == 2 * 2 * (5 + 2 * 5)
    assert set(frame["curve"]) == {"", "saliency", "probability"}
    assert set(frame["image"]) == {key for _, key in plan.groups[0].images[:2]}


def test_a_few_examples_are_kept_without_being_asked_for_and_change_no_bit(
    run: Run, tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    default, without = (
        run(out=tmp_path / "a", **SMALL),
        run(out=tmp_path / "b", **keeping(examples=0)),
    )
    assert default.csv == without.csv
    assert default.values() == without.values()
    for key in ("forward", "backward", "padding"):
        assert default.run["passes"][key] == without.run["passes"][key]
    found = stored(tmp_path / "a", **SMALL)
    first = {key for _, key in make_plan(suite_of(**SMALL), None).groups[0].images[:4]}
    assert same(found, {key: array for key, array in whole.items() if key[-1] in first})
    assert stored(tmp_path / "b", **SMALL) == {}
    assert "of curves, maps and pictures" in default.err


def test_what_is_asked_for_later_costs_what_the_plan_says_and_no_score(
    run: Run, tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    out = tmp_path / "later"
    first = run(out=out, **keeping(examples=0))
    curves = run(out=out, **keeping(keep=["curves"], examples=0))
    passes = curves.run["passes"]
    # the clean pass; black; three inner points of deletion and five of RCAP, of two methods
    assert passes["planned"]["forward"] == passes["forward"] == 10 * (1 + 1 + 2 * (3 + 5))
    maps = run(out=out, **keeping(examples=0, **ALL))
    passes = maps.run["passes"]
    assert passes["planned"]["forward"] == passes["forward"] == 10
    assert passes["planned"]["backward"] == passes["backward"] == 10
    assert curves.run["rows"] == maps.run["rows"] == {}
    assert first.csv == curves.csv == maps.csv
    assert same(stored(out, **SMALL), whole)
    again = run(out=out, **keeping(**ALL))
    assert "nothing to do" in again.err


def test_images_that_lack_curves_and_images_that_lack_scores_go_on_together(
    run: Run, tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    out = tmp_path / "mixed"
    run(out=out, **{**SMALL, "methods": ["grad_cam"], "run": {"images": 5}})
    run(out=out, **{**SMALL, "metrics": METRICS[:1], "run": {"images": 7, "slice": 3, **ALL}})
    last = run(out=out, **keeping(**ALL))
    passes = last.run["passes"]
    assert passes["planned"]["forward"] == passes["forward"]
    assert passes["planned"]["backward"] == passes["backward"]
    assert same(stored(out, **SMALL), whole)


def unit(out: Path) -> Any:
    """The one unit of a suite that keeps everything."""
    suite = suite_of(**keeping(slice=64, **ALL))
    ((job, _),) = make_plan(suite, None).jobs(Store(out / "store"))
    return job


@pytest.mark.usefixtures("plugin")
def test_a_unit_that_is_stopped_anywhere_ends_as_an_unbroken_one(
    tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    out = tmp_path / "stopped"
    for allowed in (1, 3, 4, 6, 9):
        asked = iter(range(1000))
        report = run_unit(unit(out), lambda asked=asked, allowed=allowed: next(asked) > allowed)
        assert report.stopped
    run_unit(unit(out))
    assert same(stored(out, **SMALL), whole)
    (group,) = Store(out / "store").groups()
    rows = [row for part in group.kept.parts() for row in part.rows.to_pylist()]
    assert len({(row["cell"], row["image"], row["name"]) for row in rows}) == len(rows)


def test_a_damaged_array_is_named_set_aside_and_computed_again(
    run: Run, tmp_path: Path, whole: dict[tuple[str, ...], np.ndarray[Any, Any]]
) -> None:
    out = tmp_path / "whole"
    part, *_ = sorted(out.rglob("kept/*.parquet"))
    content = part.read_bytes()
    draw = np.random.default_rng(0)
    plan = make_plan(suite_of(**SMALL), None)
    for place in draw.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        part.write_bytes(damaged)
        store = Store(out / "store")
        found = {
            (kind, one.method, one.metric, one.name, one.image): one.array
            for kind in ("curves", "maps", "pictures")
            for one in gallery._kept(plan, store, kind, None)
        }
        kept = store.group(*plan.groups[0].folder).kept
        assert all(found[key].tobytes() == whole[key].tobytes() for key in found)
        if found.keys() != whole.keys():
            assert all(f"{part} is damaged" in words for words in kept.damaged)
            assert kept.damaged
            assert part.with_name(f"{part.name}.bad").exists()
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.bad").write_bytes(content)
    mended = run(out=out, **keeping(**ALL))
    assert mended.run["rows"] == {}
    assert same(stored(out, **SMALL), whole)


def test_a_method_that_fails_has_no_map_until_it_succeeds(
    run: Run, saboteurs: Path, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    changes = {"methods": [{"name": "sabotage/until", "path": str(flag), "label": "U"}],
               "metrics": METRICS[:1]}  # fmt: skip
    failed = run(**changes)
    assert failed.status == 3
    assert count(stored(tmp_path / "out", **changes), "maps") == 0
    flag.unlink()
    assert run(**changes).status == 0
    assert count(stored(tmp_path / "out", **changes), "maps") == 4


def test_a_picture_that_cannot_be_read_is_not_asked_for_again(
    run: Run, saboteurs: Path, tmp_path: Path
) -> None:
    changes = {"datasets": ["sabotage/pictures"], "metrics": ["average_drop"],
               "methods": ["grad_cam"]}  # fmt: skip
    run(**changes)
    again = run(**changes)
    assert "nothing to do" in again.err
    assert {key[-1] for key in stored(tmp_path / "out", **changes)} == {"a", "b", "d"}


def test_a_map_that_is_not_finite_is_kept_as_it_is(
    run: Run, saboteurs: Path, tmp_path: Path
) -> None:
    key = make_plan(suite_of(**SMALL), None).groups[0].images[0][1]
    changes = {"methods": [{"name": "sabotage/nonfinite", "key": key}]}
    run(**changes)
    found = stored(tmp_path / "out", **changes)
    bad = {k[-1]: np.isnan(a).sum() for k, a in found.items() if k[0] == "maps"}
    assert bad.pop(key) == 1
    assert set(bad.values()) == {0}


def test_the_plan_says_what_is_missing_and_how_large_it_is(
    command: Callable[..., Any], plugin: Path, tmp_path: Path
) -> None:
    from conftest import suite_file

    suite = suite_file(tmp_path / "s.yaml", **SMALL)
    words = ("plan", suite, "--plugin", plugin, "-o", tmp_path / "out")
    said = command(*words, "--keep", "curves,maps").out
    assert "40 curves, 20 maps, 10 pictures missing; maps and pictures take up to 38 KiB" in said
    command("run", *words[1:], "--keep", "maps", "--keep", "curves")
    said = command(*words, "--keep", "curves,maps").out
    assert "to keep beside them: nothing is missing" in said
    wrong = command(*words, "--keep", "scores")
    assert wrong.status == 2
    assert "--keep: " in wrong.err


def test_no_curve_is_computed_for_a_metric_that_has_none() -> None:
    plan: Plan = make_plan(suite_of(**SMALL), None)
    kinds = [(a.metric.kind, a.metric.label) for a in plan.groups[0].artefacts if a.method]
    assert ("curves", "curves of mae") not in kinds
    assert not hasattr(registry.find("metrics", "mae"), "curves")
    assert isinstance(registry.make("metrics", "deletion").needs[0], Curve)


@pytest.mark.usefixtures("plugin")
def test_what_ends_between_scores_and_what_is_kept_costs_neither(
    tmp_path: Path,
    whole: dict[tuple[str, ...], np.ndarray[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "full"
    full = StoreError("the disk is full")

    def refuse(*_: object) -> None:
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(xbench.runner, "kept_table", refuse)
        with pytest.raises(StoreError, match="the disk is full"):
            run_unit(unit(out))
    assert stored(out, **SMALL) == {}
    report = run_unit(unit(out))
    assert (report.part, report.rows) == ("", {})  # the scores are there
    assert same(stored(out, **SMALL), whole)
