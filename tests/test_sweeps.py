"""Laws of sweeps: moments are exact and flat in memory; noise, paths and the guide by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xbench import registry
from xbench.autograd import prepared
from xbench.baselines import baseline_image, gaussian_blur
from xbench.errors import Unsupported
from xbench.probe import ImageGradient, LayerGradient, Logits, Need, Probe
from xbench.sweeps import (
    AdaptivePath,
    BlurPath,
    Guided,
    GuidedGradient,
    Moments,
    NoisyGradients,
    NoisyLayerGradients,
    StraightPath,
    Term,
    quadrature,
)
from xbench.testing import SIDE, LinearNetwork, toy_batch, toy_model
from xbench.types import Batch, Model, Passes


@contextmanager
def probing(model: Model | None = None, batch: Batch | None = None, **how: Any) -> Iterator[Probe]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, batch or toy_batch(3), meter=meter, **how)


def linear_model() -> Model:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3 * SIDE * SIDE, generator=generator, dtype=torch.float64)
    return Model("linear", LinearNetwork(weight), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def rows(probe: Probe) -> Tensor:
    """On a linear network, each target's weights: every gradient there is."""
    return probe.model.net.get_parameter("weight")[probe.target].view_as(probe.inputs)


def smooth_model() -> Model:
    """The toy network without kinks."""
    model = toy_model()
    assert isinstance(model.net, nn.Sequential)
    model.net[1] = model.net[3] = nn.Softplus()
    return model


def logit(probe: Probe, inputs: Tensor) -> Tensor:
    found: Tensor = probe.model.net(inputs).gather(1, probe.target[:, None])[:, 0]
    return found


# --- moments --------------------------------------------------------------------------------------


INTERPRETATIONS = ("signed", "positive", "negative", "absolute")


def samples(count: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, 2, 3, 4, 4, generator=generator).double() + offset).to(dtype)


@pytest.mark.parametrize("count", [2, 3, 20, 100])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_are_those_of_two_passes(count: int, offset: float) -> None:
    given = samples(count, offset)
    found = Moments.of(map(Term.of, given))
    torch.testing.assert_close(found.signed, given.mean(0))
    torch.testing.assert_close(found.positive, given.clamp(min=0).mean(0))
    torch.testing.assert_close(found.negative, given.clamp(max=0).mean(0))
    torch.testing.assert_close(found.absolute, given.abs().mean(0))
    torch.testing.assert_close(found.square, given.square().mean(0))
    torch.testing.assert_close(found.variance, given.var(0, correction=1))
    torch.testing.assert_close(found.spread, given.var(0, correction=1))


def test_each_interpretation_of_a_term_has_its_own_moments() -> None:
    signed, positive, negative, spread = (samples(5, offset) for offset in (0.0, 1.0, 2.0, 3.0))
    found = Moments.of(map(Term, signed, positive, negative, spread))
    torch.testing.assert_close(found.signed, signed.mean(0))
    torch.testing.assert_close(found.positive, positive.mean(0))
    torch.testing.assert_close(found.negative, negative.mean(0))
    torch.testing.assert_close(found.absolute, spread.abs().mean(0))
    torch.testing.assert_close(found.variance, signed.var(0))
    torch.testing.assert_close(found.spread, spread.var(0))


def test_a_total_is_the_mean_times_the_number_of_terms() -> None:
    given = samples(6)
    mean, total = Moments.of(map(Term.of, given)), Moments.of(map(Term.of, given), total=True)
    for name in INTERPRETATIONS:
        torch.testing.assert_close(getattr(total, name), 6 * getattr(mean, name))
    for name in ("square", "variance", "spread", "count"):
        assert torch.equal(getattr(total, name), getattr(mean, name))


