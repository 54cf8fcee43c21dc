"""Laws of the randomisation of parameters and of the random logit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import class_gradient, prepared
from xbench.errors import Unsupported, UsageError
from xbench.probe import Explanation, Logits, MapOf, Need, Probe, method_cost
from xbench.scoring import evaluated
from xbench.similarity import spearman
from xbench.testing import LinearNetwork, toy_batch, toy_model, unchanged
from xbench.types import Batch, Model

SANITY = ("model_randomisation", "random_logit")
SIMILARITIES = ("spearman", "ssim", "ssim_second_moment")


def scores(
    method: Any, metric: str, params: dict[str, Any] | None = None, *, model: Model | None = None,
    count: int = 4, seed: int = 0, target: Any = "predicted",
) -> Tensor:  # fmt: skip
    model = model or toy_model()
    method = registry.make("methods", method) if isinstance(method, str) else method
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(count), seed=seed, target=target, meter=meter)
        return registry.make("metrics", metric, params)(probe.explain(method))


@dataclass(frozen=True)
class Watching:
    """A map by the gradient, and what the probe looked like each time; or an error."""

    name: ClassVar[str] = "watching"
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, hash=False)
    fails_at: int = 99
    nan_at: int = 99

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (Logits(),)

    def __call__(self, probe: Probe) -> Tensor:
        first = next(probe.model.net.parameters()).clone()
        self.seen.append((probe.target.clone(), probe.normal("any", 0), first))
        if len(self.seen) - 1 == self.fails_at:
            raise RuntimeError("no map")
        maps = probe.input_gradient(probe.inputs).sum(1)
        if len(self.seen) - 1 == self.nan_at:
            maps[1, 0, 0] = torch.nan
        return maps


# --- what they tell -------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("metric", SANITY)
@pytest.mark.parametrize("control", ["random", "centre", "sobel", "constant", "fake_cam", "oracle"])
def test_a_map_that_ignores_the_network_has_similarity_1_and_fails(
    control: str, metric: str, similarity: str
) -> None:
    found = scores(control, metric, {"similarity": similarity})
    assert found.tolist() == pytest.approx([1] * 4, abs=1e-12)
    assert found.mean() > registry.find("metrics", metric).gate


@pytest.mark.parametrize("order", ["top_down", "bottom_up", "independent"])
def test_a_map_that_is_the_weights_passes(order: str) -> None:
    weight = torch.randn(3, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)).double()
    model = Model("linear", LinearNetwork(weight), (0.0,) * 3, (1.0,) * 3)
    found = scores("gradient", "model_randomisation", {"order": order}, model=model)
    assert found.abs().max() < 0.2  # 256 pixels: chance has a deviation of 0.06
    assert scores("gradient", "random_logit", model=model).abs().max() < 0.2


def test_the_class_that_is_compared_is_another_and_every_other_one_may_be() -> None:
    watching = Watching()
    scores(watching, "random_logit", count=200)
    target, other = (watching.seen[at][0] for at in (0, 1))
    assert not (target == other).any()
    assert other.min() >= 0
    counts = torch.bincount((other - target) % 5, minlength=5).tolist()
    assert counts[0] == 0
    assert min(counts[1:]) > 30  # 50 expected each


def test_the_random_logit_of_two_classes_is_the_gradient_of_the_other_one() -> None:
    model, batch = toy_model(classes=2), toy_batch(4)
    target = torch.tensor([0, 1, 1, 0])
    inputs = model.normalise(batch.images).requires_grad_()
    maps = [
        class_gradient(model.net(inputs), wanted, (inputs,))[0].abs().sum(1)
        for wanted in (target, 1 - target)
    ]
    found = scores("gradient", "random_logit", model=model, target=target)
    assert found.tolist() == pytest.approx(spearman(*maps).tolist(), abs=1e-9)


# --- stages ---------------------------------------------------------------------------------------


def test_target_and_noise_stay_while_weights_change_stage_by_stage() -> None:
    watching = Watching()
    scores(watching, "model_randomisation", {"order": "bottom_up", "stages": "all"})
    assert len(watching.seen) == 4
    target, noise, weight = watching.seen[0]
    for other_target, other_noise, other_weight in watching.seen[1:]:
        assert torch.equal(target, other_target)
        assert torch.equal(noise, other_noise)
        assert not torch.equal(weight, other_weight)


def test_all_layers_at_once_are_the_last_stage_of_either_cascade() -> None:
    once, *cascades = (
        scores("gradient", "model_randomisation", {"order": order, "stages": stages})
        for order, stages in (("top_down", 1), ("top_down", 2), ("bottom_up", 2))
    )
    first = scores("gradient", "model_randomisation", {"order": "independent", "stages": 2})
    for stage_sum in cascades:
        assert not torch.allclose(stage_sum, once)
    # of two groups, the first stages of both cascades are those of the independent order
    assert torch.allclose(2 * cascades[0] + 2 * cascades[1] - 2 * once, 2 * first, atol=1e-12)


def test_weights_are_the_same_for_every_image_and_differ_with_the_seed() -> None:
    found = [
        scores("gradient", "model_randomisation", count=count, seed=seed)
        for count, seed in ((4, 0), (2, 0), (4, 1))
    ]
    assert torch.allclose(found[0][:2], found[1], rtol=0, atol=1e-10)
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("stages", [1, 2, 3, 10, "all"])
@pytest.mark.parametrize("method", ["gradient", "grad_cam", "smooth_grad", "random"])
def test_every_stage_costs_what_the_method_costs(method: str, stages: Any) -> None:
    model, made = toy_model(), registry.make("methods", method)
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(2), meter=meter)
        probe[Logits()]
        before = probe.spent
        explanation = probe.explain(made)
        alone = probe.spent
        registry.make("metrics", "model_randomisation", {"stages": stages})(explanation)
        each = method_cost(made, model, beside=(Logits(),))
        spent = [after - start for after, start in zip(probe.spent, alone, strict=True)]
        assert spent == list(each.times(stages if isinstance(stages, int) and stages < 3 else 3))
        assert before.forward == 1


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_method_that_raises_at_a_stage_leaves_the_network_as_it_was() -> None:
    model, batch = toy_model(), toy_batch(4)
    for fails_at in (1, 2, 3):
        with unchanged(model, batch, "model_randomisation"), pytest.raises(RuntimeError) as error:
            scores(Watching(fails_at=fails_at), "model_randomisation", model=model)
        assert "no map" in str(error.value)


def test_an_error_while_maps_are_compared_leaves_the_network_as_it_was(monkeypatch) -> None:
    def broken(maps: Tensor, others: Tensor) -> Tensor:
        raise MemoryError("no memory")

    monkeypatch.setattr("xbench.randomisation.similarities", broken)
    model = toy_model()
    before = [value.clone() for value in model.net.parameters()]
    with pytest.raises(MemoryError) as error:
        scores("gradient", "model_randomisation", model=model)
    assert error.tb is not None  # whose frames are still alive
    assert all(map(torch.equal, model.net.parameters(), before))


@pytest.mark.parametrize("metric", SANITY)
def test_a_map_that_is_not_finite_there_makes_its_own_image_undefined(metric: str) -> None:
    model = toy_model()
    made = registry.make("metrics", metric)
    with prepared(model.net):
        explanation = Probe(model, toy_batch(3)).explain(Watching(nan_at=1))
        outcomes = evaluated(made, explanation)
    assert [status == "ok" for _, status in outcomes] == [True, False, True]
    assert outcomes[1][1] == made.undefined
    assert math.isnan(outcomes[1][0])


def test_a_network_of_one_class_has_no_other() -> None:
    weight = torch.ones(1, 3 * 16 * 16).double()
    model = Model("linear", LinearNetwork(weight), (0.0,) * 3, (1.0,) * 3)
    assert scores("gradient", "random_logit", model=model).isnan().all()


def test_a_network_without_parameters_is_unsupported() -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    with pytest.raises(Unsupported, match="no parameters"):
        scores("gradient", "model_randomisation", model=Model("mean", Mean()))


@pytest.mark.parametrize("metric", SANITY)
def test_maps_without_their_method_are_unsupported(metric: str) -> None:
    model = toy_model()
    with prepared(model.net):
        given = Explanation(Probe(model, toy_batch(2)), torch.rand(2, 16, 16).double())
        with pytest.raises(Unsupported, match="runs the method again"):
            registry.make("metrics", metric)(given)


def test_wrong_parameters_are_named() -> None:
    for params in ({"stages": 0}, {"order": "sideways"}, {"similarity": "mse"}):
        with pytest.raises(UsageError, match=next(iter(params))):
            registry.make("metrics", "model_randomisation", params)


# --- sharing --------------------------------------------------------------------------------------


def test_similarities_share_the_maps_of_the_random_networks() -> None:
    watching, model = Watching(), toy_model()
    with prepared(model.net) as meter:
        explanation = Probe(model, toy_batch(2), meter=meter).explain(watching)
        for similarity in SIMILARITIES:
            registry.make("metrics", "model_randomisation", {"similarity": similarity})(explanation)
    assert len(watching.seen) == 1 + 3


def test_what_is_explained_afterwards_is_the_network_as_it_was() -> None:
    model = toy_model()
    batch = Batch(toy_batch(2).images, torch.zeros(2).long(), ("a", "b"))
    gradient = registry.make("methods", "gradient")
    with prepared(model.net):
        probe = Probe(model, batch)
        explanation = probe.explain(gradient)
        registry.make("metrics", "model_randomisation")(explanation)
        again = Probe(model, batch)
        assert torch.equal(again[MapOf(gradient)], explanation.raw)
        assert torch.equal(again[Logits()], probe[Logits()])
