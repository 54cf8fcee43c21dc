"""Laws of the probe: what is shared, what it costs, and that only an image's own pixels count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from test_contract import CHEAP
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import Meter, prepared
from xbench.datasets.shapes import generate
from xbench.errors import Unsupported
from xbench.models.loading import load_model
from xbench.plan import batch_needs, map_needs
from xbench.probe import (
    Explanation,
    ImageGradient,
    LayerGradient,
    Logits,
    MapOf,
    Need,
    Probe,
    closure,
    cost,
    needs_of,
    probability,
    stops_early,
)
from xbench.sweeps import (
    AdaptivePath,
    BlurPath,
    GuidedGradient,
    NoisyGradients,
    StraightPath,
)
from xbench.testing import toy_batch, toy_model, toy_model_for, toy_transformer
from xbench.types import Batch, Model, Passes

CLEAN: tuple[Need[Any], ...] = (Logits(), ImageGradient(), LayerGradient(), LayerGradient("1"))
CAMS = ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam")
NOISY = ("smooth_grad", "smooth_grad_squared", "var_grad", "absolute_grad")


def part(batch: Batch, *chosen: int) -> Batch:
    at = list(chosen)
    masks = None if batch.masks is None else batch.masks[at]
    return Batch(batch.images[at], batch.labels[at], tuple(batch.keys[a] for a in at), masks)


@contextmanager
def probing(
    batch: Batch | None = None, model: Model | None = None, **how: Any
) -> Iterator[tuple[Probe, Meter]]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, toy_batch(4) if batch is None else batch, meter=meter, **how), meter


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value if isinstance(value, tuple) else vars(value).values())


# --- values and what they cost --------------------------------------------------------------------


@pytest.mark.parametrize("need", [*CLEAN, GuidedGradient(), NoisyGradients(0.1, 3)], ids=repr)
def test_an_announced_need_has_the_value_of_an_unannounced_one(need: Need[Any]) -> None:
    with probing(needs=CLEAN) as (announced, _):
        expected = tensors(announced[need])
    with probing() as (alone, _):
        found = tensors(alone[need])
    for one, other in zip(found, expected, strict=True):
        # the graph begins elsewhere, so gradients are added up in another order
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_announced_clean_needs_cost_one_forward_and_one_backward_together() -> None:
    with probing(needs=CLEAN) as (probe, meter):
        for need in CLEAN:
            probe[need]
        assert probe.spent == Passes(1, 1) == cost(closure(CLEAN), probe.model)
        assert (meter.forward, meter.backward) == (4, 4)


def test_logits_alone_cost_one_forward() -> None:
    with probing(needs=[Logits()]) as (probe, _):
        assert probe[Logits()].shape == (4, 5)
        assert probe.probability.shape == (4,)
        assert probe.spent == Passes(1, 0)


def test_all_cams_and_the_gradient_cost_one_forward_and_one_backward_together() -> None:
    methods = [registry.make("methods", name) for name in (*CAMS, "gradient", "input_x_gradient")]
    with probing(needs=batch_needs(methods, [])) as (probe, _):
        for method in methods:
            probe.explain(method)
        assert probe.spent == Passes(1, 1) == cost(batch_needs(methods, []), probe.model)


def test_all_noise_methods_at_all_percentiles_cost_one_sweep_together() -> None:
    methods = [registry.make("methods", name, {"samples": 6}) for name in NOISY]
    methods += [
        registry.make("methods", "guided_absolute_grad", {"samples": 6, "percentile": percentile})
        for percentile in range(0, 101, 5)
    ]
    with probing(needs=batch_needs(methods, [])) as (probe, _):
        for method in methods:
            probe.explain(method)
        # the sweep, and one forward for the logits
        assert probe.spent == Passes(7, 6) == cost(batch_needs(methods, []), probe.model)


@pytest.mark.parametrize(
    "name", [name for name, entry in registry.entries("methods").items() if not entry.summary]
)
@pytest.mark.parametrize("rows", [4, 7])
def test_a_method_spends_what_it_costs_also_with_a_partially_filled_batch(
    name: str, rows: int
) -> None:
    method = registry.make("methods", name, CHEAP.get(name))
    model = toy_model_for(method)
    with probing(model=model, needs=batch_needs([method], []), rows=rows) as (probe, meter):
        assert probe.probability.isfinite().all()
        probe.explain(method)
        declared = cost(batch_needs([method], []), probe.model)
        if stops_early([MapOf(method)]):
            assert probe.spent.together(declared) == declared  # it is only a bound
            declared = probe.spent
        assert probe.spent == declared
        assert (meter.forward, meter.backward) == (4 * declared.forward, 4 * declared.backward)
        # chunks that are filled across images and steps take less
        assert meter.padding <= (rows - 4) * declared.forward
        assert (meter.forward + meter.padding) % rows == 0


def test_a_need_is_computed_once() -> None:
    @dataclass(frozen=True)
    class Counted(Need[int]):
        times: ClassVar[list[int]] = []

        def compute(self, on: Probe) -> int:
            self.times.append(1)
            return 7

    with probing() as (probe, _):
        assert probe[Counted()] + probe[Counted()] == 14
    assert len(Counted.times) == 1


def test_what_a_plug_in_forwards_itself_is_counted_without_the_filling() -> None:
    @dataclass(frozen=True)
    class Again(Need[Tensor]):
        scope: ClassVar[Any] = "map"

        def compute(self, on: Explanation) -> Tensor:
            logits: Tensor = on.probe.model.net(on.probe.inputs)
            return logits

    class Method:
        name: ClassVar[str] = "own"

        def __call__(self, probe: Probe) -> Tensor:
            for row in probe.inputs.split(1):  # as captum's internal_batch_size=1 does
                probe.model.net(row)
            return probe.inputs[:, 0]

    with probing(rows=6) as (probe, meter):
        explanation = probe.explain(Method())
        assert (meter.forward, meter.padding) == (4, 2)
        explanation[Again()]
        assert (meter.forward, meter.padding) == (8, 4)
        assert probe.spent == Passes(2, 0)


def test_spent_passes_begin_with_the_probe() -> None:
    with probing() as (probe, meter):
        probe[Logits()]
        assert Probe(probe.model, probe.batch, meter=meter).spent == Passes(0, 0)


def test_closure_holds_what_needs_ask_for_once() -> None:
    found = closure([ImageGradient(), LayerGradient(), NoisyGradients(0.1, 2)])
    assert sorted(map(repr, found)) == sorted(
        map(repr, [ImageGradient(), LayerGradient(), NoisyGradients(0.1, 2), Logits()])
    )


def test_an_entry_without_declared_needs_has_none() -> None:
    assert needs_of(object()) == ()


# --- layers that cannot be had --------------------------------------------------------------------


class Reused(nn.Module):
    """Two calls of one ReLU: it is no layer to record, but everything else works."""

    def __init__(self) -> None:
        super().__init__()
        plain = toy_model().net
        assert isinstance(plain, nn.Sequential)
        self.conv1, self.conv2, self.linear = plain[0], plain[2], plain[6]
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(images))))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_that_cannot_be_recorded_fails_nobody_else() -> None:
    model = replace(toy_model(), net=Reused())
    good = (Logits(), ImageGradient(), LayerGradient("conv2"))
    with probing(model=model, needs=good) as (probe, _):
        expected = [tensors(probe[need]) for need in good]
    with probing(model=model, needs=(*good, LayerGradient("relu"))) as (probe, _):
        with pytest.raises(Unsupported, match="layer 'relu' is called more than once"):
            probe[LayerGradient("relu")]
        found = [tensors(probe[need]) for need in good]
        assert probe.spent == Passes(1, 1)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_a_layer_that_cannot_be_recorded_leaves_the_logits() -> None:
    model = replace(toy_model(), net=Reused())
    with probing(model=model, needs=[LayerGradient("relu")]) as (probe, _):
        assert probe.probability.isfinite().all()
        with pytest.raises(Unsupported, match="layer 'relu' is called more than once"):
            probe[LayerGradient("relu")]


def test_a_layer_without_feature_maps_is_unsupported() -> None:
    with (
        probing(needs=[LayerGradient("5")]) as (probe, _),
        pytest.raises(
            Unsupported, match=r"layer '5' returns 1 axes per image; feature maps have 3"
        ),
    ):
        probe[LayerGradient("5")]


def test_an_unknown_layer_costs_only_those_who_ask_for_it() -> None:
    needs = (LayerGradient("layer9"), ImageGradient())
    with probing(needs=needs) as (probe, _):
        assert probe[ImageGradient()].isfinite().all()
        with pytest.raises(Unsupported, match="no module 'layer9'"):
            probe[LayerGradient("layer9")]


def test_a_role_and_its_module_path_are_one_layer() -> None:
    with probing(needs=[LayerGradient(), LayerGradient("3")]) as (probe, _):
        role, path = probe[LayerGradient()], probe[LayerGradient("3")]
        assert all(torch.equal(a, b) for a, b in zip(role, path, strict=True))
        assert probe.spent == Passes(1, 1)


# --- targets --------------------------------------------------------------------------------------


def test_the_target_is_the_predicted_class_the_label_or_what_is_asked_for() -> None:
    asked = torch.tensor([4, 3, 2, 1])
    with probing() as (probe, _):
        assert torch.equal(probe.target, probe[Logits()].argmax(1))
    with probing(target="label") as (probe, _):
        assert torch.equal(probe.target, probe.batch.labels)
    with probing(target=asked) as (probe, _):
        assert torch.equal(probe.target, asked)


@pytest.mark.parametrize("target", ["predicted", "label", torch.tensor([4, 3, 2, 1])], ids=str)
def test_gradients_and_probability_are_of_the_target(target: Any) -> None:
    with probing(target=target, needs=CLEAN, rows=5) as (probe, _):
        logits = probe[Logits()]
        expected = logits.softmax(1)[torch.arange(5), probe.target]
        torch.testing.assert_close(probe.probability, expected)
        inputs = probe.inputs.clone().requires_grad_()
        chosen = probe.model.net(inputs)[torch.arange(5), probe.target].sum()
        (gradient,) = torch.autograd.grad(chosen, inputs)
        torch.testing.assert_close(probe[ImageGradient()], gradient)
        torch.testing.assert_close(probe.input_gradient(probe.inputs), gradient)


def test_a_probability_is_never_lost_to_float32() -> None:
    logits = torch.tensor([[0.0, 200.0], [200.0, 0.0]])
    found = probability(logits, torch.tensor([0, 0]))
    assert found.dtype == torch.float64
    assert 0 < found[0] < 1e-80
    assert found[1] == 1


# --- filling up -----------------------------------------------------------------------------------


NEEDS = (*CLEAN, GuidedGradient(), NoisyGradients(0.1, 3))


def test_a_filled_batch_gives_the_same_in_float64() -> None:
    with probing(needs=NEEDS) as (plain, _), probing(needs=NEEDS, rows=6) as (filled, _):
        assert (filled.rows, filled.real) == (6, 4)
        assert filled.batch.keys[4:] == filled.batch.keys[3:4] * 2
        for need in NEEDS:
            for one, other in zip(tensors(plain[need]), tensors(filled[need]), strict=True):
                # another batch size: rounding alone
                torch.testing.assert_close(one, other[:4], rtol=1e-10, atol=1e-13)
        assert torch.equal(filled.normal("a", 1)[:4], plain.normal("a", 1))
        assert torch.equal(filled.uniform("a")[:4], plain.uniform("a"))


def embedded() -> tuple[Model, Batch]:
    network = registry.make("models", "shapes/resnet").describe(None)
    images, labels, masks = generate(3, "test", range(8))
    batch = Batch(images, labels, tuple(map(str, range(8))), masks)
    return load_model(network, "shapes/resnet", network.layers, "cpu"), batch


@pytest.mark.parametrize("companions", [(1, 2, 3, 4, 5), (7, 6), ()])
def test_at_one_forward_shape_an_images_bits_do_not_depend_on_its_companions(
    companions: Sequence[int],
) -> None:
    model, batch = embedded()
    needs = (
        Logits(),
        ImageGradient(),
        LayerGradient(),
        GuidedGradient(),
        NoisyGradients(0.15, 2),
        StraightPath("uniform", steps=2, trials=2),
        AdaptivePath(steps=3),
        BlurPath(steps=3),
    )
    with probing(part(batch, 0, 5, 6, 7, 1, 2), model, needs=needs, rows=6) as (one, _):
        expected = [tensors(one[need]) for need in needs]
    with probing(part(batch, *companions, 0), model, needs=needs, rows=6) as (other, _):
        found = [tensors(other[need]) for need in needs]
    place = len(companions)
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == torch.float32
            assert torch.equal(x[0], y[place])


def test_logits_are_bit_equal_with_and_without_a_graph() -> None:
    model, batch = embedded()
    with probing(batch, model, needs=[Logits()]) as (bare, _):
        expected = bare[Logits()]
    for needs in ([ImageGradient()], [LayerGradient()], [ImageGradient(), LayerGradient("layer1")]):
        with probing(batch, model, needs=needs) as (probe, _):
            assert torch.equal(probe[Logits()], expected)
            with torch.inference_mode():
                assert torch.equal(model.logits(probe.inputs), expected)


def test_a_transformers_logits_are_bit_equal_with_and_without_a_graph() -> None:
    """torch has a fast path for attention without a graph, which rounds in another way."""
    toy = toy_transformer()
    model, plain = replace(toy, net=toy.net.float()), toy_batch(4)
    batch = replace(plain, images=plain.images.float())
    for needs in ([ImageGradient()], [LayerGradient()]):
        with probing(batch, model, needs=needs) as (probe, _):
            with torch.inference_mode():
                expected = model.logits(probe.inputs)
            assert torch.equal(probe[Logits()], expected)


def test_a_callers_no_grad_or_graph_changes_nothing() -> None:
    with probing(needs=NEEDS) as (plain, _):
        expected = [tensors(plain[need]) for need in NEEDS]
    batch = toy_batch(4)
    tracked = replace(batch, images=batch.images.clone().requires_grad_())
    with torch.no_grad(), probing(needs=NEEDS) as (probe, _):
        quiet = [tensors(probe[need]) for need in NEEDS]
    with probing(tracked, needs=NEEDS) as (probe, _):
        graph = [tensors(probe[need]) for need in NEEDS]
        assert not probe.explain(registry.make("methods", "input_x_gradient")).raw.requires_grad
    for found in (quiet, graph):
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- noise ----------------------------------------------------------------------------------------


def test_noise_belongs_to_the_images_key_seed_purpose_and_draw() -> None:
    batch = toy_batch(4)
    with probing(batch) as (probe, _):
        noise = probe.normal("a", 0)
        assert noise.dtype == torch.float64
        assert noise.shape == probe.inputs.shape
        for other in (probe.normal("a", 1), probe.normal("b", 0)):
            assert (noise != other).any()
    with probing(part(batch, 2, 0)) as (probe, _):
        assert torch.equal(probe.normal("a", 0), noise[[2, 0]])
    with probing(batch, seed=1) as (probe, _):
        assert (probe.normal("a", 0) != noise).any()
    renamed = replace(batch, keys=tuple("abcd"))
    with probing(renamed) as (probe, _):
        assert (probe.normal("a", 0) != noise).any()


# --- at other inputs ------------------------------------------------------------------------------


def test_a_probe_at_other_inputs_asks_about_the_same_classes() -> None:
    with probing() as (probe, _):
        moved = -30 * probe.inputs.abs()
        other = probe.at(moved)
        assert torch.equal(other[Logits()], probe.model.logits(moved))
        assert not torch.equal(other[Logits()].argmax(1), probe.target)  # else it shows nothing
        assert torch.equal(other.target, probe.target)
        assert torch.equal(other[ImageGradient()], probe.input_gradient(moved))
        assert torch.equal(other.probability, probability(other[Logits()], probe.target))
        assert torch.equal(other.normal("a", 0), probe.normal("a", 0))


def test_a_probe_at_other_inputs_keeps_the_clean_values() -> None:
    with probing() as (probe, _):
        clean = probe[LayerGradient()]
        other = probe.at(probe.inputs * 2)
        assert not torch.equal(other[LayerGradient()][0], clean[0])
        assert probe[LayerGradient()] is clean
        assert probe[Logits()].equal(probe.model.logits(probe.inputs))


def test_what_is_asked_at_other_inputs_is_answered_together_and_counted() -> None:
    with probing(rows=6) as (probe, _):
        assert probe.target.shape == (6,)
        other = probe.at(probe.inputs * 2, ImageGradient(), LayerGradient())
        for need in (Logits(), ImageGradient(), LayerGradient()):
            other[need]
        assert probe.spent == Passes(2, 1)


def test_a_probe_of_other_images_is_one_of_a_batch_of_them() -> None:
    batch = toy_batch(4)
    darker = replace(batch, images=batch.images * 0.3)
    with probing(batch, rows=6, seed=3, target=torch.tensor([1, 0, 2, 2])) as (probe, _):
        images = torch.cat((darker.images, darker.images[-1:].expand(2, -1, -1, -1)))
        other = probe.with_images(images, ImageGradient())
        direct = Probe(probe.model, darker, target=probe.target[:4], rows=6, seed=3)
        assert torch.equal(other.batch.images, images)
        assert torch.equal(other.inputs, direct.inputs)
        assert torch.equal(other.target, probe.target)
        for name in ("gradient", "grad_cam", "identity", "random", "oracle", "smooth_grad"):
            method = registry.make("methods", name, CHEAP.get(name))
            assert torch.equal(other.explain(method).raw, direct.explain(method).raw), name
        assert torch.equal(probe.batch.images[:4], batch.images)
        before = probe.spent
        probe.with_images(images)[Logits()]
        assert probe.spent == before.plus(Passes(1, 0))


def test_pixels_are_the_inverse_of_normalisation() -> None:
    model, images = toy_model(), toy_batch(2).images
    torch.testing.assert_close(model.pixels(model.normalise(images)), images)


# --- explanations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maps", "shown"),
    [
        (torch.zeros(4, 16), r"\(4, 16\)"),
        (torch.zeros(4, 1, 16, 16), r"\(4, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(4, 8, 8), r"\(4, 8, 8\)"),
        (None, "NoneType"),
    ],
)
def test_a_map_of_another_shape_is_refused(maps: Any, shown: str) -> None:
    with (
        probing() as (probe, _),
        pytest.raises(ValueError, match=rf"shape \(4, 16, 16\) \(N, H, W\), but got {shown}"),
    ):
        Explanation(probe, maps)


def test_an_explanation_marks_maps_that_are_not_finite() -> None:
    maps = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[0, 3, 3] = torch.nan
    maps[1, 0, 0] = -torch.inf
    maps[2] = 0.5
    with probing() as (probe, _):
        explanation = Explanation(probe, maps)
    assert explanation.finite.tolist() == [False, False, True, True]
    assert not explanation.saliency[:2].any()
    assert torch.equal(explanation.saliency[2:], maps[2:])
    assert torch.equal(explanation.raw.isnan(), maps.isnan())


def test_an_explanation_computes_what_belongs_to_its_map_once_per_map() -> None:
    @dataclass(frozen=True)
    class Total(Need[Tensor]):
        scope: ClassVar[Any] = "map"

        def compute(self, on: Explanation) -> Tensor:
            return on.saliency.sum((1, 2))

    with probing() as (probe, _):
        one, two = (Explanation(probe, torch.full((4, 16, 16), value)) for value in (1.0, 2.0))
        assert one[Total()] is one[Total()]
        assert one[Total()].tolist() == [256] * 4
        assert two[Total()].tolist() == [512] * 4
        assert one[Logits()] is two[Logits()] is probe[Logits()]


def test_an_image_that_is_not_finite_has_no_map_whatever_the_network_makes_of_it() -> None:
    model, batch = toy_model(), toy_batch(4)
    images = batch.images.clone()
    images[2, 0, 3, 3] = torch.nan
    with prepared(model.net) as meter:
        probe = Probe(model, replace(batch, images=images), meter=meter)
        gradient = probe.explain(registry.make("methods", "gradient"))
    assert probe[ImageGradient()].isfinite().all()  # a ReLU stops NaN on its way back
    assert gradient.finite.tolist() == [True, True, False, True]
    assert gradient.raw[2].isnan().all()


@dataclass(frozen=True)
class Twice(Need[Tensor]):
    """The method's map, made once more; as a need that runs a method again is written."""

    scope: ClassVar[Any] = "map"
    method: Any = None

    def for_method(self, method: Any) -> Twice:
        return replace(self, method=method)

    def passes(self, model: Model) -> Passes:
        return Passes() if self.method is None else cost(closure([MapOf(self.method)]), model)

    def compute(self, on: Explanation) -> Tensor:
        found: Tensor = self.method(on.probe.with_images(on.probe.batch.images))
        return found


