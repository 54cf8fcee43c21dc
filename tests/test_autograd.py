"""Laws of hooks and gradients: the network is found again as it was, and what is read is right."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from xbench import autograd
from xbench.autograd import (
    Meter,
    attention_in_graph,
    attention_weights,
    bias_terms,
    class_gradient,
    guided_relu,
    module_at,
    operations_behind,
    prepared,
    recording,
    rerouted,
    untouched,
)
from xbench.errors import Unsupported, UsageError
from xbench.testing import (
    SIDE,
    LinearNetwork,
    toy_batch,
    toy_network,
)

IMAGES = toy_batch(4).images
TARGET = torch.tensor([0, 1, 2, 3])


class InPlace(nn.Module):
    """The toy network as many are written: in-place and reused activations, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        plain = toy_network()
        self.conv1, self.conv2, self.linear = plain[0], plain[2], plain[6]
        self.norm = nn.BatchNorm2d(8).double()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv1(images))
        x = self.relu(self.norm(self.conv2(x)))
        y = self.relu(x - 0.1)
        return self.linear((x + y).mean((2, 3)))  # type: ignore[no-any-return]


class Written(nn.Module):
    """A forward that a test writes down, over the toy network's layers."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        plain = toy_network()
        self.conv1, self.relu, self.conv2, self.linear = plain[0], plain[1], plain[2], plain[6]
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv2(self.relu(self.conv1(images)))
        return self.linear(self.between(x).mean((2, 3)))  # type: ignore[no-any-return]


def facts(net: nn.Module) -> list[Any]:
    """Everything that must be found again."""
    found: list[Any] = [
        (m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._backward_hooks))
        for m in net.modules()
    ]
    found += [(p.requires_grad, p.grad is None) for p in net.parameters()]
    return found + [value.tolist() for value in net.state_dict().values()]


def input_gradient(net: nn.Module, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    """Logits and the target's gradient towards the images."""
    images = images.clone().requires_grad_()
    logits = net(images)
    return logits, class_gradient(logits, TARGET[: len(images)], (images,))[0]


# --- prepared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_network_is_found_again_as_it_was(error: type[BaseException] | None) -> None:
    net = InPlace().train()
    net.norm.eval()
    net.linear.weight.requires_grad_(False)
    before = facts(net)
    try:
        with prepared(net):
            net(IMAGES)
            if error:
                raise error("inside")
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert facts(net) == before


def test_inside_a_network_is_evaluated_frozen_and_not_in_place() -> None:
    net = InPlace().train()
    with prepared(net):
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert not net.relu.inplace
    assert net.relu.inplace


def test_attention_is_computed_as_before_once_a_network_is_left() -> None:
    def ways() -> list[bool]:
        flags = torch.backends.cuda
        return [
            torch.backends.mha.get_fastpath_enabled(),
            flags.flash_sdp_enabled(),
            flags.math_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.cudnn_sdp_enabled(),
        ]

    before = ways()
    with prepared(toy_network()):
        assert ways() == [False, True, True, False, False]
        with attention_in_graph():
            assert ways() == [False, False, True, False, False]
        assert ways() == [False, True, True, False, False]
    assert ways() == before
    with pytest.raises(RuntimeError), prepared(toy_network()), attention_in_graph():
        raise RuntimeError
    assert ways() == before


def test_an_in_place_network_has_the_gradient_of_its_twin() -> None:
    net = InPlace().eval()
    twin = copy.deepcopy(net)
    twin.relu.inplace = False
    with prepared(net):
        found = input_gradient(net)
    for value, expected in zip(found, input_gradient(twin), strict=True):
        assert torch.equal(value, expected)


# --- recording ------------------------------------------------------------------------------------


def test_a_recorded_layer_is_its_output_and_its_gradient_the_chain_rule() -> None:
    net = toy_network().requires_grad_(False)
    with recording(net, ["3"]) as (kept, refused):
        logits = net(IMAGES)
    (gradient,) = class_gradient(logits, TARGET, (kept["3"],))
    assert not refused
    assert torch.equal(kept["3"], net[:4](IMAGES))
    # each of the 64 positions gets an equal share of the target's weight row
    expected = (net[6].weight[TARGET] / 64)[:, :, None, None].expand(4, 8, 8, 8)
    torch.testing.assert_close(gradient, expected)


