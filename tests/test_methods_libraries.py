"""Methods of captum and pytorch-grad-cam: named, validated, reproducible, and without a trace."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import suite_of
from test_contract import CHEAP
from torch import Tensor, nn
from torch.nn import functional

import xbench
from xbench import info, registry
from xbench.autograd import prepared
from xbench.baselines import baseline_image
from xbench.errors import Unsupported, UsageError
from xbench.maps import cam_map, reduced
from xbench.methods import from_captum, from_gradcam
from xbench.plan import batch_needs, make_plan
from xbench.probe import Logits, Probe, method_cost
from xbench.testing import SIDE, toy_batch, toy_model, toy_network, toy_transformer, unchanged
from xbench.types import Batch, Model

NAMES = [
    *(f"captum/{name}" for name in from_captum.CLASSES),
    *(f"gradcam/{name}" for name in from_gradcam.CLASSES),
]


@contextmanager
def probing(
    model: Model | None = None, batch: Batch | None = None, **given: Any
) -> Iterator[Probe]:
    model, batch = model or toy_model(), batch or toy_batch(3)
    with prepared(model.net) as meter:
        yield Probe(model, batch, target=torch.tensor([4, 0, 2]), meter=meter, **given)


def explained(name: str, params: dict[str, Any] | None = None, **given: Any) -> Tensor:
    with probing(**given) as probe:
        return probe.explain(registry.make("methods", name, params)).raw


def wrapped(net: nn.Module, last: str = "body") -> Model:
    return Model("net", net.double().eval().requires_grad_(False), layers={"last_conv": last})


# --- names ----------------------------------------------------------------------------------------


def test_classes_are_listed_without_importing_the_libraries() -> None:
    code = (
        "import sys, xbench.info as info\n"
        "print('captum/DeepLift ' in info.listing('methods'), info.listing('plugins') != '')\n"
        "print([name for name in ('captum', 'pytorch_grad_cam', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True True", "[]"]


def test_every_explaining_class_of_captum_is_served_or_refused_with_a_reason() -> None:
    captum = importlib.import_module("captum.attr")
    exported = {
        name
        for name in captum.__all__
        if inspect.isclass(theirs := getattr(captum, name))
        and (hasattr(theirs, "attribute") or issubclass(theirs, captum.Attribution))
    }
    assert exported == from_captum.CLASSES.keys() | from_captum.REFUSED.keys()


def test_every_explaining_class_of_pytorch_grad_cam_is_served_or_refused_with_a_reason() -> None:
    pytorch_grad_cam = importlib.import_module("pytorch_grad_cam")
    parts = {"AblationLayer", "AblationLayerFasterRCNN", "AblationLayerVit"}
    exported = {
        name for name, theirs in vars(pytorch_grad_cam).items() if inspect.isclass(theirs)
    } - {*parts, "ActivationsAndGradients"}
    assert exported == from_gradcam.CLASSES.keys() | from_gradcam.REFUSED.keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("captum/DeepLif", "unknown method 'captum/DeepLif'; did you mean 'captum/DeepLift'"),
        ("gradcam/GradCam", "did you mean 'gradcam/GradCAM'"),
        ("captum/NeuronGradient", "not offered: it explains a neuron"),
        ("captum/FeaturePermutation", "not offered: it mixes the images"),
        ("gradcam/DeepFeatureFactorization", "not offered: it finds concepts"),
    ],
)
def test_a_name_that_is_not_served_says_why_or_what_was_meant(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("methods", name)
    if "offered" in words:
        with pytest.raises(UsageError, match=words):
            info.description(name)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"captum/Saliency needs captum, which cannot be imported"):
        from_captum.LIBRARY.theirs("Saliency")


def test_a_class_that_the_installed_version_lacks_is_named() -> None:
    with pytest.raises(UsageError, match="installed version of captum has no class Saliencies"):
        from_captum.LIBRARY.theirs("Saliencies")


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_the_librarys_defaults(name: str) -> None:
    cls: Any = registry.find("methods", name)
    for key, default in {**cls.made, **cls.called}.items():
        if key in cls.__dataclass_fields__ and key not in {*cls.facts.fields, "layer", "baselines"}:
            assert getattr(cls(), key) in (default, getattr(default, "__name__", default))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_is_the_one_that_is_listed_and_fits(name: str) -> None:
    entry = registry.entries("methods")[name]
    lines = (inspect.getdoc(entry.load()) or "").splitlines()
    assert lines[0] == entry.summary
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("Source: ") for line in lines)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("captum/DeepLift", {"basline": "mean"}, "no parameter 'basline'; did you mean 'baseline'"),
        ("captum/DeepLift", {"baseline": "grey"}, "baseline = 'grey': input should be 'black'"),
        ("captum/DeepLift", {"custom_attribution_func": None}, "no parameter 'custom_attribution"),
        ("captum/IntegratedGradients", {"n_steps": 0}, "greater than or equal to 1"),
        ("captum/IntegratedGradients", {"method": "simpson"}, "input should be 'gausslegendre'"),
        ("captum/Occlusion", {"window": 3, "stride": 4}, "stride 4 leaves gaps between windows"),
        ("captum/ShapleyValues", {"patches": 3}, "less than or equal to 2"),
        ("captum/DeepLiftShap", {"baselines": ("black",)}, "at least 2 items"),
        ("captum/GradientShap", {"baselines": ()}, "at least 1 item"),
        ("gradcam/GradCAM", {"aug_smooth": 1}, "valid boolean"),
        ("gradcam/EigenCAM", {"eigen_smooth": True}, "no parameter 'eigen_smooth'"),
        ("gradcam/AblationCAM", {"ratio_channels_to_ablate": 0.0}, "greater than 0"),
    ],
)
def test_a_wrong_parameter_is_refused(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("methods", name, params)


def test_a_description_shows_types_defaults_and_passes() -> None:
    text = info.description("captum/GradientShap")
    assert "n_samples: int >= 1, default 5" in text
    assert "baselines: tuple of 'black' | 'mean' | 'white' | 'blur' | " in text
    assert ", default ('black'," in text
    assert "Passes per image on shapes/resnet, alone: 6 forward, 5 backward" in text


def test_parameters_reach_the_library() -> None:
    maps = {
        str(params): explained("captum/IntegratedGradients", params)
        for params in (
            {"n_steps": 3},
            {"n_steps": 4},
            {"n_steps": 3, "method": "riemann_left"},
            {"n_steps": 3, "multiply_by_inputs": False},
            {"n_steps": 3, "baseline": "white"},
            {"n_steps": 3, "channels": "max"},
        )
    }
    found = list(maps.values())
    assert not any(torch.equal(one, two) for at, one in enumerate(found) for two in found[:at])


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("name", ["captum/LayerGradCam", "gradcam/ScoreCAM"])
def test_a_plan_resolves_the_layers_that_a_library_reads(name: str) -> None:
    def cell(**params: Any) -> str:
        methods, metrics = [{"name": name, **params}], ["average_drop"]
        (found,) = make_plan(suite_of(methods=methods, metrics=metrics), None).cells
        return found.id

    assert cell() != cell(layer="0")
    with pytest.raises(UsageError, match=f"no layer 'layer9' .asked for by {name}"):
        cell(layer="layer9")


def test_signs_and_upsampling_of_a_layers_map_are_parameters() -> None:
    from captum.attr import LayerGradCam

    with probing() as probe:
        layer = probe.model.net.get_submodule("1")
        made = LayerGradCam(probe.model.net, layer)
        small = made.attribute(probe.inputs, target=probe.target)[:, 0].detach()
        for params in ({}, {"sign": "signed"}, {"upsampling": "corners"}):
            method = registry.make("methods", "captum/LayerGradCam", {"layer": "1", **params})
            torch.testing.assert_close(
                method(probe), cam_map(small, like=probe.inputs, **params), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("name", ["captum/LayerActivation", "gradcam/GradCAM"])
@pytest.mark.parametrize(
    ("layer", "words"), [("5", "feature maps have 3"), ("6", "feature maps have 3")]
)
def test_a_layer_without_feature_maps_is_refused(name: str, layer: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        explained(name, {"layer": layer})


TOKENS = [
    *(f"captum/{n}" for n, facts in from_captum.CLASSES.items() if "Layer" in n and not facts.kind),
    "gradcam/LayerCAM",
    *(name for name in NAMES if name.startswith("gradcam") and "FullGrad" not in name),
]


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_are_read_as_feature_maps_or_refused(name: str) -> None:
    method = registry.make("methods", name, CHEAP.get(name))
    model = toy_transformer()
    with probing(model) as probe:
        if method.facts.maps_only:
            with pytest.raises(Unsupported, match=r"reads feature maps .N, C, h, w., and layer"):
                probe.explain(method)
        else:
            assert probe.probability.isfinite().all()
            maps = probe.explain(method).raw
            assert maps.isfinite().all()
            assert maps.flatten(1).std(1).max() > 0
            assert probe.spent == method_cost(method, model, beside=(Logits(),))


def test_grad_cam_of_tokens_is_ours_scaled_as_the_library_does() -> None:
    model = toy_transformer()
    ours = explained("grad_cam", model=model)
    theirs = explained("gradcam/GradCAM", model=model)
    small = theirs[:, 2::4, 2::4]  # the library scales and enlarges them
    assert ours.shape == theirs.shape
    for one, two in zip(ours[:, 2::4, 2::4].flatten(1), small.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack((one, two)))[0, 1] > 0.99


class Overwritten(nn.Module):
    """Changes its last feature map in place, as torchvision's DenseNets do, or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Conv2d(3, 6, 3, stride=2)
            self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        kept = functional.relu(self.body(images), inplace=self.in_place)
        return self.head(kept.square().mean((2, 3)))


