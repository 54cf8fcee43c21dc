"""Laws of dry runs: which layer is last, and what depends on it, without a look at weights."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from test_autograd import IMAGES, TARGET, InPlace, facts
from torch import Tensor, nn
from torch.nn import functional

from xbench.autograd import class_gradient, prepared, recording
from xbench.errors import Unsupported
from xbench.layers import LayerFacts, last_feature_map, layer_facts
from xbench.testing import SIDE, toy_model, toy_network, toy_transformer
from xbench.types import Model

# --- the last feature map -------------------------------------------------------------------------


def test_the_last_feature_map_is_what_goes_into_the_pooling() -> None:
    assert last_feature_map(toy_network(), IMAGES) == "3"


def test_the_last_feature_map_of_blocks_is_the_outermost_module() -> None:
    blocks = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    net = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    assert last_feature_map(net, IMAGES) == "0"


def test_a_network_without_feature_maps_has_no_last_one() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5)).double()
    assert last_feature_map(net, IMAGES) is None


def test_the_last_feature_map_is_found_without_weights() -> None:
    with torch.device("meta"):
        net = toy_network()
        assert last_feature_map(net, torch.empty(1, 3, SIDE, SIDE, dtype=torch.float64)) == "3"


@pytest.mark.parametrize("net", [toy_network(), toy_transformer().net], ids=["cnn", "transformer"])
def test_looking_for_the_last_feature_map_leaves_no_trace(net: nn.Module) -> None:
    before = facts(net)
    last_feature_map(net, IMAGES)
    with pytest.raises((RuntimeError, ValueError)):  # the network's own
        last_feature_map(net, IMAGES[0, 0])
    assert facts(net) == before


# --- facts about layers ---------------------------------------------------------------------------


def model_of(net: nn.Module, size: tuple[int, int] | None = (SIDE, SIDE)) -> Model:
    return Model("mine", net.eval(), (0.0,) * 3, (1.0,) * 3, {}, size)


def headed(head: Any) -> Model:
    """The toy network's convolutions and a head that a test writes down."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = toy_network()
            self.body, self.norm = plain[:4], nn.BatchNorm2d(8).double()
            self.conv = nn.Conv2d(8, 6, 3, padding=1).double()
            self.drop, self.linear, self.last = nn.Dropout(), plain[6], nn.Linear(512, 5).double()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = head(self, self.body(images))
            return logits

    return model_of(Headed())


AFFINE = {
    "pooling": lambda net, x: net.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1)),
    "mean, dropout": lambda net, x: net.linear(net.drop(x.mean((2, 3)))),
    "sum less a constant": lambda net, x: -net.linear(x.sum((2, 3))) - 3,
    "flattened": lambda net, x: net.last(x.flatten(1)),
    "tokens": lambda net, x: net.linear(x.flatten(2).transpose(1, 2)[:, 5]),
    "convolution": lambda net, x: net.conv(x).mean((2, 3)),
    "twice": lambda net, x: net.linear(x.mean((2, 3))) + net.last(x.flatten(1)),
    "not at all": lambda net, x: net.linear(torch.zeros_like(x).mean((2, 3))),
}
CURVED = {
    "relu": lambda net, x: net.linear(x.relu().mean((2, 3))),
    "relu by a product": lambda net, x: net.linear((x * (x > 0)).mean((2, 3))),
    "maximum": lambda net, x: net.linear(x.amax((2, 3))),
    "square": lambda net, x: net.linear(x.square().mean((2, 3))),
    "attention": lambda net, x: (x.flatten(2) @ x.flatten(2).mT).flatten(1)[:, :5],
    "hidden": lambda net, x: net.linear(net.linear(x.mean((2, 3))).relu().repeat(1, 2)[:, :8]),
    "softmax": lambda net, x: net.linear(x.mean((2, 3))).softmax(1),
}


