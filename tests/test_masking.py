"""Laws of masked images: exact blending, any chunking, counted passes, memory that runs out."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from xbench import registry
from xbench.autograd import Meter, prepared
from xbench.baselines import BaselineImage, baseline_image, gaussian_blur, rise_blur, rise_kernel
from xbench.datasets.shapes import generate
from xbench.errors import Unsupported
from xbench.imputation import linear_imputation
from xbench.maps import unit_range, with_sign
from xbench.masking import (
    BaselineProbability,
    BaselineScores,
    Curve,
    Imputation,
    ImputationNoise,
    MapMask,
    MaskedMap,
    MaskedScores,
    Shown,
    masked_probabilities,
    masked_scores,
    readings,
    row_scores,
    target_logit,
)
from xbench.metrics.rcap import AuthorsRecovered, Recovered
from xbench.models.loading import load_model
from xbench.orders import Permutation, Ranks
from xbench.probe import (
    Explanation,
    Logits,
    Need,
    Probe,
    closure,
    cost,
    filled,
    probability,
)
from xbench.testing import SIDE, toy_batch, toy_model
from xbench.types import Batch, Model, Passes

STEPS = 5
GENERATOR = torch.Generator().manual_seed(0)
MASKS = torch.rand(4, STEPS, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)


@contextmanager
def probing(
    count: int = 4, model: Model | None = None, batch: Batch | None = None, **how: Any
) -> Iterator[tuple[Probe, Meter]]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, batch or toy_batch(count), meter=meter, **how)
        assert probe.probability.isfinite().all()
        yield probe, meter


def one_image(height: int, width: int) -> Batch:
    images = torch.rand(1, 3, height, width, generator=GENERATOR, dtype=torch.float64)
    return Batch(images, torch.zeros(1).long(), ("a",))


def black(probe: Probe) -> Tensor:
    return probe[BaselineImage("black")]


def by_hand(probe: Probe, masks: Tensor, baseline: Tensor) -> Tensor:
    """(N, S), one image and one step at a time."""
    found = torch.empty(masks.shape[:2], dtype=torch.float64)
    for image in range(masks.shape[0]):
        for step in range(masks.shape[1]):
            mask = masks[image, step].double()
            blended = (
                mask * probe.inputs[image] + (1 - mask) * baseline.expand_as(probe.inputs)[image]
            )
            logits = probe.model.net(blended[None])
            found[image, step] = probability(logits, probe.target[image : image + 1])
    return found


# --- the primitive --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 5, 7, 32])
@pytest.mark.parametrize("portion", [1, 2, 5])
def test_any_chunking_gives_what_single_images_give(rows: int, portion: int) -> None:
    with probing(rows=rows) as (probe, _):
        filling = MASKS[-1:].expand(rows - 4, -1, -1, -1)
        masks = torch.cat((MASKS, filling))
        found = masked_probabilities(probe, masks.split(portion, dim=1), black(probe))
        expected = by_hand(probe, MASKS, black(probe))
    assert found.dtype == torch.float64
    assert found.shape == (rows, STEPS)
    torch.testing.assert_close(found[:4], expected, rtol=0, atol=1e-12)
    assert found[4:].isnan().all()


def test_bool_masks_are_zeros_and_ones() -> None:
    chosen = MASKS > 0.5
    with probing() as (probe, _):
        for dtype in (torch.float32, torch.float64, torch.uint8):
            given = masked_probabilities(probe, [chosen.to(dtype)], black(probe))
            assert torch.equal(given, masked_probabilities(probe, [chosen], black(probe)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_ones_gives_exactly_the_clean_probability(dtype: torch.dtype) -> None:
    ones = torch.ones(4, 3, SIDE, SIDE, dtype=dtype)
    with probing() as (probe, _):
        found = masked_probabilities(probe, [ones], black(probe))
        assert torch.equal(found, probe.probability[:, None].expand(-1, 3))


@pytest.mark.parametrize("needs", [[], ["gradient", "grad_cam"]])
def test_in_float32_too_a_mask_of_ones_ties_exactly(needs: list[str]) -> None:
    network = registry.make("models", "shapes/resnet").describe(None)
    model = load_model(network, "shapes/resnet", network.layers, "cpu")
    images, labels, _ = generate(3, "test", range(8))
    batch = Batch(images, labels, tuple(map(str, range(8))))
    asked = [need for name in needs for need in registry.make("methods", name).needs]
    with probing(model=model, batch=batch, needs=[Logits(), *asked]) as (probe, _):
        for dtype in (torch.bool, torch.float32):
            ones = torch.ones(8, 2, 64, 64, dtype=dtype)
            found = masked_probabilities(probe, [ones], black(probe))
            assert torch.equal(found, probe.probability[:, None].expand(-1, 2))


def test_a_mask_of_ones_has_no_drop_no_gain_and_no_increase() -> None:
    with probing() as (probe, _):
        explanation = Explanation(probe, MASKS[:, 0])
        ones = torch.ones(4, 1, SIDE, SIDE)
        masked = masked_scores(probe, [ones], black(probe), read=readings)[:, 0]
        explanation._values[MaskedScores("black", "magnitude")] = masked
        for name in ("average_drop", "average_gain", "average_increase"):
            assert not registry.make("metrics", name)(explanation).any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_of_zeros_gives_exactly_the_baseline(dtype: torch.dtype) -> None:
    with probing() as (probe, _):
        found = masked_probabilities(
            probe, [torch.zeros(4, 1, SIDE, SIDE, dtype=dtype)], black(probe)
        )
        assert torch.equal(found[:, 0], probe[BaselineProbability("black")])
        assert torch.equal(
            found[:, 0],
            probability(probe.model.net(black(probe).expand(4, -1, -1, -1)), probe.target),
        )


def test_masks_are_taken_a_few_steps_at_a_time() -> None:
    held: list[int] = []

    def masks() -> Iterator[Tensor]:
        for step in range(STEPS):
            held.append(forwarded[0])
            yield MASKS[:, step : step + 1]

    with probing() as (probe, meter):
        start = meter.forward
        forwarded = [0]
        probe.model.net.register_forward_hook(
            lambda *_: forwarded.__setitem__(0, meter.forward - start)
        )
        masked_probabilities(probe, masks(), black(probe))
    # what a step brings is forwarded before more than one further step is asked for
    assert all(done >= 4 * (step - 1) for step, done in enumerate(held))


def test_probabilities_are_of_the_probes_target() -> None:
    target = torch.tensor([4, 3, 2, 1])
    with probing(target=target) as (probe, _):
        found = masked_probabilities(probe, [MASKS], black(probe))
        torch.testing.assert_close(found, by_hand(probe, MASKS, black(probe)))


@pytest.mark.parametrize("rows", [4, 6, 32])
def test_passes_are_counted_exactly_with_a_partially_filled_batch(rows: int) -> None:
    with probing(rows=rows) as (probe, meter):
        before = meter.forward, meter.padding
        filled = torch.cat((MASKS, MASKS[-1:].expand(rows - 4, -1, -1, -1)))
        masked_probabilities(probe, [filled], black(probe))
        sent = math.ceil(4 * STEPS / rows) * rows
        assert meter.forward - before[0] == 4 * STEPS
        assert meter.padding - before[1] == sent - 4 * STEPS
        assert probe.spent == Passes(1 + STEPS, 0)


def test_every_forward_has_the_fixed_shape() -> None:
    shapes = []
    model = toy_model()
    model.net.register_forward_hook(lambda module, args, output: shapes.append(len(args[0])))
    with probing(model=model, rows=7) as (probe, _):
        filled = torch.cat((MASKS, MASKS[-1:].expand(3, -1, -1, -1)))
        masked_probabilities(probe, [filled], black(probe))
    assert shapes == [7] * (1 + math.ceil(4 * STEPS / 7))


@pytest.mark.parametrize(("count", "rows"), [(4, 4), (3, 7), (1, 8), (2, 8)])
@pytest.mark.parametrize("portion", [1, 2, 5])
def test_chunks_are_filled_across_images_and_steps(count: int, rows: int, portion: int) -> None:
    calls = []
    model = toy_model()
    with probing(count, model, rows=rows) as (probe, _):
        model.net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        masked_probabilities(probe, MASKS[:1].split(portion, dim=1), black(probe))
    assert calls == [rows] * math.ceil(count * STEPS / rows)


def test_masks_without_an_axis_of_images_are_the_same_for_all() -> None:
    with probing(rows=6) as (probe, _):
        shared = masked_probabilities(probe, MASKS[:1].split(2, dim=1), black(probe))
        each = MASKS[:1].expand(6, -1, -1, -1)
        assert torch.equal(shared[:4], masked_probabilities(probe, [each], black(probe))[:4])


def test_the_logit_or_several_numbers_can_be_read() -> None:
    with probing(rows=6) as (probe, _):
        masks = torch.cat((MASKS, MASKS[:2]))
        chance = masked_probabilities(probe, [masks], black(probe))
        logit = masked_scores(probe, [masks], black(probe), read=target_logit)
        whole = masked_scores(
            probe, [masks], black(probe), read=lambda logits, target: logits.double()
        )
    assert whole.shape == (6, STEPS, 5)
    assert whole[4:].isnan().all()
    chosen = probe.target[:4, None, None].expand(-1, STEPS, 1)
    assert torch.equal(whole[:4].gather(2, chosen)[..., 0], logit[:4])
    assert torch.equal(whole[:4].softmax(2).gather(2, chosen)[..., 0], chance[:4])


def test_an_image_with_nan_spoils_its_own_scores_alone() -> None:
    batch = toy_batch(4)
    batch.images[1] = torch.nan
    target = torch.tensor([0, 1, 2, 3])
    with probing(target=target, rows=7) as (whole, _):
        expected = masked_probabilities(whole, [MASKS], black(whole))
    with prepared(toy_model().net):
        probe = Probe(toy_model(), batch, target=target, rows=7)
        found = masked_probabilities(probe, [MASKS], black(probe))
    assert found[1].isnan().all()
    kept = [0, 2, 3]
    assert torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize(("rows", "most"), [(4, 9), (7, 9), (7, 3), (8, 1)])
def test_rows_of_any_kind_reach_their_forward_with_their_images(rows: int, most: int) -> None:
    """Rows of three numbers, the last chunk filled up, and memory that runs out."""
    steps = torch.rand(STEPS, 4, 3, generator=GENERATOR, dtype=torch.float64)
    weight = torch.rand(3, 5, generator=GENERATOR, dtype=torch.float64)
    seen: list[int] = []

    def forward(given: Tensor, images: Tensor) -> Tensor:
        if len(given) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        assert given.shape == (len(images), 3)
        seen.append(len(given))
        return given @ weight + images[:, None]

    with probing(rows=rows) as (probe, _):
        found = row_scores(probe, steps, forward, read=target_logit)
        expected = steps @ weight + torch.arange(4)[:, None]  # (steps, images, classes)
        target = probe.target[:4].expand(STEPS, -1)[..., None]
        torch.testing.assert_close(found[:4], expected.gather(2, target)[..., 0].T)
        assert set(seen) == {probe.chunk}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_memory_does_not_grow_with_the_number_of_steps(count: int) -> None:
    """Of masks and of images that are forwarded, only those of a chunk are alive at any time."""
    masks: list[weakref.ref[Tensor]] = []
    images: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def drawn() -> Iterator[Tensor]:
        for _ in range(40):
            mask = torch.rand(1, 1, SIDE, SIDE, dtype=torch.float64)
            masks.append(weakref.ref(mask))
            held.append(sum(ref() is not None for ref in (*masks, *images)))
            yield mask

    model = toy_model()
    with probing(count, model, rows=4) as (probe, _):
        baseline = black(probe)
        model.net.register_forward_pre_hook(lambda _, args: images.append(weakref.ref(args[0])))
        masked_probabilities(probe, drawn(), baseline)
    assert len(masks) == 40
    assert len(images) == 10 * count
    assert max(held) <= 4


# --- memory that runs out -------------------------------------------------------------------------


class Full(nn.Module):
    """Takes up to ``most`` rows once its limit is on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.most = inner, 1000

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        logits: Tensor = self.inner(images)
        return logits


