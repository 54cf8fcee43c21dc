"""What released libraries got wrong, and that xbench gets it right: one test for each case.

A comment says which library had it. What Quantus gets wrong when xbench calls it is in
``test_known_defects_quantus.py``. Two cases take more than a short test, and stand elsewhere:

* mean ranks are not rounded (LATEC):
  ``tests/test_tables.py::test_equal_means_share_their_places``
* results are saved as they come (M4: all at the end of a run):
  ``tests/faults/test_kill.py::test_the_first_interrupt_stores_what_is_finished_and_the_same_command_goes_on``

Infidelity (captum#613: not the authors' definition, and it scales with the map) is no metric here.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import xbench
from xbench import registry
from xbench.autograd import prepared
from xbench.baselines import BaselineImage
from xbench.errors import Unsupported
from xbench.imputation import linear_imputation
from xbench.masking import Curve, MapMask
from xbench.metrics.composites import harmonic_mean
from xbench.metrics.curves import Insertion
from xbench.plan import batch_needs
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.testing import ShareNetwork, toy_batch, toy_model, toy_network, toy_transformer
from xbench.types import Batch, Model

SIDE = 16
COUNT = 4
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@contextmanager
def probing(
    model: Model | None = None, batch: Batch | None = None, **given: Any
) -> Iterator[Probe]:
    model, batch = model or toy_model(), batch or toy_batch(COUNT)
    with prepared(model.net) as meter:
        yield Probe(model, batch, meter=meter, **given)


def random_maps(count: int = COUNT, seed: int = 3, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, side, side, generator=generator, dtype=torch.float64)


def score(name: str, maps: Tensor, batch: Batch | None = None, **params: Any) -> Tensor:
    """Of maps on the toy network, target 0."""
    batch = batch or toy_batch(len(maps))
    seed = params.pop("seed", 0)
    return xbench.score(
        toy_network(), batch.images, maps, name, target=[0] * len(maps), masks=batch.masks,
        mean=MEAN, std=STD, keys=batch.keys, seed=seed, **params,
    )  # fmt: skip


def explained(name: str, **params: Any) -> Tensor:
    with probing() as probe:
        return probe.explain(registry.make("methods", name, params)).raw


@pytest.mark.parametrize("channels", ["absolute_sum", "sum", "max"])
def test_road_runs_on_images_of_three_channels_whatever_makes_their_maps(channels: str) -> None:
    # Quantus 0.6: IndexError, indices over C H W against a mask over H W
    maps = explained("gradient", channels=channels)
    assert maps.shape == (COUNT, SIDE, SIDE)
    assert score("road", maps, levels=(0.2, 0.6)).isfinite().all()


def test_a_map_of_three_channels_is_refused_before_a_metric_sees_it() -> None:
    # the same: no index over C H W can reach a mask over H W
    with probing() as probe, pytest.raises(ValueError, match=r"must return maps of shape \(4, 16"):
        Explanation(probe, random_maps()[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("batch_size", [3, 10, 20])
def test_a_mean_over_images_uses_all_batches(
    run: Callable[..., Any], tmp_path: Path, batch_size: int
) -> None:
    # Quantus 0.6 ROAD: only the first batch counts
    outcome = run(
        datasets=[{"name": "plug/noise", "images": 20}],
        methods=["plug/ramp"],
        metrics=["plug/brightness"],
        run={"batch_size": batch_size, "slice": 20},
        out=tmp_path / str(batch_size),
    )
    table = pd.read_csv(outcome.folder / "table.csv")
    each = pd.read_parquet(outcome.folder / "per_image.parquet")["value"]
    assert len(each) == 20
    assert each.iloc[:3].mean() != pytest.approx(each.mean(), abs=1e-4)
    assert table["mean"].iloc[0] == pytest.approx(each.mean(), abs=1e-6)


@pytest.mark.parametrize(
    "name", ["effective_complexity", "average_drop", "insertion", "rcap", "road", "mae"]
)
def test_a_score_does_not_depend_on_the_other_images_of_the_batch(name: str) -> None:
    # Quantus 0.6: the maximum over the batch in normalise_by_max
    maps = random_maps() * torch.tensor([1.0, 1e3, 1e-3, 1e6])[:, None, None]
    batch = toy_batch(COUNT)
    together = score(name, maps)
    for at in range(COUNT):
        alone = score(name, maps[at : at + 1], batch.part(slice(at, at + 1)))
        torch.testing.assert_close(alone, together[at : at + 1], rtol=1e-10, atol=1e-10)


def test_noise_is_as_wide_as_the_range_of_its_own_image() -> None:
    # Guided AbsoluteGrad: the range of the whole batch
    batch = toy_batch(2)
    wide = torch.cat((batch.images[:1] / 10, batch.images[1:]))
    pair = Batch(wide, batch.labels, batch.keys)
    method = registry.make("methods", "guided_absolute_grad")
    with probing(batch=pair) as probe:
        together = probe.explain(method).raw[0]
    with probing(batch=pair.part(slice(0, 1))) as probe:
        alone = probe.explain(method).raw[0]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_an_iterative_method_stops_per_image() -> None:
    # Opti-CAM: stop test on the loss summed over the batch
    params = {"learning_rate": 0.5, "iterations": 20}
    method, batch = registry.make("methods", "opti_cam", params), toy_batch(COUNT)
    spent = []
    with probing() as probe:
        together = probe.explain(method).raw
    for at in range(COUNT):
        with probing(batch=batch.part(slice(at, at + 1))) as probe:
            alone = probe.explain(method).raw
            spent.append(probe.spent)
        torch.testing.assert_close(alone[0], together[at], rtol=1e-8, atol=1e-10)
    assert len(set(spent)) > 1  # or none could have stopped before another


def test_an_exception_in_a_metric_reaches_the_user_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Quantus 0.6 evaluate(): printed, then KeyError
    mine = ArithmeticError("no such area")

    def fail(self: Insertion, explanation: Explanation) -> Tensor:
        raise mine

    monkeypatch.setattr(Insertion, "__call__", fail)
    with pytest.raises(ArithmeticError) as caught:
        score("insertion", random_maps())
    assert caught.value is mine


@pytest.mark.parametrize("name", ["insertion", "deletion", "abpc"])
def test_areas_run_on_current_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Quantus: np.trapz, absent from NumPy 2.4
    monkeypatch.delattr(np, "trapz", raising=False)
    monkeypatch.delattr(np, "trapezoid", raising=False)
    assert score(name, random_maps()).isfinite().all()


def test_a_parameter_that_is_passed_is_used() -> None:
    # Quantus: Integrated Gradients of always 10 steps with a zero baseline
    maps = [
        explained("integrated_gradients", **params)
        for params in ({"steps": 3}, {"steps": 10}, {"steps": 10, "baseline": "white"})
    ]
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.allclose(maps[1], maps[2])


def test_the_batch_size_that_is_passed_is_used() -> None:
    # Xplique#137: batch_size ignored
    net, seen = toy_network(), []
    net.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    images = toy_batch(7).images
    xbench.score(net, images, random_maps(7), "insertion", batch_size=3, steps=4)
    assert set(seen[1:]) == {3}  # the first is the dry run


def test_grad_cam_includes_the_relu_of_its_paper() -> None:
    # Quantus; captum (captum#179): off by default
    signed = explained("grad_cam", sign="signed")
    assert (signed < 0).any()
    assert (explained("grad_cam") >= 0).all()


def test_black_is_black_fixed_and_defined_in_pixel_space() -> None:
    # Quantus: the minimum of the perturbed, normalised image; captum PR #428: zeros are not black
    batch = toy_batch(COUNT)
    bright = Batch(0.5 + batch.images / 2, batch.labels, batch.keys)
    for images in (batch, bright):
        with probing(batch=images) as probe:
            black = probe[BaselineImage("black")]
            assert probe.model.pixels(black).abs().max() < 1e-15
            assert black.abs().max() > 1  # no zeros, for the network


def test_memory_does_not_grow_over_a_loop() -> None:
    # pytorch-grad-cam#71, #78, #112, #117, #132, #195, #483 leak; Quantus holds the whole data set
    net, images = toy_network(), toy_batch(COUNT).images

    def alive() -> int:
        for _ in range(3):
            xbench.evaluate(net, images, ["grad_cam", "smooth_grad"], ["average_drop", "deletion"])
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    alive()  # what is made once and kept
    assert alive() == alive()


@pytest.mark.parametrize("percent", [10, 30, 50, 70, 90])
def test_to_remove_a_share_removes_it_also_from_a_map_of_many_zeros(percent: int) -> None:
    # pytorch-grad-cam ROAD: 62 % zeros give the same, fully imputed image at 10 and at 50 %
    maps = random_maps().abs()
    maps = maps.where(maps > maps.flatten(1).quantile(0.62, dim=1)[:, None, None], 0)
    road = registry.make("metrics", "road", {"levels": [percent / 100]})
    with probing() as probe:
        explanation = Explanation(probe, maps)
        for point in (*road.points("rest"), *road.points("salient")):
            removed = (~point.mask(explanation)).flatten(1).sum(1)
            assert removed.tolist() == [round(SIDE * SIDE * percent / 100)] * COUNT


def test_the_noise_of_road_is_the_seed_s_and_nobody_else_s() -> None:
    # pytorch-grad-cam: unseeded
    maps, params = random_maps(), {"levels": (0.4,), "noise": 0.3}
    found = []
    for outside, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(outside)
        np.random.seed(outside)  # noqa: NPY002  (what it is held against)
        found.append(score("road", maps, seed=seed, **params))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_road_runs_on_the_device() -> None:
    # pytorch-grad-cam: a sparse solve per image on the CPU
    images, known = torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8) > 0.5
    moved: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket.__name__ in ("_to_copy", "numpy", "to"):
                moved.append(str((kwargs or {}).get("device")))
            return func(*args, **(kwargs or {}))

    with Watch():
        linear_imputation(images, known)
    assert set(moved) <= {"None"}


def test_average_drop_is_the_published_relative_drop_of_the_probability() -> None:
    # pytorch-grad-cam DropInConfidence: absolute, of the logit by default
    net = ShareNetwork(torch.tensor([[0.6, 0.2], [0.0, 0.0]], dtype=torch.float64))
    maps = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    images = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    (drop,) = xbench.score(net, images, maps, "average_drop", target=[0])
    assert float(drop) == pytest.approx(100 * (0.8 - 0.2) / 0.8)  # not 60, the absolute one


@pytest.mark.parametrize("name", ["arcc", "adcc"])
def test_the_docstring_names_the_mean_that_is_computed(name: str) -> None:
    # pytorch-grad-cam ARCC: says geometric, is harmonic
    entry = type(registry.make("metrics", name))
    assert "harmonic mean" in (entry.__doc__ or "").partition("\n")[0]
    parts = torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64)
    assert float(harmonic_mean(*parts.T)) == pytest.approx(3 / (1 / 0.2 + 1 / 0.5 + 1 / 0.9))


@pytest.mark.parametrize("keep", ["salient", "rest"])
def test_each_pixel_changes_once_all_channels_together_and_the_abscissa_is_their_share(
    keep: Any,
) -> None:
    # LATEC: 3 H W entries, a pixel up to three times; Quantus#75: only the red channel
    curve = Curve(keep, "black", steps=8)
    batch = toy_batch(COUNT)
    bright = Batch(0.5 + batch.images / 2, batch.labels, batch.keys)
    with probing(batch=bright) as probe:
        explanation = Explanation(probe, random_maps())
        black = probe[BaselineImage("black")]
        before = torch.full((COUNT, SIDE, SIDE), keep == "rest")
        changes = []
        for point in curve.inner:
            differs = point.image(explanation) != black
            assert (differs == differs[:, :1]).all()
            changes.append((differs[:, 0] != before).flatten(1).sum(1))
            assert (differs[:, 0] >= before if keep == "salient" else differs[:, 0] <= before).all()
            before = differs[:, 0]
    assert torch.stack(changes).eq(SIDE * SIDE // 8).all()
    assert curve.shares(SIDE * SIDE) == [step / 8 for step in range(9)]


def test_results_are_keyed_by_name() -> None:
    # LATEC: metric columns sliced by position, in another order than that of the configuration
    net, images = toy_network(), toy_batch(COUNT).images
    metrics = ["average_drop", "deletion", "sparseness"]
    keys = ["image", "method", "metric"]
    one, other = (
        xbench.evaluate(net, images, ["gradient", "grad_cam"], order).set_index(keys).sort_index()
        for order in (metrics, metrics[::-1])
    )
    pd.testing.assert_frame_equal(one, other)


def test_mae_is_a_mean_absolute_error_and_no_root_of_it() -> None:
    # Guided-AbsoluteGrad: square roots of both
    batch = toy_batch(COUNT)
    maps = random_maps().abs()
    scaled = (maps - maps.amin((1, 2), keepdim=True)) / (
        maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
    )
    assert batch.masks is not None
    error = (scaled - batch.masks).abs().mean((1, 2))
    torch.testing.assert_close(score("mae", maps), error)
    torch.testing.assert_close(score("mae_sqrt", maps), error.sqrt())


def test_the_pointing_game_tests_the_maximum() -> None:
    # Guided-AbsoluteGrad: the centroid of the top 30 %
    batch = toy_batch(1)
    assert batch.masks is not None
    row, column = batch.masks[0].nonzero()[0].tolist()
    maps = torch.zeros(1, SIDE, SIDE, dtype=torch.float64)
    maps[0, row, column], maps[0, -1, -1] = 1.0, 0.9  # the centroid lies between both
    assert score("pointing_game", maps, tolerance=0.0).tolist() == [1.0]
    maps[0, -1, -1] = 1.1
    assert score("pointing_game", maps, tolerance=0.0).tolist() == [0.0]


@pytest.mark.parametrize("name", ["insertion", "deletion", "morf", "lerf"])
def test_areas_cover_the_whole_axis_or_say_that_they_do_not(name: str) -> None:
    # Guided-AbsoluteGrad: [0.1, 1.0], not rescaled
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2)).double()
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    images, maps = toy_batch(COUNT).images, random_maps()
    assert xbench.score(net, images, maps, name).tolist() == pytest.approx([0.5] * COUNT)
    preset = {"insertion": "gag-2024", "deletion": "gag-2024"}.get(name)
    if preset:  # its points are named in its identity, and its area is not stretched
        metric = registry.make("metrics", name, {"preset": preset})
        assert metric.points != "all"
        area = xbench.score(net, images, maps, name, preset=preset)
        assert area.tolist() == pytest.approx([0.45] * COUNT)


@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_insertion_alone_and_deletion_alone_can_be_asked_for(name: str) -> None:
    # InterpretDL: error
    assert score(name, random_maps()).isfinite().all()


@pytest.mark.parametrize("name", ["average_drop", "insertion", "rcap", "mae"])
def test_a_nan_map_is_counted_and_has_a_row_of_its_own(name: str) -> None:
    # torch-cam leaves it out of the mean; pytorch-grad-cam#214, #108, #173, #449: they occur
    maps = random_maps()
    maps[1, 3, 3] = float("nan")
    metric = registry.make("metrics", name)
    with probing(needs=batch_needs([], [[metric]])) as probe:
        outcomes = evaluated(metric, Explanation(probe, maps))
    assert [status for _, status in outcomes] == ["ok", "failed: nonfinite", "ok", "ok"]


def test_the_first_point_of_insertion_is_the_blurred_image() -> None:
    # MarcoParola/saliency-benchmark: the full image
    metric = registry.make("metrics", "insertion")
    with probing(target=torch.zeros(COUNT, dtype=torch.int64)) as probe:
        curve = Explanation(probe, random_maps())[metric.curve("salient")]
        blurred, whole = (
            probe.model.net(images).softmax(1)[:, 0]
            for images in (probe[BaselineImage("blur")], probe.inputs)
        )
    torch.testing.assert_close(curve[:, 0], blurred)
    torch.testing.assert_close(curve[:, -1], whole)
    assert not torch.allclose(blurred, whole)


class Rectified(nn.Module):
    """Two layers; between them a ReLU as a module, as a function, twice in a row, or one module
    that also runs at the end.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.relu, self.other, self.kind = nn.ReLU(), nn.ReLU(), kind
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        found = self.first(images)
        if self.kind == "functional":
            found = torch.relu(found)
        elif self.kind == "adjacent":
            found = self.other(self.relu(found))
        else:
            found = self.relu(found)
        last = self.relu if self.kind == "reused" else self.other
        logits: Tensor = last(self.second(found)).mean((2, 3))
        return logits


