"""What released versions of Quantus get wrong, and that xbench gets it right.

Each test shows the defect in the installed version first, where that is quick, so that it speaks up
when a later one has mended it; then what xbench makes of the same case.
"""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import quantus
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.baselines import baseline_image
from xbench.errors import Unsupported, UsageError
from xbench.probe import Explanation, Probe
from xbench.testing import toy_batch, toy_model, toy_network
from xbench.types import Batch, Model

Array = NDArray[Any]
SIDE = 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class FromFloat32(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images.double())
        return logits


def maps(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, SIDE, SIDE, generator=generator, dtype=torch.float64)


def ours(
    name: str,
    saliency: Tensor,
    params: dict[str, Any] | None = None,
    *,
    batch: Batch | None = None,
    model: Model | None = None,
    target: Tensor | None = None,
    method: Any = None,
) -> list[float]:
    model, batch = model or toy_model(), batch or toy_batch(len(saliency), side=SIDE)
    with prepared(model.net):
        chosen = torch.zeros(len(saliency), dtype=torch.int64) if target is None else target
        probe = Probe(model, batch, target=chosen)
        found: Tensor = registry.make("metrics", name, params)(Explanation(probe, saliency, method))
    return found.tolist()


def theirs(name: str, saliency: Tensor, *, call: dict[str, Any] | None = None, **how: Any) -> Any:
    batch = toy_batch(len(saliency), side=SIDE)
    assert batch.masks is not None
    given: dict[str, Any] = {
        "model": FromFloat32(toy_network()),
        "x_batch": toy_model().normalise(batch.images).numpy(),
        "y_batch": np.zeros(len(saliency), dtype=int),
        "a_batch": saliency[:, None].numpy().copy(),
        "s_batch": batch.masks[:, None].numpy(),
        "channel_first": True,
        "device": "cpu",
        **(call or {}),
    }
    return getattr(quantus, name)(disable_warnings=True, return_aggregate=False, **how)(**given)


def gradient(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Array:
    images = torch.tensor(np.asarray(inputs), dtype=torch.float32, requires_grad=True)
    model(images)[torch.arange(len(images)), torch.as_tensor(targets)].sum().backward()
    assert images.grad is not None
    return images.grad.numpy()


# --- ROAD -----------------------------------------------------------------------------------------


def test_road_runs_on_images_of_three_channels_with_maps_of_one() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        theirs("ROAD", maps(2))
    for value in ours("road", maps(2), {"levels": (0.2, 0.6)}):
        assert -0.5 <= value <= 0.5


def test_road_counts_the_images_of_every_batch() -> None:
    """Twenty, of which the last ten are called by another class than the network's."""
    grey = np.linspace(0, 1, 20 * SIDE * SIDE).reshape(20, 1, SIDE, SIDE)
    labels = np.arange(20) // 10
    by_hand = quantus.ROAD(percentages=[10], disable_warnings=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 2, bias=False))
    net[1].weight.data.copy_(torch.tensor([[1.0], [0.0]]).expand(2, SIDE * SIDE))
    found = by_hand(
        model=net.eval(),
        x_batch=grey.astype(np.float32) + 1,
        y_batch=labels,
        a_batch=np.random.default_rng(0).random((20, 1, SIDE, SIDE)),
        channel_first=True,
        device="cpu",
        batch_size=10,
    )
    assert found == {10: 1.0}  # half of them are wrong
    params = {"levels": (0.1,)}
    batch, target = toy_batch(20, side=SIDE), torch.arange(20) // 10
    whole = ours("road_morf", maps(20), params, batch=batch, target=target)
    parts = [
        ours(
            "road_morf",
            maps(20)[part],
            params,
            batch=batch.part(part),
            target=target[part],
        )
        for part in (slice(0, 10), slice(10, 20))
    ]
    assert np.mean(whole) == pytest.approx(np.mean(parts), rel=1e-9)


def test_quantus_road_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="use road, road_morf or road_lerf"):
        registry.make("metrics", "quantus/ROAD")


# --- neighbours in a batch ------------------------------------------------------------------------


def test_a_score_does_not_depend_on_the_other_images_of_the_batch() -> None:
    saliency = maps(2)
    saliency[1] *= 1e7
    assert theirs("EffectiveComplexity", saliency)[0] == 0
    assert theirs("EffectiveComplexity", saliency[:1])[0] == SIDE * SIDE
    for name in ("effective_complexity", "quantus/EffectiveComplexity"):
        assert ours(name, saliency) == [SIDE * SIDE] * 2