def test_recording_changes_no_logit() -> None:
    net = toy_network()
    plain = net(IMAGES)
    with recording(net, ["0", "1", "2", "3"]):
        assert torch.equal(net(IMAGES), plain)


def test_an_in_place_step_after_a_layer_does_not_overwrite_what_is_kept() -> None:
    net = Written(functional.relu_)
    with recording(net, ["conv2"]) as (kept, _):
        logits = net(IMAGES)
    assert kept["conv2"].min() < 0
    assert torch.equal(kept["conv2"], net.conv2(net.relu(net.conv1(IMAGES))))
    twin = Written(functional.relu)
    with recording(twin, ["conv2"]) as (expected, _):
        other = twin(IMAGES)
    for value, wanted in zip(
        class_gradient(logits, TARGET, (kept["conv2"],)),
        class_gradient(other, TARGET, (expected["conv2"],)),
        strict=True,
    ):
        assert torch.equal(value, wanted)


def test_the_graph_begins_at_the_recorded_layer() -> None:
    net = toy_network().requires_grad_(False)
    with recording(net, ["3"]) as (kept, _):
        net(IMAGES)
    assert kept["3"].is_leaf
    assert kept["3"].requires_grad


def test_with_several_layers_the_graph_begins_at_the_first() -> None:
    net = toy_network().requires_grad_(False)
    with recording(net, ["3", "1"]) as (kept, _):
        logits = net(IMAGES)
    assert kept["1"].is_leaf
    assert not kept["3"].is_leaf
    first, last = class_gradient(logits, TARGET, (kept["1"], kept["3"]))
    images = IMAGES.clone().requires_grad_()
    (through,) = torch.autograd.grad(net[:2](images), images, first)
    torch.testing.assert_close(through, input_gradient(net)[1])
    assert last.shape == (4, 8, 8, 8)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("relu", "is called more than once in a forward; name the module around it"),
        ("pair", "returns tuple, not a tensor"),
        ("idle", "takes no part in the forward"),
    ],
)
def test_a_layer_that_cannot_be_kept_is_refused_and_the_others_are_kept(
    path: str, reason: str
) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Odd(InPlace):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.idle = Pair(), nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(self.pair(images)[0])

    net = Odd().eval()
    with prepared(net), recording(net, [path, "conv2"]) as (kept, refused):
        net(IMAGES)
    assert list(kept) == ["conv2"]
    assert refused == {path: reason}


def test_an_unknown_layer_names_the_networks_children_and_costs_no_other_layer() -> None:
    net = Written(functional.relu)
    with pytest.raises(UsageError, match=r"no module 'layer5'; its children are conv1, relu"):
        module_at(net, "layer5")
    with recording(net, ["conv1", "layer5"]) as (kept, refused):
        net(IMAGES)
    assert set(kept) == {"conv1"}
    assert "no module 'layer5'" in refused["layer5"]


def test_hooks_of_a_recording_are_gone_also_after_an_error() -> None:
    net = toy_network()
    before = facts(net)
    for layers in (["3"], ["3", "nowhere"]):
        with pytest.raises((RuntimeError, UsageError)), recording(net, layers):
            raise RuntimeError
        assert facts(net) == before


def test_a_module_is_found_by_its_path() -> None:
    net = nn.Sequential(toy_network())
    assert module_at(net, "0.3") is net[0][3]


# --- class gradients ------------------------------------------------------------------------------


def test_the_class_gradient_of_a_linear_network_is_the_targets_weight_row() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, gradient = input_gradient(LinearNetwork(weight), torch.rand(4, 3, 2, 2).double())
    assert torch.equal(gradient.flatten(1), weight[TARGET])


def test_the_gradient_of_nll_is_that_of_cross_entropy() -> None:
    net = toy_network()
    images = IMAGES.clone().requires_grad_()
    (found,) = class_gradient(net(images), TARGET, (images,), "nll")
    loss = functional.cross_entropy(net(images), TARGET, reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(loss, images)[0])


