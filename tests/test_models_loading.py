"""Laws of weights: what fits is loaded whole, everything else is one typed error."""

from __future__ import annotations

import pickle
import random
import re
import shlex
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer, densenet

from xbench.errors import BadWeights, UsageError
from xbench.models.loading import load_model, metadata, weights_hash
from xbench.types import Network


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def state() -> dict[str, Tensor]:
    return {key: value + 1 for key, value in build().state_dict().items()}


def network(weights: Path | None) -> Network:
    return Network(build, weights, (0.5,) * 3, (0.25,) * 3, {})


def load(path: Path) -> dict[str, Tensor]:
    model = load_model(network(path), "toy", {}, "cpu")
    return dict(model.net.state_dict())


def as_safetensors(found: Any, path: Path) -> Path:
    save_file(found, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_pt(found: Any, path: Path) -> Path:
    torch.save(found, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


SAVERS = [as_safetensors, as_pt]


@pytest.mark.parametrize("save", SAVERS)
def test_weights_that_fit_are_loaded_bit_by_bit(save: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load(save(state(), tmp_path / "w"))
    assert all(torch.equal(loaded[key], value) for key, value in state().items())


def test_a_checkpoint_may_keep_its_weights_under_state_dict(tmp_path: Path) -> None:
    loaded = load(as_pt({"state_dict": state(), "epoch": 3}, tmp_path / "w"))
    assert torch.equal(loaded["3.bias"], state()["3.bias"])


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "net.", "_orig_mod.module.", "model._orig_mod."]
)
def test_nests_and_prefixes_of_wrappers_are_understood(
    nest: str, prefix: str, tmp_path: Path
) -> None:
    wrapped = {f"{prefix}{key}": value for key, value in state().items()}
    path = as_pt({nest: wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "w")
    assert torch.equal(load(path)["3.bias"], state()["3.bias"])
    loaded = load(as_safetensors(wrapped, tmp_path / "w"))
    assert torch.equal(loaded["1.running_var"], state()["1.running_var"])


def test_weights_of_a_wrapped_network_are_understood_as_their_wrappers_write_them(
    tmp_path: Path,
) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(build()))
    for wrapped in (nn.DataParallel(build()), averaged):
        loaded = load(as_pt({"state_dict": wrapped.state_dict()}, tmp_path / "w"))
        assert torch.equal(loaded["0.weight"], build().state_dict()["0.weight"])


def test_a_wrapper_inside_the_network_is_understood_too(tmp_path: Path) -> None:
    inner = {f"3.module.{key[2:]}" if key[0] == "3" else key: v for key, v in state().items()}
    assert torch.equal(load(as_safetensors(inner, tmp_path / "w"))["3.bias"], state()["3.bias"])


def test_a_prefix_that_the_architecture_has_itself_stays(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    weights = {key: torch.ones_like(v) for key, v in Wrapper().state_dict().items()}
    path = as_safetensors(weights, tmp_path / "w")
    net = load_model(Network(Wrapper, path, (0.0,), (1.0,)), "toy", {}, "cpu").net
    assert torch.equal(net.state_dict()["model.bias"], torch.ones(2))


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    found = {**state(), "module.3.bias": torch.zeros(3)}
    with pytest.raises(BadWeights, match=r"hold '3\.bias' twice, also as 'module\.3\.bias'"):
        load(as_safetensors(found, tmp_path / "w"))


@pytest.mark.parametrize("head", ["AuxLogits.fc.weight", "aux1.fc.bias", "module.aux2.conv.weight"])
def test_auxiliary_heads_play_no_part(head: str, tmp_path: Path) -> None:
    load(as_safetensors({**state(), head: torch.zeros(2)}, tmp_path / "w"))


def test_old_names_of_densely_connected_layers_are_understood(tmp_path: Path) -> None:
    def layer() -> nn.Module:
        return densenet._DenseLayer(4, 2, 2, 0.0)

    named = {
        re.sub(r"(norm|conv)([12])", r"\1.\2", key): v for key, v in layer().state_dict().items()
    }
    assert "norm.1.weight" in named
    found = {f"denselayer1.{key}": value for key, value in named.items()}
    path = as_safetensors(found, tmp_path / "w")
    network = Network(lambda: nn.Sequential(OrderedDict(denselayer1=layer())), path, (0.0,), (1.0,))
    loaded = load_model(network, "toy", {}, "cpu").net.state_dict()
    assert torch.equal(loaded["denselayer1.conv1.weight"], named["conv.1.weight"])


@pytest.mark.parametrize("versions", [True, False])
def test_old_names_that_torchvision_itself_understands_are_left_to_it(
    versions: bool, tmp_path: Path
) -> None:
    def transformer() -> nn.Module:
        return VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3)

    saved = transformer().state_dict()
    for new, old in (("mlp.0", "mlp.linear_1"), ("mlp.3", "mlp.linear_2")):
        for key in [key for key in saved if new in key]:
            saved[key.replace(new, old)] = saved.pop(key)
    for entry in saved._metadata.values():
        entry["version"] = 1
    if not versions:
        del saved._metadata
    path = as_pt(saved, tmp_path / "w")
    network = Network(transformer, path, (0.0,), (1.0,))
    loaded = load_model(network, "toy", {}, "cpu").net.state_dict()
    old = saved["encoder.layers.encoder_layer_0.mlp.linear_1.weight"]
    assert torch.equal(loaded["encoder.layers.encoder_layer_0.mlp.0.weight"], old)


def test_a_network_that_asks_for_a_version_is_loaded_without_one(tmp_path: Path) -> None:
    def mnasnet() -> nn.Module:
        return models.MNASNet(0.1, num_classes=2)

    saved = mnasnet().state_dict()
    path = as_safetensors(dict(saved), tmp_path / "w")
    loaded = load_model(Network(mnasnet, path, (0.0,), (1.0,)), "toy", {}, "cpu").net.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = load_model(network(as_pt(state(), tmp_path / "w")), "toy", {"last_conv": "0"}, "cpu")
    assert not any(module.training for module in model.net.modules())
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert (model.name, model.mean, model.layer("last_conv")) == ("toy", (0.5,) * 3, "0")


def test_counters_of_batch_normalisation_may_be_missing(tmp_path: Path) -> None:
    found = state()
    del found["1.num_batches_tracked"]
    load(as_safetensors(found, tmp_path / "w"))


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("3.bias"), "1 missing: 3.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.update({"3.bias": torch.zeros(4)}), "3.bias is (4,), expected (3,)"),
        (lambda s: s.clear(), "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_differs(
    change: Callable[[dict[str, Tensor]], object],
    words: str,
    save: Callable[..., Path],
    tmp_path: Path,
) -> None:
    found = state()
    change(found)
    with pytest.raises(BadWeights) as refused:
        load(save(found, tmp_path / "w"))
    assert "do not fit the architecture" in str(refused.value)
    assert words in str(refused.value)


def test_many_misfits_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    found = {f"extra{at}": torch.zeros(1) for at in range(5)}
    with pytest.raises(BadWeights) as refused:
        load(as_safetensors(found, tmp_path / "w"))
    words = str(refused.value)
    assert "8 missing: 0.weight, 0.bias, 1.weight, ...; " in words
    assert words.endswith("5 unexpected: extra0, extra1, extra2, ...")


def test_another_number_of_classes_is_told_as_such(tmp_path: Path) -> None:
    found = {**state(), "3.weight": torch.zeros(7, 8), "3.bias": torch.zeros(7)}
    with pytest.raises(BadWeights, match=r"tells 7 classes apart.*; give classes: 7"):
        load(as_safetensors(found, tmp_path / "w"))
    found["0.weight"] = torch.zeros(2, 3, 5, 5)
    with pytest.raises(BadWeights) as refused:
        load(as_safetensors(found, tmp_path / "w"))
    assert "3 of another shape" in str(refused.value)
    assert "apart" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    found = state()
    found["3.weight"][0, 0] = value
    with pytest.raises(BadWeights, match=r"'toy' hold NaN or infinity in 1 tensors.*'3.weight'"):
        load(as_safetensors(found, tmp_path / "w"))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "new.pt").write_bytes(pickle.dumps(Canary(canary), protocol=4))
    evil = as_pt({"w": Canary(canary)}, tmp_path / "evil")
    for path in (evil, tmp_path / "raw.pt", tmp_path / "new.pt"):
        with pytest.raises(BadWeights, match=r"an object can run code.*keep its tensors alone: py"):
            load(path)
    assert not canary.exists()