@pytest.mark.parametrize(
    "name", ["captum/LayerGradCam", "captum/LayerActivation", "gradcam/GradCAM", "gradcam/ScoreCAM"]
)
def test_a_recorded_layer_is_not_overwritten_by_what_follows(name: str) -> None:
    clean, dirty = (
        explained(name, model=wrapped(Overwritten(in_place=in_place))) for in_place in (False, True)
    )
    assert torch.equal(clean, dirty)


def test_a_layer_that_captum_cannot_replace_is_refused_with_a_way_out() -> None:
    with pytest.raises(Unsupported, match="name one before it"):
        explained(
            "captum/LayerIntegratedGradients", model=wrapped(Overwritten(in_place=True), "body")
        )


# --- networks that captum gets wrong --------------------------------------------------------------


class Reused(nn.Module):
    """One ReLU for two places, a function, an addition in place, and overlapping max pooling."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 5)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        start = self.pool(self.relu(self.norm(self.stem(images))))
        inner = self.two(functional.relu(self.one(start)))
        inner += start
        return self.head(self.body(self.relu(inner)).mean((2, 3)))


@pytest.mark.parametrize("name", ["captum/DeepLift", "captum/LayerDeepLift"])
@pytest.mark.parametrize("baseline", ["black", "white", "blur"])
def test_deep_lift_adds_up_to_the_difference_of_the_logits(name: str, baseline: str) -> None:
    model, batch = wrapped(Reused()), toy_batch(3)
    params = {"baseline": baseline, **({"channels": "sum"} if "Layer" not in name else {})}
    if "Layer" in name:  # at the layer's resolution, where nothing is upsampled
        model.net.pool = nn.AvgPool2d(1)
        params |= {"sign": "signed", "layer": "body"}
    with probing(model, batch) as probe:
        maps = probe.explain(registry.make("methods", name, params)).raw
        images = baseline_image(baseline, model, probe.inputs).expand_as(probe.inputs)
        gain = model.net(probe.inputs) - model.net(images)
    difference = gain.gather(1, probe.target[:, None])[:, 0]
    assert difference.abs().min() > 1e-4
    torch.testing.assert_close(maps.sum((1, 2)), difference, rtol=1e-9, atol=1e-12)


def test_deep_lift_shap_is_the_mean_of_deep_lift_over_its_baselines() -> None:
    model = wrapped(Reused())
    single = [
        explained("captum/DeepLift", {"baseline": name, "channels": "sum"}, model=model)
        for name in ("black", "blur")
    ]
    both = explained(
        "captum/DeepLiftShap", {"baselines": ("black", "blur"), "channels": "sum"}, model=model
    )
    torch.testing.assert_close(both, torch.stack(single).mean(0), rtol=0, atol=1e-12)


def test_a_map_of_a_pooling_network_does_not_read_its_neighbours() -> None:
    model, batch = wrapped(Reused()), toy_batch(3)
    batch.images[:, :, :8] = 0  # where an image is its baseline, captum takes the first's gradient
    method = registry.make("methods", "captum/DeepLift", {"multiply_by_inputs": False})
    with probing(model, batch) as probe:
        together = probe.explain(method).raw
    target = torch.tensor([0])
    alone = Probe(model, batch.part(slice(1, 2)), target=target, rows=3).explain(method).raw
    assert torch.equal(together[1], alone[0])


def test_relevance_of_a_layer_is_conserved_without_biases() -> None:
    net = Reused()
    for part in (net.stem, net.one, net.two, net.head):
        nn.init.zeros_(part.bias)
    model = wrapped(net)
    net.pool, net.norm = nn.AvgPool2d(1), nn.Identity()
    params = {"layer": "body", "sign": "signed"}
    with probing(model) as probe:
        layer = probe.explain(registry.make("methods", "captum/LayerLRP", params)).raw
        image = probe.explain(registry.make("methods", "captum/LRP", {"channels": "sum"})).raw
        logit = model.net(probe.inputs).gather(1, probe.target[:, None])[:, 0]
    torch.testing.assert_close(layer.sum((1, 2)), logit, rtol=1e-5, atol=0)
    torch.testing.assert_close(image.sum((1, 2)), logit, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name", ["captum/DeepLift", "captum/LayerDeepLift", "captum/LRP", "captum/GuidedBackprop"]
)
def test_an_activation_that_captum_does_not_know_is_refused(name: str) -> None:
    net = toy_network()
    net[1] = nn.ReLU6()
    with pytest.raises(Unsupported, match=f"{name}: .* does not cover Hardtanh"):
        explained(name, model=wrapped(net, "3"))


def test_full_grad_refuses_layers_that_run_in_another_order_than_they_stand() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.one = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.two(self.one(images).relu()).mean((2, 3)))

    with pytest.raises(Unsupported, match="in the order in which they stand"):
        explained("gradcam/FullGrad", model=wrapped(Swapped(), "two"))


def test_the_librarys_own_refusal_is_passed_on() -> None:
    with pytest.raises(Unsupported, match=r"captum/IntegratedGradients refuses: \w"):
        explained("captum/IntegratedGradients", {"n_steps": 1, "method": "riemann_trapezoid"})


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("captum/FeatureAblation", {"patches": 17}, "a grid of 17 does not fit 16 x 16"),
        ("captum/KernelShap", {"patches": 17}, "a grid of 17 does not fit 16 x 16"),
        ("captum/Occlusion", {"window": 17}, "a window of 17 does not fit 16 x 16"),
    ],
)
def test_what_does_not_fit_the_image_is_refused(
    name: str, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(Unsupported, match=words):
        explained(name, params)
    if name != "captum/KernelShap":  # whose cost does not depend on it; a plan then says so
        with pytest.raises(Unsupported, match=words):
            registry.make("methods", name, params).passes(toy_model())


# --- random numbers -------------------------------------------------------------------------------

RANDOM = {
    "captum/GradientShap": {"n_samples": 3},
    "captum/LayerGradientShap": {"n_samples": 3, "sign": "signed"},
    "captum/ShapleyValueSampling": {"n_samples": 2, "patches": 3},
    "captum/Lime": {"n_samples": 12, "patches": 3, "alpha": 1e-6},
    "captum/KernelShap": {"n_samples": 12, "patches": 3},
    "gradcam/RandomCAM": {},
}


@pytest.mark.parametrize("name", RANDOM)
def test_maps_follow_the_seed_and_nothing_else(name: str) -> None:
    def drawn(seed: int, state: int) -> Tensor:
        np.random.seed(state)  # noqa: NPY002
        torch.manual_seed(state)
        found = explained(name, RANDOM[name], seed=seed)
        assert np.random.get_state()[1][0] == state  # noqa: NPY002
        return found

    before = torch.random.get_rng_state()
    try:
        assert torch.equal(drawn(0, 1), drawn(0, 2))
        assert not torch.equal(drawn(0, 1), drawn(1, 1))
    finally:
        torch.random.set_rng_state(before)


def test_more_samples_than_go_into_one_forward_are_averaged_over_portions() -> None:
    """On a linear network, expected gradients are exact whatever is drawn."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5))
    model = wrapped(net, "")
    params = {"baselines": ("white",), "n_samples": 70, "channels": "sum"}
    rows = forwarded(model, "captum/GradientShap", params)
    assert set(rows) == {from_captum.SAMPLES_AT_ONCE, 70 - 2 * from_captum.SAMPLES_AT_ONCE}
    maps = explained("captum/GradientShap", params, model=model)
    weight = net[1].weight[torch.tensor([4, 0, 2])].view(3, 3, SIDE, SIDE)
    expected = (weight * (toy_batch(3).images - 1)).sum(1)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-12)