def test_an_image_of_another_class_has_no_part_in_a_gradient() -> None:
    net = toy_network()
    whole = input_gradient(net)[1]
    for at in range(4):
        images = IMAGES[at : at + 1].clone().requires_grad_()
        (alone,) = class_gradient(net(images), TARGET[at : at + 1], (images,))
        torch.testing.assert_close(whole[at : at + 1], alone)


def test_a_tensor_without_influence_gets_zeros() -> None:
    net, other = toy_network(), torch.ones(2, 3, requires_grad=True)
    images = IMAGES.clone().requires_grad_()
    _, nothing = class_gradient(net(images), TARGET, (images, other))
    assert torch.equal(nothing, torch.zeros(2, 3))


# --- the guided rule ------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda signal: signal.clamp(min=0),
    "negative": lambda signal: signal.clamp(max=0),
    "absolute": lambda signal: signal.abs(),
}


class GuidedFunction(torch.autograd.Function):
    """The rule as it is written: 1[low < u < high] [dv]_+."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, high: float, part: str) -> Tensor:
        context.save_for_backward(inputs)
        context.high, context.part = high, part
        return inputs.clamp(0, high)

    @staticmethod
    def backward(context: Any, signal: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inputs,) = context.saved_tensors
        gated = signal * ((inputs > 0) & (inputs < context.high))
        return PARTS[context.part](gated), None, None


class GuidedModule(nn.Module):
    def __init__(self, high: float = float("inf"), part: str = "positive") -> None:
        super().__init__()
        self.high, self.part = high, part

    def forward(self, inputs: Tensor) -> Tensor:
        return GuidedFunction.apply(inputs, self.high, self.part)  # type: ignore[no-any-return]


def guided_gradient(
    net: nn.Module, scale: float = 1.0, passing: Any = "positive", **how: Any
) -> Tensor:
    with prepared(net):
        images = (IMAGES * scale).requires_grad_()
        logits = net(images)
        with guided_relu(logits, passing, **how):
            return class_gradient(logits, TARGET, (images,))[0]


def explicit_gradient(net: nn.Module, scale: float = 1.0, part: str = "positive") -> Tensor:
    """The same with the rule's own function in place of every ReLU."""
    net = copy.deepcopy(net).eval()
    for parent in list(net.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.ReLU | nn.ReLU6):
                high = 6.0 if isinstance(module, nn.ReLU6) else float("inf")
                setattr(parent, name, GuidedModule(high, part))
    return input_gradient(net, IMAGES * scale)[1]


@pytest.mark.parametrize("part", PARTS)
def test_the_guided_gradient_is_the_rule_written_as_a_function(part: str) -> None:
    net = toy_network()
    found = guided_gradient(net, passing=part)
    assert found.abs().max() > 0
    assert not torch.allclose(found, input_gradient(net)[1])
    torch.testing.assert_close(found, explicit_gradient(net, part=part))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_rule_covers_relu6_and_stops_above_six(in_place: bool) -> None:
    net = toy_network()
    net[1], net[3] = nn.ReLU6(), nn.ReLU6(inplace=in_place)
    scale = 30.0  # so that some units lie above 6
    assert net[0](IMAGES * scale).max() > 6
    found = guided_gradient(net, scale)
    torch.testing.assert_close(found, explicit_gradient(net, scale))


@pytest.mark.parametrize("part", PARTS)
def test_the_rule_acts_on_every_call_of_a_reused_relu_and_on_the_sum_of_its_consumers(
    part: str,
) -> None:
    net = InPlace().eval()
    torch.testing.assert_close(
        guided_gradient(net, passing=part), explicit_gradient(net, part=part)
    )


@pytest.mark.parametrize(
    ("between", "high"),
    [
        (functional.relu, float("inf")),
        (torch.relu, float("inf")),
        (torch.relu_, float("inf")),
        (nn.ReLU(inplace=True), float("inf")),
        (functional.relu6, 6.0),
        (lambda x: functional.relu6(x, inplace=True), 6.0),
        (lambda x: functional.hardtanh(x, 0, 6), 6.0),
    ],
    ids=["relu", "torch.relu", "relu_", "in place", "relu6", "relu6 in place", "hardtanh"],
)
def test_a_functional_relu_is_guided_as_a_module_is(between: Any, high: float) -> None:
    scale = 30.0
    found = guided_gradient(Written(between), scale)
    torch.testing.assert_close(found, explicit_gradient(Written(GuidedModule(high)), scale))