@pytest.mark.parametrize("most", range(1, 8))
def test_out_of_memory_halves_the_chunk_and_changes_no_number(most: int) -> None:
    plain = toy_model()
    model = replace(plain, net=Full(plain.net), layers={})
    with probing(8, rows=8) as (reference, _):
        masks = torch.rand(8, STEPS, SIDE, SIDE, dtype=torch.float64)
        expected = masked_probabilities(reference, [masks], black(reference))
    with probing(8, model, rows=8) as (probe, meter):
        assert isinstance(probe.model.net, Full)
        probe.model.net.most = most
        found = masked_probabilities(probe, masks.split(1, dim=1), black(probe))
        halvings = []
        size = 8
        while size > most:
            halvings.append(size)
            size = (size + 1) // 2
        assert probe.chunk == size
        assert probe.events == [
            f"out of memory: chunk halved to {(big + 1) // 2}" for big in halvings
        ]
        assert meter.retried == sum(halvings)
        assert meter.forward == 8 + 8 * STEPS  # what ran out was not forwarded
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_out_of_memory_in_the_middle_of_a_chunk_loses_and_doubles_nothing() -> None:
    plain = toy_model()
    masks = torch.rand(8, STEPS, SIDE, SIDE, dtype=torch.float64)
    with probing(8, rows=8) as (reference, _):
        expected = masked_probabilities(reference, [masks], black(reference))
    for first in range(1, 12):
        for second in range(first + 1, 12):

            class Sometimes(Full):
                calls = -1  # the clean pass is not counted
                fails = (first, second)

                def forward(self, images: Tensor) -> Tensor:
                    self.calls += 1
                    self.most = 0 if self.calls in self.fails else 1000
                    return super().forward(images)

            model = replace(plain, net=Sometimes(plain.net), layers={})
            with probing(8, model, rows=8) as (probe, _):
                probe.model.net.calls = 0
                found = masked_probabilities(probe, [masks], black(probe))
                assert len(probe.events) <= 2
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_out_of_memory_at_one_row_rises() -> None:
    plain = toy_model()
    model = replace(plain, net=Full(plain.net), layers={})
    with probing(8, model, rows=8) as (probe, _):
        probe.model.net.most = 0
        with pytest.raises(torch.OutOfMemoryError):
            masked_probabilities(probe, [torch.ones(8, 1, SIDE, SIDE)], black(probe))
        assert probe.chunk == 1


