"""Laws of occlusion and of random masks: by hand on linear networks, and one mask at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from xbench import noise, registry
from xbench.autograd import Meter, prepared
from xbench.datasets.shapes import generate
from xbench.errors import UsageError
from xbench.methods.perturbation import RISE, Occlusion
from xbench.models.loading import load_model
from xbench.plan import batch_needs
from xbench.probe import Probe, method_cost, probability
from xbench.testing import SIDE, LinearNetwork, toy_batch, toy_model
from xbench.types import Batch, Model, Passes

TARGET = torch.tensor([4, 0, 2, 2])


@contextmanager
def probing(
    method: Any, model: Model | None = None, batch: Batch | None = None, **how: Any
) -> Iterator[tuple[Probe, Meter]]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        needs = batch_needs([method], [])
        yield Probe(model, batch or toy_batch(4), needs=needs, meter=meter, **how), meter


def explain(method: Any, model: Model | None = None, **how: Any) -> Tensor:
    how.setdefault("target", TARGET)
    with probing(method, model, **how) as (probe, _):
        return probe.explain(method).raw


def linear(height: int, width: int) -> Model:
    """Logits are a weighted sum of pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 3 * height * width, generator=generator, dtype=torch.float64)
    return Model("linear", LinearNetwork(weight), (0.0,) * 3, (1.0,) * 3, {}, (height, width))


def images_of(height: int, width: int) -> Batch:
    batch = toy_batch(4, side=max(height, width))
    return replace(batch, images=batch.images[..., :height, :width], masks=None)


# --- occlusion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "window", "stride"),
    [(16, 16, 0.25, 0.125), (16, 16, 0.25, 0.25), (13, 18, 0.4, 0.23), (10, 7, 0.5, 0.5),
     (12, 12, 1.0, 1.0), (8, 8, 0.01, 0.01), (11, 11, 0.9, 0.1)],
)  # fmt: skip
def test_on_a_linear_network_occlusion_is_the_windows_share_of_the_logit(
    height: int, width: int, window: float, stride: float
) -> None:
    """With black pixels the logit falls by what the window's pixels give to it."""
    model, batch = linear(height, width), images_of(height, width)
    assert isinstance(model.net, LinearNetwork)
    found = explain(Occlusion(window=window, stride=stride), model, batch=batch)
    weight = model.net.weight.detach()[TARGET].view(4, 3, height, width)
    share = (weight * batch.images).sum(1)
    side, step = (max(round(part * min(height, width)), 1) for part in (window, stride))
    total, windows = torch.zeros_like(share), torch.zeros(height, width)
    top = 0
    while True:
        left = 0
        while True:
            at = (..., slice(top, top + side), slice(left, left + side))
            total[at] += share[at].sum((1, 2))[:, None, None]
            windows[at] += 1
            if left + side >= width:
                break
            left += step
        if top + side >= height:
            break
        top += step
    assert windows.min() >= 1
    torch.testing.assert_close(found, total / windows, rtol=0, atol=1e-11)


def test_a_window_over_the_whole_image_gives_the_fall_to_the_baseline_everywhere() -> None:
    model = toy_model()
    found = explain(Occlusion(window=1.0, stride=1.0, baseline="mean"))
    inputs = model.normalise(toy_batch(4).images)
    fall = (model.net(inputs) - model.net(torch.zeros_like(inputs))).gather(1, TARGET[:, None])
    torch.testing.assert_close(found, fall[..., None].expand_as(found), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("size", "params", "windows"),
    [((224, 224), {}, 49), ((32, 32), {}, 49), ((224, 224), {"preset": "latec-2024"}, 64),
     ((16, 24), {}, 7 * 11), ((64, 64), {"window": 0.5, "stride": 0.5}, 4)],
)  # fmt: skip
def test_windows_are_counted_by_the_images_size(
    size: tuple[int, int], params: dict[str, Any], windows: int
) -> None:
    method = registry.make("methods", "occlusion", params)
    model = replace(toy_model(), size=size)
    assert method_cost(method, model) == Passes(1 + windows, 0)
    assert method_cost(method, replace(model, size=None)) is None


