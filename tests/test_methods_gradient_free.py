"""Laws of maps that ask about each channel, held against one image and channel at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xbench import registry
from xbench.autograd import Meter, prepared
from xbench.errors import Unsupported
from xbench.layers import LayerFacts
from xbench.methods import gradient_free
from xbench.methods.gradient_free import AblationCAM, ChannelDrops, ScoreCAM
from xbench.plan import batch_needs
from xbench.probe import LayerActivation, Logits, Probe, method_cost
from xbench.replay import Replay
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model, Passes

TARGET = torch.tensor([4, 0, 2, 2])


class Skipping(nn.Module):
    """A by-pass around the layer ``inner``, and a head that bends."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1).double()
            self.inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1).double(), nn.ReLU())
            self.outer = nn.Conv2d(6, 6, 3, padding=1).double()
            self.linear = nn.Linear(6, 5).double()

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images).relu()
        x = self.outer(stem + self.inner(stem)).relu()
        return self.linear((x + stem).mean((2, 3)))  # type: ignore[no-any-return]


def skipping() -> Model:
    return replace(toy_model(), net=Skipping().eval(), layers={"last_conv": "inner"})


@contextmanager
def probing(
    method: Any, model: Model | None = None, batch: Batch | None = None, **how: Any
) -> Iterator[tuple[Probe, Meter]]:
    model = model or toy_model()
    how.setdefault("target", TARGET)
    with prepared(model.net) as meter:
        needs = batch_needs([method], [])
        yield Probe(model, batch or toy_batch(4), needs=needs, meter=meter, **how), meter


def explain(method: Any, model: Model | None = None, **how: Any) -> Tensor:
    with probing(method, model, **how) as (probe, _):
        return probe.explain(method).raw


def activation_of(model: Model, layer: str, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    module = model.net.get_submodule(model.layer(layer))
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
    model.net(images)
    handle.remove()
    return kept[0].detach()


def ablated_logits(model: Model, layer: str, inputs: Tensor, channel: int, value: Any) -> Tensor:
    """(N, K), by a whole forward with one channel of the layer's output set to a value."""

    def ablate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, channel] = value
        return changed

    handle = model.net.get_submodule(model.layer(layer)).register_forward_hook(ablate)
    try:
        logits: Tensor = model.net(inputs)
    finally:
        handle.remove()
    return logits.detach()


# --- Score-CAM ------------------------------------------------------------------------------------


def score_cam_by_hand(model: Model, layer: str, weights: str, colour: float) -> Tensor:
    """Equation 5, one image and one channel at a time, on a pixel colour."""
    images = toy_batch(4).images
    blank = model.normalise(torch.full_like(images[:1], colour))[0]
    maps = []
    for image, target in zip(model.normalise(images), TARGET, strict=True):
        activation = activation_of(model, layer, image[None])[0]
        weight = []
        for channel in activation:
            mask = functional.interpolate(channel[None, None], (16, 16), mode="bilinear")[0, 0]
            low, high = mask.min(), mask.max()
            mask = (mask - low) / (high - low) if high > low else torch.zeros_like(mask)
            logits = model.net((mask * image + (1 - mask) * blank)[None])[0]
            alone = model.net(blank[None])[0]
            gain = logits.softmax(0)[target] - alone.softmax(0)[target]
            weight.append(gain if weights == "increase" else logits[target])
        weight = torch.stack(weight)
        weight = weight if weights == "increase" else weight.softmax(0)
        cam = (weight[:, None, None] * activation).sum(0)
        maps.append(functional.interpolate(cam[None, None], (16, 16), mode="bilinear")[0, 0])
    return torch.stack(maps).detach()


@pytest.mark.parametrize("weights", ["increase", "softmax"])
@pytest.mark.parametrize(("baseline", "colour"), [("black", 0.0), ("white", 1.0)])
@pytest.mark.parametrize(("make", "layer"), [(toy_model, "1"), (skipping, "last_conv")])
def test_score_cam_is_its_formula_one_channel_at_a_time(
    make: Any, layer: str, weights: Any, baseline: Any, colour: float
) -> None:
    method = ScoreCAM(layer=layer, weights=weights, baseline=baseline, sign="signed")
    found = explain(method, make())
    expected = score_cam_by_hand(make(), layer, weights, colour)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_is_asked_of_channels_is_shared_by_all_that_is_made_of_it() -> None:
    methods = [ScoreCAM(weights=w, sign=s) for w in ("increase", "softmax")
               for s in ("positive", "signed")]  # fmt: skip
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), needs=batch_needs(methods, []), meter=meter)
        for method in methods:
            probe.explain(method)
        assert probe.spent == Passes(1 + 1 + 8, 0)  # clean, baseline, channels