def test_after_the_rule_gradients_of_the_same_logits_are_plain_again() -> None:
    net = toy_network()
    images = IMAGES.clone().requires_grad_()
    logits = net(images)

    def gradient() -> Tensor:
        chosen = logits.gather(1, TARGET[:, None]).sum()
        return torch.autograd.grad(chosen, images, retain_graph=True)[0]

    plain = gradient()
    try:
        with guided_relu(logits):
            assert not torch.equal(gradient(), plain)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(gradient(), plain)


def test_the_rule_does_not_touch_the_network() -> None:
    net = InPlace().eval()
    before = facts(net)
    images = IMAGES.clone().requires_grad_()
    with guided_relu(net(images)):
        assert facts(net) == before


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (nn.LeakyReLU(), "not for a leaky ReLU"),
        (nn.RReLU(), "not for a randomised ReLU"),
        (lambda x: functional.rrelu(x, training=True), "not for a randomised ReLU"),
        (nn.PReLU().double(), "not for a parametric ReLU"),
        (nn.Hardtanh(), "not for a hard tanh"),
        (lambda x: x.clamp(min=0), "not for a clamp"),
        (lambda x: x.clamp_min(0), "not for a clamp"),
        (lambda x: x.clamp(torch.zeros_like(x)), "not for a clamp"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "not for a maximum"),
        (nn.Threshold(0, 0), "not for a threshold"),
        (lambda x: torch.where(x > 0, x, 0), "not for a torch.where"),
        (lambda x: x.masked_fill(x < 0, 0), "not for a masked_fill"),
        (GuidedModule(), "cannot see inside GuidedFunction"),
        (
            lambda x: checkpoint(functional.relu, x, use_reentrant=True),
            "not for the inside of a checkpointed block, which it cannot see",
        ),
    ],
    ids=[
        *("leaky", "rrelu", "rrelu in training", "prelu", "hardtanh", "clamp", "clamp_min"),
        *("clamp to a tensor", "maximum", "threshold", "where", "masked_fill", "function"),
        "checkpoint",
    ],
)
def test_what_rectifies_but_is_no_relu_is_refused(between: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        guided_gradient(Written(between))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_block_is_refused_once_it_hides_its_relus() -> None:
    net = nn.Sequential(torch.jit.script(toy_network().eval()))
    input_gradient(net)  # the first call only watches
    with pytest.raises(Unsupported, match="the inside of a scripted block"):
        guided_gradient(net)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (functional.silu, "SiLU"),
        (functional.elu, "ELU"),
        (functional.gelu, "GELU"),
        (functional.hardswish, "hard-swish"),
    ],
)
def test_smooth_activations_beside_a_relu_keep_their_own_gradient_if_that_is_accepted(
    between: Any, words: str
) -> None:
    net = Written(between)
    with pytest.raises(Unsupported, match=f"the network has {words} beside its ReLUs, so"):
        guided_gradient(net)
    found = guided_gradient(net, allow_no_relu=True)
    torch.testing.assert_close(found, explicit_gradient(net))


def test_a_relu_behind_no_logit_does_not_count() -> None:
    class Dead(Written):
        def forward(self, images: Tensor) -> Tensor:
            self.relu(self.conv1(images))  # such as an auxiliary head
            x = torch.tanh(self.conv2(torch.tanh(self.conv1(images))))
            return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]

    net = Dead(None)
    with pytest.raises(Unsupported, match="the network has no ReLU or ReLU6"):
        guided_gradient(net)
    assert torch.equal(guided_gradient(net, allow_no_relu=True), input_gradient(net)[1])


def test_without_any_relu_the_rule_is_refused_unless_that_is_accepted() -> None:
    weight = torch.randn(5, 3 * SIDE * SIDE, dtype=torch.float64)
    net = LinearNetwork(weight)
    with pytest.raises(Unsupported, match=r"no ReLU or ReLU6, .*allow_no_relu: true accepts that"):
        guided_gradient(net)
    assert torch.equal(guided_gradient(net, allow_no_relu=True).flatten(1), weight[TARGET])


# --- the meter ------------------------------------------------------------------------------------


