"""Metrics of Quantus: named, validated, each image alone, and without a trace."""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer, suite_of
from test_contract import cheap
from torch import Tensor, nn

from xbench import info, registry
from xbench.autograd import prepared
from xbench.errors import Unsupported, UsageError
from xbench.metrics.from_quantus import CLASSES, LIBRARY, REFUSED
from xbench.plan import batch_needs, make_plan
from xbench.probe import Explanation, Logits, Probe, closure, cost
from xbench.runner import run_unit
from xbench.scoring import evaluated
from xbench.store import Store
from xbench.tables import collect
from xbench.testing import SIDE, toy_batch, toy_model, unchanged
from xbench.types import Batch, Model, Passes

NAMES = list(CLASSES)
AGAIN = [name for name, facts in CLASSES.items() if facts.again]
MASKS = [name for name, facts in CLASSES.items() if facts.masks]
LITTLE = 6
"""Side of images that even a forward for each value is quick on."""


def small(name: str, side: int) -> dict[str, Any]:
    return cheap(f"quantus/{name}", (side, side))


def scored(
    name: str,
    params: dict[str, Any] | None = None,
    *,
    count: int = 3,
    side: int = LITTLE,
    batch: Batch | None = None,
    maps: Tensor | None = None,
    method: Any = "gradient",
    model: Model | None = None,
    seed: int = 0,
) -> list[tuple[float, str]]:
    """Statuses of toy images with signed maps."""
    batch, model = batch or toy_batch(count, side=side), model or toy_model()
    if maps is None:
        generator = torch.Generator().manual_seed(1)
        maps = torch.randn(count, side, side, generator=generator, dtype=torch.float64)
    metric = registry.make("metrics", f"quantus/{name}", params or small(name, side))
    with prepared(model.net) as meter:
        target = torch.arange(len(batch.keys)) % 5
        probe = Probe(model, batch, target=target, seed=seed, meter=meter)
        made = None if method is None else registry.make("methods", method)
        return evaluated(metric, Explanation(probe, maps, made))


def values(name: str, params: dict[str, Any] | None = None, **given: Any) -> list[float]:
    return [value for value, _ in scored(name, params, **given)]


# --- names ----------------------------------------------------------------------------------------


def test_classes_are_listed_without_importing_quantus() -> None:
    code = (
        "import sys, xbench.info as info\n"
        "print('quantus/Sparseness ' in info.listing('metrics'))\n"
        "print([name for name in ('quantus', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True", "[]"]


def test_every_class_of_quantus_is_served_or_refused_with_a_reason() -> None:
    quantus = importlib.import_module("quantus")
    base = importlib.import_module("quantus.metrics.base").Metric
    exported = {
        name
        for name, theirs in vars(quantus).items()
        if inspect.isclass(theirs) and issubclass(theirs, base) and theirs is not base
    }
    known = importlib.import_module("quantus.helpers.constants").AVAILABLE_METRICS
    assert {cls.__name__ for group in known.values() for cls in group.values()} <= exported
    assert exported == CLASSES.keys() | REFUSED.keys()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Sparsness", "unknown metric 'quantus/Sparsness'; did you mean 'quantus/Sparseness'"),
        ("ROAD", "not offered: it counts three channels .* use road, road_morf or road_lerf"),
        ("MPRT", "not offered: it counts the unchanged .* use model_randomisation"),
        ("Sufficiency", "not offered: it compares the images of a batch"),
        ("SensitivityN", "not offered: it correlates over .* use quantus/FaithfulnessCorrelation"),
    ],
)
def test_a_name_that_is_not_served_says_why_or_what_was_meant(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("metrics", f"quantus/{name}")
    if "offered" in words:
        with pytest.raises(UsageError, match=words):
            info.description(f"quantus/{name}")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libGL.so.1: cannot open shared object file"), "opencv-python-headless"),
        (ImportError("No module named 'quantus'"), "install quantus>=0.6"),
    ],
)
def test_quantus_that_cannot_be_imported_is_named_with_the_way_out(
    error: ImportError, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UsageError, match=f"quantus/AUC needs Quantus, .*{words}"):
        LIBRARY.theirs("AUC")


