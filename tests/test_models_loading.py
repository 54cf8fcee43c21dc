"""Laws of weights: what fits is loaded whole, everything else is one typed error."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xbench.errors import BadWeights, UsageError
from xbench.models.loading import load_model, weights_hash
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
    for path in (as_pt({"w": Canary(canary)}, tmp_path / "evil"), tmp_path / "raw.pt"):
        with pytest.raises(BadWeights, match="cannot be read"):
            load(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "found",
    [
        [1, 2],
        torch.zeros(3),
        {"3.bias": "text"},
        {"state_dict": None},
        {"3.bias": torch.zeros(3).to_sparse()},
        3,
    ],
    ids=["list", "tensor", "text", "none", "sparse", "number"],
)
def test_a_checkpoint_of_something_else_is_refused(found: Any, tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="cannot be read"):
        load(as_pt(found, tmp_path / "w"))


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
