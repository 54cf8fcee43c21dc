"""Laws of the augmentation of a batch on its device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from xbench.training.augmentation import augmented
from xbench.training.recipe import Augmentation


def images(count: int = 64, side: int = 8) -> Tensor:
    """No two pixels alike within an image, none black."""
    return torch.arange(1, count * 3 * side * side + 1).view(count, 3, side, side).float()


def of(augmentation: Augmentation, epoch: int = 0, count: int = 64, side: int = 8) -> Tensor:
    return augmented(images(count, side), augmentation, 0, epoch, range(count))


def test_nothing_to_do_gives_the_same_images() -> None:
    assert torch.equal(of(Augmentation()), images())


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    found, before = of(Augmentation(flip=True), count=400), images(400)
    is_same = (found == before).flatten(1).all(1)
    is_mirrored = (found == before.flip(3)).flatten(1).all(1)
    assert torch.equal(is_same, ~is_mirrored)
    assert 150 < int(is_mirrored.sum()) < 250


def test_a_crop_is_one_of_the_padded_image_and_every_place_occurs() -> None:
    found, before = of(Augmentation(crop=1), count=200), images(200)
    padded = functional.pad(before, (1, 1, 1, 1))
    windows = torch.stack(
        [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)], dim=1
    )
    is_it = (windows == found[:, None]).flatten(2).all(2)
    assert (is_it.sum(1) == 1).all()
    assert is_it.any(0).all()


@pytest.mark.parametrize("turn", [90.0, 180.0])
def test_a_rotation_moves_no_pixel_further_than_its_largest_angle(turn: float) -> None:
    """The pixel in the middle stays; a corner of a rotated picture may be black."""
    found = of(Augmentation(rotation=turn), side=9)
    assert torch.equal(found[:, :, 4, 4], images(side=9)[:, :, 4, 4])
    assert (found == 0).any()
    small = of(Augmentation(rotation=1e-3), side=9)
    assert torch.equal(small, images(side=9))


def test_a_rotation_agrees_with_an_independent_one() -> None:
    """torchvision's, whose angles turn the other way."""
    from torchvision.transforms.functional import rotate

    from xbench.noise import stream_keys, uniform

    before = images(40, 16)
    found = augmented(before, Augmentation(rotation=30.0), 5, 2, range(40))
    draws = uniform(stream_keys(5, [f"2/{index}" for index in range(40)], "augmentation"), 4)
    angles = ((2 * draws[:, 3] - 1) * 30).tolist()
    theirs = [rotate(image, -angle) for image, angle in zip(before, angles, strict=True)]
    assert torch.equal(found, torch.stack(theirs))


def test_an_image_does_not_depend_on_its_batch_but_on_its_epoch() -> None:
    everything = Augmentation(crop=2, flip=True, rotation=15.0)
    whole = of(everything)
    part = augmented(images()[10:20], everything, 0, 0, range(10, 20))
    assert torch.equal(part, whole[10:20])
    assert not torch.equal(of(everything, epoch=1), whole)


def test_bytes_stay_bytes() -> None:
    found = augmented(images(4).to(torch.uint8), Augmentation(crop=2), 0, 0, range(4))
    assert found.dtype == torch.uint8
