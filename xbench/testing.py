"""Toy models with known answers, and the contract that every entry must pass, as plain functions.

A plug-in's test is one line::

    def test_contract():
        xbench.testing.check_method("my_method")

A broken law raises AssertionError with one sentence that says which.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .autograd import prepared
from .errors import BadImage, Unpriced, Unsupported
from .models.loading import describe_layers, load_model, weights_hash
from .plan import batch_needs, map_needs
from .probe import Explanation, Logits, MapOf, Probe, closure, cost, method_cost, stops_early
from .scoring import evaluated
from .types import Batch, Model

TOLERANCE = 1e-10
"""Between batch sizes in float64, relative to the map's largest value: rounding alone.

A class may declare another ``tolerance``, such as for a library that computes in float32.
"""

SIDE = 16


def toy_network(classes: int = 5, seed: int = 0) -> nn.Sequential:
    """Two convolutions with ReLU, global average pooling and a linear layer; float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        ).double()


def toy_model(classes: int = 5, seed: int = 0) -> Model:
    """:func:`toy_network` with a normalisation that is not trivial; its last_conv is 8 x 8."""
    net = toy_network(classes, seed).eval().requires_grad_(False)
    colours = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return Model("toy", net, *colours, {"last_conv": "3"}, (SIDE, SIDE))


def toy_transformer(classes: int = 5, seed: int = 0) -> Model:
    """torchvision's VisionTransformer of two layers and two heads, on 4 x 4 patches; float64."""
    from torchvision.models import VisionTransformer  # imports much

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = VisionTransformer(SIDE, 4, 2, 2, hidden_dim=8, mlp_dim=16, num_classes=classes)
        for parameter in net.parameters():  # several begin as zeros, and fresh tokens are all alike
            nn.init.normal_(parameter, std=0.3)
    net = net.double().eval().requires_grad_(False)
    roles = {"last_conv": "encoder.layers.encoder_layer_1.ln_1"}
    return Model("toy transformer", net, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), roles, (SIDE, SIDE))


def toy_model_for(method: Any) -> Model:
    """The toy that a method works on: a transformer if it declares that architecture."""
    is_for_transformers = getattr(method, "architecture", "") == "transformer"
    return toy_transformer() if is_for_transformers else toy_model()


def toy_batch(count: int = 8, seed: int = 0, side: int = SIDE) -> Batch:
    """Random images (N, 3, side, side) in float64 with keys, labels and square masks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)
    masks = torch.zeros(count, side, side, dtype=torch.float64)
    masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    return Batch(
        images, torch.arange(count) % 5, tuple(f"toy-{seed}-{at}" for at in range(count)), masks
    )


class LinearNetwork(nn.Module):
    """Logits = weight x flattened image: every gradient is a row of the weight (K, 3 * H * W)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class ShareNetwork(nn.Module):
    """Two classes, the first with probability = sum of share x mean pixel: areas are known by hand.

    Args:
        share: (H, W), non-negative, adding up to less than 1.
    """

    def __init__(self, share: Tensor) -> None:
        super().__init__()
        self.share = nn.Parameter(share)

    def forward(self, images: Tensor) -> Tensor:
        chosen = (images.mean(1) * self.share).sum((1, 2)).clamp(1e-12, 1 - 1e-12)
        return torch.stack((chosen.log(), (1 - chosen).log()), dim=1)


class PlantedNetwork(nn.Module):
    """Two classes; the first sees a checkerboard on the object, and dislikes one elsewhere.

    With :func:`planted_batch`, whose images hold both, the object's mask is the best explanation:
    to keep the object alone raises the probability, and a blurred or black object says nothing.
    """

    def __init__(self, objects: Tensor) -> None:
        super().__init__()
        side = objects.shape[-1]
        at = torch.arange(side)
        self.checker = nn.Parameter(((at[:, None] + at) % 2 * 2.0 - 1).double())
        self.objects = nn.Parameter(objects.double())

    def forward(self, images: Tensor) -> Tensor:
        seen = images.mean(1) * self.checker
        inside = (seen * self.objects).sum((1, 2)) / self.objects.sum()
        outside = (seen * (1 - self.objects)).sum((1, 2)) / (1 - self.objects).sum()
        logit = 8 * inside - 5 * outside - 0.5
        return torch.stack((logit, torch.zeros_like(logit)), dim=1)


def planted_batch(count: int = 8, side: int = SIDE) -> tuple[Model, Batch]:
    """A model whose evidence is known, and images that hold it; target 0 throughout."""
    batch = toy_batch(count, side=side)
    assert batch.masks is not None
    net = PlantedNetwork(batch.masks[0]).eval().requires_grad_(False)
    images = (net.checker + 1) / 2 * 0.9 + 0.1 * batch.images
    planted = Batch(images, torch.zeros(count, dtype=torch.int64), batch.keys, batch.masks)
    return Model("planted", net, (0.0,) * 3, (1.0,) * 3, {}, (side, side)), planted