@pytest.mark.parametrize("total", [False, True])
def test_an_images_moments_are_those_of_its_own_terms(total: bool) -> None:
    given = samples(7)
    present = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0]]).bool().T
    terms = [
        Term.of(values)._replace(present=has) for values, has in zip(given, present, strict=True)
    ]
    found = Moments.of(terms, total=total)
    assert found.count.flatten().tolist() == [5, 3]
    for image in range(2):
        own = Moments.of(map(Term.of, given[present[:, image], image : image + 1]), total=total)
        for name, value in vars(own).items():
            torch.testing.assert_close(getattr(found, name)[image : image + 1], value)


def test_an_image_without_terms_has_zeros() -> None:
    none = Term.of(samples(1)[0])._replace(present=torch.tensor([False, True]))
    found = Moments.of([none, none], total=True)
    assert not any(value[0].any() for value in vars(found).values())


def test_the_variance_does_not_cancel_in_float32() -> None:
    given = samples(20, offset=1e4, dtype=torch.float32)
    expected = given.double().var(0, correction=1)
    # sums of squares of 1e4 would leave an error near 10; updated in steps it is near 1e-3
    found = Moments.of(map(Term.of, given)).variance.double()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_a_single_sample_is_its_own_mean_and_has_no_variance() -> None:
    (only,) = given = samples(1)
    found = Moments.of(map(Term.of, given))
    assert torch.equal(found.signed, only)
    assert torch.equal(found.absolute, only.abs())
    assert torch.equal(found.square, only.square())
    assert found.variance.isnan().all()


def test_the_variance_of_equal_samples_is_exactly_zero() -> None:
    given = samples(1).expand(7, -1, -1, -1, -1)
    assert not Moments.of(map(Term.of, given)).variance.any()


def test_moments_leave_the_samples_as_they_were() -> None:
    given = samples(5)
    before = given.clone()
    Moments.of(map(Term.of, given))
    assert torch.equal(given, before)


@pytest.mark.parametrize("count", [3, 30])
def test_no_more_than_two_samples_live_at_once(count: int) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def terms() -> Iterator[Term]:
        nonlocal most
        for at in range(count):
            gradient = torch.full((2, 3, 4, 4), float(at))
            alive.add(gradient)
            most = max(most, len(alive))
            yield Term.of(gradient)
            del gradient

    Moments.of(terms())
    gc.collect()
    assert most <= 2
    assert len(alive) == 0


