"""Laws of the loop: what a run is made of, and that an interruption leaves no mark."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Answer, environment, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xbench import registry
from xbench.document import Document
from xbench.errors import BadWeights, Unsupported, UsageError, XbenchError
from xbench.models.architectures import OWN
from xbench.models.loading import load_model
from xbench.models.resnet import ResNet
from xbench.training import loop
from xbench.training import pictures as pictures_module
from xbench.training.log import COLUMNS, write_figure
from xbench.training.pictures import open_pictures
from xbench.training.recipe import Recipe, load_recipe, read_recipe

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
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network in the place of ResNet-20, few pictures of shapes, and no figures."""
    monkeypatch.setitem(OWN, "resnet20", lambda classes: ResNet(1, (4, 4, 4), classes))
    monkeypatch.setattr("xbench.datasets.shapes.COUNT", 24)
    monkeypatch.setattr(loop, "write_figure", lambda *args: None)


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
    real, done = loop.Run.step, [0]

    def step(run: Any, epoch: int, batch: list[int]) -> Tensor:
        done[0] += 1
        if done[0] > after:
            raise Stop
        return real(run, epoch, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", step)
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


# --- what a run leaves ----------------------------------------------------------------------------


def test_a_run_leaves_weights_that_a_suite_can_name(tmp_path: Path, plugin: Path) -> None:
    chosen = recipe(regulariser=COSINE)
    weights = loop.train(chosen, out=tmp_path / "run", quiet=True)
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    facts = {name: json.loads(value) for name, value in metadata.items() if name != "sha256"}
    assert facts["architecture"] == "resnet20"
    assert facts["classes"] == 3
    assert facts["recipe"]["regulariser"]["error"] == "cosine"
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.25] * 3)
    rows = table(tmp_path / "run")
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(facts["accuracy"], rel=1e-5)
    params = {"architecture": "resnet20", "weights": str(weights), "classes": 3}
    network = registry.make("models", "checkpoint", params).describe(None)
    model = load_model(network, "trained", {}, "cpu")
    source = registry.make("datasets", "plug/noise", {"count": 9}).open(None)
    samples = source.load(range(9))
    images = (torch.stack([sample.image for sample in samples]) - 0.5) / 0.25
    right = [int(model.net(image[None]).argmax()) == sample.label
             for image, sample in zip(images, samples, strict=True)]  # fmt: skip
    assert sum(right) / 9 == pytest.approx(facts["accuracy"])