# --- memory ---------------------------------------------------------------------------------------


def forwarded(model: Model, name: str, params: dict[str, Any]) -> list[int]:
    """Rows of each forward but the first, of the clean images."""
    rows: list[int] = []
    handle = model.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    try:
        explained(name, params, model=model)
    finally:
        handle.remove()
    return rows[1:]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("captum/IntegratedGradients", {"n_steps": 9}),
        ("captum/InternalInfluence", {"n_steps": 9}),
        ("captum/Occlusion", {"window": 4, "stride": 4}),
        ("captum/FeatureAblation", {"patches": 3}),
        ("captum/LayerFeatureAblation", {"patches": 3}),
        ("captum/ShapleyValueSampling", {"patches": 2, "n_samples": 3}),
        ("captum/ShapleyValues", {"patches": 2}),
        ("captum/Lime", {"patches": 2, "n_samples": 7}),
        ("captum/KernelShap", {"patches": 2, "n_samples": 7}),
        ("gradcam/ScoreCAM", {}),
        ("gradcam/AblationCAM", {}),
        ("gradcam/SESS", {"num_scales": 3}),
    ],
)
def test_no_forward_is_larger_than_the_fixed_shape(name: str, params: dict[str, Any]) -> None:
    rows = forwarded(toy_model(), name, params)
    assert rows
    assert max(rows) <= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_partially_filled_batch_costs_its_images_and_changes_no_bit(name: str) -> None:
    method = registry.make("methods", name, CHEAP.get(name))
    needs = batch_needs([method], [])
    with probing(toy_model(), rows=4, needs=needs) as probe:
        assert probe.probability.isfinite().all()
        maps = probe.explain(method).raw
        declared = method_cost(method, probe.model, beside=(Logits(),))
        assert declared == probe.spent or hasattr(method, "passes_bound")
        last = Probe(probe.model, probe.batch.part(slice(2, 3)), target=probe.target[2:3], rows=4)
        assert torch.equal(maps[2:3], last.explain(method).raw[:1])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gradcam/SESS", {"scales": (16, 20, 33), "window_size": 12, "step_size": 5}),
        ("gradcam/SESS", {"num_scales": 4, "pre_filter_ratio": 0.3}),
        ("gradcam/AblationCAM", {"ratio_channels_to_ablate": 0.3, "aug_smooth": True}),
        ("gradcam/ScoreCAM", {"layer": "1", "aug_smooth": True}),
        ("gradcam/RefineCAM", {"layers": ("1", "3")}),
        ("captum/Occlusion", {"window": 7, "stride": 3}),
        ("captum/LayerIntegratedGradients", {"n_steps": 4, "method": "riemann_right"}),
        ("captum/DeepLiftShap", {"baselines": ("black", "mean", "blur")}),
    ],
)
def test_passes_follow_the_parameters(name: str, params: dict[str, Any]) -> None:
    """On images that are not square."""
    method = registry.make("methods", name, params)
    model = replace(toy_model(), size=(16, 21))
    wide = torch.cat((toy_batch(3).images, toy_batch(3, seed=1).images[..., :5]), dim=3)
    batch = replace(toy_batch(3), images=wide, masks=None)
    with probing(model, batch, needs=batch_needs([method], [])) as probe:
        assert probe.probability.isfinite().all()
        probe.explain(method)
        assert probe.spent == method_cost(method, model, beside=(Logits(),))