def test_a_need_that_runs_the_method_again_is_told_which() -> None:
    method = registry.make("methods", "smooth_grad", {"samples": 3})
    asked = map_needs([_Asks(Twice())], method)
    assert asked == (Twice(method),)
    assert cost(asked, toy_model()) == Passes(1 + 3, 3)
    assert map_needs([_Asks(Twice())]) == (Twice(),)
    with probing() as (probe, _):
        explanation = probe.explain(method)
        assert explanation.method is method
        before = probe.spent
        assert torch.equal(explanation[Twice()], explanation.raw)
        assert explanation[Twice()] is explanation[Twice(method)]
        assert probe.spent == before.plus(Passes(1 + 3, 3))
        assert Explanation(probe, explanation.raw).method is None


@dataclass(frozen=True)
class _Asks:
    need: Need[Any]

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.need,)


def test_needs_that_are_asked_together_are_computed_in_one_go_and_once() -> None:
    @dataclass(frozen=True)
    class Times(Need[Tensor]):
        scope: ClassVar[Any] = "map"
        factor: int

    calls: list[list[int]] = []

    def compute(needs: Sequence[Times]) -> list[Tensor]:
        calls.append([need.factor for need in needs])
        return [torch.tensor(need.factor) for need in needs]

    with probing() as (probe, _):
        explanation = Explanation(probe, torch.zeros(4, 16, 16))
        asked = [Times(factor) for factor in (3, 1, 3)]
        assert [int(value) for value in explanation.together(asked, compute)] == [3, 1, 3]
        asked = [Times(factor) for factor in (1, 2, 3)]
        assert [int(value) for value in explanation.together(asked, compute)] == [1, 2, 3]
        assert int(explanation[Times(2)]) == 2
    assert calls == [[3, 1], [2]]
