"""The verdict on two result sets: laws on made-up numbers, and how often it is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from xbench.compare import ResultSet, compare, read_results, render, update
from xbench.errors import UsageError

IMAGES = 64


def result_set(
    scores: Mapping[tuple[str, str], Sequence[float]],
    *,
    better: str = "higher",
    version: int = 1,
    weights: str = "w",
    torch: str = "2.14",
) -> ResultSet:
    """Cells by (method, metric) with their images' scores; NaN is a failed image."""
    names = [("data", "net", method, metric) for method, metric in scores]
    table = pd.DataFrame(
        [
            {
                **dict(zip(("dataset", "model", "method", "metric"), name, strict=True)),
                "cell": f"{name}{version}{weights}",
                "better": better,
                "status": "ok",
                "reason": "",
            }
            for name in names
        ]
    )
    rows = [
        {
            **dict(zip(("dataset", "model", "method", "metric"), name, strict=True)),
            "image": f"i{at}",
            "value": value,
            "status": "ok" if np.isfinite(value) else "failed: nonfinite",
        }
        for name, values in zip(names, scores.values(), strict=True)
        for at, value in enumerate(values)
    ]
    origin: dict[str, Any] = {
        "groups": [{"dataset": "data", "model": "net", "identity": {"weights": weights}}],
        "methods": {method: {"version": 1} for method, _ in scores},
        "metrics": {metric: {"version": version, "tolerance": 0.001} for _, metric in scores},
        "versions": {"torch": torch},
        "platform": {},
    }
    return ResultSet(Path(), table, pd.DataFrame(rows), origin)


def noisy(seed: int, shift: float = 0.0, noise: float = 0.05, images: int = IMAGES) -> list[float]:
    """Scores about 0.5, the same pictures each time, with fresh noise per image."""
    pictures = np.random.default_rng(99).uniform(0.2, 0.8, images)
    return list(pictures + shift + noise * np.random.default_rng(seed).normal(size=images))


CELL = ("grad_cam", "rcap")


def verdict(base: ResultSet, new: ResultSet, **options: bool) -> str:
    return compare(base, new, **options).changes[0].verdict


def test_equal_numbers_are_the_same() -> None:
    found = compare(result_set({CELL: noisy(0)}), result_set({CELL: noisy(0)}))
    assert found.changes[0].verdict == "same"
    assert found.changes[0].p == 1
    assert found.status() == found.status(strict=True) == 0


@pytest.mark.parametrize(("better", "expected"), [("higher", "worse"), ("lower", "better")])
def test_a_sure_drop_is_worse_where_higher_is_better(better: str, expected: str) -> None:
    base = result_set({CELL: noisy(0)}, better=better)
    new = result_set({CELL: noisy(1, shift=-0.1)}, better=better)
    found = compare(base, new)
    assert found.changes[0].verdict == expected
    assert found.changes[0].high < 0
    assert found.status() == (4 if expected == "worse" else 0)
    assert found.status(strict=True) == 4


def test_a_sure_change_below_the_tolerance_is_the_same() -> None:
    base = noisy(0)
    new = [value - 0.0005 for value in base]
    found = compare(result_set({CELL: base}), result_set({CELL: new})).changes[0]
    assert found.p < 1e-6
    assert found.verdict == "same"


def test_a_change_of_a_metric_without_direction_is_worse_than_none() -> None:
    base, new = (result_set({CELL: noisy(s, 0.2 * s)}, better="neither") for s in (0, 1))
    assert verdict(base, new) == "worse"


def test_images_that_newly_fail_are_a_regression() -> None:
    new = noisy(0)
    new[3] = float("nan")
    found = compare(result_set({CELL: noisy(0)}), result_set({CELL: new}))
    assert found.changes[0].verdict == "failing"
    assert "1 image" in found.changes[0].reason
    assert found.status() == 4


def test_images_that_fail_in_both_are_left_out() -> None:
    scores = noisy(0)
    scores[3] = float("nan")
    found = compare(result_set({CELL: scores}), result_set({CELL: scores}))
    assert found.changes[0].verdict == "same"
    assert found.changes[0].images == IMAGES - 1


