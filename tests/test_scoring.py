"""Laws of statuses: one value and one word for each image, and nothing for the filling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import toy_batch, toy_model

NAN = float("nan")


def metric(score: Callable[[Explanation], Any], undefined: str | None = None) -> Any:
    class Scores:
        name: ClassVar[str] = "scores"

        def __call__(self, explanation: Explanation) -> Any:
            return score(explanation)

    if undefined is not None:
        Scores.undefined = undefined  # type: ignore[attr-defined]
    return Scores()


def outcomes(
    score: Callable[[Explanation], Any],
    maps: Tensor | None = None,
    rows: int = 4,
    undefined: str | None = None,
) -> list[tuple[float, str]]:
    model = toy_model()
    if maps is None:
        maps = torch.rand(rows, 16, 16, generator=torch.Generator().manual_seed(0))
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), rows=rows, meter=meter)
        return evaluated(metric(score, undefined), Explanation(probe, maps))


def mean(explanation: Explanation) -> Tensor:
    return explanation.saliency.mean((1, 2))


def test_a_finite_score_is_ok() -> None:
    found = outcomes(lambda explanation: torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == [(1.0, "ok"), (2.0, "ok"), (3.0, "ok"), (4.0, "ok")]


def test_the_filling_has_no_outcome() -> None:
    whole = outcomes(lambda explanation: torch.arange(6.0), rows=6)
    assert [value for value, _ in whole] == [0, 1, 2, 3]


def test_a_constant_map_is_scored_and_called_degenerate() -> None:
    maps = torch.rand(4, 16, 16)
    maps[1] = 0.25
    found = outcomes(mean, maps)
    assert found[1] == (0.25, "degenerate")
    assert [status for _, status in found] == ["ok", "degenerate", "ok", "ok"]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_map_that_is_not_finite_fails_its_own_image_alone(value: float) -> None:
    maps = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = outcomes(mean, maps)
    broken = maps.clone()
    broken[2, 5, 5] = value
    found = outcomes(mean, broken)
    assert math.isnan(found[2][0])
    assert found[2][1] == "failed: nonfinite"
    assert found[:2] + found[3:] == whole[:2] + whole[3:]


def test_nan_is_a_metrics_word_for_undefined() -> None:
    def one_nan(explanation: Explanation) -> Tensor:
        return torch.tensor([1.0, NAN, 1.0, 1.0])

    assert outcomes(one_nan)[1][1] == "failed: nonfinite score"
    assert outcomes(one_nan, undefined="undefined: p < 1e-6")[1][1] == "undefined: p < 1e-6"


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_score_is_a_failure_whatever_the_metric_declares(value: float) -> None:
    found = outcomes(lambda explanation: torch.full((4,), value), undefined="undefined: here")
    assert all(math.isnan(score) for score, _ in found)
    assert {status for _, status in found} == {"failed: nonfinite score"}


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (torch.tensor(1.0), r"\(\)"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(4, 1), r"\(4, 1\)"),
        (0.5, "float"),
        ([1.0, 2.0, 3.0, 4.0], "list"),
        (None, "NoneType"),
    ],
)
def test_anything_but_one_score_per_image_is_refused(returned: Any, shown: str) -> None:
    message = rf"metric 'scores' must return one score per image, shape \(4,\), but got {shown}"
    with pytest.raises(ValueError, match=message):
        outcomes(lambda explanation: returned)


def test_whole_numbers_and_truths_are_scores() -> None:
    assert outcomes(lambda explanation: torch.tensor([1, 0, 1, 0]))[0] == (1.0, "ok")
    assert outcomes(lambda explanation: torch.tensor([True] * 4))[0] == (1.0, "ok")


def test_what_a_metric_forwards_itself_is_counted_without_the_filling() -> None:
    counted = []

    def again(explanation: Explanation) -> Tensor:
        probe = explanation.probe
        probe.model.net(probe.inputs)
        counted.append((probe.meter.forward, probe.meter.padding))
        return torch.zeros(6)

    outcomes(again, rows=6)
    assert counted == [(4, 2)]


def test_a_map_is_degenerate_if_it_is_constant_as_the_metric_reads_it() -> None:
    maps = -torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
    model = toy_model()
    with prepared(model.net) as meter:
        explanation = Explanation(Probe(model, toy_batch(4), meter=meter), maps)
        for sign, status in (("positive", "degenerate"), ("magnitude", "ok")):
            drop = registry.make("metrics", "average_drop", {"sign": sign})
            assert {words for _, words in evaluated(drop, explanation)} == {status}