def test_another_error_of_the_network_rises_at_once() -> None:
    class Breaks(Full):
        def forward(self, images: Tensor) -> Tensor:
            if self.most == 0:
                raise RuntimeError("mine")
            return super().forward(images)

    plain = toy_model()
    model = replace(plain, net=Breaks(plain.net), layers={})
    with probing(8, model) as (probe, _):
        probe.model.net.most = 0
        with pytest.raises(RuntimeError, match="mine"):
            masked_probabilities(probe, [torch.ones(8, 1, SIDE, SIDE)], black(probe))
        assert probe.events == []


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pixels"), [("black", (0, 0, 0)), ("white", (1, 1, 1)), ("mean", (0.4, 0.5, 0.6))]
)
def test_a_colour_baseline_is_that_colour_in_pixels(name: Any, pixels: tuple[float, ...]) -> None:
    model, batch = toy_model(), toy_batch(3)
    inputs = model.normalise(batch.images)
    baseline = baseline_image(name, model, inputs)
    assert baseline.shape == (1, 3, SIDE, SIDE)
    colour = torch.tensor(pixels, dtype=torch.float64).view(1, 3, 1, 1)
    expected = model.normalise(colour.expand(1, 3, SIDE, SIDE))
    torch.testing.assert_close(baseline, expected)
    if name == "mean":
        assert not baseline.any()


