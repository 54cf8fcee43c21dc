"""Laws of replays: what follows a layer runs again, and nothing before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_autograd import IMAGES, facts
from test_layers import model_of
from torch import Tensor, nn
from torch.nn import functional

from xbench.autograd import module_at, prepared, recording
from xbench.errors import Unsupported
from xbench.replay import Replay
from xbench.testing import toy_network


class Gate(nn.Module):
    """Returns a tuple of what it is given, and of a second tensor with no axis for images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x, {"scale": self.scale * 1, "kept": [x.sigmoid()], "name": "gate"}


class Residual(nn.Module):
    """Two convolutions beside a by-pass; the activation module is called before and after each."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.relu = relu
        self.a = nn.Conv2d(6, 6, 3, padding=1).double()
        self.b = nn.Conv2d(6, 6, 3, padding=1).double()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        y, others = self.gate(self.relu(self.a(x)))
        y = self.relu(self.b(functional.relu_(y)))
        return self.relu(x * others["scale"] + y * others["kept"][0])  # type: ignore[no-any-return]


class Named(nn.ModuleDict):
    """A dictionary of modules that is called itself, as DenseNet's blocks are."""

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = [x]
        for module in self.values():
            found.append(module(sum(found)))
        return sum(found[1:], x)


class Skips(nn.Module):
    """By-passes of every kind: around blocks, from the stem and from the images to the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu = nn.ReLU()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1).double(), self.relu)
        named = Named({"one": Residual(self.relu), "two": Residual(self.relu)})
        self.blocks = nn.Sequential(named, *(Residual(self.relu) for _ in range(3)))
        self.more = nn.ModuleList(Residual(self.relu) for _ in range(3))
        self.linear = nn.Linear(6, 5).double()

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        x = self.blocks(stem)
        for block in self.more:
            x = x + block(x)
        x = x + 0.1 * stem + images.mean(1, keepdim=True)
        return self.linear(x.square().mean((2, 3)))  # type: ignore[no-any-return]


SKIPS = ("stem.0", "blocks", "blocks.0", "blocks.0.two", "blocks.0.one.b", "blocks.2", "blocks.2.a",
         "blocks.2.b", "more.1", "more.1.b")  # fmt: skip


def by_hook(net: nn.Module, path: str, features: Tensor, images: Tensor) -> Tensor:
    """Logits of a whole forward in which a layer's output is replaced."""
    handle = module_at(net, path).register_forward_hook(lambda *_: features)
    try:
        logits: Tensor = net(images)
    finally:
        handle.remove()
    return logits


@pytest.mark.parametrize("path", SKIPS)
@torch.no_grad()
def test_a_replay_is_a_forward_with_the_layers_output_replaced(path: str) -> None:
    net = Skips().eval()
    with recording(net, [path]) as (kept, _):
        logits = net(IMAGES)
    replay = Replay(model_of(net), path, IMAGES)
    torch.testing.assert_close(replay.output, kept[path], rtol=0, atol=1e-12)
    of = torch.tensor([2, 0, 0, 3, 1, 2, 1])
    features = kept[path][of] * torch.rand(7, 6, 1, 1, dtype=torch.float64)
    expected = by_hook(net, path, features, IMAGES[of])
    assert (expected - logits[of]).abs().max() > 1e-6
    torch.testing.assert_close(replay(features, of), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", SKIPS)
@torch.no_grad()
def test_a_replay_runs_no_convolution_that_comes_before_the_layer(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Skips().eval()
    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    behind = max(at for at, name in enumerate(convs) if name.startswith(path)) + 1
    replay = Replay(model_of(net), path, IMAGES)
    calls = []
    usual = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda *args: (calls.append(args[0]), usual(*args))[1]
    )
    replay(replay.output, torch.arange(4))
    assert len(calls) == len(convs) - behind


@torch.no_grad()
def test_a_replay_keeps_no_record_that_only_a_sequence_would_see() -> None:
    replay = Replay(model_of(Skips().eval()), "blocks.3.b", IMAGES)
    kept = [module for module, records in replay._before.items() if records]
    blocks = [module for module in kept if isinstance(module, Residual)]
    assert len(blocks) == 1  # the one whose output goes into the layer's own block


@pytest.mark.parametrize("path", SKIPS)
def test_a_replay_leaves_the_network_as_it_was(path: str) -> None:
    net = Skips().eval()
    before, own = facts(net), [dict(vars(module)) for module in net.modules()]
    replay = Replay(model_of(net), path, IMAGES)
    with pytest.raises((RuntimeError, IndexError)):
        replay(replay.output[:, :1, :1], torch.tensor([7]))
    assert facts(net) == before
    assert [dict(vars(module)) for module in net.modules()] == own
    net.blocks.forward = forward = lambda x: x  # somebody else's, which must come back
    Replay(model_of(net), path if path.startswith("stem") else "more.1", IMAGES)
    assert net.blocks.forward is forward


@torch.no_grad()
def test_replays_are_counted_as_forwards() -> None:
    net = toy_network()
    with prepared(net) as meter:
        replay = Replay(model_of(net), "1", IMAGES)
        assert meter.forward == 8
        replay(replay.output[:3], torch.arange(3))
        assert meter.forward == 11


@pytest.mark.parametrize(
    ("path", "forward", "message"),
    [
        ("relu", None, "'relu' is not called just once"),
        ("blocks.1.gate", None, "'blocks.1.gate' is not called just once, for one tensor"),
        ("idle", None, "'idle' is not called just once"),
        ("blocks", lambda x: x - x.mean(0), "cannot be run alone"),
        ("blocks", lambda x: x * torch.rand(()), "cannot be run alone"),
    ],
    ids=["twice", "tuple", "never", "others", "chance"],
)
@torch.no_grad()
def test_a_layer_that_cannot_be_replayed_is_refused(path: str, forward: Any, message: str) -> None:
    net = Skips().eval()
    net.idle = nn.Identity()
    if forward is not None:
        net.linear.forward = lambda x, usual=net.linear.forward: forward(usual(x))
        # else the toy's differences would hide beneath the size of its bias
        net.linear.bias.zero_()
    with pytest.raises(Unsupported, match=message):
        Replay(model_of(net), path, IMAGES)


@torch.no_grad()
def test_an_image_with_nan_replays_as_nan_alone() -> None:
    images = IMAGES.clone()
    images[1] = torch.nan
    replay = Replay(model_of(Skips().eval()), "blocks.1", images)
    found = replay(replay.output, torch.arange(4))
    assert found.isnan().any(1).tolist() == [False, True, False, False]