def test_a_table_has_a_row_per_epoch_and_says_what_a_run_knows(tmp_path: Path) -> None:
    trained(tmp_path / "plain")
    trained(tmp_path / "pulled", regulariser=COSINE)
    plain, pulled = table(tmp_path / "plain"), table(tmp_path / "pulled")
    assert [row["epoch"] for row in plain] == ["1", "2", "3"]
    assert list(plain[0]) == [name for name in COLUMNS if name != "seconds"]
    for row in plain:
        assert row["regulariser_loss"] == row["cosine"] == row["zero_gradients"] == ""
        assert row["loss"] == row["classification_loss"]
        assert -1 <= float(row["test_cosine"]) <= 1
    for row in pulled:
        parts = float(row["classification_loss"]) + 0.1 * float(row["regulariser_loss"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
        assert float(row["cosine"]) == pytest.approx(-float(row["regulariser_loss"]), rel=1e-5)
        assert float(row["zero_gradients"]) == 0


def test_a_figure_has_a_line_for_each_column_that_is_known(tmp_path: Path) -> None:
    known = {"loss": 1.0, "classification_loss": 2.0, "test_accuracy": 0.5, "cosine": None}
    write_figure(tmp_path / "losses.svg", [{"epoch": epoch, **known} for epoch in (1, 2)], "small")
    picture = (tmp_path / "losses.svg").read_text()
    assert "<svg" in picture
    for words in ("classification loss", "test accuracy", "small"):
        assert words in picture
    assert "train accuracy" not in picture


def test_the_pull_brings_the_gradients_together(tmp_path: Path) -> None:
    trained(tmp_path / "run", regulariser={**COSINE, "weight": 3.0}, epochs=20)
    rows = table(tmp_path / "run")
    assert float(rows[-1]["cosine"]) > float(rows[0]["cosine"]) + 0.1


@pytest.mark.parametrize(
    "regulariser",
    [
        {"name": "double_backpropagation", "weight": 0.1},
        {"name": "input_gradient_norm", "weight": 0.1, "norm": "l1"},
        {"name": "adversarial", "attack": "pgd", "steps": 2},
        {"name": "interpretable_gradients", "error": "histogram"},
    ],
    ids=lambda params: params["name"],
)
def test_every_regulariser_trains(regulariser: dict[str, Any], tmp_path: Path) -> None:
    found = trained(tmp_path / "run", regulariser=regulariser, epochs=1)
    assert all(value.isfinite().all() for value in found.values())
    assert table(tmp_path / "run")[0]["regulariser_loss"] != ""
    assert not equal(found, trained(tmp_path / "plain", epochs=1))


def test_training_leaves_the_random_numbers_of_its_caller_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained(tmp_path / "run", epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_seed_decides_weights_and_order(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", seed=1, epochs=1)
    assert equal(one, trained(tmp_path / "again", seed=1, epochs=1))
    assert not equal(one, trained(tmp_path / "two", seed=2, epochs=1))


def test_several_data_sets_are_learnt_one_after_the_other(tmp_path: Path) -> None:
    several = [{"name": "plug/noise", "count": 12}, {"name": "plug/noise", "count": 8}]
    pictures = open_pictures(recipe(train=several).train, None, torch.device("cpu"))
    assert (pictures.count, pictures.classes) == (20, 3)
    images, labels = pictures.take([11, 12, 19])
    assert labels.tolist() == [2, 0, 1]
    alone = open_pictures(recipe().train, None, torch.device("cpu"))
    assert torch.equal(images[1], alone.take([0])[0][0])


def test_images_that_do_not_fit_are_read_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [{"name": "plug/noise", "count": 12}, {"name": "plug/noise", "count": 8}]
    held = open_pictures(recipe(train=several).train, None, torch.device("cpu"))
    monkeypatch.setattr(pictures_module, "_free_bytes", lambda device: 1000)
    read = open_pictures(recipe(train=several).train, None, torch.device("cpu"))
    assert type(held) is not type(read)
    for one, other in zip(held.take([3, 13, 19]), read.take([3, 13, 19]), strict=True):
        assert torch.equal(one, other)


def test_pictures_of_bytes_are_held_as_bytes() -> None:
    pictures = open_pictures([{"name": "shapes"}], None, torch.device("cpu"))
    images, labels = pictures.take([0, 13])
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1]
    sample = registry.make("datasets", "shapes").open(None).load([13])[0]
    assert torch.equal(images[1] / 255, sample.image)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(tmp_path / "run")
    monkeypatch.setattr(loop.Run, "epoch", None)
    assert equal(trained(tmp_path / "run"), first)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_recipe_is_refused(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        trained(tmp_path / "run")
    else:
        stopped(tmp_path / "run", 3, monkeypatch)
    with pytest.raises(UsageError, match=r"another recipe: seed is 1 here and 0 there.*--fresh"):
        trained(tmp_path / "run", seed=1)
    fresh = load_file(loop.train(recipe(seed=1), out=tmp_path / "run", fresh=True, quiet=True))
    assert equal(fresh, trained(tmp_path / "other", seed=1))


def test_a_fresh_run_that_is_interrupted_does_not_pass_for_the_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "epoch", None)
        with pytest.raises(TypeError):
            loop.train(recipe(), out=tmp_path / "run", fresh=True, quiet=True)
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty"])
def test_a_damaged_checkpoint_is_named(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "run", 3, monkeypatch)
    path = tmp_path / "run" / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    elif damage == "flip":
        content[-50] ^= 4
    elif damage == "empty":
        content.clear()
    path.write_bytes(content)
    if damage == "foreign":
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(BadWeights, match=r"checkpoint.safetensors is damaged or no file of"):
        trained(tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "run", 3, monkeypatch)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(loop.Run, "criterion", lambda run, logits, labels: logits.sum(1) / 0)
    with pytest.raises(XbenchError, match="not finite in epoch 2; a lower learning_rate"):
        trained(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 21}, "batch_size 21 is more than the 20 training images"),
        ({"architecture": "resnet21"}, r"unknown architecture 'resnet21'; did you mean"),
        ({"test": "shapes"}, "train has 3 classes, test 12"),
        ({"train": ["plug/noise", "shapes"]}, "must agree in size and classes"),
        ({"train": "sabotage/pictures", "test": "sabotage/pictures"}, "names no classes"),
    ],
)
def test_what_does_not_fit_together_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path, saboteurs: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        trained(tmp_path / "run", **changes)


def test_a_network_without_relu_is_refused_under_the_guided_rule_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = lambda classes: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )
    monkeypatch.setitem(OWN, "resnet20", smooth)
    trained(tmp_path / "plain", epochs=1)
    assert table(tmp_path / "plain")[0]["test_cosine"] == ""
    with pytest.raises(Unsupported, match="no ReLU"):
        trained(tmp_path / "pulled", epochs=1, regulariser=COSINE)


# --- the command ----------------------------------------------------------------------------------