class Live(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.watch(tensor.untyped_storage())
        return made

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(name: str, **params: Any) -> int:
    method = registry.make("methods", name, params)
    with probing(batch=toy_batch(2)) as probe:
        assert probe.probability.isfinite().all()
        with Live() as live:
            probe.explain(method)
    return live.peak


def test_the_peak_of_what_is_kept_grows_with_it() -> None:
    def kept(count: int) -> int:
        with Live() as live:
            held = [torch.ones(100) for _ in range(count)]
            del held
            torch.ones(100)
        assert live.now == 0
        return live.peak

    assert kept(20) == 20 * 400
    assert kept(200) == 200 * 400


@pytest.mark.parametrize(
    ("name", "counted", "few", "how"),
    [
        ("guided_absolute_grad", "samples", 20, {}),
        ("integrated_gradients", "steps", 20, {}),
        ("integrated_gradients", "trials", 10, {"baseline": "uniform", "steps": 2}),
        ("guided_ig", "steps", 20, {}),
        ("blur_ig", "steps", 20, {}),
    ],
)
def test_ten_times_the_gradients_take_no_more_memory(
    name: str, counted: str, few: int, how: dict[str, Any]
) -> None:
    small, large = (peak(name, **how, **{counted: count}) for count in (few, 10 * few))
    assert large <= 1.1 * small


# --- noise ----------------------------------------------------------------------------------------


def test_a_sweep_is_the_loop_over_noisy_images() -> None:
    with probing(seed=5) as probe:
        found = probe[NoisyGradients(0.2, 6)]
        flat = probe.inputs.flatten(1)
        sigma = 0.2 * (flat.max(1).values - flat.min(1).values).view(-1, 1, 1, 1)
        loop = torch.stack(
            [
                probe.input_gradient(probe.inputs + sigma * probe.normal("gaussian", draw))
                for draw in range(6)
            ]
        )
    torch.testing.assert_close(found.signed, loop.mean(0))
    torch.testing.assert_close(found.variance, loop.var(0))


def test_a_longer_sweep_begins_with_the_same_draws() -> None:
    with probing() as probe:
        short, long = (probe[NoisyGradients(0.2, count)] for count in (4, 5))
        fifth = 5 * long.signed - 4 * short.signed
        flat = probe.inputs.flatten(1)
        sigma = (0.2 * (flat.amax(1) - flat.amin(1))).view(-1, 1, 1, 1)
        expected = probe.input_gradient(probe.inputs + sigma * probe.normal("gaussian", 4))
    torch.testing.assert_close(fifth, expected)


def test_without_noise_every_sample_is_the_gradient() -> None:
    with probing() as probe:
        found = probe[NoisyGradients(0.0, 4)]
        gradient = probe[ImageGradient()]
    torch.testing.assert_close(found.signed, gradient)
    torch.testing.assert_close(found.absolute, gradient.abs())
    assert not found.variance.any()


class Squares(LinearNetwork):
    """Its gradient is its input, so that a variance of gradients tells the noise."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.square() / 2)


@pytest.mark.parametrize("noise_range", ["image", "batch", 4.758])
def test_the_noise_is_as_wide_as_its_share_of_the_range(noise_range: Any) -> None:
    side = 32
    model = Model("squares", Squares(torch.ones(1, 3 * side * side).double()))
    batch = toy_batch(2, side=side)
    batch.images[1] = batch.images[1] * 0.1 + 0.5
    with probing(model, batch) as probe:
        found = probe[NoisyGradients(0.15, 8, noise_range)]
    spread = found.variance.flatten(1).mean(1).sqrt()
    own = batch.images.flatten(1).amax(1) - batch.images.flatten(1).amin(1)
    assert own[1] < 0.2
    whole = batch.images.max() - batch.images.min()
    width = {"image": own, "batch": whole.expand(2)}.get(noise_range, torch.full((2,), 4.758))
    # 3 x 32 x 32 x 7 degrees of freedom: a relative error of 0.5 %, five of them
    torch.testing.assert_close(spread, 0.15 * width.double(), rtol=0.025, atol=0)


def test_a_batchs_range_is_that_of_its_images_whatever_their_filling() -> None:
    need = NoisyGradients(0.2, 3, "batch")
    with probing() as probe, probing(rows=7) as filled:
        torch.testing.assert_close(probe[need].signed, filled[need].signed[:3])


# --- straight paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_rules_weights_add_up_to_one_and_its_points_lie_on_the_path(steps: int) -> None:
    for rule in ("midpoint", "gauss_legendre", "endpoints"):
        places, weights = np.array(quadrature(rule, steps)).T
        assert weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(places + places[::-1], 1)  # symmetric
        assert places.min() >= 0
        assert (places.min() == 0) == (rule == "endpoints")


@pytest.mark.parametrize(("rule", "degree"), [("midpoint", 1), ("gauss_legendre", 7)])
def test_a_rule_integrates_polynomials_up_to_its_degree(rule: Any, degree: int) -> None:
    places, weights = np.array(quadrature(rule, 4)).T
    for power in range(degree + 1):
        assert weights @ places**power == pytest.approx(1 / (power + 1), abs=1e-14)
    assert weights @ places ** (degree + 1) != pytest.approx(1 / (degree + 2), abs=1e-9)


PATHS = [
    StraightPath(steps=3),
    StraightPath(steps=3, rule="gauss_legendre"),
    StraightPath(steps=3, rule="endpoints"),
    StraightPath("blur", steps=1),
    AdaptivePath(steps=5),
    AdaptivePath("white", steps=4, fraction=0.5, max_dist=1.0),
]


@pytest.mark.parametrize("need", PATHS, ids=repr)
def test_on_a_linear_network_every_path_gives_each_pixels_share(need: Any) -> None:
    with probing(linear_model()) as probe:
        way = probe.inputs - baseline_image(need.baseline, probe.model, probe.inputs)
        expected = way * rows(probe)
        found = probe[need]
    torch.testing.assert_close(found.signed, expected)
    torch.testing.assert_close(found.absolute, expected.abs())
    if isinstance(need, StraightPath):  # clips the gradient
        torch.testing.assert_close(found.positive, way * rows(probe).clamp(min=0))
        torch.testing.assert_close(found.negative, way * rows(probe).clamp(max=0))
    else:  # clips the increments
        torch.testing.assert_close(found.positive, expected.clamp(min=0))
        torch.testing.assert_close(found.negative, expected.clamp(max=0))


def path_errors(rule: Any, counts: tuple[int, ...], objective: Any = "logit") -> list[float]:
    """How far integrated gradients are from adding up to the difference of the ends."""
    with probing(smooth_model()) as probe:
        start = baseline_image("black", probe.model, probe.inputs).expand_as(probe.inputs)
        if objective == "logit":
            values = [logit(probe, at) for at in (probe.inputs, start)]
        else:
            values = [
                nn.functional.cross_entropy(probe.model.net(at), probe.target, reduction="none")
                for at in (probe.inputs, start)
            ]
        gap = values[0] - values[1]
        assert gap.abs().min() > 1e-4
        needs = [StraightPath(steps=n, rule=rule, objective=objective) for n in counts]
        return [float((probe[n].signed.sum((1, 2, 3)) / gap - 1).abs().max()) for n in needs]


@pytest.mark.parametrize(("rule", "order"), [("midpoint", 2), ("endpoints", 1)])
@pytest.mark.parametrize("objective", ["logit", "nll"])
def test_integrated_gradients_complete_with_the_order_of_their_rule(
    rule: Any, order: int, objective: Any
) -> None:
    coarse, fine = path_errors(rule, (40, 80), objective)
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("objective", ["logit", "nll"])
def test_gauss_legendre_completes_to_rounding_on_a_smooth_network(objective: Any) -> None:
    assert max(path_errors("gauss_legendre", (20,), objective)) < 1e-10


def test_of_a_single_midpoint_the_mean_gradient_is_the_one_in_the_middle() -> None:
    with probing() as probe:
        found = probe[StraightPath("mean", steps=1)].signed
        expected = probe.inputs * probe.input_gradient(probe.inputs / 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("noise_range", ["image", "batch"])
def test_uniform_baselines_fill_the_range_and_differ_from_trial_to_trial(noise_range: Any) -> None:
    batch = toy_batch(3)
    batch.images[1] = batch.images[1] * 0.1 + 0.5
    with probing(linear_model(), batch) as probe:
        # on a linear network an attribution is (x - b) times known weights
        one, two = (
            probe[StraightPath("uniform", 1, trials, noise_range=noise_range)].signed / rows(probe)
            for trials in (1, 2)
        )
        first = probe.inputs - one
        second = probe.inputs - (2 * two - one)
        of = probe.inputs.flatten(1) if noise_range == "image" else probe.inputs.view(1, -1)
        low, high = of.amin(1)[:, None], of.amax(1)[:, None]
    assert (first - second).abs().mean() > 0.1 * (high - low).min()
    for start in (first, second):
        flat = (start.flatten(1) - low) / (high - low)
        assert flat.min() > -1e-9
        assert flat.max() < 1 + 1e-9
        # 768 draws: a mean of 0.5 with an error of 0.0104, four of them
        assert (flat.mean(1) - 0.5).abs().max() < 0.042
        assert (first[:, 0] - first[:, 1]).abs().mean() > 0.1 * (high - low).min()


def test_a_trial_is_a_path_of_its_own_and_the_attribution_their_mean() -> None:
    with probing() as probe:
        needs = [StraightPath("uniform", steps=3, trials=n) for n in (1, 2)]
        one, both = (probe[need] for need in needs)
        second = 2 * both.signed - one.signed
        variance = (one.signed - second).square() / 2
    torch.testing.assert_close(both.variance, variance)


# --- the adaptive path ----------------------------------------------------------------------------


def test_in_a_tube_without_width_the_adaptive_path_is_the_straight_line() -> None:
    steps = 6
    with probing() as probe:
        found = probe[AdaptivePath("mean", steps=steps, max_dist=0.0)]
        gradients = [probe.input_gradient(probe.inputs * at / steps) for at in range(steps)]
        expected = probe.inputs * torch.stack(gradients).mean(0)  # each from the step's beginning
    torch.testing.assert_close(found.signed, expected)
    assert (found.count == steps).all()


def test_an_adaptive_path_completes_to_the_first_order_on_a_smooth_network() -> None:
    with probing(smooth_model()) as probe:
        start = baseline_image("black", probe.model, probe.inputs).expand_as(probe.inputs)
        gap = logit(probe, probe.inputs) - logit(probe, start)
        needs = [AdaptivePath(steps=n, max_dist=2 / n) for n in (100, 200, 400)]
        errors = [float((probe[n].signed.sum((1, 2, 3)) / gap - 1).abs().max()) for n in needs]
    assert errors[2] < 0.02
    assert np.log2(errors[0] / errors[2]) == pytest.approx(2, abs=0.3)


def test_an_adaptive_path_takes_the_smallest_gradients_first() -> None:
    """On a linear network the order is known: after half the way, the smaller slopes are done."""
    model = linear_model()
    with probing(model) as probe:
        slope = rows(probe).abs().flatten(1)
        seen: list[Tensor] = []
        inner = probe.input_gradient

        def watched(inputs: Tensor, objective: Any = "logit") -> Tensor:
            seen.append(inputs)
            return inner(inputs, objective)

        probe.input_gradient = watched  # type: ignore[method-assign]
        probe[AdaptivePath("mean", steps=2, max_dist=1.0, fraction=0.01)]
        share = (seen[1] / probe.inputs).flatten(1)
    assert not seen[0].any()
    for image in range(3):
        done, waiting = share[image] > 1 - 1e-9, share[image] < 1e-9
        assert done.sum() + waiting.sum() >= 0.98 * share.shape[1]
        assert slope[image, done].max() <= slope[image, waiting].min()
        moved = (seen[1][image]).abs().sum() / probe.inputs[image].abs().sum()
        torch.testing.assert_close(moved, torch.tensor(0.5).double())


@pytest.mark.parametrize("baseline", ["black", "white", "mean"])
def test_the_number_of_increments_does_not_hang_on_rounding(baseline: Any) -> None:
    """Whether the last move's ratio is 1 or a bit more; from the mean colour it is always 1."""
    with probing(batch=toy_batch(16)) as probe:
        assert (probe[AdaptivePath(baseline, 20, 0.25, 0.1)].count == 40).all()
        assert (probe[AdaptivePath(baseline, 10, 0.5, 0.2)].count == 11).all()


@pytest.mark.parametrize("need", [AdaptivePath(), StraightPath(), StraightPath(trials=2)], ids=repr)
def test_an_image_that_is_its_baseline_gets_zeros_and_leaves_the_others(need: Any) -> None:
    batch = toy_batch(3)
    black = replace(batch, images=batch.images.clone())
    black.images[1] = 0
    target = torch.tensor([4, 0, 2])
    with probing(batch=batch, target=target) as plain, probing(batch=black, target=target) as probe:
        expected, found = plain[need], probe[need]
    for name in INTERPRETATIONS:
        value = getattr(found, name)
        assert torch.equal(value[[0, 2]], getattr(expected, name)[[0, 2]])
        assert not value[1].any()


# --- the blur path --------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("radius", ["4sigma", 12])
def test_a_blur_path_adds_up_towards_the_difference_of_its_ends(padding: Any, radius: Any) -> None:
    """As far as steps, and jumps of a kernel that grows, allow."""
    with probing() as probe:
        far = gaussian_blur(probe.inputs, 2.0, 8 if radius == "4sigma" else radius, padding)
        gap = logit(probe, probe.inputs) - logit(probe, far)
        needs = [BlurPath(n, 2.0, radius, padding, 1e-4) for n in (20, 200)]
        coarse, fine = (
            float(((probe[need].signed.sum((1, 2, 3)) - gap) / gap).abs().max()) for need in needs
        )
    assert fine < coarse / 5
    assert fine < 0.02


def test_on_a_linear_network_a_blur_path_is_the_change_of_the_blur() -> None:
    with probing(linear_model()) as probe:
        found = probe[BlurPath(400, 2.0, 12, "reflect", 1e-4)]
        change = probe.inputs - gaussian_blur(probe.inputs, 2.0, 12, "reflect")
        expected = change * rows(probe)
    # sums of 400 left ends: an error of a 400th
    assert (found.signed - expected).abs().max() < 0.01 * expected.abs().max()


def test_the_first_step_of_a_blur_path_is_zero() -> None:
    with probing() as probe:
        found = probe[BlurPath(steps=1)]
    assert not found.signed.any()
    assert (found.count == 1).all()


def test_in_float32_the_blurs_difference_keeps_its_digits() -> None:
    """A float32 difference divided by 0.01 would be wrong in the fifth digit of the blur's own."""
    model, batch = linear_model(), toy_batch(3)
    target = torch.tensor([4, 0, 2])
    with probing(model, batch, target=target) as probe:
        expected = probe[BlurPath()].signed
    small = replace(model, net=model.net.float())
    with probing(small, replace(batch, images=batch.images.float()), target=target) as probe:
        found = probe[BlurPath()].signed
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


# --- what sweeps cost, and whom they touch --------------------------------------------------------

NEEDS = [
    NoisyGradients(0.15, 4),
    NoisyGradients(0.15, 4, 2.0),
    StraightPath(steps=4),
    StraightPath("uniform", steps=3, trials=2, rule="endpoints", objective="nll"),
    AdaptivePath(steps=4),
    BlurPath(steps=4),
    GuidedGradient(),
    GuidedGradient(passing="absolute"),
]


@pytest.mark.parametrize("need", NEEDS, ids=repr)
@pytest.mark.parametrize("rows", [3, 5])
def test_a_sweep_spends_what_it_declares(need: Need[Any], rows: int) -> None:
    with probing(rows=rows) as probe:
        assert probe.probability.isfinite().all()
        probe[need]
        own = need.passes(probe.model)
        assert probe.spent == Passes(1, 0).plus(own)
        assert own.forward == own.backward > 0


def values(need: Need[Any], probe: Probe) -> dict[str, Tensor]:
    found = probe[need]
    if isinstance(found, Tensor):
        return {"gradient": found}
    return {name: getattr(found, name) for name in INTERPRETATIONS}


@pytest.mark.parametrize("need", NEEDS, ids=repr)
def test_nan_in_one_image_moves_no_bit_of_another(need: Need[Any]) -> None:
    target = torch.tensor([4, 0, 2])
    batch = toy_batch(3)
    broken = replace(batch, images=batch.images.clone())
    broken.images[1, 0, 3, 3] = torch.nan
    with probing(batch=batch, target=target) as probe:
        expected = values(need, probe)
    with probing(batch=broken, target=target) as probe:
        for name, found in values(need, probe).items():
            assert torch.equal(found[[0, 2]], expected[name][[0, 2]])
            assert not torch.equal(found[1], expected[name][1])


@pytest.mark.parametrize("need", NEEDS, ids=repr)
def test_float32_stays_float32(need: Need[Any]) -> None:
    model, batch = toy_model(), toy_batch(2)
    with probing(model, batch) as probe:
        expected = values(need, probe)
    single = replace(model, net=model.net.float())
    with probing(single, replace(batch, images=batch.images.float())) as probe:
        for name, found in values(need, probe).items():
            assert found.dtype == torch.float32
            # a unit of the network may switch on rounding
            assert (found - expected[name]).abs().max() < 0.02 * expected[name].abs().max()


# --- the guide ------------------------------------------------------------------------------------

VARIANCE = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(3)).double() * 3