@pytest.mark.parametrize("name", ["guided_backprop", "captum/DeepLift"])
@pytest.mark.parametrize("kind", ["functional", "adjacent", "reused"])
def test_functional_adjacent_and_reused_relus_are_handled_or_refused(name: str, kind: str) -> None:
    # captum#1082, PR #1843: DeepLift silently wrong
    def maps(kind: str) -> Tensor:
        model = Model("relu", Rectified(kind).eval(), MEAN, STD, {"last_conv": "first"})
        with probing(model) as probe:
            return probe.explain(registry.make("methods", name)).raw

    try:
        found = maps(kind)
    except Unsupported:
        return
    torch.testing.assert_close(found, maps("modules"))


def test_infidelity_is_no_metric_here_until_it_is_the_authors() -> None:
    # captum#613: not their definition, and it scales with the map
    assert "infidelity" not in registry.entries("metrics")


@pytest.mark.parametrize(
    "name", ["gradient", "smooth_grad", "grad_cam", "layer_cam", "score_cam", "guided_backprop"]
)
def test_maps_of_different_images_in_a_batch_differ(name: str) -> None:
    # pytorch-grad-cam#18, #144
    maps = explained(name)
    for at in range(COUNT):
        for other in range(at):
            assert not torch.allclose(maps[at], maps[other]), (at, other)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("methods", name) for name in ("score_cam", "smooth_grad", "integrated_gradients")),
        *(("methods", name) for name in ("occlusion", "rise", "blur_ig", "ablation_cam")),
        *(("metrics", name) for name in ("insertion", "rcap", "road")),
    ],
)
def test_no_forward_is_larger_than_the_fixed_shape(kind: str, name: str) -> None:
    # captum#245, #538, #497, #632, #1350: steps and samples expand the batch beyond the memory
    entry, rows = registry.make(kind, name), []
    with probing() as probe:
        probe.model.net.register_forward_hook(lambda module, args, out: rows.append(len(out)))
        if kind == "methods":
            probe.explain(entry)
        else:
            evaluated(entry, Explanation(probe, random_maps()))
    assert max(rows) <= COUNT


def test_a_layer_without_gradients_at_its_positions_is_reported() -> None:
    # pytorch-grad-cam#513: a map of zeros, without a word
    model = toy_transformer()
    last = {"last_conv": "encoder.layers.encoder_layer_1"}
    wrong = Model("toy", model.net, model.mean, model.std, last, model.size)
    with (
        probing(wrong) as probe,
        pytest.raises(Unsupported, match="comes after the last attention"),
    ):
        probe.explain(registry.make("methods", "grad_cam"))


def test_a_soft_mask_scales_each_map_by_itself() -> None:
    # Quantus 0.6 normalise_by_max and others: by the largest value of the batch
    maps = random_maps() * torch.tensor([1.0, 1e6, 1e-6, 1.0])[:, None, None]
    with probing() as probe:
        masks = Explanation(probe, maps)[MapMask("signed")]
    assert masks.amax((1, 2)).tolist() == pytest.approx([1.0] * COUNT)


def test_the_tests_that_stand_elsewhere_are_there() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"``(tests/\S+\.py)::(test_\w+)``", __doc__ or "")
    assert len(named) == 2
    for file, name in named:
        assert f"\ndef {name}(" in (root / file).read_text(encoding="utf-8"), name
