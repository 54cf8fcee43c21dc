"""Laws of the notebook's functions: a run's numbers, for a network and images at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_contract import CHEAP
from torch import Tensor, nn

import xbench
from xbench import registry
from xbench.api import attribute, content_keys, evaluate, score
from xbench.autograd import prepared
from xbench.datasets.shapes import generate
from xbench.errors import Unsupported, UsageError
from xbench.models.loading import load_model
from xbench.plan import batch_needs
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import toy_batch, toy_network
from xbench.types import Batch, Model

BATCH = toy_batch(7)
IMAGES, MASKS, KEYS = BATCH.images, BATCH.masks, BATCH.keys
NORM: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
METHODS = sorted(
    name
    for name, entry in registry.entries("methods").items()
    # the contract is enough for the libraries' classes; others do not work on the toy network
    if not entry.summary and not hasattr(entry.load(), "architecture")
)
METRICS = sorted(name for name, entry in registry.entries("metrics").items() if not entry.summary)
METRICS_OF_MAPS = [
    name for name in METRICS if not getattr(registry.find("metrics", name), "needs_method", False)
]


def probe_of(net: nn.Module, meter: Any, **how: Any) -> Probe:
    """As the functions should build it, for all images at once."""
    model = Model("toy", net, NORM["mean"], NORM["std"], {"last_conv": "3"}, (16, 16))
    target = how.get("target")
    labels = torch.full((7,), -1) if target is None else target
    batch = Batch(IMAGES, labels, how.get("keys", KEYS), MASKS)
    return Probe(
        model,
        batch,
        needs=how.get("needs", ()),
        seed=how.get("seed", 0),
        target="predicted" if target is None else target,
        meter=meter,
    )


# --- equal to probes built by hand ----------------------------------------------------------------


@pytest.mark.parametrize("target", [None, torch.tensor([4, 3, 2, 1, 0, 1, 2])], ids=["top", "own"])
@pytest.mark.parametrize("name", METHODS)
def test_attribute_is_the_methods_map_of_a_probe(name: str, target: Tensor | None) -> None:
    net = toy_network()
    how = {**NORM, **CHEAP.get(name, {})}
    found = attribute(net, IMAGES, name, target=target, masks=MASKS, keys=KEYS, seed=3, **how)
    method = registry.make("methods", name, CHEAP.get(name))
    with prepared(net) as meter:
        probe = probe_of(net, meter, target=target, seed=3, needs=batch_needs([method], []))
        assert torch.equal(found, probe.explain(method).raw)
    assert found.dtype == torch.float64


@pytest.mark.parametrize("name", METRICS_OF_MAPS)
def test_score_is_the_metrics_value_of_a_probe(name: str) -> None:
    net = toy_network()
    maps = torch.randn(7, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    maps[2] = 1.0
    maps[3, 0, 0] = torch.nan
    found = score(net, IMAGES, maps, name, masks=MASKS, keys=KEYS, **NORM)
    metric = registry.make("metrics", name)
    with prepared(net) as meter:
        explanation = Explanation(probe_of(net, meter), maps)
        expected = [value for value, _ in evaluated(metric, explanation)]
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found[3].isnan()


@pytest.mark.parametrize("name", sorted({*METRICS} - {*METRICS_OF_MAPS}))
def test_a_metric_that_runs_the_method_again_cannot_score_maps_alone(name: str) -> None:
    net = toy_network()
    with pytest.raises(Unsupported, match=r"given without it; use xbench\.evaluate"):
        score(net, IMAGES, torch.rand(7, 16, 16).double(), name, masks=MASKS, **NORM)
    tables = [
        evaluate(net, IMAGES, ["grad_cam"], [name], masks=MASKS, batch_size=size, **NORM)
        for size in (7, 3)
    ]
    assert set(tables[0]["status"]) == {"ok"}
    np.testing.assert_allclose(tables[0]["value"], tables[1]["value"], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("saboteurs")
def test_an_exception_of_a_metric_reaches_its_caller_unchanged() -> None:
    maps = torch.rand(7, 16, 16).double()
    with pytest.raises(ValueError, match=r"^the metric's own words$"):
        score(toy_network(), IMAGES, maps, "sabotage/metric_raise")
    with pytest.raises(ValueError, match=r"^the metric's own words$"):
        evaluate(toy_network(), IMAGES, ["gradient"], ["rcap", "sabotage/metric_raise"])


def test_evaluate_is_attribute_and_score_of_each_pair() -> None:
    net = toy_network()
    methods = ["gradient", {"name": "smooth_grad", "samples": 3}, "grad_cam"]
    metrics = ["rcap", {"name": "insertion", "steps": 4}, "mae"]
    table = evaluate(net, IMAGES, methods, metrics, masks=MASKS, keys=KEYS, **NORM)
    assert list(table.columns) == ["image", "method", "metric", "value", "status"]
    assert len(table) == 7 * 3 * 3
    assert set(table["status"]) == {"ok"}
    assert set(table["method"]) == {"gradient", "smooth_grad(samples=3)", "grad_cam"}
    assert set(table["metric"]) == {"rcap", "insertion(steps=4)", "mae"}
    for method in methods:
        params = {"name": method} if isinstance(method, str) else dict(method)
        maps = attribute(net, IMAGES, params.pop("name"), keys=KEYS, **NORM, **params)
        for metric in metrics:
            chosen = {"name": metric} if isinstance(metric, str) else dict(metric)
            label = registry.label(registry.make("metrics", **split(dict(chosen))))
            wanted = score(
                net, IMAGES, maps, chosen.pop("name"), masks=MASKS, keys=KEYS, **NORM, **chosen
            )
            name = registry.label(registry.make("methods", **split(named(method))))
            rows = table[(table["method"] == name) & (table["metric"] == label)]
            assert list(rows["image"]) == list(KEYS)
            # passes are shared, so the graph begins elsewhere: rounding alone
            np.testing.assert_allclose(rows["value"], wanted.numpy(), rtol=1e-10, atol=1e-12)


def named(item: Any) -> dict[str, Any]:
    return {"name": item} if isinstance(item, str) else dict(item)


def split(item: dict[str, Any]) -> dict[str, Any]:
    return {"name": item.pop("name"), "params": item}


def test_evaluate_shares_passes_as_a_run_does() -> None:
    net = toy_network()
    rows: list[int] = []
    net.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    methods = ["grad_cam", "layer_cam", "gradient", "smooth_grad", "absolute_grad"]
    evaluate(net, IMAGES, methods, ["average_drop", "average_gain", "average_increase"], **NORM)
    # the look for the last layer; one clean pass, 20 noisy ones, one masked for each method
    assert rows == [1] + [7] * (1 + 20 + 5)


def test_the_package_offers_the_functions_by_name() -> None:
    assert xbench.attribute is attribute
    assert xbench.score is score
    assert xbench.evaluate is evaluate


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", METHODS)
def test_in_float64_maps_do_not_depend_on_the_batch_size(name: str, size: int) -> None:
    how = {**NORM, **CHEAP.get(name, {})}
    whole = attribute(toy_network(), IMAGES, name, masks=MASKS, **how)
    found = attribute(toy_network(), IMAGES, name, masks=MASKS, batch_size=size, **how)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", METRICS_OF_MAPS)
def test_in_float64_scores_do_not_depend_on_the_batch_size(name: str, size: int) -> None:
    net = toy_network()
    maps = torch.rand(7, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    whole = score(net, IMAGES, maps, name, masks=MASKS, **NORM)
    found = score(net, IMAGES, maps, name, masks=MASKS, batch_size=size, **NORM)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gradient", "grad_cam", "guided_absolute_grad"])
def test_in_float32_a_subset_at_the_same_batch_size_has_the_same_bits(name: str) -> None:
    network = registry.make("models", "shapes/resnet").describe(None)
    net = load_model(network, "shapes/resnet", network.layers, "cpu").net
    images, _, _ = generate(3, "test", range(8))
    how: dict[str, Any] = {"mean": network.mean, "std": network.std, "batch_size": 5}
    params = {"samples": 2} if name == "guided_absolute_grad" else {}
    maps = attribute(net, images, name, **how, **params)
    scores = score(net, images, maps, "rcap", **how)
    for chosen in ([6], [3, 0], [7, 6, 5, 4, 3, 2]):
        assert torch.equal(attribute(net, images[chosen], name, **how, **params), maps[chosen])
        some = score(net, images[chosen], maps[chosen], "rcap", **how)
        assert torch.equal(some, scores[chosen])


def test_more_images_than_a_batch_are_cut_into_batches_of_32() -> None:
    net = toy_network()
    rows: list[int] = []
    net.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    found = attribute(net, toy_batch(40).images, "gradient")
    assert found.shape == (40, 16, 16)
    assert rows == [1, 32, 32]
    torch.testing.assert_close(found[:7], attribute(net, IMAGES, "gradient"), rtol=0, atol=1e-10)


def test_keys_make_the_noise_and_default_to_the_content() -> None:
    net = toy_network()

    def noisy(images: Tensor = IMAGES, **how: Any) -> Tensor:
        return attribute(net, images, "smooth_grad", samples=2, **how)

    assert torch.equal(noisy(), noisy(keys=content_keys(IMAGES)))
    assert not torch.equal(noisy(), noisy(keys=KEYS))
    assert not torch.equal(noisy(), noisy(seed=1))
    backwards = noisy(IMAGES.flip(0)).flip(0)
    torch.testing.assert_close(backwards, noisy(), rtol=0, atol=1e-10)


def test_content_keys_tell_images_apart_and_equal_ones_together() -> None:
    keys = content_keys(torch.cat((IMAGES, IMAGES[:2])))
    assert len(set(keys)) == 7
    assert keys[:2] == keys[7:]


# --- the network is left as it was found ----------------------------------------------------------


class Careless(nn.Sequential):
    """Training mode, trainable, in place: as a notebook has it after a training loop."""

    def __init__(self) -> None:
        plain = toy_network()
        super().__init__(
            plain[0],
            nn.BatchNorm2d(6).double(),
            nn.ReLU(inplace=True),
            plain[2],
            nn.ReLU6(inplace=True),
            *plain[4:6],
            nn.Dropout(0.5),
            plain[6],
        )


def facts(net: nn.Module) -> list[Any]:
    found: list[Any] = [
        (m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._backward_hooks))
        for m in net.modules()
    ]
    found += [(p.requires_grad, p.grad is None) for p in net.parameters()]
    return [*found, *(value.tolist() for value in net.state_dict().values())]


@pytest.mark.parametrize("name", METHODS)
def test_the_network_is_left_as_it_was_found(name: str) -> None:
    net = Careless().train()
    net[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    before, images, state = facts(net), IMAGES.clone(), torch.random.get_rng_state()
    cheap = CHEAP.get(name, {})
    maps = attribute(net, IMAGES, name, masks=MASKS, **cheap)
    score(net, IMAGES, maps, "insertion", steps=3)
    evaluate(net, IMAGES, [{"name": name, **cheap}], ["rcap"], masks=MASKS)
    assert facts(net) == before
    assert torch.equal(IMAGES, images)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_network_is_left_as_it_was_found_after_an_error_too() -> None:
    net = Careless().train()
    before = facts(net)
    with pytest.raises(UsageError):
        attribute(net, IMAGES, "grad_cam", layer="nowhere")
    with pytest.raises(Unsupported):
        score(net, IMAGES, IMAGES[:, 0], "mae")
    with pytest.raises(RuntimeError):
        attribute(net, IMAGES[:, :2], "gradient", mean=(0.0, 0.0), std=(1.0, 1.0))
    assert facts(net) == before


def test_a_training_network_is_explained_in_evaluation_mode() -> None:
    net = Careless().train()
    found = attribute(net, IMAGES, "gradient")
    assert torch.equal(found, attribute(net.eval(), IMAGES, "gradient"))


def test_a_callers_no_grad_changes_nothing() -> None:
    expected = attribute(toy_network(), IMAGES, "grad_cam")
    with torch.no_grad():
        assert torch.equal(attribute(toy_network(), IMAGES, "grad_cam"), expected)


# --- layers ---------------------------------------------------------------------------------------


def test_the_last_feature_map_is_found() -> None:
    net = toy_network()
    found = attribute(net, IMAGES, "grad_cam")
    assert torch.equal(found, attribute(net, IMAGES, "grad_cam", layer="3"))
    assert not torch.equal(found, attribute(net, IMAGES, "grad_cam", layer="1"))


def test_another_layer_can_be_named_for_all_or_for_one_method() -> None:
    net = toy_network()
    first = {"name": "grad_cam", "layer": "1"}
    whole = evaluate(net, IMAGES, ["grad_cam", first], ["rcap"], layer="1")
    values = whole["value"].to_numpy().reshape(2, 7)
    assert np.array_equal(values[0], values[1])


def test_an_unknown_layer_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no module 'layer4'; its children are 0, 1, 2"):
        attribute(toy_network(), IMAGES, "grad_cam", layer="layer4")


def test_a_network_without_feature_maps_says_so_to_cams_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5)).double()
    assert attribute(net, IMAGES, "gradient").shape == (7, 16, 16)
    with pytest.raises((Unsupported, UsageError), match="last_conv"):
        attribute(net, IMAGES, "grad_cam")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: attribute(net, IMAGES, "grad_camm"), "did you mean 'grad_cam'"),
        (lambda net: score(net, IMAGES, IMAGES[:, 0], "rcapp"), "did you mean 'rcap'"),
        (lambda net: evaluate(net, IMAGES, ["x"], ["rcap"]), "unknown method 'x'"),
        (lambda net: evaluate(net, IMAGES, [{"samples": 3}], ["rcap"]), "'name'"),
        (lambda net: attribute(net, IMAGES, "smooth_grad", sample=3), "no parameter 'sample'"),
        (lambda net: attribute(net, IMAGES.float(), "gradient"), "images are torch.float32"),
        (lambda net: attribute(net, IMAGES[0], "gradient"), r"must be a float tensor \(N, C, H"),
        (lambda net: attribute(net, IMAGES[:0], "gradient"), r"must be a float tensor \(N, C, H"),
        (lambda net: attribute(net, (IMAGES * 255).byte(), "gradient"), r"in \[0, 1\]"),
        (lambda net: attribute(net, IMAGES, "gradient", target=[1, 2]), "target has 2 entries"),
        (lambda net: attribute(net, IMAGES, "gradient", keys=["a"]), "keys has 1 entries for 7"),
        (lambda net: score(net, IMAGES, IMAGES[:, 0], "mae", masks=MASKS[:3]), "masks has 3"),
        (lambda net: score(net, IMAGES, IMAGES[:3, 0], "rcap"), r"maps have the shape \(3, 16"),
        (lambda net: score(net, IMAGES, IMAGES, "rcap"), r"expected \(7, 16, 16\)"),
        (lambda net: attribute(net, IMAGES, "gradient", target=3), "target must hold one class"),
        (lambda net: attribute(net, IMAGES, "gradient", target=[[1]] * 7), "target must hold one"),
        (lambda net: attribute(net, IMAGES, "gradient", target=[0.5] * 7), "target must hold one"),
        (lambda net: attribute(net, IMAGES, "gradient", target=[9] * 7), "target .* 5 classes"),
        (lambda net: attribute(net, IMAGES, "gradient", target=[-1] * 7), "target .* 5 classes"),
        (lambda net: attribute(net, IMAGES, "gradient", batch_size=0), "batch_size must be"),
        (lambda net: attribute(net, IMAGES, "gradient", batch_size=-3), "batch_size must be"),
        (lambda net: score(net, IMAGES, IMAGES[:, 0] > 0.5, "rcap"), "maps are torch.bool"),
        (
            lambda net: score(net, IMAGES, IMAGES[:, 0], "mae", masks=MASKS[:, :8]),
            r"masks have the shape \(7, 8, 16\), expected \(7, 16, 16\)",
        ),
    ],
)  # fmt: skip
def test_a_wrong_call_is_an_error_that_says_what_to_change(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(toy_network())


def test_a_metric_without_its_masks_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="no object masks"):
        score(toy_network(), IMAGES, IMAGES[:, 0], "mae")


def test_a_network_that_returns_no_logits_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"returns \(7, 5, 1\), not logits|returns \(1, 5, 1\)"):
        attribute(nn.Sequential(*toy_network(), nn.Unflatten(1, (5, 1))), IMAGES, "gradient")


@pytest.mark.parametrize("name", ["gradient", "smooth_grad", "guided_absolute_grad", "grad_cam"])
@pytest.mark.parametrize("size", [1, 7])
def test_another_forward_shape_moves_maps_within_the_bound_t1(name: str, size: int) -> None:
    """T1: median relative distance 1e-3, rank correlation 0.995, overlap of the top tenth 0.95.

    Rounding flips single ReLUs, so single pixels may move more; the noise is the same bit by bit.
    """
    network = registry.make("models", "shapes/resnet").describe(None)
    net = load_model(network, "shapes", {}, "cpu").net
    images, _, _ = generate(7, "test", range(32))
    colours = {"mean": network.mean, "std": network.std}
    at_32, other = (
        attribute(net, images, name, batch_size=rows, **colours).flatten(1) for rows in (32, size)
    )
    distance = (at_32 - other).norm(dim=1) / at_32.norm(dim=1)
    assert distance.median() <= 1e-3
    orders = [maps.argsort(dim=1, stable=True).argsort(dim=1).double() for maps in (at_32, other)]
    centred = [order - order.mean(1, keepdim=True) for order in orders]
    spearman = (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
    assert spearman.min() >= 0.995
    top = [order >= 0.9 * order.shape[1] for order in orders]
    assert ((top[0] & top[1]).sum(1) / top[0].sum(1)).min() >= 0.95
