"""Laws of the loop: what a run is made of, and that an interruption leaves no mark."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file
from torch import Tensor

from xbench.document import Document
from xbench.models.architectures import OWN
from xbench.models.resnet import ResNet
from xbench.training import loop
from xbench.training.recipe import Recipe, load_recipe

Command = Callable[..., Answer]

COSINE = {"name": "interpretable_gradients", "weight": 0.1}

SMALL: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "architecture": "resnet20",
    "train": {"name": "plug/noise", "count": 20},
    "test": {"name": "plug/noise", "count": 9},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "epochs": 3,
    "batch_size": 8,
    "augmentation": {"crop": 2, "flip": True, "rotation": 15.0},
}


@pytest.fixture(autouse=True)
def _entries(plugin: Path) -> None:
    """The data set of noise."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network in the place of ResNet-20."""
    monkeypatch.setitem(OWN, "resnet20", lambda classes: ResNet(1, (4, 4, 4), classes))


def recipe(**changes: Any) -> Recipe:
    return load_recipe(Document(SMALL | changes, "test", {}))


def trained(out: Path, **changes: Any) -> dict[str, Tensor]:
    return load_file(loop.train(recipe(**changes), out=out, quiet=True))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def table(out: Path) -> list[dict[str, str]]:
    """The rows of a log, but for the time they took."""
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


class Stop(Exception):
    """An interruption."""


def stopped(out: Path, after: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ends in the middle of an epoch, after so many steps."""
    real, done = loop._Run.step, [0]

    def step(run: Any, epoch: int, batch: list[int]) -> Tensor:
        done[0] += 1
        if done[0] > after:
            raise Stop
        return real(run, epoch, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", step)
        with pytest.raises(Stop):
            loop.train(recipe(**changes), out=out, quiet=True)


@pytest.mark.parametrize("regulariser", ["none", COSINE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(
    regulariser: Any, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"regulariser": regulariser, "precision": precision, "channels_last": True}
    whole = trained(tmp_path / "whole", **changes)
    stopped(tmp_path / "broken", 3, monkeypatch, **changes)  # two steps are an epoch
    assert (tmp_path / "broken" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "broken" / "weights.safetensors").exists()
    assert equal(trained(tmp_path / "broken", **changes), whole)
    assert table(tmp_path / "broken") == table(tmp_path / "whole")


def test_weight_zero_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    without = trained(tmp_path / "zero", regulariser={**COSINE, "weight": 0.0})
    assert equal(plain, without)
    assert not equal(plain, trained(tmp_path / "some", regulariser=COSINE))