def test_a_meter_counts_rows_whoever_sends_them() -> None:
    net = toy_network()
    with prepared(net) as meter:
        net(IMAGES)
        assert (meter.forward, meter.backward) == (4, 0)
        input_gradient(net)
        assert (meter.forward, meter.backward) == (8, 4)
        captum.attr.IntegratedGradients(net).attribute(
            IMAGES, target=TARGET, n_steps=5, internal_batch_size=4
        )
        # 5 steps of 4 images in chunks of 4, and captum's own two looks for its batch check
        assert meter.backward == 4 + 20
        assert meter.forward >= 8 + 20
    net(IMAGES)
    assert meter.backward == 24


def test_a_meter_counts_each_backward_through_the_same_logits() -> None:
    net = toy_network()
    images = IMAGES.clone().requires_grad_()
    with prepared(net) as meter:
        logits = net(images)
        for _ in range(3):
            torch.autograd.grad(logits.sum(), images, retain_graph=True)
    assert (meter.forward, meter.backward) == (4, 12)


def test_a_meter_without_gradients_counts_no_backward() -> None:
    net = toy_network()
    with prepared(net) as meter, torch.inference_mode():
        net(IMAGES)
    assert (meter.forward, meter.backward) == (4, 0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 12])
def test_padding_is_counted_apart_whatever_the_chunks(chunk: int) -> None:
    """12 rows of which 4 of every 6 are images, sent in chunks of any size."""
    net = toy_network()
    rows = torch.cat((IMAGES, IMAGES, IMAGES))
    with prepared(net) as meter, meter.padded(4, 6):
        for part in rows.split(chunk):
            input_gradient(net, part) if len(part) <= 4 else net(part)
    assert (meter.forward, meter.padding) == (8, 4)


def test_padding_ends_with_its_block() -> None:
    net = toy_network()
    with prepared(net) as meter:
        with pytest.raises(RuntimeError), meter.padded(2, 4):
            raise RuntimeError
        net(IMAGES)
    assert (meter.forward, meter.padding) == (4, 0)


def test_a_reset_meter_counts_from_zero() -> None:
    meter = Meter(1, 2, 3, 4)
    meter.reset()
    assert meter == Meter()


