"""Calls as modules: the network stays the same, and what hooks find is right or refused."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LRP, DeepLift
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from torch.nn import functional

from xbench.autograd import prepared
from xbench.calls import GUIDED, RELEVANCE, RESCALE, Call, Kind, Separated, Windows
from xbench.errors import Unsupported

IMAGES = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHERS = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore:Setting forward", "ignore:Input Tensor 0")


class Net(nn.Module):
    """Two convolutions and a head; ``between`` and ``after`` are what a test is about."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
            self.two = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
            self.head = nn.Linear(4, 5, bias=bias)
            self.relu = nn.ReLU()
            self.pool = nn.MaxPool2d(3, 2, 1)
        self.double().eval().requires_grad_(False)

    def between(self, features: Tensor) -> Tensor:
        return self.relu(features)

    def after(self, features: Tensor) -> Tensor:
        return self.relu(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.after(self.two(self.between(self.one(images)))).mean((2, 3)))


class Functions(Net):
    def between(self, features: Tensor) -> Tensor:
        return functional.relu(features, inplace=True)

    def after(self, features: Tensor) -> Tensor:
        return features.relu_()


class Residual(Net):
    def after(self, features: Tensor) -> Tensor:
        features += self.relu(features)
        return self.relu(features)


class Overlapping(Net):
    def between(self, features: Tensor) -> Tensor:
        return self.pool(self.relu(features))

    def after(self, features: Tensor) -> Tensor:
        return functional.max_pool2d(torch.sigmoid(features), 3, stride=2, ceil_mode=True)


