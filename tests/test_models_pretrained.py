"""Laws of networks of libraries: their metadata, their weights and their last feature maps."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from conftest import Answer, suite_of
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import xbench
from xbench import info, registry
from xbench.autograd import prepared
from xbench.errors import UsageError
from xbench.layers import layer_facts
from xbench.models import torchvision
from xbench.models.architectures import architecture
from xbench.models.loading import describe_layers, load_model, weights_hash
from xbench.plan import Plan, make_plan
from xbench.testing import check_model
from xbench.types import Model, Network

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def described(name: str, data: Path | None = None, **params: object) -> Network:
    network: Network = registry.make("models", name, params).describe(data)
    return network


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torchvision's weights, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts files into an own cache of the Hugging Face hub, laid out as the hub lays it out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(repository: str, **files: bytes) -> None:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            link = folder / "snapshots" / "0123" / name.replace("__", ".")
            for path in (blob, link, folder / "refs" / "main"):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            (folder / "refs" / "main").write_text("0123")
            link.symlink_to(blob)

    return put


def safetensors(net: nn.Module, path: Path) -> bytes:
    save_file(net.state_dict(), path)
    return path.read_bytes()


# --- last feature maps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "role", "channels"),
    [
        ("torchvision/resnet18", 224, "layer4", 512),
        ("torchvision/resnext50_32x4d", 224, "layer4", 2048),
        ("torchvision/wide_resnet50_2", 224, "layer4", 2048),
        ("torchvision/vgg16", 224, "features", 512),
        ("torchvision/vgg11_bn", 224, "features", 512),
        ("torchvision/densenet121", 224, "features", 1024),
        ("torchvision/mobilenet_v2", 224, "features", 1280),
        ("torchvision/mobilenet_v3_small", 224, "features", 576),
        ("torchvision/efficientnet_b0", 224, "features", 1280),
        ("torchvision/efficientnet_v2_s", 384, "features", 1280),
        ("torchvision/convnext_tiny", 224, "features", 768),
        ("torchvision/inception_v3", 299, "Mixed_7c", 2048),
        ("torchvision/googlenet", 224, "inception5b", 1024),
        ("torchvision/vit_b_16", 224, "encoder.layers.encoder_layer_11.ln_1", 768),
        ("torchvision/swin_t", 224, "permute", 768),
        ("torchvision/swin_v2_t", 256, "permute", 768),
        ("torchvision/regnet_x_400mf", 224, "trunk_output", 400),
        ("torchvision/regnet_y_400mf", 224, "trunk_output", 440),
        ("timm/resnet18", 224, "layer4", 512),
        ("timm/resnext50_32x4d", 224, "layer4", 2048),
        ("timm/wide_resnet50_2", 224, "layer4", 2048),
        ("timm/vgg11", 224, "features", 512),
        ("timm/densenet121", 224, "features", 1024),
        ("timm/mobilenetv2_100", 224, "bn2", 1280),
        ("timm/efficientnet_b0", 224, "bn2", 1280),
        ("timm/convnext_atto", 224, "norm_pre", 320),
        ("timm/inception_v3", 299, "Mixed_7c", 2048),
        ("timm/vit_tiny_patch16_224", 224, "blocks.11.norm1", 192),
        ("timm/deit_tiny_patch16_224", 224, "blocks.11.norm1", 192),
        ("timm/deit_tiny_distilled_patch16_224", 224, "blocks.11.norm1", 192),
        ("timm/swin_tiny_patch4_window7_224", 224, "norm", 768),
        ("timm/regnety_002", 224, "final_conv", 368),
    ],
)
def test_the_last_feature_map_of_each_family_is_found(
    name: str, size: int, role: str, channels: int
) -> None:
    network = described(name, weights="none")
    assert network.size == (size, size) or name == "timm/efficientnet_b0"
    net, layers, classes = describe_layers(network, (size, size))
    assert (layers, classes) == ({"last_conv": role}, 1000)
    model = Model(name, net, network.mean, network.std, layers, (size, size))
    with prepared(net):
        assert layer_facts(model, "last_conv").channels == channels


@pytest.mark.parametrize(
    ("name", "path", "channels"),
    [
        ("torchvision/resnet18", "layer3.1.conv1", 256),
        ("torchvision/densenet121", "features.denseblock2", 512),
        ("torchvision/vit_b_16", "encoder.layers.encoder_layer_4.mlp", 768),
        ("timm/swin_tiny_patch4_window7_224", "layers.2", 384),
    ],
)
def test_any_module_with_feature_maps_is_a_layer(name: str, path: str, channels: int) -> None:
    net, layers, _ = describe_layers(described(name, weights="none"), (224, 224))
    model = Model(name, net, *IMAGENET, layers, (224, 224))
    assert layer_facts(model, path).channels == channels


def vgg() -> nn.Module:
    """VGG-11 with batch normalisation and a head that is quickly drawn."""
    with torch.device("meta"):
        net = models.vgg11_bn()
    net.features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    net.classifier = nn.Linear(512 * 7 * 7, 10)
    return net


def wide() -> nn.Module:
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128)


def vision_transformer() -> nn.Module:
    net = models.VisionTransformer(48, 8, 2, 2, 32, 64, num_classes=10)
    nn.init.normal_(net.heads.head.weight)  # it begins with zeros, where no gradient is
    return net


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=10)


@pytest.mark.parametrize(
    ("net", "size"),
    [
        ("torchvision/resnet18", 48),
        ("torchvision/resnext50_32x4d", 48),
        (wide, 48),
        (vgg, 48),
        ("torchvision/densenet121", 48),
        ("torchvision/mobilenet_v2", 48),
        ("torchvision/efficientnet_b0", 48),
        ("torchvision/convnext_tiny", 48),
        ("torchvision/inception_v3", 107),
        (vision_transformer, 48),
        (swin, 48),
        ("timm/deit_tiny_patch16_224", 224),
    ],
)
def test_grad_cam_of_each_family_reads_the_image(
    net: str | Callable[[], nn.Module], size: int
) -> None:
    build = described(net, weights="none").build if isinstance(net, str) else net
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build().eval()
        images = torch.rand(2, 3, size, size)
    network = Network(lambda: copy.deepcopy(made).to("meta"), None, *IMAGENET)
    layer = describe_layers(network, (size, size))[1]["last_conv"]
    maps = xbench.attribute(
        made, images, method="grad_cam", layer=layer, sign="signed", mean=IMAGENET[0],
        std=IMAGENET[1],
    )  # fmt: skip
    assert maps.shape == (2, size, size)
    assert maps.isfinite().all()
    assert (maps.amax((1, 2)) > maps.amin((1, 2))).all()
    assert not torch.equal(*maps)


def test_networks_that_count_with_tensors_have_the_same_form_without_weights() -> None:
    build = architecture("torchvision/regnet_x_400mf")
    with torch.device("meta"):
        sketch = build(10)
    assert all(value.is_meta for value in sketch.state_dict().values())
    real = build(10).state_dict()
    assert {key: value.shape for key, value in sketch.state_dict().items()} == {
        key: value.shape for key, value in real.items()
    }


# --- torchvision ----------------------------------------------------------------------------------


def test_mean_std_and_size_are_those_of_the_weights() -> None:
    def facts(name: str, **more: object) -> tuple[Any, ...]:
        network = described(name, **more)
        return network.mean, network.std, network.size

    assert facts("torchvision/resnet50") == (*IMAGENET, (224, 224))
    assert facts("torchvision/inception_v3") == (*IMAGENET, (299, 299))
    assert facts("torchvision/efficientnet_v2_l") == ((0.5,) * 3, (0.5,) * 3, (480, 480))
    end_to_end = facts("torchvision/vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1")
    assert end_to_end == (*IMAGENET, (384, 384))


def test_every_classifier_of_torchvision_describes_itself_without_its_weights(hub: Path) -> None:
    for name in torchvision.names():
        cls = registry.find("models", f"torchvision/{name}")
        for weights in torchvision.weights(name):
            network = cls(weights=weights).describe(None)
            assert network.weights is not None
            assert network.weights.parent == hub
            assert len(network.sha256) >= 8, network.weights
            assert network.size is not None


def test_a_network_has_the_form_that_its_weights_were_trained_in() -> None:
    with torch.device("meta"):
        sketch = described("torchvision/vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1").build()
        inception = described("torchvision/inception_v3").build()
    assert sketch(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 1000)
    assert inception.transform_input  # so torchvision builds it for these weights
    assert inception.AuxLogits is None


def test_weights_that_are_not_there_are_told_with_what_brings_them(hub: Path) -> None:
    network = described("torchvision/resnet18")
    with pytest.raises(UsageError) as refused:
        weights_hash(network)
    place = hub / "resnet18-f37072fd.pth"
    words = str(refused.value)
    assert words.startswith(f"weights {str(place)!r} do not exist; ")
    assert f"--output {place} https://download.pytorch.org/models/resnet18-f37072fd.pth" in words
    assert "'weights: none'" in words


def test_planning_never_downloads(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in ("torchvision/resnet18", "timm/test_vit", "hf/timm/test_vit.r160_in1k"):
        with pytest.raises(UsageError, match="brings"):
            weights_hash(described(name))


def test_weights_are_found_in_the_data_directory_and_then_in_the_cache(
    hub: Path, tmp_path: Path
) -> None:
    name, file = "torchvision/squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"
    assert described(name, tmp_path).weights == hub / file
    for place in (tmp_path / "weights" / file, tmp_path / file):
        place.parent.mkdir(exist_ok=True)
        place.touch()
        assert described(name, tmp_path).weights == place


def test_weights_with_another_hash_than_they_are_named_for_are_refused(hub: Path) -> None:
    network = described("torchvision/squeezenet1_1")
    assert network.weights is not None
    network.weights.write_bytes(b"half a file")
    found = hashlib.sha256(b"half a file").hexdigest()[:8]
    with pytest.raises(UsageError, match=f"begins with {found}, expected b8a52dc0; delete"):
        weights_hash(network)


def test_weights_of_torchvision_are_loaded_whole(hub: Path) -> None:
    network = described("torchvision/squeezenet1_1")
    assert network.weights is not None
    theirs = models.squeezenet1_1().eval()
    torch.save(theirs.state_dict(), network.weights)
    network = replace(network, sha256=hashlib.sha256(network.weights.read_bytes()).hexdigest()[:8])
    model = load_model(network, "net", {}, "cpu", planned=weights_hash(network))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.net(images), theirs(images))


def test_weights_of_features_alone_are_not_offered() -> None:
    with pytest.raises(UsageError, match="'IMAGENET1K_FEATURES'"):
        registry.make("models", "torchvision/vgg16", {"weights": "IMAGENET1K_FEATURES"})
    assert "IMAGENET1K_V1" in torchvision.weights("vgg16")


def test_fresh_weights_keep_the_contract_of_models() -> None:
    check_model("torchvision/squeezenet1_1", {"weights": "none"}, side=64)
    check_model("timm/test_convnext", {"weights": "none"}, side=160)


def test_fresh_weights_leave_the_global_stream_as_it_was() -> None:
    before = torch.random.get_rng_state()
    registry.make("models", "timm/test_vit", {"weights": "none"}).describe(None).build()
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_weights_hang_on_their_seed() -> None:
    hashes = [
        weights_hash(described("timm/test_resnet", weights="none", seed=s)) for s in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_choice_of_weights_is_in_the_identity_by_their_hash_alone() -> None:
    def identity(**params: object) -> object:
        return registry.identity(registry.make("models", "torchvision/resnet50", params))

    assert identity() == identity(weights="IMAGENET1K_V2") == identity(weights="none", seed=1)


# --- timm and the hub -----------------------------------------------------------------------------


def test_weights_of_timm_come_from_the_cache_of_the_hub(
    cache: Callable[..., None], tmp_path: Path
) -> None:
    theirs = timm.create_model("test_vit.r160_in1k").eval()
    content = safetensors(theirs, tmp_path / "w")
    cache("timm/test_vit.r160_in1k", model__safetensors=content)
    network = described("timm/test_vit.r160_in1k")
    assert (network.mean, network.std) == ((0.5,) * 3, (0.5,) * 3)
    assert network.size == (160, 160)
    assert network.sha256 == weights_hash(network) == hashlib.sha256(content).hexdigest()
    images = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(load_model(network, "net", {}, "cpu").net(images), theirs(images))


def test_weights_that_timm_does_not_have_are_told() -> None:
    with pytest.raises(UsageError, match="'timm/mixer_s32_224': timm has no weights of it"):
        described("timm/mixer_s32_224")
    assert described("timm/mixer_s32_224", weights="none").weights is None


def test_features_without_classes_are_no_model() -> None:
    with pytest.raises(UsageError, match="has no classes"):
        described("timm/vit_base_patch16_siglip_224.webli", weights="none")


CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 7,
    "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}


def test_a_repository_of_the_hub_says_what_it_is(
    cache: Callable[..., None], tmp_path: Path
) -> None:
    theirs = timm.create_model("test_resnet", num_classes=7).eval()
    cache(
        "somebody/net",
        config__json=json.dumps(CONFIG).encode(),
        model__safetensors=safetensors(theirs, tmp_path / "w"),
    )
    network = described("hf/somebody/net")
    assert (network.mean, network.std, network.size) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        (96, 96),
    )
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(load_model(network, "net", {}, "cpu").net(images), theirs(images))


def test_a_repository_that_is_not_in_the_cache_is_told_with_what_brings_it(
    cache: Callable[..., None],
) -> None:
    with pytest.raises(
        UsageError, match=r"'hf download somebody/net config\.json model\.safetensors' brings"
    ):
        described("hf/somebody/net")
    cache("somebody/net", config__json=json.dumps(CONFIG).encode())
    with pytest.raises(UsageError, match=r"'hf download somebody/net config\.json"):
        weights_hash(described("hf/somebody/net"))


@pytest.mark.parametrize("config", [b"{}", b"[]", b"no JSON", b'{"architecture": "bert"}'])
def test_a_repository_of_something_else_is_refused(
    config: bytes, cache: Callable[..., None]
) -> None:
    cache("somebody/bert", config__json=config)
    with pytest.raises(UsageError, match="does not describe an image classifier of timm"):
        described("hf/somebody/bert")


def test_without_timm_its_networks_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"pip install 'xbench\[timm\]' brings it"):
        registry.find("models", "timm/never_asked_for_before")
    with pytest.raises(UsageError, match=r"xbench\[timm\]"):
        architecture("timm/resnet18")
    assert "timm/<name>" in info.listing("models")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("torchvision/resnet5O", "torchvision has no classifier 'resnet5O'; did you mean"),
        ("torchvison/resnet50", "did you mean 'torchvision/resnet50'?"),
        ("resnet50", "did you mean 'torchvision/resnet50'?"),
        ("timm/convnext_attto", "did you mean 'convnext_atto'"),
        ("deit_tiny_patch16_224", "did you mean 'timm/deit_tiny_patch16_224'?"),
        ("hf/resnet50", "OWNER/NAME"),
        ("shapes/resnt", "did you mean 'shapes/resnet'"),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_a_suggestion(wrong: str, words: str) -> None:
    for ask in (lambda: registry.find("models", wrong), lambda: info.description(wrong)):
        with pytest.raises(UsageError) as refused:
            ask()
        assert words in str(refused.value)


def test_a_network_of_a_library_describes_itself(command: Callable[..., Answer]) -> None:
    text = command("info", "torchvision/resnet50").out
    for words in (
        "25.6 M parameters, 1,000 classes",
        "224 x 224\ncut out of a short side of 232",
        "IMAGENET1K_V2: (default)",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "'DEFAULT' | 'IMAGENET1K_V1' | 'IMAGENET1K_V2' | 'none'",
    ):
        assert words in text
    assert "apache-2.0" in command("info", "timm/test_vit.r160_in1k").out


def test_a_family_lists_its_names(command: Callable[..., Answer]) -> None:
    for name in ("torchvision", "torchvision/", "torchvision/<name>"):
        assert "wide_resnet50_2" in command("info", name).out


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_vit.r160_in1k", "hf/a/b.c"])
def test_a_network_of_a_library_can_be_sent_to_a_worker(name: str) -> None:
    entry = registry.make("models", name, {"weights": "none", "seed": 3})
    assert pickle.loads(pickle.dumps(entry)) == entry


# --- a suite --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plugin")
def test_images_of_another_size_than_the_weights_want_are_noticed() -> None:
    def plan(**model: object) -> Plan:
        return make_plan(suite_of(models=[{"weights": "none", **model}]), None)

    found = plan(name="timm/test_resnet", label="net")
    (notice,) = found.notices
    assert "of model 'net' are for images of 160 x 160; data set 'plug/noise' gives 16" in notice
    with pytest.raises(UsageError, match=r"'net' cannot take images.*are for images of 224 x 224"):
        plan(name="timm/vit_tiny_patch16_224", label="net")


def test_a_network_of_a_library_runs_in_a_suite(run: Callable[..., Any]) -> None:
    outcome = run(
        models=[{"name": "timm/test_resnet", "weights": "none"}],
        methods=["gradient", "grad_cam"],
        metrics=["average_drop"],
    )
    assert outcome.status == 0
    assert set(outcome.table["status"]) == {"ok"}