def test_an_entry_is_pickled_by_its_name_and_parameters() -> None:
    made = registry.make("metrics", "quantus/Sparseness", {"normalise": False})
    assert (
        pickle.loads(pickle.dumps(made)) == made != registry.make("metrics", "quantus/Sparseness")
    )


def test_a_class_that_the_installed_version_lacks_is_named() -> None:
    with pytest.raises(UsageError, match="installed version of Quantus has no class Sparsenesses"):
        LIBRARY.theirs("Sparsenesses")


@pytest.mark.parametrize("name", NAMES)
def test_direction_and_family_are_those_that_quantus_gives(name: str) -> None:
    cls: Any = registry.find("metrics", f"quantus/{name}")
    theirs = LIBRARY.theirs(name)
    wrong = {"RegionPerturbation": "lower"}  # it measures the drop
    assert theirs.score_direction.value == wrong.get(name, cls.better)
    category = theirs.evaluation_category.value.lower()
    assert cls.family == {"randomisation": "sanity"}.get(category, category)


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_quantus_own_defaults(name: str) -> None:
    cls: Any = registry.find("metrics", f"quantus/{name}")
    theirs = LIBRARY.theirs(name)
    defaults = {
        **inspect.signature(theirs.__call__).parameters,
        **inspect.signature(theirs.__init__).parameters,
    }
    for key, value in registry.parameters(cls()).items():
        if defaults[key].default is not None:
            assert value == defaults[key].default, key
    made = theirs(disable_warnings=True)
    if "normalise_func" in cls.__dataclass_fields__:
        function = getattr(made.normalise_func, "func", made.normalise_func)
        assert cls().normalise_func == function.__name__
    if "similarity_func" in cls.__dataclass_fields__:
        assert cls().similarity_func == made.similarity_func.__name__


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_is_the_one_that_is_listed_and_fits(name: str) -> None:
    entry = registry.entries("metrics")[f"quantus/{name}"]
    lines = (inspect.getdoc(entry.load()) or "").splitlines()
    assert lines[0] == entry.summary
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("Source: ") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_not_offered_is_named(name: str) -> None:
    text = info.description(f"quantus/{name}")
    for key in CLASSES[name].without:
        assert key in text
    assert "abs: bool, default" in text or name == "AttributionLocalisation"
    assert "normalise: bool, default" in text


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("Sparseness", {"normalize": True}, "no parameter 'normalize'; did you mean 'normalise'"),
        ("Sparseness", {"abs": 1}, "valid boolean"),
        ("Sparseness", {"return_aggregate": True}, "no parameter 'return_aggregate'"),
        ("PixelFlipping", {"perturb_func": None}, "no parameter 'perturb_func'"),
        ("PixelFlipping", {"perturb_baseline": "grey"}, "input should be 'black'"),
        ("PixelFlipping", {"perturb_baseline": "uniform"}, "input should be 'black'"),
        ("PixelFlipping", {"features_in_step": 0}, "greater than or equal to 1"),
        ("PointingGame", {"weighted": True}, "no parameter 'weighted'"),
        ("MaxSensitivity", {"upper_bound": 0.1}, "upper_bound 0.1 must be above lower_bound 0.2"),
        ("FaithfulnessCorrelation", {"similarity_func": "ssim"}, "'correlation_pearson'"),
        ("RandomLogit", {"num_classes": 1000}, "no parameter 'num_classes'"),
    ],
)
def test_a_wrong_parameter_is_refused(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("metrics", f"quantus/{name}", params)


def test_parameters_are_part_of_the_identity() -> None:
    identity = registry.identity(registry.make("metrics", "quantus/Sparseness"))
    assert identity["params"] == {
        "abs": True,
        "normalise": True,
        "normalise_func": "normalise_by_max",
    }


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("TopKIntersection", {"k": 36}, "k = 36 must be below the 36 pixels of images of 6 x 6"),
        ("FaithfulnessCorrelation", {}, "subset_size = 224 must be below the 36 pixels"),
        ("PixelFlipping", {"features_in_step": 5}, "features_in_step = 5 must divide the 36"),
        ("Selectivity", {}, "patches of 8 x 8 do not divide images of 6 x 6"),
        ("Selectivity", {"patch_size": 6}, "6 x 6 are a single patch"),
        ("Infidelity", {"perturb_patch_sizes": (2, 4)}, "patches of 4 x 4 do not divide"),
        ("Continuity", {}, "nr_steps = 28 must neither exceed nor divide 13"),
        ("Continuity", {"nr_steps": 13}, "nr_steps = 13 must neither exceed nor divide 13"),
    ],
)
def test_what_does_not_fit_the_images_is_unsupported(
    name: str, params: dict[str, Any], words: str
) -> None:
    method = registry.make("methods", "gradient")
    metric = registry.make("metrics", f"quantus/{name}", params)
    sketch = replace(toy_model(), size=(LITTLE, LITTLE))
    with pytest.raises(Unsupported, match=words):
        cost(closure(metric.needs), sketch)
    probe = Probe(toy_model(), toy_batch(1, side=LITTLE))
    with pytest.raises(Unsupported, match=words):
        metric(Explanation(probe, torch.rand(1, LITTLE, LITTLE), method))