@pytest.mark.parametrize("percentile", [1e-9, 33.3, 85, 100])
@pytest.mark.parametrize("norm", ["none", "max", "quantile"])
@pytest.mark.parametrize("scope", ["channel", "image"])
def test_the_guide_is_one_above_the_percentile_and_the_variance_below(
    percentile: float, norm: Any, scope: Any
) -> None:
    found = Guided(percentile=percentile, guide_norm=norm, guide_scope=scope).guide(VARIANCE)
    for image in range(2):
        for channel in range(3):
            seen = VARIANCE[image, channel] if scope == "channel" else VARIANCE[image]
            threshold = np.percentile(seen.numpy(), percentile)
            unit = {"none": 1, "max": seen.max(), "quantile": threshold}[norm]
            plane = VARIANCE[image, channel]
            expected = torch.where(plane > threshold, 1, plane / unit)
            torch.testing.assert_close(found[image, channel], expected)


@pytest.mark.parametrize("norm", ["none", "max", "quantile"])
def test_where_nothing_varies_the_guide_is_zero(norm: Any) -> None:
    found = Guided(guide_norm=norm).guide(torch.zeros(2, 3, 4, 4))
    assert torch.equal(found, torch.zeros(2, 3, 4, 4))


def test_a_guide_divided_by_its_quantile_has_no_jump() -> None:
    line = torch.linspace(0, 1, 1001).double().view(1, 1, 1, -1)
    smooth, raw = (Guided(guide_norm=norm).guide(line)[0, 0, 0] for norm in ("quantile", "none"))
    assert smooth.diff().abs().max() < 0.002
    assert raw.diff().abs().max() > 0.14


