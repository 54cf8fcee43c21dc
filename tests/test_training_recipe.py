"""Laws of recipes: what is wrong is said with its place before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import Answer

from xbench.document import parse
from xbench.errors import SuiteError, UsageError
from xbench.models.architectures import architecture
from xbench.training.recipe import Recipe, builtin_recipes, load_recipe, read_recipe
from xbench.training.schedules import Constant, OneCycle, Steps

Command = Callable[..., Answer]

TEXT = """version: 1
name: small
architecture: resnet20
train: {name: cifar100, split: train}
test: cifar100
mean: [0.5, 0.5, 0.5]
std: [0.25, 0.25, 0.25]
regulariser: {name: interpretable_gradients, error: mae}
variants: {strong: {name: interpretable_gradients, weight: 0.1}}
epochs: 4
schedule: {name: steps, milestones: [2]}
augmentation: {crop: 4, flip: true}
"""


def recipe(text: str = TEXT, *settings: tuple[str, Any]) -> Recipe:
    given = [(key, value, f"--set {key}") for key, value in settings]
    return load_recipe(parse(text, "small.yaml"), given)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("epochs: 4", "epoch: 4", r"small.yaml:10 \(epoch\): unknown key 'epoch'.*'epochs'\?"),
        ("epochs: 4", "epochs: 0", r"small.yaml:10 \(epochs\): .*greater than or equal to 1.*0"),
        ("epochs: 4", "epochs: 4.5", r"small.yaml:10 \(epochs\): .*integer.*4.5"),
        ("epochs: 4\n", "", r"small.yaml:1: key 'epochs' is missing"),
        ("flip: true", "flop: true", r"small.yaml:12 \(augmentation.flop\): unknown key 'flop'"),
        ("error: mae", "error: mea", r"small.yaml:8 \(regulariser\): .*error = 'mea'.*'mae'"),
        ("{name: interp", "{nam: interp", r"small.yaml:8 \(regulariser\): write the name of a reg"),
        ("interpretable_gradients, error", "interpretable, error", "'interpretable_gradients'\\?"),
        ("weight: 0.1", "weight: -1", r"small.yaml:9 \(variants.strong\): .*weight = -1"),
        ("split: train", "split: tain", r"small.yaml:4 \(train\): .*split = 'tain'"),
        ("name: steps", "name: step", r"small.yaml:11 \(schedule\): .*step"),
        ("milestones: [2]", "milestones: [0]", r"small.yaml:11 \(schedule.*\): .*greater than"),
        (
            "std: [0.25, 0.25, 0.25]",
            "std: [0, 1, 1]",
            r"small.yaml:7 \(std\[0\]\): .*greater than 0",
        ),
        (
            "test: cifar100",
            "test: cifar1000",
            r"small.yaml:5 \(test\): unknown dataset 'cifar1000'",
        ),
    ],
)
def test_a_mistake_names_its_place_and_the_way_out(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(SuiteError, match=message):
        recipe(TEXT.replace(before, after))


def test_all_mistakes_are_said_at_once() -> None:
    with pytest.raises(SuiteError) as caught:
        recipe(TEXT.replace("epochs: 4", "epochs: no\nbatch_size: none"))
    assert len(caught.value.problems) == 2


def test_a_setting_overrides_the_file_and_is_named_where_it_is_wrong() -> None:
    assert recipe(TEXT, ("epochs", 7)).epochs == 7
    assert recipe(TEXT, ("regulariser", "none")).regulariser == {"name": "none"}
    weighted = recipe(TEXT, ("regulariser.weight", 0.5)).regulariser
    assert (weighted["weight"], weighted["error"]) == (0.5, "mae")
    assert recipe(TEXT, ("augmentation.rotation", 15.0)).augmentation.rotation == 15
    with pytest.raises(SuiteError, match=r"^--set epochs: .*integer"):
        recipe(TEXT, ("epochs", "many"))


def test_a_variant_changes_the_regulariser_alone() -> None:
    base = recipe()
    strong = base.variant("strong")
    assert strong.regulariser["weight"] == 0.1
    assert [words.split()[0] for words in base.differences(strong.plain())] == ["regulariser"]
    with pytest.raises(UsageError, match=r"no variant 'string'; did you mean 'strong'\?"):
        base.variant("string")
    with pytest.raises(UsageError, match="no variant 'x'; it has none"):
        recipe(TEXT.replace("variants:", "# ")).variant("x")


def test_a_recipe_in_its_plain_form_is_the_same_recipe() -> None:
    first = recipe()
    again = Recipe.model_validate(yaml.safe_load(yaml.safe_dump(first.plain())))
    assert not first.differences(again.plain())


# --- those that ship ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_built_in_recipe_is_valid_and_its_architecture_known(name: str) -> None:
    found = load_recipe(read_recipe(name))
    assert found.name == name
    assert found.description
    assert found.regulariser == {"name": "none"}
    assert callable(architecture(found.architecture))
    for variant in found.variants:
        assert found.variant(variant).regulariser["weight"] > 0


def test_the_papers_recipes_have_its_values() -> None:
    resnet, mobilenet = (
        load_recipe(read_recipe(f"cifar100-{name}")) for name in ("resnet18", "mobilenet-v2")
    )
    for found in (resnet, mobilenet):
        assert (found.epochs, found.batch_size, found.learning_rate) == (200, 128, 0.1)
        assert (found.momentum, found.nesterov, found.weight_decay) == (0.9, True, 5e-4)
        assert found.schedule == Steps(name="steps", milestones=[60, 120, 160], divisor=5.0)
        assert (found.label_smoothing, found.precision) == (0.0, "fp32")
    assert resnet.variants["cosine"]["weight"] == 7.5e-3
    assert mobilenet.variants["cosine"]["weight"] == 1e-3
    errors = {params["error"] for params in resnet.variants.values()}
    assert errors == {"cosine", "histogram", "mae", "mse"}
    strengths = {p["weight"] for p in resnet.variants.values() if p["error"] == "cosine"}
    assert strengths == {1e-3, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 0.1, 1.0, 10.0}


@pytest.mark.parametrize("name", ["cifar100-resnet18", "cifar100-mobilenet-v2"])
def test_a_short_recipe_is_of_the_same_network(name: str) -> None:
    long, short = load_recipe(read_recipe(name)), load_recipe(read_recipe(f"{name}-short"))
    assert (short.epochs, short.schedule.name, short.precision) == (15, "one_cycle", "bf16")
    for key in ("architecture", "train", "test", "mean", "std", "batch_size", "augmentation"):
        assert getattr(short, key) == getattr(long, key), key


def test_an_unknown_recipe_is_answered_with_a_near_one() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'cifar100-resnet81'.*'cifar100-resnet18'"):
        read_recipe("cifar100-resnet81")


# --- schedules ------------------------------------------------------------------------------------


def test_steps_rise_through_the_warm_up_and_are_divided_at_milestones() -> None:
    schedule = Steps(name="steps", milestones=[2, 4], divisor=5.0, warm_up=1.0)
    found = [schedule.factor(epoch, 6) for epoch in (0.0, 0.25, 0.5, 1.0, 1.99, 2.0, 3.9, 4.0, 5.9)]
    assert found == pytest.approx([0, 0.25, 0.5, 1, 1, 0.2, 0.2, 0.04, 0.04])


def test_one_cycle_is_that_of_torch() -> None:
    """At torch's steps: its first phase ends at step 0.3 n - 1, its last at n - 1."""
    n = 1000
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=n)
    rates = []
    for _ in range(n):
        rates.append(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step() if len(rates) < n else None
    schedule = OneCycle(name="one_cycle", warm_up=299 / 999)
    ours = [schedule.factor(step, n - 1) for step in range(n)]
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-12)


def test_one_cycle_by_hand() -> None:
    schedule = OneCycle(name="one_cycle", warm_up=0.5, start=0.2, end=0.0)
    found = [schedule.factor(epoch, 8) for epoch in range(9)]
    half = [0.6 - 0.4 * math.cos(math.pi * share / 4) for share in range(4)]
    down = [0.5 + 0.5 * math.cos(math.pi * share / 4) for share in range(5)]
    assert found == pytest.approx(half + down)


def test_a_constant_rate_is_constant() -> None:
    assert {Constant().factor(epoch, 3) for epoch in range(3)} == {1.0}
    assert recipe(TEXT, ("schedule", {"name": "constant"})).rate(2.5) == 0.1