def test_latecs_windows_are_fifty_pixels_at_steps_of_twenty_five() -> None:
    lines = registry.make("methods", "occlusion", {"preset": "latec-2024"})._along(224, (224, 224))
    assert lines[0].sum() == 50
    assert lines[1].nonzero()[0] == 25
    assert lines[-1].nonzero().flatten().tolist() == list(range(175, 224))


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(UsageError, match=r"stride 0.3 exceeds window 0.2"):
        registry.make("methods", "occlusion", {"window": 0.2, "stride": 0.3})


@pytest.mark.parametrize(("count", "rows"), [(4, 4), (3, 7), (1, 8)])
@pytest.mark.parametrize(("method", "steps"), [(Occlusion(), 49), (RISE(samples=20), 20)])
def test_chunks_are_filled_across_images_and_masks(
    method: Any, steps: int, count: int, rows: int
) -> None:
    model, calls = toy_model(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    with probing(method, model, toy_batch(count), rows=rows) as (probe, meter):
        maps = probe.explain(method).raw
        assert maps[:count].isfinite().all()
        assert meter.forward == count * (1 + steps)
    assert len(calls) == 1 + math.ceil(count * steps / rows)


@functools.cache
def embedded() -> tuple[Model, Batch]:
    network = registry.make("models", "shapes/resnet").describe(None)
    images, labels, _ = generate(3, "test", range(8))
    model = load_model(network, "shapes/resnet", network.layers, "cpu")
    batch = Batch(images, labels, tuple(map(str, range(8))))
    return replace(model, size=(64, 64)), batch


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("occlusion", {"baseline": "blur", "window": 0.5, "stride": 0.4}),
        ("rise", {"samples": 5}),
        ("score_cam", {"layer": "layer1"}),
        ("score_cam", {"layer": "layer1", "preset": "pgc-1.5"}),
        ("ablation_cam", {}),
        ("ablation_cam", {"preset": "pgc-1.5"}),
        ("ablation_cam", {"layer": "layer2.0.conv1"}),
    ],
)
@pytest.mark.parametrize("companions", [(1, 2, 3, 4, 5), (7, 6), ()])
def test_at_one_forward_shape_an_images_bits_do_not_depend_on_its_companions(
    name: str, params: dict[str, Any], companions: tuple[int, ...]
) -> None:
    """The last chunk is filled up differently, and an image's rows lie elsewhere in every one."""
    model, batch = embedded()
    method = registry.make("methods", name, params)

    def first_map(*chosen: int) -> Tensor:
        at = list(chosen)
        part = Batch(batch.images[at], batch.labels[at], tuple(batch.keys[a] for a in at))
        return explain(method, model, batch=part, rows=6, target="label")[at.index(0)]

    expected = first_map(0, 5, 6, 7, 1, 2)
    assert expected.dtype == torch.float32
    assert torch.equal(first_map(*companions, 0), expected)


# --- RISE -----------------------------------------------------------------------------------------


def masks_of(method: RISE, batch: Batch | None = None, **how: Any) -> Tensor:
    with probing(method, None, batch, **how) as (probe, _):
        return torch.stack(list(method.masks(probe)))


def test_rise_is_the_mean_mask_weighted_by_what_it_leaves() -> None:
    method, model = RISE(samples=70, p1=0.3, cells=4), toy_model()
    found = explain(method)
    inputs = model.normalise(toy_batch(4).images)
    expected = torch.zeros_like(found)
    for mask in masks_of(method):
        expected += probability(model.net(inputs * mask), TARGET)[:, None, None] * mask
    torch.testing.assert_close(found, expected.detach() / (70 * 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 65])