def test_scores_that_are_of_a_batch_are_refused() -> None:
    """Sensitivity-n gives a number per step, not per image; of one image it gives none."""
    assert len(theirs("SensitivityN", maps(4), features_in_step=SIDE * SIDE)) != 4
    with pytest.raises(ValueError, match="length at least 2"):
        theirs("SensitivityN", maps(1), features_in_step=SIDE * SIDE)
    for name in ("SensitivityN", "Sufficiency", "BatchSufficiency", "Consistency"):
        with pytest.raises(UsageError, match="no image has a score of its own"):
            registry.make("metrics", f"quantus/{name}")


# --- errors ---------------------------------------------------------------------------------------


class Broken:
    """A metric whose error must reach whoever called it."""

    name = "broken"
    better = "higher"

    def __call__(self, explanation: Explanation) -> Tensor:
        raise ZeroDivisionError("the metric's own words")


def test_an_exception_in_a_metric_reaches_the_user_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("the metric's own words")

    batch = toy_batch(2, side=SIDE)
    with pytest.raises(KeyError):  # what was wrong is only printed
        quantus.evaluate(
            {"broken": fail},
            {"any": maps(2)[:, None].numpy()},
            toy_network(),
            batch.images.numpy(),
            batch.labels.numpy(),
        )
    with pytest.raises(ZeroDivisionError, match="the metric's own words"):
        Broken()(Explanation(Probe(toy_model(), batch), maps(2)))
    monkeypatch.setattr(quantus.Sparseness, "evaluate_batch", fail)
    with pytest.raises(ZeroDivisionError, match="the metric's own words"):
        ours("quantus/Sparseness", maps(2))


# --- areas ----------------------------------------------------------------------------------------


def test_areas_run_on_current_numpy() -> None:
    if not hasattr(np, "trapz"):
        with pytest.raises(AttributeError, match="trapz"):
            theirs("PixelFlipping", maps(2), features_in_step=SIDE, return_auc_per_sample=True)
    for name in ("deletion", "insertion", "quantus/PixelFlipping"):
        assert np.isfinite(ours(name, maps(2))).all()


