"""Laws of the generated data set."""

from __future__ import annotations

import hashlib

import pytest
import torch

from xbench.datasets.shapes import CLASSES, SHAPES, TEXTURES, Shapes, generate
from xbench.types import Sample

IMAGES, LABELS, MASKS = generate(0, "test", range(120))


def test_an_image_is_the_same_in_any_batch() -> None:
    chosen = [119, 3, 64, 3]
    images, labels, masks = generate(0, "test", chosen)
    assert torch.equal(images, IMAGES[chosen])
    assert torch.equal(labels, LABELS[chosen])
    assert torch.equal(masks, MASKS[chosen])


def test_no_indices_give_no_images() -> None:
    images, labels, masks = generate(0, "test", [])
    assert images.shape == (0, 3, 64, 64)
    assert labels.shape == (0,)
    assert masks.shape == (0, 64, 64)


def test_the_first_pictures_stay_as_version_1_drew_them() -> None:
    pixels = (IMAGES * 255).to(torch.uint8).numpy().tobytes() + MASKS.bool().numpy().tobytes()
    assert hashlib.blake2b(pixels, digest_size=8).hexdigest() == "182ed2649b38c520"


@pytest.mark.parametrize(("seed", "split"), [(1, "test"), (0, "train")])
def test_another_seed_or_split_gives_other_images(seed: int, split: str) -> None:
    images, _, masks = generate(seed, split, range(12))
    assert not (images == IMAGES[:12]).flatten(1).all(1).any()
    assert not (masks == MASKS[:12]).flatten(1).all(1).any()


def test_images_are_multiples_of_a_255th_between_0_and_1() -> None:
    assert IMAGES.dtype == torch.float32
    assert IMAGES.shape == (120, 3, 64, 64)
    assert torch.equal((IMAGES * 255).round() / 255, IMAGES)
    assert IMAGES.min() >= 0
    assert IMAGES.max() <= 1


def test_masks_are_binary() -> None:
    assert MASKS.dtype == torch.float32
    assert torch.equal(MASKS, (MASKS > 0.5).float())


def test_the_object_covers_a_sensible_share_of_the_image() -> None:
    share = MASKS.mean((1, 2))
    assert share.min() > 0.05
    assert share.max() < 0.30


def test_the_object_lies_fully_inside_the_image() -> None:
    # a cut object would be smaller than its shape's least area: radius 14 at each place
    least = {"disc": 380, "square": 380, "triangle": 245, "cross": 380}
    for shape, area in least.items():
        of_shape = LABELS // len(TEXTURES) == SHAPES.index(shape)
        assert MASKS[of_shape].sum((1, 2)).min() > area
    # and no edge of the image is covered along more than a few pixels, where a point touches it
    edges = torch.stack((MASKS[:, 0], MASKS[:, -1], MASKS[:, :, 0], MASKS[:, :, -1]))
    assert edges.sum(-1).max() <= 8


def test_the_object_shows_two_contrasting_colours_in_every_channel() -> None:
    for image, mask in zip(IMAGES, MASKS, strict=True):
        inside = image[:, mask > 0]
        spread = inside.amax(1) - inside.amin(1)
        assert (spread > 0.38).all()
        assert (spread < 0.62).all()


def test_distractors_and_background_do_not_touch_the_object() -> None:
    # each pixel of the object is a mixture of its two colours, so the channels lie on one line
    for image, mask in zip(IMAGES, MASKS, strict=True):
        inside = image[:, mask > 0].double()
        spread = torch.linalg.svdvals(inside - inside.mean(1, keepdim=True))
        assert spread[1] < 0.02 * spread[0]


def test_each_twelve_images_hold_each_class_once() -> None:
    assert LABELS.dtype == torch.int64
    assert all(sorted(part) == list(range(12)) for part in LABELS.view(-1, 12).tolist())


def test_shapes_of_one_class_differ_in_place_size_and_angle() -> None:
    striped_disc = CLASSES.index("striped disc")
    areas = MASKS[striped_disc :: len(CLASSES)].sum((1, 2))
    assert len(set(areas.tolist())) > 5


def test_a_source_loads_what_the_generator_draws() -> None:
    source = Shapes(seed=3, split="train").open(None)
    images, labels, masks = generate(3, "train", [7, 29])
    for place, sample in enumerate(source.load([7, 29])):
        assert isinstance(sample, Sample)
        assert torch.equal(sample.image, images[place])
        assert sample.label == labels[place]
        assert sample.mask is not None
        assert torch.equal(sample.mask, masks[place])


def test_a_source_knows_its_labels_without_drawing() -> None:
    source = Shapes().open(None)
    drawn = [sample.label for sample in source.load(range(30)) if isinstance(sample, Sample)]
    assert list(source.labels[:30]) == drawn  # type: ignore[attr-defined]


def test_a_source_tells_its_ids_keys_and_classes() -> None:
    source = Shapes().open(None)
    assert len(source.ids) == 10_000
    assert list(source.ids[:3]) == ["0000000", "0000001", "0000002"]
    assert source.key(2) == "shapes/test/0/0000002"
    assert source.classes[5] == "dotted square"
    assert len(set(source.classes)) == 12
    assert source.revision == "1"
    assert source.size == (64, 64)
    assert source.has_masks