def test_blur_in_network_space_is_blur_in_pixels() -> None:
    model, batch = toy_model(), toy_batch(3)
    found = baseline_image("blur", model, model.normalise(batch.images))
    torch.testing.assert_close(found, model.normalise(gaussian_blur(batch.images, SIDE / 16)))


def blurred_by_hand(
    image: np.ndarray[Any, Any], sigma: float, radius: int, mode: Any = "reflect"
) -> np.ndarray[Any, Any]:
    """A two-dimensional sum over a padded image, without separating the axes."""
    padded = np.pad(image, radius, mode=mode)  # mirrors as often as the radius needs
    offset = np.arange(-radius, radius + 1)
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    weight /= weight.sum()
    found = np.empty_like(image)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            window = padded[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
            found[row, column] = (window * weight).sum()
    return found


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("radius", [None, 0, 3, 40])
@pytest.mark.parametrize(("padding", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_blur_is_the_gaussian_sum_over_the_padded_image(
    sigma: float, radius: int | None, padding: Any, mode: str
) -> None:
    images = torch.rand(2, 1, 7, 11, generator=GENERATOR, dtype=torch.float64)
    found = gaussian_blur(images, sigma, radius, padding)
    wide = round(3 * sigma) if radius is None else radius
    for image, blurred in zip(images[:, 0].numpy(), found[:, 0].numpy(), strict=True):
        expected = blurred_by_hand(image, sigma, wide, mode)
        np.testing.assert_allclose(blurred, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_blur_with_a_sigma_of_zero_is_the_image(padding: Any) -> None:
    images = torch.rand(2, 3, 7, 11, generator=GENERATOR, dtype=torch.float64)
    assert torch.equal(gaussian_blur(images, 0.0, 5, padding), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [5, 15, 16, 31])
def test_a_blurred_images_bits_depend_neither_on_its_place_nor_on_its_neighbours(
    dtype: torch.dtype, side: int
) -> None:
    images = torch.rand(5, 3, side, side, generator=GENERATOR, dtype=dtype)
    images[1, 0, 0, 0] = torch.nan
    found, turned = (gaussian_blur(batch, 1.5) for batch in (images, images.flip(0)))
    assert torch.equal(found[[0, 2, 3, 4]], turned.flip(0)[[0, 2, 3, 4]])
    assert found[1].isnan().any()
    assert found.dtype == dtype


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_blur_of_one_colour_is_that_colour(side: int) -> None:
    flat = torch.full((1, 3, side, side), 0.3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(flat, side / 16), flat)


def test_rises_kernel_has_the_published_values() -> None:
    """As in the authors' code, which filters a point inside 11 x 11 pixels with scipy."""
    kernel = rise_kernel()[:, None] * rise_kernel()
    assert round(float(kernel[5, 5]), 6) == 0.008833
    assert round(float(kernel[0, 5]), 6) == 0.008266
    assert round(float(kernel[0, 0]), 6) == 0.007737
    point = np.zeros((11, 11))
    point[5, 5] = 1
    np.testing.assert_allclose(kernel.numpy(), gaussian_filter(point, 5), rtol=1e-12)


@pytest.mark.parametrize("side", [3, 16, 30])
def test_rises_blur_is_the_kernel_over_an_image_surrounded_by_zeros(side: int) -> None:
    images = torch.rand(2, 3, side, side, generator=GENERATOR, dtype=torch.float64)
    kernel = np.zeros((11, 11))
    kernel[5, 5] = 1
    weight = torch.from_numpy(gaussian_filter(kernel, 5)).expand(3, 1, 11, 11)
    expected = torch.nn.functional.conv2d(images, weight, padding=5, groups=3)
    torch.testing.assert_close(rise_blur(images), expected)


@pytest.mark.parametrize(("name", "size", "sigma"), [("blur_gag", 33, 16), ("blur_latec", 15, 5)])
def test_blurs_of_presets_are_torchvisions(name: Any, size: int, sigma: float) -> None:
    model, batch = toy_model(), toy_batch(2, side=24)
    inputs = model.normalise(batch.images)
    expected = torchvision_blur(inputs, [size, size], [float(sigma), float(sigma)])
    torch.testing.assert_close(baseline_image(name, model, inputs), expected)


@pytest.mark.parametrize("name", ["blur", "blur_rise", "blur_gag", "blur_latec", "noise", "white"])
@pytest.mark.parametrize("sides", [(1, 1), (1, 9), (7, 40)])
def test_a_baseline_exists_for_images_of_any_size(name: Any, sides: tuple[int, int]) -> None:
    with probing(1, batch=one_image(*sides)) as (probe, _):
        found = probe[BaselineImage(name)]
    assert found.shape == (1, 3, *sides)
    assert found.isfinite().all()


def test_noise_is_uniform_in_pixels_and_belongs_to_the_images_key() -> None:
    batch = toy_batch(4, side=32)
    swapped = Batch(batch.images, batch.labels, batch.keys[::-1])
    with probing(batch=batch) as (probe, _), probing(batch=swapped) as (other, _):
        noise = probe[BaselineImage("noise")]
        torch.testing.assert_close(noise, other[BaselineImage("noise")].flip(0))
        pixels = probe.model.pixels(noise)
        with pytest.raises(Unsupported, match="drawn for each image of a probe"):
            baseline_image("noise", probe.model, probe.inputs)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert abs(float(pixels.mean()) - 0.5) < 0.01
    assert abs(float(pixels.var()) - 1 / 12) < 0.005
    correlation = torch.corrcoef(pixels.transpose(0, 1).flatten(1))  # channels are independent
    assert (correlation - torch.eye(3)).abs().max() < 0.05


# --- needs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
def test_a_masked_probability_reads_the_map_by_its_rule(sign: Any) -> None:
    raw = torch.randn(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    read = {"magnitude": raw.abs(), "positive": raw.clamp(min=0), "signed": raw}[sign]
    low, high = read.amin((1, 2), keepdim=True), read.amax((1, 2), keepdim=True)
    with probing() as (probe, _):
        found = Explanation(probe, raw)[MaskedScores("black", sign)]
        mask = ((read - low) / (high - low))[:, None]
        torch.testing.assert_close(found[:, 0], by_hand(probe, mask, black(probe))[:, 0])


@pytest.mark.parametrize(
    ("pixels", "steps", "counts"),
    [
        (4, 4, [0, 1, 2, 3, 4]),
        (10, 3, [0, 3, 7, 10]),
        (256, 1, [0, 256]),
        (4, 8, [0, 0, 1, 2, 2, 2, 3, 4, 4]),
    ],
)
def test_a_curve_changes_equal_shares_from_none_to_all(
    pixels: int, steps: int, counts: list[int]
) -> None:
    assert Curve("salient", "black", steps).counts(pixels) == counts


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("baseline", ["black", "blur"])
def test_a_curve_runs_from_the_baseline_to_the_image_or_back(steps: int, baseline: Any) -> None:
    maps = torch.randn(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    with probing() as (probe, _):
        explanation = Explanation(probe, maps)
        insertion = explanation[Curve("salient", baseline, steps)]
        deletion = explanation[Curve("rest", baseline, steps)]
        empty, full = probe[BaselineProbability(baseline)], probe.probability
    assert insertion.shape == deletion.shape == (4, steps + 1)
    assert torch.equal(insertion[:, 0], empty)
    assert torch.equal(insertion[:, -1], full)
    assert torch.equal(deletion[:, 0], full)
    assert torch.equal(deletion[:, -1], empty)


@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("keep", ["salient", "rest"])
def test_a_curve_is_the_brute_force_over_ranked_pixels(keep: Any, levels: int) -> None:
    """Maps with many, some and hardly any ties."""
    steps, side = 7, 6
    maps = torch.randint(levels, (4, side, side), generator=GENERATOR).double()
    with probing(batch=toy_batch(4, side=side)) as (probe, _):
        order = probe[Permutation()]
        explanation = Explanation(probe, maps)
        curve = Curve(keep, "black", steps)
        found = torch.stack([point.mask(explanation) for point in curve.inner], dim=1)
        scores = explanation[curve]
        torch.testing.assert_close(scores[:, 1:-1], by_hand(probe, found, black(probe)))
    assert found.shape == (4, steps - 1, side, side)
    pixels = side * side
    for image in range(4):
        tie = {int(pixel): place for place, pixel in enumerate(order[image])}
        flat = maps[image].flatten().tolist()
        ranking = sorted(range(pixels), key=lambda pixel: (-flat[pixel], tie[pixel]))
        for step in range(1, steps):
            salient = set(ranking[: round(pixels * step / steps)])
            shown = [(pixel in salient) == (keep == "salient") for pixel in range(pixels)]
            assert found[image, step - 1].flatten().tolist() == shown


def test_the_permutation_is_one_and_belongs_to_the_images_key() -> None:
    batch = toy_batch(4)
    swapped = Batch(batch.images, batch.labels, batch.keys[::-1])
    with probing(batch=batch) as (probe, _), probing(batch=swapped) as (other, _):
        order = probe[Permutation()]
        assert torch.equal(order.sort(1).values, torch.arange(SIDE * SIDE).expand(4, -1))
        assert torch.equal(order, other[Permutation()].flip(0))
        assert len({tuple(row) for row in order.tolist()}) == 4


def test_recovered_pixels_exceed_the_order_statistic() -> None:
    maps = torch.randn(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    percents = (10, 25, 50)
    with probing() as (probe, _):
        share, found, _ = Explanation(probe, maps)[Recovered("black", "signed", percents)]
        scaled = (maps - maps.amin((1, 2), True)) / (
            maps.amax((1, 2), True) - maps.amin((1, 2), True)
        )
        flat = scaled.flatten(1)
        masks = []
        for at, percent in enumerate(percents):
            count = 256 - 256 * (100 - percent) // 100  # without ties: the pixels above the rank
            chosen = torch.zeros_like(flat).scatter(
                1, flat.argsort(1, descending=True)[:, :count], 1
            )
            torch.testing.assert_close(share[:, at], (flat * chosen).sum(1) / flat.sum(1))
            masks.append(chosen.view(4, 1, SIDE, SIDE))
        torch.testing.assert_close(found, by_hand(probe, torch.cat(masks, 1), black(probe)))


# --- the order of pixels --------------------------------------------------------------------------


TIED = torch.tensor([[[3.0, 1, 2], [2, 3, 0]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("ties", "places"),
    [
        ("first", [0, 4, 2, 3, 1, 5]),
        ("last", [1, 4, 3, 2, 0, 5]),
    ],
)
def test_equal_values_come_in_the_order_that_was_asked_for(ties: Any, places: list[int]) -> None:
    with probing(1, batch=one_image(2, 3)) as (probe, _):
        found = Explanation(probe, TIED)[Ranks(ties=ties)]
    assert found.flatten().tolist() == places


@pytest.mark.parametrize("sign", ["magnitude", "positive", "signed"])
@pytest.mark.parametrize("ties", ["seeded", "first", "last", "above", "partition"])
def test_pixels_are_chosen_by_the_map_as_it_is_read(sign: Any, ties: Any) -> None:
    raw = torch.randn(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    need = Shown("salient", Fraction(1, 3), "black", sign, ties)
    with probing() as (probe, _):
        found = need.mask(Explanation(probe, raw))
        plain = replace(need, sign="signed").mask(Explanation(probe, with_sign(raw, sign)))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("levels", [2, 3, 5, 1000])
@pytest.mark.parametrize("ties", ["above", "partition"])
@pytest.mark.parametrize("keep", ["salient", "rest"])
def test_pixels_above_an_order_statistic_are_shown_together(
    keep: Any, ties: Any, levels: int
) -> None:
    maps = torch.randint(levels, (4, 5, 5), generator=GENERATOR).double()
    with probing(batch=toy_batch(4, side=5)) as (probe, _):
        explanation = Explanation(probe, maps)
        for percent in (10, 20, 48, 90):
            share = Fraction(percent, 100)
            need = Shown(keep, share if keep == "salient" else 1 - share, "black", ties=ties)
            found = need.mask(explanation).flatten(1).tolist()
            for saliency, shown in zip(maps.flatten(1).tolist(), found, strict=True):
                threshold = sorted(saliency)[max(25 * (100 - percent) // 100, 1) - 1]
                salient = [
                    value > threshold or (ties == "partition" and value == max(saliency))
                    for value in saliency
                ]
                assert shown == [each == (keep == "salient") for each in salient]


def test_rankings_of_equal_fractions_share_their_forwards() -> None:
    maps = torch.rand(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    with probing() as (probe, _):
        explanation = Explanation(probe, maps)
        explanation[Curve("salient", "black", 10)]
        spent = probe.spent.forward
        fine = explanation[Curve("salient", "black", 20)]
        assert probe.spent.forward - spent == 10
        again = Explanation(probe, maps)[Curve("salient", "black", 20)]
    assert torch.equal(fine, again)


def test_a_curve_reads_logits_and_probabilities_of_the_same_forwards() -> None:
    maps = torch.rand(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    with probing() as (probe, _):
        explanation = Explanation(probe, maps)
        need = Curve("rest", "black", 4)
        explanation[need]
        spent = probe.spent
        logits = explanation[replace(need, reading="logit")]
        assert probe.spent == spent
        image = need.inner[1].image(explanation)
        expected = probe.model.net(image).gather(1, probe.target[:, None])[:, 0]
        torch.testing.assert_close(logits[:, 2], expected)
        first = probe[Logits()].gather(1, probe.target[:, None])[:, 0]
        torch.testing.assert_close(logits[:, 0], first)


# --- masks ----------------------------------------------------------------------------------------


def test_matched_masks_hold_the_same_values_for_every_map() -> None:
    raw = torch.randn(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    raw[2] = raw[2].round()  # with ties
    raw[3] = 7.0
    with probing() as (probe, _):
        found = Explanation(probe, raw)[MapMask("magnitude", "matched")].flatten(1)
    values = torch.linspace(0, 1, SIDE * SIDE, dtype=torch.float64)
    torch.testing.assert_close(found.sort(1).values, values.expand(4, -1))
    torch.testing.assert_close(found.mean(1), torch.full((4,), 0.5).double())
    order = raw[0].abs().flatten().argsort()
    torch.testing.assert_close(found[0][order], values)


def test_the_range_of_a_soft_mask_takes_an_epsilon() -> None:
    raw = 1e-6 * torch.rand(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    raw[3] = 2.0
    with probing() as (probe, _):
        found = Explanation(probe, raw)[MapMask("positive", range_epsilon=1e-7)]
    above = raw - raw.amin((1, 2), keepdim=True)
    torch.testing.assert_close(found, above / (1e-7 + above.amax((1, 2), keepdim=True)))
    assert not found[3].any()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_top_of_a_map_is_an_exact_number_of_pixels(share: float) -> None:
    raw = torch.randint(3, (4, SIDE, SIDE), generator=GENERATOR).double()
    need = MaskedScores("black", "signed", "top", share)
    with probing() as (probe, _):
        explanation = Explanation(probe, raw)
        assert isinstance(need.source, Shown)
        mask = need.source.mask(explanation)
        assert mask.flatten(1).sum(1).tolist() == [round(SIDE * SIDE * share)] * 4
        found = explanation[need][:, 0]
        torch.testing.assert_close(found, by_hand(probe, mask[:, None], black(probe))[:, 0])
        outside = raw.where(~mask, -1).flatten(1).amax(1)
        assert (outside <= raw.where(mask, 9).flatten(1).amin(1)).all()


def test_the_map_of_the_masked_image_is_what_the_method_makes_of_it() -> None:
    method = registry.make("methods", "input_x_gradient")
    need = MaskedMap("mean", "magnitude")
    for rows in (4, 6):
        with probing(rows=rows) as (probe, meter):
            explanation = probe.explain(method)
            before = meter.forward, meter.backward
            found = explanation[need][:4]
            declared = need.for_method(method).passes(probe.model)
            assert (meter.forward - before[0], meter.backward - before[1]) == (
                4 * declared.forward,
                4 * declared.backward,
            )
            mask = unit_range(explanation.saliency.abs())[:4, None]
            colour = torch.tensor(probe.model.mean).double().view(1, 3, 1, 1)
            batch = toy_batch(4)
            masked = replace(batch, images=mask * batch.images + (1 - mask) * colour)
            alone = Probe(probe.model, masked, target=probe.target[:4]).explain(method)
            torch.testing.assert_close(found, alone.raw)


def test_maps_without_their_method_cannot_be_made_again() -> None:
    with probing() as (probe, _):
        explanation = Explanation(probe, MASKS[:, 0])
        with pytest.raises(Unsupported, match=r"given without it; use xbench\.evaluate"):
            explanation[MaskedMap("black", "magnitude")]
        assert MaskedMap("black", "magnitude").passes(probe.model) == Passes()


# --- imputation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["pixels", "normalised"])
@pytest.mark.parametrize("keep", ["salient", "rest"])
def test_pixels_that_go_are_imputed_and_the_others_stay(keep: Any, space: Any) -> None:
    maps = torch.rand(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    with probing(rows=5) as (probe, _):
        need = Shown(keep, Fraction(3, 10), Imputation(0.02, space))
        explanation = Explanation(probe, filled(maps, 5))
        image, known = need.image(explanation), need.mask(explanation)[:4]
        assert image.shape == (4, 3, SIDE, SIDE)
        assert torch.equal(
            image.where(known[:, None], 0), probe.inputs[:4].where(known[:, None], 0)
        )
        assert known.flatten(1).sum(1).tolist() == [77] * 4
        off = image - linear_imputation(probe.inputs[:4], known)
        scale = torch.tensor(probe.model.std if space == "pixels" else (1.0,) * 3).view(1, 3, 1, 1)
        noise = 0.02 / scale * probe[ImputationNoise()][:4]
        torch.testing.assert_close(off, noise.where(~known[:, None], 0))
        torch.testing.assert_close(
            explanation[need][:4, 0], probability(probe.model.net(image), probe.target[:4])
        )


def test_the_noise_of_an_image_is_one_for_all_maps_and_levels() -> None:
    maps = torch.rand(4, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    fill = Imputation(1.0, "normalised")
    with probing() as (probe, _):
        images = []
        for saliency, share in ((maps, Fraction(1, 2)), (-maps, Fraction(1, 4))):
            need = Shown("salient", share, fill)
            explanation = Explanation(probe, saliency)
            known = need.mask(explanation)
            noise = need.image(explanation) - linear_imputation(probe.inputs, known)
            images.append(noise.where(~known[:, None], torch.nan))
        both = images[0].isfinite() & images[1].isfinite()
        assert both.any()
        torch.testing.assert_close(images[0][both], images[1][both])


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 6])
@pytest.mark.parametrize(
    "need",
    [
        MaskedScores("mean", "signed"),
        MaskedScores("noise", "signed", "matched"),
        MaskedScores("black", "signed", "top"),
        Curve("salient", "blur", 1),
        Curve("rest", "black", 9),
        Recovered("black", "magnitude", (10, 50)),
        AuthorsRecovered("black", "magnitude", (10, 50)),
        Shown("salient", Fraction(1, 2), Imputation(0.01, "pixels")),
        BaselineScores("noise"),
        BaselineProbability("white"),
    ],
    ids=repr,
)
def test_a_need_spends_what_it_declares(need: Need[Any], rows: int) -> None:
    maps = torch.rand(rows, SIDE, SIDE, generator=GENERATOR, dtype=torch.float64)
    with probing(rows=rows) as (probe, meter):
        before = meter.forward
        Explanation(probe, maps)[need]
        declared = cost(closure((Logits(), need)), probe.model)
        assert meter.forward - before == 4 * (declared.forward - 1)  # the clean pass is done
        assert meter.backward == 0