def test_an_area_is_over_the_share_of_steps_whatever_their_number() -> None:
    """Of a network that always says a half, it stays below a half; a sum grows with the steps."""
    model = toy_model(classes=2)
    assert isinstance(model.net, nn.Sequential)
    last = model.net[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data.zero_()
    assert last.bias is not None
    last.bias.data.zero_()
    for features in (1, SIDE, SIDE * SIDE):
        params = {"features_in_step": features, "softmax": True}
        steps = 3 * SIDE * SIDE // features
        found = ours("quantus/PixelFlipping", maps(2), params, model=model)
        assert found == pytest.approx([0.5 * (steps - 1) / steps] * 2)


# --- parameters -----------------------------------------------------------------------------------


def test_a_parameter_that_is_passed_is_used() -> None:
    call = {"explain_func": gradient, "model": toy_network().float().eval()}
    assert theirs("Continuity", maps(2), nr_steps=3, perturb_baseline="black", call=call) == theirs(
        "Continuity", maps(2), nr_steps=3, perturb_baseline="white", call=call
    )
    batch = toy_batch(1, side=SIDE)
    given = (toy_network().float().eval(), batch.images.float().numpy(), np.zeros(1, dtype=int))
    few, many = (
        quantus.explain(*given, method="IntegratedGradients", xai_lib_kwargs={}, n_steps=steps)
        for steps in (2, 200)
    )
    assert np.array_equal(few, many)
    with pytest.raises(UsageError, match="has no parameter 'perturb_baseline'"):
        registry.make("metrics", "quantus/Continuity", {"perturb_baseline": "white"})
    with prepared(toy_model().net):
        one, two = (
            Probe(toy_model(), batch).explain(
                registry.make("methods", "integrated_gradients", {"steps": steps})
            )
            for steps in (2, 200)
        )
    assert not torch.equal(one.raw, two.raw)


def test_the_pointing_game_on_an_empty_mask_is_no_hit() -> None:
    batch = toy_batch(2, side=SIDE)
    assert batch.masks is not None
    empty = Batch(batch.images, batch.labels, batch.keys, 0 * batch.masks)
    assert theirs("PointingGame", maps(2), call={"s_batch": np.zeros((2, 1, SIDE, SIDE))}) == [1, 1]
    for name in ("pointing_game", "quantus/PointingGame"):
        assert np.isnan(ours(name, maps(2), batch=empty)).all()


def test_weights_by_the_size_of_the_mask_are_not_offered_where_they_cannot_work() -> None:
    """Written into truth values, or divided by the size of a batch that lacks its first images."""
    masks = toy_batch(2, side=SIDE).masks
    assert masks is not None
    with pytest.raises(TypeError, match="boolean array indexing"):
        theirs("PointingGame", maps(2) + 2 * masks, weighted=True)
    assert np.isinf(theirs("AttributionLocalisation", maps(2) + 2 * masks, weighted=True)).all()
    for name in ("PointingGame", "AttributionLocalisation"):
        with pytest.raises(UsageError, match="has no parameter 'weighted'"):
            registry.make("metrics", f"quantus/{name}", {"weighted": True})


# --- black ----------------------------------------------------------------------------------------


def test_black_is_black_fixed_and_defined_in_pixel_space() -> None:
    """Bright images have no black in them; theirs is the darkest value that is left."""
    images = 0.5 + 0.5 * toy_batch(2, side=SIDE).images
    darkest = toy_model().normalise(images).flatten(1).amin(1)
    black = baseline_image("black", toy_model(), toy_model().normalise(images))
    changed = quantus.batch_baseline_replacement_by_indices(
        arr=toy_model().normalise(images).flatten(1).numpy(),
        indices=np.zeros((2, 1), dtype=int),
        perturb_baseline="black",
    )
    assert changed[:, 0].tolist() == darkest.tolist()
    assert (black.amax() < darkest).all()
    assert torch.equal(toy_model().pixels(black), torch.zeros_like(black)) or torch.allclose(
        toy_model().pixels(black), torch.zeros_like(black), atol=1e-15
    )


class Seen(nn.Module):
    """The toy network, and the least pixel of each image that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = toy_network().eval().requires_grad_(False)
        self.least: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.least += toy_model().pixels(inputs).flatten(1).amin(1).tolist()
        logits: Tensor = self.inner(inputs)
        return logits


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("PixelFlipping", {"features_in_step": SIDE * SIDE}),
        ("RegionPerturbation", {"patch_size": 4}),
        ("Selectivity", {"patch_size": 4}),
        ("Infidelity", {"perturb_patch_sizes": (4,)}),
        ("FaithfulnessCorrelation", {"nr_runs": 3, "subset_size": 20}),
        ("FaithfulnessEstimate", {"features_in_step": SIDE * SIDE}),
    ],
)
def test_what_quantus_perturbs_becomes_black_in_pixel_space(
    name: str, params: dict[str, Any]
) -> None:
    net, toy = Seen().eval(), toy_model()
    model = Model("seen", net, toy.mean, toy.std)
    batch = toy_batch(1, side=SIDE)
    bright = Batch(0.5 + 0.5 * batch.images, batch.labels, batch.keys, batch.masks)
    ours(f"quantus/{name}", maps(1), params, batch=bright, model=model)
    perturbed = [least for least in net.least if least < 0.4]
    assert len(perturbed) >= 2
    assert perturbed == pytest.approx([0.0] * len(perturbed), abs=1e-6)


# --- further defects that the adapter mends or refuses --------------------------------------------


def test_monotonicity_is_not_1_for_every_map() -> None:
    """Theirs puts the baseline where the baseline is."""
    assert theirs("Monotonicity", maps(6), features_in_step=SIDE) == [True] * 6
    assert 0.0 in ours("quantus/Monotonicity", maps(6), {"features_in_step": SIDE})


def test_infidelity_perturbs_one_patch_at_a_time() -> None:
    """A map that is exact for a linear network has none; theirs let the patches pile up, which is
    exact as well there, so that a network with a product tells them apart.
    """

    class Product(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            halves = images.flatten(1).chunk(2, dim=1)
            both = halves[0].mean(1) * halves[1].mean(1)
            return torch.stack((both, -both), dim=1)

    model = Model("product", Product().eval(), (0.0,) * 3, (1.0,) * 3)
    batch = toy_batch(1, side=SIDE)
    params = {"perturb_patch_sizes": (4,)}
    saliency = torch.zeros(1, SIDE, SIDE, dtype=torch.float64)
    saliency[0, 0, 0] = 1e-12
    (found,) = ours("quantus/Infidelity", saliency, params, batch=batch, model=model)
    errors = []
    for row in (0, 4):
        for column in (0, 4):
            without = batch.images.clone()
            without[:, :, row : row + 4, column : column + 4] = 0
            change = Product()(batch.images)[0, 0] - Product()(without)[0, 0]
            errors.append(float(change) ** 2)
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_superpixels_of_coloured_images_can_be_removed() -> None:
    halves = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    halves[..., 8:] = 1
    saliency = torch.rand(1, 16, 16, dtype=torch.float64)
    call = {"x_batch": halves.float().numpy(), "a_batch": saliency[:, None].numpy()}
    with pytest.raises(AssertionError, match="shape of arr must be the same as the mask shape"):
        theirs("IROF", maps(1), call=call)
    batch = Batch(halves, torch.zeros(1), ("halves",))
    assert np.isfinite(ours("quantus/IROF", saliency, batch=batch)).all()


def test_the_drop_of_the_score_is_better_when_it_is_larger() -> None:
    """Quantus says that a lower one is; black where the object is lowers the probability."""
    assert quantus.RegionPerturbation.score_direction.value == "lower"
    metric = registry.make("metrics", "quantus/RegionPerturbation", {"patch_size": 4})
    assert metric.better == "higher"


def test_completeness_is_not_a_question_of_the_last_bit() -> None:
    """Exact attributions of a linear network fail it for some of the images."""
    weight = torch.randn(1, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 1, bias=False)).eval()
    net[1].weight.data.copy_(weight)
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    exact = images * weight.view(1, 3, SIDE, SIDE)
    found = quantus.Completeness(normalise=False, perturb_baseline=0.0, disable_warnings=True)(
        model=net,
        x_batch=images.numpy(),
        y_batch=np.zeros(8, dtype=int),
        a_batch=exact.numpy(),
        channel_first=True,
        device="cpu",
    )
    assert not all(found)
    with pytest.raises(UsageError, match="equal to the last bit"):
        registry.make("metrics", "quantus/Completeness")


def test_the_unchanged_network_is_no_part_of_a_randomisation_test() -> None:
    call = {"explain_func": gradient, "model": toy_network().float().eval(), "a_batch": None}
    stages = theirs("MPRT", maps(2), call=call)
    (mean, _) = theirs("MPRT", maps(2), call=call, return_average_correlation=True)
    assert stages["original"] == pytest.approx([1.0, 1.0])
    assert mean == pytest.approx(np.mean([stage[0] for stage in stages.values()]))
    with pytest.raises(UsageError, match="use model_randomisation"):
        registry.make("metrics", "quantus/MPRT")


def test_input_invariance_of_a_padded_network_is_no_verdict_on_a_gradient() -> None:
    """The shift of the input cannot be undone at the border, so even a gradient fails."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * SIDE**2, 2)
    ).eval()
    images = np.random.default_rng(0).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    labels = np.zeros(2, dtype=int)
    found = quantus.InputInvariance(disable_warnings=True)(
        model=net,
        x_batch=images,
        y_batch=labels,
        a_batch=gradient(net, images, labels),
        explain_func=gradient,
        channel_first=True,
        device="cpu",
    )
    assert not any(found)
    with pytest.raises(UsageError, match="not offered: it rewrites the bias"):
        registry.make("metrics", "quantus/InputInvariance")


