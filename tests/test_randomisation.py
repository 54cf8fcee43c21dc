"""Layers that are drawn anew: what changes, on what that depends, and that nothing is left."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xbench.errors import Unsupported
from xbench.models.resnet import shapes_resnet
from xbench.randomisation import drawn_anew, layers_of, stage_groups
from xbench.testing import toy_network, toy_transformer


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def drawn(net: nn.Module, paths: list[str] | None = None, seed: int = 0) -> dict[str, Tensor]:
    with drawn_anew(net, list(layers_of(net)) if paths is None else paths, seed):
        return state(net)


def changed(net: nn.Module, after: dict[str, Tensor]) -> set[str]:
    return {key for key, value in net.state_dict().items() if not torch.equal(value, after[key])}


# --- nothing is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_the_same_memory_with_the_same_bits(fails: bool) -> None:
    net = shapes_resnet()
    before = state(net)
    places = {key: value.data_ptr() for key, value in net.state_dict().items()}
    identities = [id(parameter) for parameter in net.parameters()]
    random = torch.random.get_rng_state()
    try:
        with drawn_anew(net, list(layers_of(net)), 0):
            assert not torch.equal(net.conv1.weight, before["conv1.weight"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {key: value.data_ptr() for key, value in net.state_dict().items()} == places
    assert [id(parameter) for parameter in net.parameters()] == identities
    assert torch.equal(torch.random.get_rng_state(), random)


def test_nothing_is_left_by_a_layer_whose_own_function_fails() -> None:
    class Broken(nn.Linear):
        made = False

        def reset_parameters(self) -> None:
            super().reset_parameters()
            if self.made:
                raise RuntimeError("no more")

    net = nn.Sequential(nn.Linear(3, 3), Broken(3, 3))
    net[1].made = True
    before = state(net)
    with (
        pytest.raises(Unsupported, match=r"layer '1' cannot be drawn anew.*no more"),
        drawn_anew(net, ["0", "1"], 0),
    ):
        pass
    assert not changed(net, before)


# --- on what the weights depend -------------------------------------------------------------------


def test_weights_depend_on_seed_and_path_alone() -> None:
    net = toy_network()
    one = drawn(net)
    torch.rand(5)
    reverse = drawn(net, ["6", "2", "0"])
    for key, value in one.items():
        assert torch.equal(value, reverse[key]), key
        assert torch.equal(value, drawn(net, [key.partition(".")[0]])[key]), key
        assert not torch.equal(value, drawn(net, seed=1)[key]), key


def test_layers_of_equal_shape_draw_different_weights() -> None:
    after = drawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert not torch.equal(after["0.weight"], after["1.weight"])


def test_the_precision_of_the_network_does_not_change_the_draw() -> None:
    one, other = drawn(toy_transformer().net), drawn(toy_transformer().net.float())
    for key, value in one.items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, other[key].double(), rtol=1e-6, atol=1e-7), key


# --- what a layer draws ---------------------------------------------------------------------------


def test_a_layer_draws_by_its_own_function() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    for value in net[1].state_dict().values():
        value.fill_(7)
    after = drawn(net)
    bound = 1 / math.sqrt(3 * 9)
    for name in ("0.weight", "0.bias"):
        assert 0.5 * bound < after[name].abs().max() <= bound
    with drawn_anew(net, ["1"], 0):  # the normalisation does nothing
        maps = torch.rand(2, 8, 4, 4)
        assert torch.allclose(net[1].eval()(maps), maps, atol=1e-4)
    assert after["1.num_batches_tracked"] == 7


def test_what_has_no_function_of_its_own_keeps_mean_and_deviation() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(3 + 0.1 * torch.randn(100, 50))
            self.scale = nn.Parameter(torch.full((4,), 0.5))
            self.register_buffer("index", torch.arange(4.0))

    net = Tokens()
    after = drawn(net)
    assert changed(net, after) == {"position"}
    assert abs(after["position"].mean() - 3) < 0.01
    assert abs(after["position"].std() - 0.1) < 0.01
    corr = torch.corrcoef(torch.stack((net.position.flatten(), after["position"].flatten())))
    assert abs(corr[0, 1]) < 0.1


def test_every_tensor_of_a_transformer_that_is_not_constant_changes() -> None:
    net = toy_transformer().net
    assert changed(net, drawn(net)) == set(net.state_dict())


def test_shared_weights_are_drawn_once_and_change_everywhere() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    assert list(layers_of(net)) == ["0"]
    after = drawn(net)
    assert torch.equal(after["0.weight"], after["2.weight"])
    assert changed(net, after) == {"0.weight", "2.weight"}


def test_a_recurrent_layer_which_keeps_its_weights_in_a_list_uses_the_new_ones() -> None:
    net, steps = nn.LSTM(3, 4), torch.rand(2, 1, 3)
    before = net(steps)[0]
    with drawn_anew(net, [""], 0):
        inside = net(steps)[0]
    assert not torch.allclose(before, inside)
    assert torch.equal(net(steps)[0], before)


def test_weights_behind_a_parametrisation_change_and_come_back() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
    before = net.weight.clone()
    with drawn_anew(net, list(layers_of(net)), 0):
        assert not torch.allclose(net.weight, before)
    assert torch.equal(net.weight, before)


def test_a_function_that_resets_its_children_too_leaves_those_alone() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.inner = nn.Linear(4, 4)

        def reset_parameters(self) -> None:
            nn.init.uniform_(self.scale, 5, 6)
            self.inner.reset_parameters()

    net = Outer()
    after = drawn(net, [""])
    assert changed(net, after) == {"scale"}
    assert after["scale"].min() >= 5


# --- stages ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20) | st.just("all"))
def test_stages_are_neighbours_of_nearly_equal_number_and_hold_every_layer_once(stages) -> None:
    net = shapes_resnet()
    layers = list(layers_of(net))
    groups = stage_groups(net, "bottom_up", stages)
    assert [path for group in groups for path in group] == layers
    assert groups[::-1] == stage_groups(net, "top_down", stages)
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == (len(layers) if stages == "all" else min(stages, len(layers)))


def test_the_output_layer_is_the_top_and_layers_are_those_with_parameters() -> None:
    assert list(layers_of(toy_network())) == ["0", "2", "6"]
    assert stage_groups(toy_network(), "top_down", "all") == [["6"], ["2"], ["0"]]
    assert stage_groups(nn.ReLU(), "top_down", 3) == []