# --- the guided gradient --------------------------------------------------------------------------


def test_the_guided_gradient_of_a_network_without_relu_is_the_plain_one() -> None:
    with probing(linear_model()) as probe:
        with pytest.raises(Unsupported, match="allow_no_relu: true accepts that"):
            probe[GuidedGradient()]
        assert torch.equal(probe[GuidedGradient(allow_no_relu=True)], probe[ImageGradient()])


def test_the_guided_gradient_leaves_the_clean_pass_as_it_is() -> None:
    with probing(needs=[ImageGradient(), Logits()]) as probe:
        before = probe[ImageGradient()].clone()
        probe[GuidedGradient()]
        assert torch.equal(probe[ImageGradient()], before)


def test_noisy_gradients_of_the_first_layer_are_those_of_the_input() -> None:
    """Hence the noise is the same."""
    model = toy_model()
    net = nn.Sequential(nn.Identity(), *model.net.children())
    with prepared(net):
        probe = Probe(Model("same", net, model.mean, model.std), toy_batch(3))
        first, second, _ = probe[NoisyLayerGradients("0", 0.2, 5)]
        expected = probe[NoisyGradients(0.2, 5)]
    torch.testing.assert_close(first, expected.signed)
    torch.testing.assert_close(second, expected.square)


def test_powers_of_noisy_layer_gradients_are_averaged_in_float64() -> None:
    model, batch = toy_model(), toy_batch(3)
    model.net.get_submodule("6").get_parameter("weight").mul_(1e-15)  # its cube is no float32
    model.net.float()
    probe = Probe(model, replace(batch, images=batch.images.float()))
    with prepared(model.net):
        assert probe[LayerGradient("1")][1].dtype == torch.float32
        first, second, third = probe[NoisyLayerGradients("1", 0.2, 1)]
    assert third.any()
    torch.testing.assert_close(second, first.square(), rtol=1e-12, atol=0)
    torch.testing.assert_close(third, first**3, rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_the_samples_of_a_layer() -> None:
    counts = []

    class Watched(Probe):
        def normal(self, purpose: str, draw: int) -> Tensor:
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
            return super().normal(purpose, draw)

    model = toy_model()
    with prepared(model.net):
        Watched(model, toy_batch(2))[NoisyLayerGradients("1", 0.1, 8)]
    assert len(counts) == 8
    assert len(set(counts[2:])) == 1