# --- each image alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_score_depends_on_its_own_image_alone(name: str) -> None:
    """Beside a map a thousand times as large, in another place, in a batch of another size."""
    batch = toy_batch(3, side=LITTLE)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(3, LITTLE, LITTLE, generator=generator, dtype=torch.float64)
    maps[2] *= 1000
    metric = registry.make("metrics", f"quantus/{name}", small(name, LITTLE))
    method = registry.make("methods", "smooth_grad", {"samples": 2})
    target = torch.tensor([1, 4, 0])
    found = []
    with prepared(toy_model().net):
        for order, rows in (([0, 1, 2], None), ([2, 1, 0], 5), ([1], None)):
            part = Batch(
                batch.images[order],
                batch.labels[order],
                tuple(batch.keys[at] for at in order),
                None if batch.masks is None else batch.masks[order],
            )
            probe = Probe(toy_model(), part, target=target[order], rows=rows)
            given = maps[order + order[-1:] * (probe.rows - len(order))]
            found.append(metric(Explanation(probe, given, method))[order.index(1)])
    assert found[0].equal(found[1]) or found[0].isnan()
    assert found[0].equal(found[2]) or found[0].isnan()
    assert not found[0].isnan() or name in ("IROF", "RelativeRepresentationStability"), name


@pytest.mark.parametrize(
    "name",
    ["FaithfulnessCorrelation", "MonotonicityCorrelation", "MaxSensitivity", "RandomLogit"],
)
def test_random_numbers_are_the_images_own_and_the_global_ones_stay(name: str) -> None:
    params = {"nr_runs": 5, "subset_size": 9} if name == "FaithfulnessCorrelation" else None
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index, union-attr]  # noqa: NPY002
    found = values(name, params, seed=1)
    np.random.seed(4)  # noqa: NPY002
    again = values(name, params, seed=1)
    np.random.seed(3)  # noqa: NPY002
    assert found == again != values(name, params, seed=2)
    assert np.array_equal(np.random.get_state()[1], before[0])  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_images_of_equal_content_and_other_keys_draw_other_numbers() -> None:
    batch = toy_batch(1, side=LITTLE)
    twice = Batch(batch.images.repeat(2, 1, 1, 1), batch.labels.repeat(2), ("one", "two"))
    maps = torch.rand(1, LITTLE, LITTLE).double().repeat(2, 1, 1)
    metric = registry.make("metrics", "quantus/MaxSensitivity", {"nr_samples": 3})
    with prepared(toy_model().net):
        probe = Probe(toy_model(), twice, target=torch.tensor([0, 0]))
        one, two = metric(Explanation(probe, maps, registry.make("methods", "gradient")))
    assert one != two


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_printed_and_nothing_is_left_behind(
    name: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    helpers = importlib.import_module("quantus.helpers")

    def functions() -> list[Any]:
        modules = (helpers.asserts, helpers.utils, helpers.warn)
        return [
            found for module in modules for found in vars(module).items() if "__" not in found[0]
        ]

    before = functions()
    model, batch = toy_model(), toy_batch(2, side=LITTLE)
    with unchanged(model, batch, name):
        scored(name, count=2, model=model, batch=batch)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert functions() == before


# --- maps, masks, methods -------------------------------------------------------------------------


def test_pixels_without_a_label_are_left_out() -> None:
    """The same as of an image that ends where the labels do."""
    batch = toy_batch(2, side=8)
    assert batch.masks is not None
    masks = batch.masks.clone()
    masks[:, 6:] = torch.nan
    maps = torch.rand(2, 8, 8).double()
    holed = replace(batch, masks=masks)
    for name in MASKS:
        params = {"k": 9} if name == "TopKIntersection" else {}
        cut = Batch(batch.images[:, :, :6], batch.labels, batch.keys, masks[:, :6])
        whole = values(name, params, batch=holed, maps=maps)
        assert whole == values(name, params, batch=cut, maps=maps[:, :6]), name


@pytest.mark.parametrize("name", MASKS)
def test_an_image_without_a_usable_mask_fails(name: str) -> None:
    batch = toy_batch(3, side=LITTLE)
    masks = torch.stack([torch.zeros(LITTLE, LITTLE), torch.ones(LITTLE, LITTLE)] * 2)[:3]
    masks[2] = torch.nan
    found = scored(name, batch=replace(batch, masks=masks))
    assert [status for _, status in found] == ["failed: mask"] * 3


@pytest.mark.parametrize("name", MASKS)
def test_data_without_masks_are_unsupported(name: str) -> None:
    with pytest.raises(Unsupported, match="has no object masks"):
        scored(name, batch=replace(toy_batch(3, side=LITTLE), masks=None))


@pytest.mark.parametrize("name", AGAIN)
def test_maps_without_their_method_are_refused_by_what_runs_it_again(name: str) -> None:
    with pytest.raises(Unsupported, match="runs the method again, but the maps were given without"):
        scored(name, method=None)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"IROF"}))