@pytest.mark.parametrize(("count", "rows"), [(4, 4), (3, 7), (1, 8)])
def test_chunks_are_filled_across_images_and_channels(count: int, rows: int) -> None:
    model, calls = toy_model(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    method = ScoreCAM(weights="softmax")
    explain(method, model, batch=toy_batch(count), target="predicted", rows=rows)
    assert len(calls) == 1 + math.ceil(8 * count / rows)


def test_a_constant_channel_has_no_weight_in_score_cam() -> None:
    model = toy_model()
    model.net[2].weight[3], model.net[2].bias[3] = 0, 0.7  # type: ignore[index]
    with probing(method := ScoreCAM(), model) as (probe, _):
        probe.explain(method)
        assert (probe[LayerActivation()][:, 3] == 0.7).all()
        chance, _ = probe[method.scores]
        alone = probe[gradient_free.BaselineProbability("black")]
        assert torch.equal(chance[:, 3], alone)


# --- Ablation-CAM ---------------------------------------------------------------------------------


def drops_by_hand(model: Model, layer: str, value: Any = 0.0) -> Tensor:
    """(N, C): y - y_k by whole forwards with a plain hook."""
    inputs = model.normalise(toy_batch(4).images)
    logits = model.net(inputs).detach()
    count = activation_of(model, layer, inputs).shape[1]
    drops = [logits - ablated_logits(model, layer, inputs, at, value) for at in range(count)]
    return torch.stack([drop.gather(1, TARGET[:, None])[:, 0] for drop in drops], dim=1)


def drops(model: Model, layer: str, ablation: Any = "zero", **how: Any) -> Tensor:
    with probing(AblationCAM(layer=layer, ablation=ablation), model, **how) as (probe, _):
        return probe[ChannelDrops(layer, ablation)]


@pytest.mark.parametrize(
    ("make", "layer"),
    [(toy_model, "last_conv"), (toy_model, "1"), (toy_model, "0"), (skipping, "inner"),
     (skipping, "inner.0"), (skipping, "stem"), (skipping, "outer")],
)  # fmt: skip
def test_a_drop_is_what_a_whole_forward_without_the_channel_loses(make: Any, layer: str) -> None:
    expected = drops_by_hand(make(), layer)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(drops(make(), layer), expected, rtol=0, atol=1e-13)


def test_the_closed_form_is_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = drops(toy_model(), "last_conv")
    monkeypatch.setattr(gradient_free, "layer_facts", lambda *_: LayerFacts(8, affine=False))
    replayed = drops(toy_model(), "last_conv")
    assert not torch.equal(closed, replayed)  # else one was not taken
    torch.testing.assert_close(closed, replayed, rtol=0, atol=1e-13)


def test_ablation_cam_weighs_channels_by_the_relative_drop() -> None:
    model = skipping()
    inputs = model.normalise(toy_batch(4).images)
    logit = model.net(inputs).gather(1, TARGET[:, None])
    weight = (drops_by_hand(model, "inner") / logit)[:, :, None, None]
    cam = (weight * activation_of(model, "inner", inputs)).sum(1, keepdim=True).detach()
    assert (cam < 0).any()
    for sign, kept in (("signed", cam), ("positive", cam.relu())):
        expected = functional.interpolate(kept, (16, 16), mode="bilinear")[:, 0]
        found = explain(AblationCAM(sign=sign), skipping())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 7])
@pytest.mark.parametrize(
    ("method", "make", "cost"),
    [
        (AblationCAM(), toy_model, Passes(1, 1)),
        (AblationCAM(ablation="pgc"), toy_model, Passes(1 + 8 + 2, 0)),
        (AblationCAM(layer="1"), toy_model, Passes(1 + 6 + 2, 1)),
        (AblationCAM(), skipping, Passes(1 + 6 + 2, 1)),
        (ScoreCAM(), skipping, Passes(1 + 1 + 6, 0)),
        (ScoreCAM(layer="stem", weights="softmax"), skipping, Passes(1 + 6, 0)),
    ],
)
def test_what_is_spent_is_what_the_layers_facts_say(
    method: Any, make: Any, cost: Passes, rows: int
) -> None:
    with torch.device("meta"):
        sketch = make()
    with probing(method, model := make(), rows=rows) as (probe, _):
        probe.explain(method)
        assert probe.spent == cost
    assert method_cost(method, model) == method_cost(method, sketch) == cost


def test_without_the_images_size_the_cost_is_unknown_and_the_map_the_same() -> None:
    for method in (AblationCAM(), ScoreCAM()):
        assert method_cost(method, replace(toy_model(), size=None)) is None
        unsized = explain(method, replace(toy_model(), size=None))
        assert torch.equal(unsized, explain(method))


def test_a_channel_that_is_zero_or_of_no_use_has_no_drop() -> None:
    model = skipping()
    model.net.requires_grad_(False)
    model.net.outer.weight[:, 2] = 0  # type: ignore[operator, union-attr]
    model.net.inner[0].weight[4], model.net.inner[0].bias[4] = 0, 0  # type: ignore[index, operator]
    found = drops(model, "inner")
    assert not found[:, [2, 4]].any()
    assert found[:, [0, 1, 3, 5]].all()


