"""Laws of the residual networks, and the embedded weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import xbench.models.resnet
from xbench.datasets.shapes import generate
from xbench.models.resnet import Block, ResNet, resnet20, resnet56, shapes_resnet
from xbench.training.recipe import load_recipe, read_recipe

WEIGHTS = Path(xbench.models.resnet.__file__).parents[1] / "weights"
EMBEDDED = ("shapes_resnet", "shapes_resnet_regularised")


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("net", "count"), [(resnet20(10), 269_722), (resnet20(100), 275_572), (resnet56(10), 853_018)]
)
def test_published_depths_have_the_published_number_of_parameters(net: ResNet, count: int) -> None:
    assert parameters(net) == count


def test_state_dict_keys_are_those_of_common_checkpoints() -> None:
    modules = {key.rpartition(".")[0] for key in resnet20().state_dict()}
    parts = ("conv1", "bn1", "conv2", "bn2")
    blocks = {f"layer{s}.{b}.{part}" for s in (1, 2, 3) for b in (0, 1, 2) for part in parts}
    assert modules == {"conv1", "bn1", "linear"} | blocks


@pytest.mark.parametrize("net", [resnet20(), shapes_resnet()])
def test_every_relu_runs_once_per_forward_pass_and_never_in_place(net: ResNet) -> None:
    relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
    calls: Counter[nn.Module] = Counter()
    for relu in relus:
        assert not relu.inplace
        relu.register_forward_hook(lambda module, inputs, output: calls.update([module]))
    net(torch.zeros(2, 3, 64, 64))
    assert [calls[relu] for relu in relus] == [1] * len(relus)


def test_stages_have_the_widths_and_halve_the_map() -> None:
    net = ResNet(1, (4, 6, 10), classes=5, stem_stride=2)
    shapes: list[torch.Size] = []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert shapes == [(2, 4, 32, 32), (2, 6, 16, 16), (2, 10, 8, 8)]


def test_the_last_stage_is_taken_after_its_relu() -> None:
    net = resnet20().eval()
    outputs: list[Tensor] = []
    net.layer3.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = net(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert outputs[0].min() == 0
    torch.testing.assert_close(net.linear(outputs[0].mean((2, 3))), logits)


def test_a_shortcut_keeps_every_second_position_between_channels_of_zeros() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = Block(2, 6, stride=2).shortcut(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 4:].any()


def test_a_block_of_equal_widths_adds_its_input() -> None:
    block = Block(3, 3, stride=1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_recognise_fresh_shapes(name: str) -> None:
    net = shapes_resnet().eval()
    net.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    images, labels, _ = generate(2, "test", range(240))
    with torch.inference_mode():
        right = net((images - 0.5) / 0.5).argmax(1) == labels
    assert right.float().mean() > 0.97


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_are_small(name: str) -> None:
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 1_000_000


def test_the_embedded_pair_comes_from_one_recipe() -> None:
    recipes = []
    for name in EMBEDDED:
        with safe_open(WEIGHTS / f"{name}.safetensors", framework="pt") as file:
            recipes.append(json.loads(file.metadata()["recipe"]))
    baseline, regularised = recipes
    assert [key for key in baseline if baseline[key] != regularised[key]] == ["regulariser"]
    shipped = load_recipe(read_recipe("shapes-resnet"))
    assert not shipped.differences(baseline)
    assert not shipped.variant("cosine").differences(regularised)