def test_constant_and_negative_maps_have_a_value_or_none_is_defined(name: str) -> None:
    maps = torch.rand(3, LITTLE, LITTLE).double() - 2
    maps[1], maps[2] = 1, 0
    negative, *flat = [status for _, status in scored(name, maps=maps)]
    undefined = registry.find("metrics", f"quantus/{name}").undefined  # type: ignore[attr-defined]
    assert negative in ("ok", undefined)
    assert set(flat) <= {"degenerate", undefined}
    correlations = {"FaithfulnessCorrelation", "FaithfulnessEstimate", "MonotonicityCorrelation"}
    if name in MASKS:
        assert flat == ["degenerate"] * 2
    elif name in correlations:
        assert flat == [undefined] * 2


def test_the_method_runs_again_on_the_noisy_image_for_the_same_class() -> None:
    """Max-sensitivity of a map that is the network's own gradient is 0 where that is constant."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * LITTLE**2, 5)).double()
    model = Model("linear", net.eval().requires_grad_(False))
    batch, target = toy_batch(3, side=LITTLE), torch.arange(3)
    gradients = net[1].weight.detach().view(5, 3, LITTLE, LITTLE)[target].abs().sum(1)
    for name in ("MaxSensitivity", "AvgSensitivity", "Continuity", "LocalLipschitzEstimate"):
        params = small(name, LITTLE)
        found = values(name, params, batch=batch, maps=gradients, model=model)
        assert found == pytest.approx([0.0] * 3, abs=1e-12), name


def test_random_logit_explains_another_class_of_the_networks_own() -> None:
    """Two classes leave one other, whose map is the first's: the same image, the other sign."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * LITTLE**2, 2)).double()
    net[1].weight.data[1] = -net[1].weight.data[0]
    model = Model("two", net.eval().requires_grad_(False))
    batch = toy_batch(2, side=LITTLE)
    raw = net[1].weight.detach().view(2, 3, LITTLE, LITTLE).sum(1)
    metric = registry.make(
        "metrics", "quantus/RandomLogit", {"similarity_func": "correlation_pearson"}
    )
    with prepared(net):
        probe = Probe(model, batch, target=torch.tensor([0, 1]))
        method = registry.make("methods", "gradient", {"channels": "sum"})
        found = metric(Explanation(probe, raw, method))
    assert found.tolist() == pytest.approx([-1.0, -1.0])