def test_masks_that_keep_everything_give_the_probability_everywhere(samples: int) -> None:
    method = RISE(samples=samples, p1=1.0)
    assert (masks_of(method) == 1).all()
    with probing(method, target=TARGET) as (probe, _):
        found = probe.explain(method).raw
        expected = probe.probability[:, None, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("height", "width", "cells"), [(16, 16, 7), (20, 13, 3), (9, 9, 12),
                                                        (8, 8, 1)])  # fmt: skip
def test_a_mask_is_a_grid_grown_by_a_cell_and_cut_at_a_shift_within_one(
    height: int, width: int, cells: int
) -> None:
    """Read off the documented stream: the cells row by row, then the shifts down and rightwards."""
    method = RISE(samples=5, cells=cells)
    batch = images_of(height, width)
    model = linear(height, width)
    with probing(method, model, batch, seed=3) as (probe, _):
        masks = list(method.masks(probe))
    assert len(masks) == 5
    for number, mask in enumerate(masks):
        stream = noise.stream_keys(3, [f"mask {number}"], "rise")
        drawn = noise.uniform(stream, cells * cells + 2)[0].double()
        grid = (drawn[:-2] < 0.5).double().view(1, 1, cells, cells)
        high, wide = math.ceil(height / cells), math.ceil(width / cells)
        size = ((cells + 1) * high, (cells + 1) * wide)
        grown = interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0]
        top, left = int(drawn[-2] * high), int(drawn[-1] * wide)
        assert 0 <= top < high
        assert 0 <= left < wide
        expected = grown[top : top + height, left : left + width]
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-12)


def test_masks_follow_the_seed_alone_and_more_begin_with_fewer() -> None:
    few, many = masks_of(RISE(samples=3)), masks_of(RISE(samples=130))
    assert torch.equal(masks_of(RISE(samples=3), toy_batch(2, seed=5)), few)
    torch.testing.assert_close(many[:3], few, rtol=0, atol=0)
    assert len({tuple(mask.flatten().tolist()) for mask in many}) == 130
    assert (masks_of(RISE(samples=3), seed=1) != few).any()


@pytest.mark.parametrize("p1", [0.1, 0.5])
def test_every_pixel_is_kept_with_probability_p1(p1: float) -> None:
    masks = masks_of(RISE(samples=3000, p1=p1))
    assert masks.min() >= 0
    assert masks.max() <= 1
    # a pixel's mask has at most the variance of one cell; five standard errors of 256 pixels
    assert (masks.mean(0) - p1).abs().max() < 5 * (p1 * (1 - p1) / 3000) ** 0.5


def test_a_pixel_that_carries_the_class_stands_out() -> None:
    weight = torch.zeros(5, 3, SIDE, SIDE, dtype=torch.float64)
    weight[1, :, 2:6, 9:13] = 0.1  # the class is the brightness of this square
    net = LinearNetwork(weight.flatten(1))
    model = Model("square", net, (0.0,) * 3, (1.0,) * 3, {}, (SIDE, SIDE))
    found = explain(RISE(samples=500, baseline="black"), model, target=torch.ones(4, dtype=int))
    inside = found[:, 2:6, 9:13].mean((1, 2))
    assert (inside > 1.1 * found.mean((1, 2))).all()
    assert not explain(Occlusion(), model, target=torch.zeros(4, dtype=int)).any()


def test_the_scripts_preset_is_what_the_authors_ran() -> None:
    method = registry.make("methods", "rise", {"preset": "rise-2018-script"})
    assert (method.samples, method.cells, method.p1) == (6000, 8, 0.1)
    assert method_cost(method, toy_model()) == Passes(6001, 0)


def test_in_float32_masks_and_maps_are_float32_and_near() -> None:
    model = toy_model()
    narrow = replace(model, net=toy_model().net.float())
    batch = toy_batch(4)
    small = replace(batch, images=batch.images.float())
    for method in (RISE(samples=40), Occlusion()):
        found = explain(method, narrow, batch=small)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), explain(method), rtol=1e-3, atol=1e-5)