class Neighbours(Net):
    def between(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(functional.elu(functional.softplus(features)), 0.2)

    def after(self, features: Tensor) -> Tensor:
        return torch.tanh(self.relu(features) - 0.1)


class Joined(Net):
    def after(self, features: Tensor) -> Tensor:
        left, right = features.chunk(2, dim=1)
        return torch.cat((functional.relu(left), torch.flip(right, (3,)) / 2), dim=1)


class Constant(Net):
    def between(self, features: Tensor) -> Tensor:
        rest = torch.zeros_like(features) + features.new_full((1,), 0.5)
        return self.relu(features * 2 + rest * features.shape[-1])


GOOD = [Net, Functions, Residual, Overlapping, Neighbours, Joined, Constant]


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        *((network, RESCALE) for network in GOOD),
        *((network, GUIDED) for network in GOOD if network is not Neighbours),
        *((network, RELEVANCE) for network in (Net, Functions, Residual)),
    ],
)
def test_logits_stay_the_same(network: type[Net], kind: Kind) -> None:
    net = network()
    apart = Separated(net, IMAGES[:1], kind)
    torch.testing.assert_close(apart(IMAGES), net(IMAGES), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", GOOD)
def test_contributions_of_deep_lift_add_up_to_the_difference_of_the_logits(
    network: type[Net],
) -> None:
    net = network()
    contributions = DeepLift(Separated(net, IMAGES[:1], RESCALE)).attribute(
        IMAGES.clone(), OTHERS, target=2
    )
    difference = (net(IMAGES) - net(OTHERS))[:, 2]
    assert difference.abs().min() > 1e-4
    torch.testing.assert_close(contributions.sum((1, 2, 3)), difference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [Net, Functions, Residual])
def test_relevance_is_conserved_without_biases(network: type[Net]) -> None:
    net = network(bias=False)
    apart = Separated(net, IMAGES[:1], RELEVANCE)
    for call in apart.calls:
        if isinstance(call, Call):
            call.rule = EpsilonRule()
    relevance = LRP(apart).attribute(IMAGES.clone(), target=2)
    # each of the epsilons of 1e-9 takes its share
    torch.testing.assert_close(relevance.sum((1, 2, 3)), net(IMAGES)[:, 2], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"kernel_size": 2}, 12),
        ({"kernel_size": 2}, 13),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, 12),
        ({"kernel_size": 3, "stride": 2, "ceil_mode": True}, 12),
        ({"kernel_size": 3, "stride": 2, "ceil_mode": True}, 13),
        ({"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}, 12),
        ({"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}, 11),
        ({"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 3)}, 12),
    ],
    ids=str,
)
def test_windows_pool_as_torch_does(arguments: dict[str, object], size: int) -> None:
    images = IMAGES.repeat(1, 1, 2, 2)[..., :size, :size] - 0.5
    expected = functional.max_pool2d(images, **arguments)
    assert torch.equal(Windows(**arguments)(images), expected)


def test_each_call_is_a_module_of_its_own_called_once() -> None:
    apart = Separated(Residual(), IMAGES[:1], RESCALE)
    assert [type(call).__name__ for call in apart.calls] == ["ReLU"] * 3
    assert len(set(apart.calls)) == 3
    assert [module for module in apart.modules() if isinstance(module, nn.Conv2d)] == []


def test_the_marked_call_has_the_layers_output() -> None:
    net = Functions()
    apart = Separated(net, IMAGES[:1], RELEVANCE, layer="two")
    seen = []
    assert apart.marked is not None
    apart.marked.register_forward_hook(lambda module, args, output: seen.append(output))
    apart(IMAGES)
    (found,) = seen
    torch.testing.assert_close(found, net.two(net.one(IMAGES).relu()))


class Gelu(Net):
    def between(self, features: Tensor) -> Tensor:
        return functional.gelu(features)


class Gate(Net):
    def between(self, features: Tensor) -> Tensor:
        return features * torch.sigmoid(features)


class Hidden(Net):
    def between(self, features: Tensor) -> Tensor:
        return features * (features > 0)


class Chosen(Net):
    def between(self, features: Tensor) -> Tensor:
        return torch.where(features > 0, features, torch.zeros_like(features))


class Clipped(Net):
    def between(self, features: Tensor) -> Tensor:
        return functional.relu6(features)


class Divided(Net):
    def between(self, features: Tensor) -> Tensor:
        return torch.ones(1, dtype=features.dtype) / (features.abs() + 1)


class Rectify(torch.autograd.Function):
    @staticmethod
    def forward(context: object, values: Tensor) -> Tensor:
        return values.clamp_min(0)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient


class Custom(Net):
    def between(self, features: Tensor) -> Tensor:
        return Rectify.apply(features)


class Linear(Net):
    def between(self, features: Tensor) -> Tensor:
        return features

    after = between


class Ignored(Net):
    def after(self, features: Tensor) -> Tensor:
        features.relu_()  # what it returns is not used
        return features


@pytest.mark.parametrize(
    ("network", "kind", "words"),
    [
        (Gelu, RESCALE, "does not cover Gelu"),
        (Gelu, RELEVANCE, "does not cover Gelu"),
        (Gate, RESCALE, "does not cover Mul"),
        (Gate, RELEVANCE, "does not cover Mul, Sigmoid"),
        (Hidden, RESCALE, "does not cover mul of values of the image that have no gradient"),
        (Hidden, GUIDED, "does not cover mul of values"),
        (Chosen, GUIDED, "does not cover where of values"),
        (Chosen, RESCALE, "does not cover Where"),
        (Neighbours, GUIDED, "does not cover LeakyRelu"),
        (Neighbours, RELEVANCE, "does not cover Elu, LeakyRelu, Softplus, Sub"),
        (Joined, RELEVANCE, "does not cover Div"),
        (Clipped, GUIDED, "does not cover Hardtanh"),
        (Clipped, RESCALE, "does not cover Hardtanh"),
        (Divided, RESCALE, "does not cover Abs, Div"),
        (Custom, RESCALE, "does not cover Rectify"),
        (Custom, RELEVANCE, "does not cover Rectify"),
        (Linear, GUIDED, "needs a ReLU"),
        (Ignored, RESCALE, "relies on what an activation changes in place"),
    ],
)
def test_what_would_be_wrong_in_silence_is_refused(
    network: type[Net], kind: Kind, words: str
) -> None:
    with pytest.raises(Unsupported, match=words):
        Separated(network(), IMAGES[:1], kind)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_compiled_activation_is_refused() -> None:
    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.trace(nn.ReLU(), IMAGES)

        def between(self, features: Tensor) -> Tensor:
            return self.scripted(features)

    with pytest.raises(Unsupported, match="does not cover Relu"):
        Separated(Compiled(), IMAGES[:1], RESCALE)


def test_calls_that_change_between_forwards_are_refused() -> None:
    class Moody(Net):
        mood = 0

        def between(self, features: Tensor) -> Tensor:
            return torch.tanh(features) if self.mood else features.relu()

        def after(self, features: Tensor) -> Tensor:
            return self.relu(features).relu() if self.mood == 2 else self.relu(features)

    net = Moody()
    apart = Separated(net, IMAGES[:1], RESCALE)
    for net.mood in (1, 2):
        with pytest.raises(Unsupported, match="this network's change"):
            apart(IMAGES)


def test_the_network_is_left_as_it_was() -> None:
    net = Overlapping()
    before = [dict(vars(module)) for module in net.modules()]
    with prepared(net):
        Separated(net, IMAGES[:1], RESCALE, layer="two")(IMAGES)
    assert [dict(vars(module)) for module in net.modules()] == before