def test_layers_that_are_compared_are_looked_for() -> None:
    params = {"nr_samples": 1, "return_nan_when_prediction_changes": False}
    name = "RelativeRepresentationStability"
    some = values(name, {**params, "layer_names": ("2",)})
    assert some != values(name, params)
    assert all(map(math.isfinite, some))
    assert some != values(name, {**params, "layer_names": ("last_conv",)})
    with pytest.raises(UsageError, match="no module 'layer9'"):
        values(name, {**params, "layer_names": ("layer9",)})


def test_superpixels_go_one_by_one() -> None:
    """Two halves of one colour each: the brighter decides, and its removal is what counts."""
    images = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.float64)
    images[:, :, :, SIDE // 2 :] = 1
    batch = replace(toy_batch(2), images=images)
    maps = torch.zeros(2, SIDE, SIDE, dtype=torch.float64)
    maps[0, :, SIDE // 2 :] = 1
    maps[1, :, : SIDE // 2] = 1
    net = nn.Sequential(nn.AvgPool2d(SIDE), nn.Flatten(), nn.Linear(3, 5, bias=False)).double()
    net[2].weight.data.copy_(torch.arange(1.0, 6)[:, None].expand(5, 3))
    model = Model("sum", net.eval().requires_grad_(False))
    params = {"perturb_baseline": "black", "softmax": False}
    first, second = values("IROF", params, batch=batch, maps=maps, model=model)
    assert first > second + 0.1


# --- passes and plan ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"IROF"}))
def test_declared_passes_are_counted_passes(name: str) -> None:
    for params in (
        small(name, LITTLE),
        {**small(name, LITTLE), "return_nan_when_prediction_changes": False},
    ):
        own = {field.name for field in registry.fields(registry.find("metrics", f"quantus/{name}"))}
        if not params.keys() <= own:
            continue
        metric = registry.make("metrics", f"quantus/{name}", params)
        model = replace(toy_model(), size=(LITTLE, LITTLE))
        method = registry.make("methods", "smooth_grad", {"samples": 2})
        with prepared(model.net) as meter:
            needs = batch_needs([method], [[metric]])
            probe = Probe(model, toy_batch(3, side=LITTLE), needs=needs, rows=4, meter=meter)
            explanation = probe.explain(method)
            before = probe.spent
            evaluated(metric, explanation)
            spent = probe.spent
        declared = cost(closure(metric.needs, method), model)
        alone = cost((Logits(),), model)
        assert Passes(spent[0] - before[0] + alone[0], spent[1] - before[1]) == declared


@pytest.mark.usefixtures("plugin")
def test_a_plan_knows_what_quantus_spends_and_what_cannot_work(tmp_path: Path) -> None:
    metrics = [
        {"name": "quantus/Sparseness"},
        {"name": "quantus/Selectivity", "patch_size": 2},
        {"name": "quantus/MaxSensitivity", "nr_samples": 3},
        {"name": "quantus/TopKIntersection", "k": 10**6},
        {"name": "quantus/IROF"},
    ]
    plan = make_plan(suite_of(methods=["gradient"], metrics=metrics, run={"slice": 10}), None)
    (group,) = plan.groups
    by_name = {cell.metric.name.partition("/")[2]: cell for cell in group.cells}
    assert "must be below" in by_name["TopKIntersection"].skipped
    assert group.outlay([by_name["IROF"]]).unknown == 1
    told = [by_name[name] for name in ("Sparseness", "Selectivity", "MaxSensitivity")]
    assert group.sketch.size is not None
    patches = math.prod(group.sketch.size) // 4
    assert group.outlay(told).passes == Passes(1 + patches + 3, 1 + 3)
    ((job, outlay),) = plan.jobs(Store(tmp_path))
    report = run_unit(job)
    skipped = (
        collect(plan, Store(tmp_path))
        .table.set_index("metric")
        .loc[by_name["TopKIntersection"].metric.label]
    )
    assert (skipped["status"], skipped["forwards"]) == ("skipped", "unknown")
    assert outlay.unknown == 1
    assert report.passes.forward >= outlay.passes.forward
    assert not report.errors


def test_a_description_is_complete(command: Callable[..., Answer]) -> None:
    text = command("info", "quantus/Sparseness").out
    assert "Sparseness of Quantus: Gini index of the map; (N,)." in text
    assert "Better: higher" in text
    assert "Family: complexity" in text
    assert "normalise_func: 'normalise_by_max' | 'normalise_by_average_second_moment" in text