def test_memory_does_not_grow_over_calls() -> None:
    """A cache of Quantus' keeps every network that was wrapped."""

    def networks() -> int:
        gc.collect()
        return sum(isinstance(thing, FromFloat32) for thing in gc.get_objects())

    before = networks()
    for _ in range(3):
        theirs("Selectivity", maps(1), patch_size=4)
    assert networks() - before >= 3
    wrapped = quantus.helpers.model.pytorch_model.PyTorchModel._get_last_softmax_layer_index
    ours("quantus/Selectivity", maps(1), {"patch_size": 4})
    assert wrapped.cache_info().currsize == 0


# --- explaining -----------------------------------------------------------------------------------


def test_grad_cam_includes_the_relu_of_its_paper() -> None:
    """Quantus' own Grad-CAM, which robustness metrics would use, has negative maps."""
    batch = toy_batch(4, side=16)
    net = toy_network().float().eval()
    found = quantus.explain(
        net,
        batch.images.float().numpy(),
        np.arange(4),
        method="LayerGradCam",
        gc_layer=net[2],
        interpolate=(16, 16),
    )
    assert (found < 0).any()
    with prepared(toy_model().net):
        for name in ("grad_cam", "captum/LayerGradCam", "gradcam/GradCAM"):
            probe = Probe(toy_model(), batch, target=torch.arange(4))
            assert (probe.explain(registry.make("methods", name)).raw >= 0).all()


def test_the_method_under_test_is_what_runs_again() -> None:
    """Smooth MPRT calls Quantus' own explanations, whatever it is given."""
    called = []

    def explain(*args: Any, **kwargs: Any) -> Array:
        called.append(1)
        return gradient(*args, **kwargs)

    call = {
        "explain_func": explain,
        "explain_func_kwargs": {"method": "Saliency"},
        "model": toy_network().float().eval(),
        "a_batch": None,
    }
    theirs("SmoothMPRT", maps(1), call=call, nr_samples=2)
    assert not called
    with pytest.raises(UsageError, match="explains with captum whatever method"):
        registry.make("metrics", "quantus/SmoothMPRT")
    with pytest.raises(Unsupported, match="runs the method again"):
        ours("quantus/MaxSensitivity", maps(1))
    asked: list[int] = []

    class Counting:
        name = "counting"
        needs = ()

        def __call__(self, probe: Probe) -> Tensor:
            asked.append(len(probe.inputs))
            return probe.inputs.abs().sum(1)

    ours("quantus/MaxSensitivity", maps(2), {"nr_samples": 3}, method=Counting())
    assert asked == [1] * 6