def test_a_logit_next_to_zero_divides_nothing() -> None:
    model = toy_model()
    with probing(method := AblationCAM(sign="signed"), model) as (probe, _):
        logit = probe[Logits()].gather(1, TARGET[:, None])[0, 0]
        undivided = probe.explain(method).raw[0] * logit
    model.net[6].bias[TARGET[0]] -= logit - 1e-9  # type: ignore[index, operator]
    found = explain(method, model)[0]
    torch.testing.assert_close(found, undivided, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("method", [AblationCAM(), AblationCAM(ablation="pgc"), ScoreCAM()])
def test_a_head_that_looks_at_nothing_gives_maps_of_zeros(method: Any, bias: float) -> None:
    model = toy_model()
    model.net[6].weight.zero_()  # type: ignore[index, operator]
    model.net[6].bias.fill_(bias)  # type: ignore[index, operator]
    assert not explain(method, model).any()


def test_memory_that_runs_out_in_a_replay_halves_the_chunk_and_changes_no_number() -> None:
    model = skipping()
    expected = drops(skipping(), "inner")
    usual, most = model.net.outer.forward, 1000

    def narrow(x: Tensor) -> Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return usual(x)  # type: ignore[no-any-return, operator]

    model.net.outer.forward = narrow
    with probing(AblationCAM(), model) as (probe, meter):
        assert probe.probability.isfinite().all()
        replay = Replay(model, "inner", probe.inputs)
        before, most = meter.forward, 3
        steps = gradient_free._ablated(replay.output, 1, "zero")
        left = gradient_free.row_scores(probe, steps, replay, read=gradient_free.target_logit)
        whole = gradient_free.target_logit(probe[Logits()], probe.target)[:, None]
        assert probe.chunk == 2
        assert meter.forward - before == 4 * 6
    torch.testing.assert_close(whole - left, expected, rtol=0, atol=1e-13)


def pgc_values(activation: Tensor) -> Tensor:
    """(C,) what the library sets each channel of one image (C, h, w) to, by its own steps: it keeps
    one copy of the maps for each channel of a block of 32, and looks at all of them every time."""
    values = []
    for start in range(0, len(activation), 32):
        copies = activation.repeat(min(32, len(activation) - start), 1, 1, 1)
        for at in range(len(copies)):
            value = 0.0 if copies.min() == 0 else float(copies.min() - 1e7)
            copies[at, start + at] = value
            values.append(value)
    return torch.tensor(values, dtype=activation.dtype)


@pytest.mark.parametrize("lowest", [0.0, -0.5, 0.25])
def test_the_librarys_ablation_is_zero_or_ever_lower(lowest: float) -> None:
    activation = torch.rand(2, 40, 3, 3, dtype=torch.float64) + 0.5
    activation[0, 7, 1, 1] = lowest
    activation[1, 7, 1, 1] = 0.1  # another image, whose rule must not follow the first
    ablated = list(gradient_free._ablated(activation, 1, "pgc"))
    assert len(ablated) == 40
    for at, features in enumerate(ablated):
        expected = activation.clone()
        for image in range(2):
            expected[image, at] = pgc_values(activation[image])[at]
        torch.testing.assert_close(features, expected, rtol=1e-14, atol=0)


def test_ablation_leaves_the_recorded_maps_alone() -> None:
    activation = torch.rand(2, 5, 3, 3) - 0.2
    before = activation.clone()
    for ablation in ("zero", "pgc"):
        steps = list(gradient_free._ablated(activation, 1, ablation))
        assert all(not torch.equal(step, before) for step in steps)
    assert torch.equal(activation, before)


def test_tokens_are_ablated_in_their_last_axis() -> None:
    tokens = torch.rand(2, 7, 3)
    for at, features in enumerate(gradient_free._ablated(tokens, -1, "zero")):
        assert not features[..., at].any()
        kept = [other for other in range(3) if other != at]
        assert torch.equal(features[..., kept], tokens[..., kept])


@pytest.mark.parametrize("method", [AblationCAM(layer="5"), ScoreCAM(layer="5")])
def test_a_layer_without_feature_maps_is_unsupported(method: Any) -> None:
    with pytest.raises(Unsupported, match="layer '5' returns 1 axes per image"):
        explain(method)


@pytest.mark.parametrize("name", ["score_cam", "ablation_cam"])
def test_the_presets_name_the_librarys_parts(name: str) -> None:
    method = registry.make("methods", name, {"preset": "pgc-1.5"})
    assert method.scaling == "pgc"
    assert explain(method).amax((1, 2)).allclose(torch.ones((), dtype=torch.float64), atol=1e-3)
    with pytest.raises(ValueError, match="preset"):
        type(method)(preset="pgc-1.5")