# --- without a trace ------------------------------------------------------------------------------


class Failing(nn.Module):
    """Raises at a given forward."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.forwards: list[int] = []
        self.at = at
        self.body = toy_network()[:4]
        self.head = toy_network()[4:]

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        self.forwards.append(len(images))
        if len(self.forwards) == self.at:
            raise OSError("the network is tired")
        return self.head(features)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("captum/DeepLift", 4),
        ("captum/LayerDeepLift", 5),
        ("captum/LRP", 5),
        ("captum/LayerConductance", 3),
        ("captum/GradientShap", 3),
        ("gradcam/GradCAM", 3),
        ("gradcam/AblationCAM", 5),
        ("gradcam/RefineCAM", 3),
        ("gradcam/SESS", 4),
    ],
)
def test_nothing_is_left_behind_after_an_error(name: str, at: int) -> None:
    model, batch = wrapped(Failing(at)), toy_batch(3)
    params = {"num_scales": 2} if name == "gradcam/SESS" else {}
    before = [dict(vars(module)) for module in model.net.modules()]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    with unchanged(model, batch, name), pytest.raises(OSError, match="tired"):
        explained(name, params, model=model, batch=batch)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert len(model.net.forwards) == at
    assert [dict(vars(module)) for module in model.net.modules()] == before


def test_gradients_of_the_users_parameters_are_not_cleared() -> None:
    net = toy_network()
    images = toy_batch(2).images
    net(images).sum().backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    xbench.attribute(net, images, "gradcam/GradCAM")
    after = [parameter.grad for parameter in net.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "params"),
    [("gradcam/AblationCAM", {}), ("gradcam/HiResCAM", {"eigen_smooth": True})],
)
def test_libraries_are_quiet(
    name: str, params: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    explained(name, params)
    assert capfd.readouterr() == ("", "")


# --- particular classes ---------------------------------------------------------------------------


def test_saliency_has_the_gradients_signs_where_it_sums_channels() -> None:
    with probing() as probe:
        gradient = probe.input_gradient(probe.inputs)
    for channels in ("sum", "absolute_sum", "max"):
        found = explained("captum/Saliency", {"channels": channels})
        torch.testing.assert_close(found, reduced(gradient, channels), rtol=0, atol=1e-12)


def test_finer_cam_needs_a_class_to_compare_with() -> None:
    with pytest.raises(Unsupported, match="5 classes, none of which compares"):
        explained("gradcam/FinerCAM", {"comparison_categories": (5, 7)})


def test_finer_cam_that_subtracts_nothing_is_grad_cam() -> None:
    theirs = explained("gradcam/GradCAM")
    torch.testing.assert_close(explained("gradcam/FinerCAM", {"alpha": 0.0}), theirs)
    assert not torch.allclose(explained("gradcam/FinerCAM"), theirs)


def test_refine_cam_of_one_layer_is_its_base_method() -> None:
    base = {"layers": ("3",), "base_method": "HiResCAM"}
    maps, expected = explained("gradcam/RefineCAM", base), explained("gradcam/HiResCAM")
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(explained("gradcam/RefineCAM", {"layers": ("1", "3")}), maps)


def test_occlusion_of_one_window_over_the_whole_image_is_the_logits_drop() -> None:
    """As float32 has it, in which captum averages windows."""
    maps = explained("captum/Occlusion", {"window": SIDE, "stride": SIDE, "baseline": "mean"})
    with probing() as probe:
        gone = probe.model.net(torch.zeros_like(probe.inputs))
        drop = (probe.model.net(probe.inputs) - gone).gather(1, probe.target[:, None])
    torch.testing.assert_close(maps, drop[..., None].expand(-1, SIDE, SIDE), rtol=0, atol=1e-8)


def test_exact_shapley_values_add_up_to_the_difference_of_the_logits() -> None:
    maps = explained("captum/ShapleyValues")
    with probing() as probe:
        black = probe.model.normalise(torch.zeros_like(probe.batch.images))
        gain = probe.model.net(probe.inputs) - probe.model.net(black)
    expected = gain.gather(1, probe.target[:, None])[:, 0]
    found = maps[:, 4::8, 4::8].sum((1, 2))  # one pixel of each patch
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_notebook_reaches_the_libraries() -> None:
    maps = xbench.attribute(
        toy_network(), toy_batch(2).images, "captum/DeepLift", baseline="white", mean=(0.5,)
    )
    assert maps.shape == (2, SIDE, SIDE)
    assert maps.dtype == torch.float64


def test_an_entry_is_pickled_by_its_name_and_parameters() -> None:
    made = registry.make("methods", "captum/Occlusion", {"window": 9})
    assert pickle.loads(pickle.dumps(made)) == made != registry.make("methods", "captum/Occlusion")


@pytest.mark.parametrize("name", ["captum/DeepLift", "captum/Occlusion", "captum/Lime"])
def test_noise_is_a_baseline_as_any_other(name: str) -> None:
    """It hangs on the image's key, and so does not depend on who else is in the batch."""
    model, batch = toy_model(), toy_batch(4)
    method = registry.make("methods", name, {**CHEAP.get(name, {}), "baseline": "noise"})
    target = torch.tensor([4, 0, 2, 2])
    with prepared(model.net):
        together = Probe(model, batch, target=target).explain(method).raw
        alone = Probe(model, batch.part(slice(2, 3)), target=target[2:3]).explain(method).raw
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-6)
    assert not torch.equal(together, explained(name, {**CHEAP.get(name, {})}))
