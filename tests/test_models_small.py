"""Laws of the networks for 32 x 32 images."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from xbench.autograd import class_gradient, dry_run, graph_nodes, module_at
from xbench.errors import UsageError
from xbench.models.architectures import OWN, architecture
from xbench.models.loading import describe_layers
from xbench.types import Network

RELUS = (nn.ReLU, nn.ReLU6)

FACTS = {
    # parameters with 100 classes, ReLUs, role of the last map, channels and side of that map
    "resnet18_32": (11_220_132, 17, "layer4", 512, 4),
    "resnet34_32": (21_328_292, 33, "layer4", 512, 4),
    "resnet50_32": (23_705_252, 49, "layer4", 2048, 4),
    "resnet20": (275_572, 19, "layer3", 64, 8),
    "resnet56": (858_868, 55, "layer3", 64, 8),
    "mobilenet_v2_32": (2_369_380, 36, "features", 1280, 5),
    "vgg16_bn_32": (34_015_396, 15, "features.42", 512, 2),
    "densenet121_32": (7_048_676, 121, "features", 1024, 4),
}
NAMES = list(FACTS)


def on_meta(name: str, classes: int = 100) -> nn.Module:
    with torch.device("meta"):
        return architecture(name)(classes).eval()


def test_every_network_for_small_images_is_held_to_its_facts() -> None:
    assert set(FACTS) | {"shapes_resnet"} == set(OWN)


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_the_number_of_parameters_that_their_papers_make(name: str) -> None:
    net = on_meta(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == FACTS[name][0]


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_is_a_module_that_runs_once_and_never_in_place(name: str) -> None:
    net = on_meta(name)
    relus = [module for module in net.modules() if isinstance(module, RELUS)]
    assert len(relus) == FACTS[name][1]
    assert not any(relu.inplace for relu in relus)
    with torch.device("meta"):
        calls, _ = dry_run(net, torch.empty(2, 3, 32, 32))
        logits = net(torch.empty(2, 3, 32, 32))
    counts = Counter(call.module for call in calls)
    assert [counts[relu] for relu in relus] == [1] * len(relus)
    rectified = [n for n in graph_nodes(logits) if n.name().startswith(("Relu", "Hardtanh"))]
    assert len(rectified) == len(relus)  # so none is a mere function


@pytest.mark.parametrize("name", NAMES)
def test_the_last_map_is_found_and_larger_than_one_position(name: str) -> None:
    _, _, role, channels, side = FACTS[name]
    network = Network(partial(architecture(name), 7), None, (0.0,) * 3, (1.0,) * 3)
    net, layers, classes = describe_layers(network, (32, 32))
    assert (layers, classes) == ({"last_conv": role}, 7)
    shapes: list[torch.Size] = []
    module_at(net, role).register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    with torch.device("meta"):
        net(torch.empty(2, 3, 32, 32))
    assert shapes == [(2, channels, side, side)]


@pytest.mark.parametrize("name", NAMES)
def test_the_last_map_is_taken_after_its_activation_and_explains_the_logits(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = architecture(name)(5).eval()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    module_at(net, FACTS[name][2]).register_forward_hook(lambda module, args, out: kept.append(out))
    logits = net(images)
    assert kept[0].min() == 0 < kept[0].max()
    (gradient,) = class_gradient(logits, torch.zeros(1, dtype=torch.int64), (kept[0],))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18_32", "resnet50_32", "densenet121_32", "vgg16_bn_32"])
def test_names_of_weights_are_those_of_torchvision(name: str) -> None:
    own = on_meta(name, 1000).state_dict()
    theirs = on_meta(f"torchvision/{name.removesuffix('_32')}", 1000).state_dict()
    assert own.keys() == theirs.keys()
    changed = {key for key in own if own[key].shape != theirs[key].shape}
    assert changed <= {"conv1.weight", "features.conv0.weight", "classifier.0.weight"}


@pytest.mark.parametrize("name", ["resnet18_32", "resnet50_32"])
def test_residual_networks_compute_what_torchvision_computes_behind_another_stem(name: str) -> None:
    own = architecture(name)(3).double().eval()
    theirs = architecture(f"torchvision/{name.removesuffix('_32')}")(3).double().eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(own.state_dict())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(own(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_the_densely_connected_network_computes_what_torchvision_computes() -> None:
    own = architecture("densenet121_32")(3).double().eval()
    theirs = architecture("torchvision/densenet121")(3).double().eval()
    theirs.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
    theirs.features.pool0 = nn.Identity()
    theirs.load_state_dict(own.state_dict())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(own(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_the_mobile_network_halves_the_map_in_three_stages_alone() -> None:
    strides = [m.stride for m in on_meta("mobilenet_v2_32").modules() if isinstance(m, nn.Conv2d)]
    assert strides.count((2, 2)) == 3
    assert strides.count((1, 1)) == len(strides) - 3


@pytest.mark.parametrize("name", ["resnet18_32", "mobilenet_v2_32", "densenet121_32"])
def test_the_weights_of_a_seed_are_always_the_same(name: str) -> None:
    def drawn() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return dict(architecture(name)(2).state_dict())

    first, again = drawn(), drawn()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_name_that_nothing_has_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"'resnet18_23'; did you mean 'resnet18_32'"):
        architecture("resnet18_23")