# --- the contract ---------------------------------------------------------------------------------


def check_method(name: str, params: Mapping[str, Any] | None = None) -> None:
    """The contract of a method.

    Maps have the right shape, dtype and device and are finite; a batch of 8 equals eight batches of
    1, and an image with NaN changes its own map alone; the same seed gives the same bits; nothing
    is left behind; memory is flat over calls; the
    target matters unless the class declares ``class_agnostic``; it pickles, and its parameters make
    it again; an unsuitable network raises Unsupported; declared passes are counted passes.

    The network is :func:`toy_model`; for a class that declares ``architecture = "transformer"`` it
    is :func:`toy_transformer`, and the former must raise Unsupported.

    Raises:
        AssertionError: with the law that is broken.
    """
    method = registry.make("methods", name, params)
    _check_entry("methods", method)
    model, batch = toy_model_for(method), toy_batch()
    with unchanged(model, batch, name):
        _check_maps(name, method, model, batch)
        for _ in range(2):  # prepared() would hide a changed mode
            Probe(model, batch).explain(method)
    _check_memory(name, lambda: Probe(model, batch).explain(method))
    _check_unsuitable(name, method)


def _check_maps(name: str, method: Any, model: Model, batch: Batch) -> None:
    def explained(probe: Probe) -> Tensor:
        try:
            return probe.explain(method).raw
        except ValueError as error:
            raise AssertionError(f"{name}: {error}") from error

    with prepared(model.net) as meter:
        needs = batch_needs([method], [])
        probe = Probe(model, batch, needs=needs, meter=meter)
        assert probe.probability.isfinite().all()
        maps = explained(probe)
        assert maps.dtype == probe.inputs.dtype, (
            f"{name} returns {maps.dtype}, not the input's dtype"
        )
        assert maps.device == probe.inputs.device, f"{name} leaves the input's device"
        assert maps.isfinite().all(), f"{name} returns maps that are not finite"
        _check_passes(name, method, probe)
        again = explained(Probe(model, batch, needs=needs, meter=meter))
        assert torch.equal(maps, again), f"{name} is not the same twice under one seed"
        single = torch.cat(
            [explained(Probe(model, one, needs=needs, meter=meter)) for one in _singles(batch)]
        )
        worst = float((maps - single).abs().max() / maps.abs().max().clamp_min(1e-300))
        assert worst <= getattr(method, "tolerance", TOLERANCE), (
            f"{name}: a batch of 8 differs from 8 batches of 1 by {worst:.1e}"
        )
        images = batch.images.clone()
        images[0, :, ::2] = torch.nan
        holed = replace(batch, images=images)
        broken = Probe(model, holed, needs=needs, target=probe.target, meter=meter)
        assert torch.equal(explained(broken)[1:], maps[1:]), (
            f"{name}: NaN in one image changes another image's map"
        )
        if not getattr(method, "class_agnostic", False):
            other = Probe(model, batch, target=(probe.target + 1) % 5, meter=meter)
            changed = explained(other)
            assert not torch.equal(maps, changed), f"{name} does not depend on the target class"


def _check_passes(name: str, method: Any, probe: Probe) -> None:
    declared = method_cost(method, probe.model, beside=(Logits(),))
    if declared is None:  # the plan says "unknown"
        return
    if stops_early(closure([MapOf(method)])):
        within = all(spent <= bound for spent, bound in zip(probe.spent, declared, strict=True))
        assert within, f"{name} declares at most {declared} but spends {probe.spent}"
    else:
        assert probe.spent == declared, f"{name} declares {declared} but spends {probe.spent}"


def _check_unsuitable(name: str, method: Any) -> None:
    flat = Model(
        "flat", nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5), nn.Tanh()).double()
    )
    try:
        with prepared(flat.net):
            Probe(flat, toy_batch(2)).explain(method)
    except Unsupported:
        pass
    except Exception as error:
        if "has no module" not in str(error):  # a layer that is not there is found when planning
            raise AssertionError(
                f"{name} meets an unsuitable network with {type(error).__name__} ({error}), "
                "not with Unsupported"
            ) from error
    if getattr(method, "architecture", "") == "transformer":
        model = toy_model()
        try:
            with prepared(model.net):
                Probe(model, toy_batch(2)).explain(method)
        except Unsupported:
            return
        raise AssertionError(f"{name} declares transformers but works on a convolutional network")