@pytest.mark.parametrize(
    ("returns", "shown"),
    [(lambda images: images, r"\(4, 3, 16, 16\)"), (lambda images: (images, images), "tuple")],
    ids=["images", "pair"],
)
def test_an_output_that_is_no_logits_is_refused(returns: Any, shown: str) -> None:
    class Returns(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return returns(images)

    net = Returns()
    with prepared(net), pytest.raises(Unsupported, match=f"returns {shown}, not logits of shape"):
        net(IMAGES)


# --- attention ------------------------------------------------------------------------------------


def test_weights_and_gradients_of_a_hand_made_attention() -> None:
    """One score of two keys: the logits are the weights themselves, times known numbers."""
    scores = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    weights = scores.softmax(-1)
    factors = torch.tensor([[3.0, -1.0], [0.0, 5.0]], dtype=torch.float64)
    logits = torch.stack([weights.sum((1, 2)), (weights * factors).sum((1, 2))], dim=1)
    ((found, edge),) = attention_weights(logits)
    (gradient,) = class_gradient(logits, torch.tensor([1]), [edge])
    assert torch.equal(found, weights)
    assert not found.requires_grad
    assert torch.equal(gradient[0], factors)


def test_fused_attention_is_seen_only_where_it_is_computed_in_steps() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind(0)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    target = torch.zeros(2, dtype=torch.int64)
    for how in ({}, {"attn_mask": mask}, {"is_causal": True}, {"scale": 0.1}):
        with attention_in_graph():
            out = functional.scaled_dot_product_attention(q.requires_grad_(), k, v, **how)
        logits = out.flatten(2)[:, :, 0]
        ((weights, edge),) = attention_weights(logits)
        (gradient,) = class_gradient(logits, target, [edge])
        scores = q @ k.mT * how.get("scale", 0.5)
        if "attn_mask" in how or "is_causal" in how:
            scores = scores.masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(weights, scores.softmax(-1).detach())
        assert gradient[:, 0, 0].std() > 0
        assert not gradient[:, 1].any()  # the logit reads the first head's first row
    fused = functional.scaled_dot_product_attention(q, k, v)
    assert attention_weights(fused) == attention_weights(fused.detach()) == []


# --- bias terms -----------------------------------------------------------------------------------


def with_own_statistics(net: nn.Module) -> nn.Module:
    """Batch normalisations that do something, as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
    return net.double().eval()


def small(*layers: nn.Module) -> nn.Module:
    """Layers between the toy network's first convolution and a classifier of 8 channels."""
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in (*layers, *head):
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
    return nn.Sequential(toy_network()[0], nn.ReLU(), *layers, *head)


class Twice(nn.Module):
    """One convolution in two places, and a step in place that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.conv(functional.relu_(self.conv(x)) + x))


class Residual(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv1(images))
        x = self.relu(self.inner(x) + x)
        return self.linear(self.relu(self.norm(self.conv2(x))).mean((2, 3)))  # type: ignore[no-any-return]


PIECEWISE_LINEAR = {
    "toy": toy_network(),
    "residual": Residual(),
    "pooled": small(nn.Conv2d(6, 8, 3), nn.LeakyReLU(), nn.MaxPool2d(2)),
    "normalised": small(
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
    ),
    "twice": small(Twice(), nn.Conv2d(6, 8, 1)),
    "grown": small(nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ReLU()),
    "in vectors": nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)
    ),
    "without biases": LinearNetwork(torch.randn(5, 3 * SIDE * SIDE)),
}  # fmt: skip


def decomposed(net: nn.Module) -> tuple[Tensor, Tensor]:
    """The target's logit, and the sum of input x gradient and all bias terms, per image."""
    terms: list[Tensor] = []
    with prepared(net), bias_terms(net, terms.append):
        logits, gradient = input_gradient(net)
    parts = [IMAGES * gradient, *terms]
    return logits.gather(1, TARGET[:, None])[:, 0], sum(part.flatten(1).sum(1) for part in parts)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_bias_terms_and_input_times_gradient_add_up_to_the_logit(name: str) -> None:
    """Completeness (Srinivas and Fleuret 2019, proposition 1)."""
    logit, total = decomposed(with_own_statistics(PIECEWISE_LINEAR[name]))
    torch.testing.assert_close(total, logit, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("curved", [nn.Tanh(), nn.SiLU(), nn.GroupNorm(2, 6)])
def test_what_is_not_piecewise_linear_has_biases_of_its_own(curved: nn.Module) -> None:
    net = with_own_statistics(small(curved, nn.Conv2d(6, 8, 3)))
    logit, total = decomposed(net)
    assert (total - logit).abs().min() > 1e-6


def test_bias_terms_have_their_channels_second() -> None:
    shapes = []
    net = nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(2), Transposed(), nn.Linear(6, 7),
                        Transposed(), nn.Flatten(), nn.Linear(7 * 64, 5)).double()  # fmt: skip
    with bias_terms(net, lambda term: shapes.append(tuple(term.shape))):
        input_gradient(net)
    assert shapes == [(4, 5), (4, 7, 64), (4, 6, 8, 8)]  # as the backward meets them


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_only_one_bias_term_is_alive_at_a_time() -> None:
    net = with_own_statistics(PIECEWISE_LINEAR["normalised"])
    terms: list[weakref.ref[Tensor]] = []
    alive = []

    def receive(term: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in terms))
        terms.append(weakref.ref(term))

    with prepared(net), bias_terms(net, receive):
        input_gradient(net)
    assert len(terms) == 6
    assert not any(alive)


def test_without_a_backward_there_are_no_bias_terms_and_no_hooks_stay() -> None:
    terms: list[Tensor] = []
    net = toy_network()
    before = facts(net)
    with bias_terms(net, terms.append), torch.no_grad():
        net(IMAGES)
    with pytest.raises(RuntimeError), bias_terms(net, terms.append):
        raise RuntimeError
    input_gradient(net)
    assert not terms
    assert facts(net) == before


def test_a_batch_normalisation_that_does_more_is_refused() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    net = small(nn.Conv2d(6, 8, 3), Activated(8))
    before = facts(net)
    with (
        pytest.raises(
            Unsupported, match="implicit bias of '3' cannot be read: Activated does more"
        ),
        bias_terms(net, print),
    ):
        pass
    assert facts(net) == before