def recipe_file(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def test_the_command_trains_once_and_says_so_the_second_time(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path / "small.yaml", variants={"pulled": COSINE})
    first = command("train", path, "--variant", "pulled", "--set", "epochs=2")
    assert first.status == 0, first.err
    assert first.out.strip() == "training/small-pulled-seed0/weights.safetensors"
    assert "[2/2] loss" in first.err
    second = command("train", path, "--variant", "pulled", "--set", "epochs=2")
    assert second.status == 0
    assert second.out == first.out
    assert "finished before" in second.err
    other = command("train", path, "--variant", "pulled", "--set", "epochs=3")
    assert other.status == 2
    assert "epochs is 3 here and 2 there" in other.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "epoch=2"], "--set epoch: unknown key 'epoch'; did you mean 'epochs'?"),
        (["--set", "epochs"], "write KEY=VALUE, such as seed=1"),
        (["--variant", "x"], "has no variant 'x'"),
        (["--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_a_wrong_word_costs_status_2(
    words: list[str], message: str, tmp_path: Path, command: Command
) -> None:
    path = recipe_file(tmp_path / "small.yaml")
    answer = command("train", path, "--out", tmp_path / "run", *words)
    assert answer.status == 2
    assert message in answer.err
    assert not (tmp_path / "run").exists()


def test_an_interrupt_leaves_a_state_from_which_the_same_command_goes_on(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, done = recipe_file(tmp_path / "small.yaml"), loop.Run.step, [0]

    def step(run: Any, epoch: int, batch: list[int]) -> Tensor:
        done[0] += 1
        if done[0] == 4:
            raise KeyboardInterrupt
        return real(run, epoch, batch)

    monkeypatch.setattr(loop.Run, "step", step)
    broken = command("train", path, "--out", tmp_path / "run")
    assert broken.status == 130
    assert "the same command goes on" in broken.err
    rest = command("train", path, "--out", tmp_path / "run")
    assert rest.status == 0
    assert "goes on after epoch 1 of 3" in rest.err
    assert equal(load_file(tmp_path / "run" / "weights.safetensors"), trained(tmp_path / "whole"))


OWN_REGULARISER = """
import xbench


@xbench.regulariser("mine/entropy")
class Entropy:
    weight: float = 0.5

    def __call__(self, step):
        shares = step.logits.softmax(1)
        return -(shares * shares.log()).sum(1).mean()


@xbench.regulariser("mine/weightless")
class Weightless:
    def __call__(self, step):
        return step.losses.mean()
"""


def test_a_regulariser_of_a_plugin_trains(
    tmp_path: Path, command: Command, own_names: None
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN_REGULARISER)
    path = recipe_file(tmp_path / "small.yaml", epochs=1)
    words = ("train", path, "--plugin", mine, "-o", tmp_path / "run", "--set")
    answer = command(*words, "regulariser=mine/entropy")
    assert answer.status == 0, answer.err
    row = table(tmp_path / "run")[0]
    assert float(row["regulariser_loss"]) > 0
    assert row["cosine"] == ""
    wrong = command(*words, "regulariser=mine/weightless")
    assert wrong.status == 2
    assert "'mine/weightless' has no field 'weight'" in wrong.err


# --- processes ------------------------------------------------------------------------------------


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path, plugin: Path) -> None:
    """Of the shipped network, since another process knows no other."""
    path = recipe_file(tmp_path / "small.yaml", architecture="shapes_resnet", epochs=15)
    words = ("train", path, "--plugin", plugin, "--out")
    process = start(*words, tmp_path / "broken", folder=tmp_path, OMP_NUM_THREADS="1")
    checkpoint = tmp_path / "broken" / "checkpoint.safetensors"
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert checkpoint.exists()
    assert not (tmp_path / "broken" / "weights.safetensors").exists()
    chosen = load_recipe(read_recipe(str(path)))
    rest = load_file(loop.train(chosen, out=tmp_path / "broken", quiet=True))
    assert equal(rest, load_file(loop.train(chosen, out=tmp_path / "whole", quiet=True)))


def test_two_processes_share_a_batch_and_agree_with_one(tmp_path: Path, plugin: Path) -> None:
    """Of a network without batch normalisation, whose statistics are of each process's share.

    In float32 gradients of half batches add up in another order: 1e-5 after some steps.
    """
    script = tmp_path / "plain_net.py"
    script.write_text(PLAIN_NET)
    path = recipe_file(tmp_path / "small.yaml", regulariser=COSINE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words += [str(path), str(plugin), str(tmp_path / "two")]
    process = subprocess.run(
        [sys.executable, *words], env=environment(OMP_NUM_THREADS="1"), capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    names: dict[str, Any] = {"__name__": "plain_net"}
    exec(PLAIN_NET, names)
    names["run"](str(path), tmp_path / "one")
    two, one = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert not equal(one, two)  # it did take another way
    for row, other in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
        assert float(row["cosine"]) == pytest.approx(float(other["cosine"]), rel=1e-3)
        assert row["train_accuracy"] == other["train_accuracy"]


PLAIN_NET = '''
"""Trains a network without batch normalisation, under torchrun or not."""

import sys
from pathlib import Path

from torch import nn

from xbench import registry
from xbench.models.architectures import OWN
from xbench.training.loop import train
from xbench.training.recipe import load_recipe, read_recipe


def plain(classes):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )


def run(path, out):
    OWN["resnet20"] = plain
    train(load_recipe(read_recipe(path)), out=Path(out), quiet=True)


if __name__ == "__main__":
    registry.load_plugin(sys.argv[2])
    run(sys.argv[1], sys.argv[3])
'''