def check_metric(
    name: str, params: Mapping[str, Any] | None = None, *, finds_object: bool = True
) -> None:
    """The contract of a metric.

    One value per image, the same for a batch and one by one, inside the declared range; the
    object's mask beats random maps in the declared direction, unless that is "neither", where the
    network's evidence is known (a metric that runs the method again does so with ``gradient``,
    which sees the object there); one that declares a ``gate`` lets ``gradient`` pass there, and no
    map that ignores the network;
    constant and zero maps give a value or NaN, a map with NaN gives ``failed: nonfinite`` for its
    own image alone; declared passes are counted passes; the same twice; nothing is left behind;
    memory is flat over calls.

    Args:
        name: in the registry.
        params: its hyper-parameters.
        finds_object: False where the object's mask need not beat random maps, such as for a metric
            that compares a given map with the method's own.

    Raises:
        AssertionError: with the law that is broken.
    """
    metric = registry.make("metrics", name, params)
    _check_entry("metrics", metric)
    assert metric.better in ("higher", "lower", "neither"), (
        f"{name} must declare better: higher or lower, or neither for a fact about maps"
    )
    model, batch = planted_batch()
    with unchanged(model, batch, name):
        _check_scores(name, metric, model, batch, finds_object)
        random = Probe(model, batch).uniform("random map")
        method = registry.make("methods", "gradient")
        metric(Explanation(Probe(model, batch), random, method))
    _check_memory(name, lambda: metric(Explanation(Probe(model, batch), random, method)))


def _check_scores(name: str, metric: Any, model: Model, batch: Batch, finds_object: bool) -> None:
    assert batch.masks is not None
    method = registry.make("methods", "gradient")
    with prepared(model.net) as meter:

        def values(saliency: Tensor, part: Batch = batch) -> Tensor:
            target = torch.zeros(len(part.keys), dtype=torch.int64)
            probe = Probe(
                model, part, needs=batch_needs([], [[metric]]), target=target, meter=meter
            )
            assert probe.probability.isfinite().all()
            found = metric(Explanation(probe, saliency, method))
            assert isinstance(found, Tensor), f"{name} must return a tensor"
            assert tuple(found.shape) == (len(part.keys),), (
                f"{name} must return one value per image"
            )
            asked = (Logits(), *batch_needs([], [[metric]]), *map_needs([metric], method))
            try:
                declared = cost(closure(asked, method), model)
            except Unpriced:  # the plan says "unknown"
                return found.double()
            assert probe.spent == declared, f"{name} declares {declared} but spends {probe.spent}"
            return found.double()

        random = Probe(model, batch, meter=meter).uniform("random map")
        drawn, oracle = values(random), values(batch.masks)
        assert torch.equal(drawn, values(random)), f"{name} is not the same twice"
        single = torch.cat(
            [values(random[at : at + 1], one) for at, one in enumerate(_singles(batch))]
        )
        worst = float((drawn - single).abs().max() / drawn.abs().max().clamp_min(1e-300))
        assert worst <= TOLERANCE, (
            f"{name}: a batch of 8 differs from 8 batches of 1 by {worst:.1e}"
        )
        gain = float((oracle - drawn).mean()) * (1 if metric.better == "higher" else -1)
        gate = getattr(metric, "gate", None)
        told = metric.better != "neither" and finds_object and gate is None
        assert gain > 0 or not told, (
            f"{name}: the object's mask does not beat random maps ({metric.better} is better)"
        )
        if gate is not None:
            _check_gate(name, metric, Probe(model, batch, meter=meter), gate)
        low, high = getattr(metric, "range", (float("-inf"), float("inf")))
        for found in (drawn, oracle):
            assert ((found >= low) & (found <= high)).all(), (
                f"{name} leaves its range {low} to {high}"
            )
        for flat in (torch.ones_like(random), torch.zeros_like(random)):
            found = values(flat)
            assert not found.isinf().any(), f"{name} of a constant map is infinite"
        broken = random.clone()
        broken[0, 0, 0] = torch.nan
        probe = Probe(model, batch, meter=meter)
        outcomes = evaluated(metric, Explanation(probe, broken, method))
        assert outcomes[0][1] == "failed: nonfinite", f"{name} scores a map that holds NaN"
        whole = Explanation(Probe(model, batch, meter=meter), random, method)
        expected = evaluated(metric, whole)
        assert outcomes[1:] == expected[1:], f"{name}: NaN in one map changes another image's score"


def _check_gate(name: str, metric: Any, probe: Probe, gate: float) -> None:
    for method, passes in (("gradient", True), ("random", False)):
        mean = float(metric(probe.explain(registry.make("methods", method))).mean())
        is_better = mean > gate if metric.better == "higher" else mean < gate
        assert is_better == passes, (
            f"{name}: {method}, at {mean:.3g}, is {'not ' if passes else ''}let through the gate"
        )