# --- libraries ------------------------------------------------------------------------------------


def test_operations_behind_a_tensor_have_names_without_numbers() -> None:
    logits = toy_network()(IMAGES.clone().requires_grad_())
    names = set(operations_behind(logits).values())
    assert names >= {"Addmm", "Convolution", "Relu", "View", "AccumulateGrad"}


def test_a_rerouted_output_is_what_the_rest_of_the_network_reads() -> None:
    net = toy_network()
    before = net(IMAGES)
    with rerouted(net[3], lambda output: output * 2):
        doubled = net(IMAGES)
    torch.testing.assert_close(doubled - net[6].bias, 2 * (before - net[6].bias))
    assert torch.equal(net(IMAGES), before)


def test_whatever_a_library_does_to_modules_is_undone_also_after_an_error() -> None:
    net = toy_network()
    kept = net[0].register_forward_hook(lambda *given: None)
    before = [dict(vars(module)) for module in net.modules()]
    hooks = dict(net[0]._forward_hooks)

    def disturb() -> None:
        net[0].register_forward_hook(lambda *given: None)
        net[1].rule = "new"
        del net[2].padding_mode
        net._modules["3"] = nn.Identity()
        net.training = not net.training
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), untouched(net):
        disturb()
    assert [dict(vars(module)) for module in net.modules()] == before
    assert dict(net[0]._forward_hooks) == hooks
    kept.remove()
    assert not net[0]._forward_hooks


# --- training -------------------------------------------------------------------------------------


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, weight, bias, training=True)


def twice_differentiated(inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a function of y and of dx, towards x, gamma and beta."""
    y = normalised(*inputs)
    slope = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    first = (y.sin() * slope).sum()
    (dx,) = torch.autograd.grad(first, inputs[0], create_graph=True)
    return list(torch.autograd.grad((dx.cos() * slope.square()).sum() + first, inputs))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (6, 3), (2, 3, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_the_fused_batch_norm_has_the_derivatives_of_the_generic_one(
    shape: tuple[int, ...], scale: float
) -> None:
    """The small scale makes eps count."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected = twice_differentiated(inputs)
    with autograd.fused_batch_norm():
        found = twice_differentiated(inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_fused_batch_norm_passes_the_check_of_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, generator=generator)

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        y = normalised(x, weight, bias)
        return torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0]

    with autograd.fused_batch_norm():
        assert torch.autograd.gradcheck(
            gradient, (x, weight.requires_grad_()), check_undefined_grad=False
        )


def test_the_fused_batch_norm_updates_statistics_as_the_module_does() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    expected = one(x)
    with autograd.fused_batch_norm():
        found = other(x)
        assert other.eval()(x).grad_fn is not None  # in evaluation mode it stands aside
    assert type(found.grad_fn).__name__ == "_BatchNormBackward"
    assert torch.equal(found, expected)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_gradients_of_gradients_of_weights_are_refused_where_batch_norm_is_fused() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with autograd.fused_batch_norm():
        y = normalised(x, weight, torch.zeros(3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(y.sin().sum(), weight, create_graph=True)
    with pytest.raises(Unsupported, match="gradient of weights is not supported"):
        slope.sum().backward()


def test_the_guided_rule_sees_through_the_fused_batch_norm() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(5, dtype=torch.int64)

    def guided() -> Tensor:
        logits = net(x)
        with autograd.guided_relu(logits):
            return autograd.class_gradient(logits, target, (x,))[0]

    expected = guided()
    with autograd.fused_batch_norm():
        torch.testing.assert_close(guided(), expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_losses_is_each_images_own_and_can_be_differentiated() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    losses = (x**3).sum(1)
    assert torch.equal(autograd.loss_gradient(losses, x), 3 * x**2)
    again = autograd.loss_gradient(losses, x, create_graph=True)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], 6 * x)


def test_frozen_statistics_leave_every_module_in_its_mode_also_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    net[1].eval()

    def fail() -> None:
        with autograd.frozen_statistics(net):
            assert not net.training
            assert not net[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in net.modules()] == [True, True, False]
