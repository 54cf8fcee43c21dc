"""Laws of model entries: what they say of themselves before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xbench import registry
from xbench.errors import UsageError
from xbench.models.architectures import architecture
from xbench.models.entries import IMAGENET_STD
from xbench.models.loading import describe_layers, load_model, weights_hash
from xbench.models.torchvision import SamePaddedConv2d, architectures, pad_like_tensorflow
from xbench.types import Network


def checkpoint(**params: object) -> Network:
    entry = registry.make("models", "checkpoint", {"weights": "w.safetensors", **params})
    described: Network = entry.describe(None)
    return described


def test_the_embedded_network_brings_its_weights_and_its_last_layer() -> None:
    network: Network = registry.make("models", "shapes/resnet").describe(None)
    assert network.weights is not None
    assert network.weights.is_file()
    assert network.weights.stat().st_size < 1 << 20
    net, layers, _ = describe_layers(network, (64, 64))
    assert layers == {"last_conv": "layer3"}
    assert all(parameter.device.type == "meta" for parameter in net.parameters())


def test_the_last_layer_that_is_found_is_the_one_that_is_named() -> None:
    network: Network = registry.make("models", "shapes/resnet").describe(None)
    unnamed = Network(network.build, None, network.mean, network.std, {})
    assert describe_layers(unnamed, (64, 64))[1] == {"last_conv": "layer3"}


@pytest.mark.parametrize(
    ("architecture", "size", "last"),
    [("resnet20", 32, "layer3"), ("resnet56", 32, "layer3"),
     ("torchvision/resnet18", 224, "layer4"), ("torchvision/vgg11", 224, "features"),
     ("torchvision/mobilenet_v2", 224, "features"), ("torchvision/swin_t", 224, "permute"),
     ("torchvision/swin_v2_t", 256, "permute"), ("torchvision/maxvit_t", 224, "blocks"),
     ("torchvision/vit_b_16", 224, "encoder.layers.encoder_layer_11.ln_1")],
)  # fmt: skip
def test_the_last_feature_map_is_the_layer_that_authors_mean(
    architecture: str, size: int, last: str
) -> None:
    network = checkpoint(architecture=architecture, classes=10)
    net, layers, _ = describe_layers(network, (size, size))
    path = layers["last_conv"]
    assert path == last or path.startswith(f"{last}."), path
    with torch.device("meta"):
        assert net(torch.empty(2, 3, size, size)).shape == (2, 10)


def trained(path: Path, **said: object) -> Path:
    """A weight file as a training writes it."""
    with torch.random.fork_rng(devices=[]):
        net = architecture("shapes_resnet")(5)
    text = {key: json.dumps(value) for key, value in said.items()}
    save_file(net.state_dict(), path, metadata=text)
    return path


def test_the_file_of_a_training_says_all_that_a_model_needs(tmp_path: Path) -> None:
    path = trained(
        tmp_path / "w.safetensors",
        architecture="shapes_resnet", classes=5, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6],
    )  # fmt: skip
    network: Network = registry.make("models", "checkpoint", {"weights": str(path)}).describe(None)
    assert (network.mean, network.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = load_model(network, "mine", {}, "cpu")
    assert model.net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_what_a_suite_says_comes_before_what_the_file_says(tmp_path: Path) -> None:
    path = trained(tmp_path / "w.safetensors", architecture="resnet20", classes=9, mean=[0, 0, 0])
    network = checkpoint(
        weights=str(path), architecture="shapes_resnet", classes=5, mean=(0.5,) * 3
    )
    assert network.mean == (0.5,) * 3
    assert network.std == IMAGENET_STD
    load_model(network, "mine", {}, "cpu")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "lacks 'architecture': the file does not name it"),
        ({"architecture": "os.system"}, "unknown architecture 'os.system'"),
        ({"architecture": 3}, "say architecture = 3, which is no value"),
        ({"architecture": "shapes_resnet", "classes": "5"}, 'say classes = "5", which is no value'),
        ({"architecture": "shapes_resnet", "mean": [120, 1, 1]}, "say mean = [120, 1, 1], which"),
        ({"architecture": "shapes_resnet", "std": [0.5]}, "give std in the suite"),
    ],
)
def test_a_file_that_says_nothing_or_nonsense_is_refused(
    said: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = trained(tmp_path / "w.safetensors", **said)
    with pytest.raises(UsageError) as refused:
        registry.make("models", "checkpoint", {"weights": str(path)}).describe(None)
    assert words in str(refused.value)


def test_a_file_that_is_not_there_names_no_architecture() -> None:
    with pytest.raises(UsageError, match="lacks 'architecture': there is no such file"):
        registry.make("models", "checkpoint", {"weights": "gone.safetensors"}).describe(None)


def test_a_file_that_is_cut_names_no_architecture_and_says_why(tmp_path: Path) -> None:
    path = trained(tmp_path / "w.safetensors", architecture="shapes_resnet")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"lacks 'architecture': it is damaged \(Safetensor"):
        registry.make("models", "checkpoint", {"weights": str(path)}).describe(None)


def test_networks_of_timm_are_architectures_too() -> None:
    with torch.device("meta"):
        net = checkpoint(architecture="timm/test_convnext", classes=3).build()
        assert net(torch.empty(2, 3, 64, 64)).shape == (2, 3)


def test_an_unknown_architecture_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"'torchvision/resnet17'; did you mean"):
        checkpoint(architecture="torchvision/resnet17")


def test_no_architecture_is_an_import_path() -> None:
    for name in ("os.system", "torchvision/../os", "torchvision/models.resnet18", ""):
        with pytest.raises(UsageError, match="unknown architecture"):
            checkpoint(architecture=name)


def test_weights_are_looked_for_in_the_data_directory_first(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    entry = registry.make(
        "models", "checkpoint", {"architecture": "resnet20", "weights": "w.safetensors"}
    )
    assert entry.describe(tmp_path).weights == tmp_path / "w.safetensors"
    assert entry.describe(None).weights == Path("w.safetensors")
    assert entry.describe(tmp_path / "other").weights == Path("w.safetensors")


def test_options_that_change_numbers_are_in_the_identity() -> None:
    def identity(**more: object) -> dict[str, Any]:
        params = {"architecture": "resnet20", "weights": "a.safetensors", "classes": 10, **more}
        return registry.identity(registry.make("models", "checkpoint", params))

    for more in ({"classes": 11}, {"padding": "same_tensorflow"}, {"architecture": "resnet56"}):
        assert identity(**more) != identity()


def test_the_place_of_a_weight_file_is_not_in_the_identity_which_has_its_hash() -> None:
    made = [
        registry.make("models", "checkpoint", {"architecture": "resnet20", "weights": place})
        for place in ("a.safetensors", "elsewhere/b.safetensors")
    ]
    assert registry.identity(made[0]) == registry.identity(made[1])


def test_same_padding_pads_the_right_and_the_bottom_only() -> None:
    conv = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False)
    net = pad_like_tensorflow(torch.nn.Sequential(conv))
    assert isinstance(net[0], SamePaddedConv2d)
    torch.nn.init.ones_(net[0].weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    # windows begin at pixel 0 and 2; what lies beyond the right and bottom edge is zero
    expected = [[image[0, 0, a : a + 3, b : b + 3].sum() for b in (0, 2)] for a in (0, 2)]
    assert torch.equal(net(image)[0, 0], torch.tensor(expected))


def test_same_padding_reaches_every_strided_convolution_of_a_real_network() -> None:
    with torch.device("meta"):
        net = pad_like_tensorflow(architectures()["torchvision/mobilenet_v2"](10))
    strided = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5
    assert all(isinstance(module, SamePaddedConv2d) for module in strided)


def test_a_fresh_network_is_hashed_by_its_weights() -> None:
    def built(value: float) -> Network:
        def build() -> torch.nn.Module:
            net = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(net.weight, value)
            torch.nn.init.zeros_(net.bias)
            return net

        return Network(build, None, (0.0,), (1.0,), {})

    assert weights_hash(built(1.0)) == weights_hash(built(1.0)) != weights_hash(built(2.0))


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 5, 2), (9, 7, 3), (6, 1, 2)])
def test_same_padding_has_the_size_and_the_left_edge_of_tensorflow(
    side: int, kernel: int, stride: int
) -> None:
    conv = torch.nn.Conv2d(1, 1, kernel, stride=stride, padding=kernel // 2, bias=False)
    net = pad_like_tensorflow(torch.nn.Sequential(conv))
    assert isinstance(net[0], SamePaddedConv2d)
    torch.nn.init.ones_(net[0].weight)
    row = torch.arange(1.0, side + 1)
    outputs = -(-side // stride)
    left = max((outputs - 1) * stride + kernel - side, 0) // 2
    windows = [range(at * stride - left, at * stride - left + kernel) for at in range(outputs)]
    sums = torch.tensor([float(sum(row[i] for i in w if 0 <= i < side)) for w in windows])
    height = torch.tensor([float(sum(0 <= i < side for i in window)) for window in windows])
    image = row.expand(1, 1, side, side)
    assert torch.equal(net(image)[0, 0], height[:, None] * sums)


def test_same_padding_is_refused_where_a_padded_pooling_layer_would_be_left_out() -> None:
    with pytest.raises(UsageError, match="pooling layer 'maxpool' of ResNet is padded too"):
        pad_like_tensorflow(architectures()["torchvision/resnet18"](10))