def check_model(
    name: str, params: Mapping[str, Any] | None = None, data: Path | None = None, side: int = 32
) -> None:
    """The contract of a model: logits (N, K), evaluation mode, frozen, a stable hash, a last layer.

    Raises:
        AssertionError: with the law that is broken.
    """
    entry = registry.make("models", name, params)
    _check_entry("models", entry)
    network = entry.describe(data)
    assert weights_hash(network) == weights_hash(entry.describe(data)), f"{name}: the hash changes"
    net, layers, _ = describe_layers(network, (side, side))
    assert "last_conv" not in layers or net.get_submodule(layers["last_conv"]) is not None
    model = load_model(network, name, layers, "cpu")
    logits = model.net(torch.rand(2, len(model.mean), side, side))
    assert logits.ndim == 2, f"{name} returns {tuple(logits.shape)}, not (images, classes)"
    assert len(logits) == 2, f"{name} returns {len(logits)} rows for 2 images"
    assert not any(module.training for module in model.net.modules()), f"{name} is in training mode"
    assert not any(p.requires_grad for p in model.net.parameters()), f"{name} is not frozen"


def check_dataset(
    name: str, params: Mapping[str, Any] | None = None, data: Path | None = None
) -> None:
    """The contract of a data set: stable keys and order, images in [0, 1], labels in range.

    Raises:
        AssertionError: with the law that is broken.
    """
    entry = registry.make("datasets", name, params)
    _check_entry("datasets", entry)
    source, twin = entry.open(data), entry.open(data)
    assert list(source.ids) == list(twin.ids), f"{name}: ids change from one opening to the next"
    assert len(set(source.ids)) == len(source.ids), f"{name} has an id twice"
    chosen = range(min(8, len(source.ids)))
    keys = [source.key(at) for at in chosen]
    assert keys == [twin.key(at) for at in chosen], f"{name}: keys change"
    assert len(set(keys)) == len(keys), f"{name} has a key twice"
    for sample in source.load(list(chosen)):
        if isinstance(sample, BadImage):
            continue
        assert sample.image.shape == (3, *source.size), f"{name}: an image is {sample.image.shape}"
        assert sample.image.dtype == torch.float32, f"{name}: images must be float32"
        assert sample.image.min() >= 0, f"{name}: pixels must lie in [0, 1]"
        assert sample.image.max() <= 1, f"{name}: pixels must lie in [0, 1]"
        top = len(source.classes) or sample.label + 1
        assert -1 <= sample.label < top, f"{name}: label {sample.label} is out of range"
        assert (sample.mask is not None) == source.has_masks, f"{name}: has_masks does not hold"


def _check_entry(kind: str, entry: Any) -> None:
    again = registry.make(kind, entry.name, registry.parameters(entry))
    assert again == entry, f"{entry.name}: its parameters do not make it again"
    assert hash(again) == hash(entry), f"{entry.name} must be hashable"
    assert pickle.loads(pickle.dumps(entry)) == entry, f"{entry.name} does not survive pickling"  # noqa: S301
    assert (type(entry).__doc__ or "").strip(), f"{entry.name} has no docstring"


def _singles(batch: Batch) -> Iterator[Batch]:
    return (batch.part(slice(at, at + 1)) for at in range(len(batch.keys)))


@contextmanager
def unchanged(model: Model, batch: Batch, name: str) -> Iterator[None]:
    """Fails if weights, modes, hooks, gradients' flags, images or the global seed change."""

    def state() -> list[Any]:
        found: list[Any] = [torch.random.get_rng_state(), batch.images.clone()]
        for module in model.net.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            found.append((module.training, *(len(hook) for hook in hooks)))
        for value in model.net.state_dict(keep_vars=True).values():
            found.append((value.requires_grad, value.grad is None))
            found.append(value.detach().clone())
        return found

    before = state()
    yield
    after = state()
    same = len(before) == len(after) and all(
        torch.equal(old, new) if isinstance(old, Tensor) else old == new
        for old, new in zip(before, after, strict=True)
    )
    assert same, f"{name} leaves a trace in the network, the images or the global random state"


def _check_memory(name: str, call: Any) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    gc.freeze()  # of what was there before, nothing need be looked at
    try:
        call()
        before = tensors()
        for _ in range(3):
            call()
        assert tensors() <= before, f"{name} keeps tensors alive from one call to the next"
    finally:
        gc.unfreeze()


__all__ = [
    "LinearNetwork",
    "PlantedNetwork",
    "ShareNetwork",
    "check_dataset",
    "check_method",
    "check_metric",
    "check_model",
    "planted_batch",
    "toy_batch",
    "toy_model",
    "toy_model_for",
    "toy_network",
    "toy_transformer",
    "unchanged",
]