@pytest.mark.parametrize("head", AFFINE.values(), ids=AFFINE.keys())
def test_behind_affine_steps_the_logits_are_affine_in_the_layer(head: Any) -> None:
    model = headed(head)
    assert layer_facts(model, "body") == LayerFacts(8, affine=True)
    with recording(model.net, ["body"]) as (kept, _):
        logits = model.net(IMAGES)
    (gradient,) = class_gradient(logits, TARGET, (kept["body"],))
    for channel in range(8):  # so that the claim is what ablation needs: a drop by gradient x map
        ablated = kept["body"].detach().clone()
        ablated[:, channel] = 0
        drop = logits - head(model.net, ablated)
        expected = (gradient * kept["body"])[:, channel].sum((1, 2))
        torch.testing.assert_close(drop.gather(1, TARGET[:, None])[:, 0], expected)


@pytest.mark.parametrize("head", CURVED.values(), ids=CURVED.keys())
def test_behind_a_step_that_bends_the_logits_are_not_affine(head: Any) -> None:
    assert layer_facts(headed(head), "body") == LayerFacts(8, affine=False)


def test_what_bends_before_the_layer_or_beside_it_does_not_matter() -> None:
    def beside(net: Any, x: Tensor) -> Tensor:
        kept = net.norm(x)
        return net.linear((kept + x.relu().square()).mean((2, 3)))  # type: ignore[no-any-return]

    assert layer_facts(headed(beside), "norm") == LayerFacts(8, affine=True)
    assert layer_facts(headed(beside), "body") == LayerFacts(8, affine=False)


def test_tokens_have_their_channels_last_and_are_not_called_affine() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.linear = nn.Linear(3, 7), nn.Linear(7, 5)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.tokens(images.flatten(2).transpose(1, 2))
            return self.linear(tokens.mean(1))  # type: ignore[no-any-return]

    assert layer_facts(model_of(Tokens()), "tokens") == LayerFacts(7, affine=False)


def test_the_facts_need_no_weights_and_a_role_names_its_layer() -> None:
    with torch.device("meta"):
        sketch = toy_model()
    assert layer_facts(sketch, "last_conv") == layer_facts(toy_model(), "3")
    assert layer_facts(sketch, "last_conv") == LayerFacts(8, affine=True)


def test_looking_for_facts_leaves_no_trace_and_is_not_counted() -> None:
    net = toy_network().train()
    before, random = facts(net), torch.random.get_rng_state()
    with prepared(net) as meter, meter.padded(2, 3):
        net(IMAGES)
        counted = copy.copy(vars(meter))
        layer_facts(Model("mine", net, (0.0,) * 3, (1.0,) * 3, {}, (SIDE, SIDE)), "3")
        assert vars(meter) == counted
    assert facts(net) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_facts_are_looked_for_once_and_do_not_keep_a_network_alive() -> None:
    calls = []
    net = toy_network()
    net.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        layer_facts(model_of(net), "3")
        with pytest.raises(Unsupported):
            layer_facts(model_of(net), "nowhere")
    assert len(calls) == 2
    layer_facts(model_of(net, (8, 8)), "3")
    assert len(calls) == 3
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_without_the_images_size_there_are_no_facts() -> None:
    model = model_of(toy_network(), None)
    with pytest.raises(Unsupported, match=r"'mine' does not know the size of its images"):
        layer_facts(model, "3")
    assert layer_facts(model, "3", (3, SIDE, SIDE)) == LayerFacts(8, affine=True)


def test_a_layer_that_cannot_be_recorded_has_no_facts() -> None:
    with pytest.raises(Unsupported, match="layer 'relu' is called more than once"):
        layer_facts(model_of(InPlace()), "relu")


def test_a_network_with_tensors_beside_its_weights_is_told_what_to_do() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = toy_network(), torch.ones(5, dtype=torch.float64)

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images) + self.shift  # type: ignore[no-any-return]

    with pytest.raises(Unsupported, match="must be parameters or buffers"):
        layer_facts(model_of(Loose()), "net.3")