def test_a_cell_that_is_gone_is_a_regression_and_a_new_one_is_not() -> None:
    both = {CELL: noisy(0), ("gradient", "rcap"): noisy(1)}
    one = {CELL: noisy(0)}
    assert compare(result_set(both), result_set(one)).status() == 4
    found = compare(result_set(one), result_set(both))
    assert [change.verdict for change in found.changes] == ["same", "new"]
    assert found.status() == 0


def test_fewer_images_are_compared_on_those_in_both_and_said() -> None:
    base, new = result_set({CELL: noisy(0)}), result_set({CELL: noisy(0)[:40]})
    found = compare(base, new)
    assert found.changes[0].images == 40
    assert "24 only in the base" in found.notices[0]


@pytest.mark.parametrize(
    ("what", "words"), [({"version": 2}, "rcap.version: 1 -> 2"), ({"weights": "v"}, '"w" -> "v"')]
)
def test_other_versions_or_weights_are_not_comparable_unless_allowed(
    what: dict[str, Any], words: str
) -> None:
    base, new = result_set({CELL: noisy(0)}), result_set({CELL: noisy(0)}, **what)
    found = compare(base, new)
    assert found.changes[0].verdict == "not comparable"
    assert words in found.changes[0].reason
    assert found.status() == 5
    assert verdict(base, new, allow_different=True) == "same"


def test_another_torch_only_warns() -> None:
    found = compare(result_set({CELL: noisy(0)}), result_set({CELL: noisy(0)}, torch="3.0"))
    assert found.status() == 0
    assert found.notices == ('versions.torch: "2.14" -> "3.0"',)


def test_nothing_in_common_is_status_5() -> None:
    base = result_set({CELL: noisy(0)})
    other = replace(base, table=base.table.iloc[:0], per_image=base.per_image.iloc[:0])
    assert compare(other, other).status() == 5


def test_markdown_names_the_regression_and_escapes_bars() -> None:
    name = ("a|b", "rcap")
    base, new = result_set({name: noisy(0)}), result_set({name: noisy(1, shift=-0.1)})
    text = render(compare(base, new), "md")
    assert "### xbench: regression" in text
    assert "a\\|b" in text
    assert json.loads(render(compare(base, new), "json"))["changes"][0]["verdict"] == "worse"


def test_a_base_is_made_and_renewed_and_read(tmp_path: Path) -> None:
    base = result_set({CELL: noisy(0)})
    run = tmp_path / "run"
    run.mkdir()
    base.table.to_csv(run / "table.csv", index=False)
    base.per_image.to_parquet(run / "per_image.parquet")
    (run / "provenance.json").write_text(json.dumps(base.provenance))
    update(tmp_path / "base", read_results(run))
    assert compare(read_results(tmp_path / "base"), base).status() == 0


def test_what_is_no_result_set_is_said_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no table\.csv and no provenance\.json"):
        read_results(tmp_path)
    for name in ("table.csv", "provenance.json", "per_image.parquet"):
        (tmp_path / name).write_bytes(b"\x00\x01")
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path)


def simulated(seed: int, drop: float) -> ResultSet:
    """A table of 20 methods and 2 metrics over 256 images, with a drop of one cell's mean."""
    stream = np.random.default_rng(seed)
    pictures = np.random.default_rng(7).uniform(0.2, 0.8, (256, 40))
    scores = pictures + 0.05 * stream.normal(size=pictures.shape)
    scores[:, 0] *= 1 - drop
    names = [(f"m{at // 2}", f"k{at % 2}") for at in range(40)]
    return result_set(dict(zip(names, scores.T, strict=True)))


def test_false_alarms_and_power() -> None:
    """At most 2 % of unchanged runs are stopped, and 95 % of drops by 5 % of one cell are found."""
    runs = 100
    base = [simulated(seed, 0.0) for seed in range(4)]
    alarms = [compare(base[at % 4], simulated(1000 + at, 0.0)).status() == 4 for at in range(runs)]
    found = [
        compare(base[at % 4], simulated(2000 + at, 0.05)).changes[0].verdict == "worse"
        for at in range(runs)
    ]
    assert np.mean(alarms) <= 0.02
    assert np.mean(found) >= 0.95