class Settings:
    """What a training script keeps beside its weights."""


def test_a_refused_pickle_is_told_with_a_command_that_makes_it_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_pt({"state_dict": state(), "settings": Settings()}, tmp_path / "it's")
    with pytest.raises(BadWeights) as refused:
        load(path)
    words = str(refused.value)
    assert f"it holds {__name__}.Settings, and an object can run code" in words
    command = words.partition("keep its tensors alone: ")[2].rpartition("); expected")[0]
    program, option, script, *arguments = shlex.split(command)
    assert (program, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(script, {})
    loaded = load(tmp_path / "it's.tensors.pt")
    assert all(torch.equal(loaded[key], value) for key, value in state().items())


def test_only_safetensors_speak_of_themselves(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    assert metadata(path) == {}
    save_file(state(), path, metadata={"classes": "3"})
    assert metadata(path) == {"classes": "3"}
    path.write_bytes(b"damaged")
    assert metadata(path) == {}
    assert metadata(as_pt(state(), path)) == {}


@pytest.mark.parametrize(
    "found",
    [
        {0: torch.zeros(1)},
        [1, 2],
        torch.zeros(3),
        {"3.bias": "text"},
        {"state_dict": None},
        {"3.bias": torch.zeros(3).to_sparse()},
        3,
    ],
    ids=["numbered", "list", "tensor", "text", "none", "sparse", "number"],
)
def test_a_checkpoint_of_something_else_is_refused(found: Any, tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="cannot be read"):
        load(as_pt(found, tmp_path / "w"))


def test_what_is_looked_for_in_a_checkpoint_is_said(tmp_path: Path) -> None:
    words = r"'epoch' is no dense tensor; tensors lie at the top or under one of state_dict, "
    with pytest.raises(BadWeights, match=words):
        load(as_pt({"epoch": 3, "weights": state()}, tmp_path / "w"))
    with pytest.raises(BadWeights, match="it holds a list, not tensors by name"):
        load(as_pt([1, 2], tmp_path / "w"))
    net = {f"net/{key}": value for key, value in state().items()}
    momentum = {f"momentum/{key}": value.clone() for key, value in state().items()}
    with pytest.raises(BadWeights, match=r"state of a training, whose network is in weights\.safe"):
        load(as_safetensors(net | momentum, tmp_path / "w"))


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04", b"not weights", b"{" * 1000])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_file_that_is_no_checkpoint_is_refused(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("save", SAVERS)
def test_two_hundred_damaged_files_load_or_are_refused_and_change_their_hash(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(state(), tmp_path / "w")
    content, draw = path.read_bytes(), random.Random(0)
    sound = weights_hash(network(path))
    for _ in range(200):
        damaged = bytearray(content)
        match draw.randrange(3):
            case 0:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[draw.randrange(len(damaged)) :]
            case 2:
                at = draw.randrange(len(damaged))
                damaged[at : at + 8] = draw.randbytes(8)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        assert weights_hash(network(path)) != sound
        with pytest.raises(BadWeights):
            load_model(network(path), "toy", {}, "cpu", planned=sound)
        try:
            load(path)
        except BadWeights as error:
            assert len(str(error)) < 1000  # noqa: PT017  (what does load is not the test's matter)


def test_weights_that_are_not_there_are_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UsageError, match="do not exist"):
            weights_hash(network(path))


def test_a_file_that_is_written_anew_is_hashed_anew(tmp_path: Path) -> None:
    path = as_safetensors(state(), tmp_path / "w")
    before = weights_hash(network(path))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert weights_hash(network(path)) != before
