"""Laws of ROAD: what goes is exact in number, imputed alike for all maps, and seeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xbench import registry
from xbench.api import score as api_score
from xbench.autograd import prepared
from xbench.errors import UsageError
from xbench.orders import Permutation
from xbench.probe import Explanation, Probe
from xbench.testing import planted_batch, toy_batch, toy_model, toy_network
from xbench.types import Batch, Model

NAMES = ("road", "road_morf", "road_lerf")


def score(
    name: str, maps: Tensor, model: Model | None = None, batch: Batch | None = None, **params: Any
) -> Tensor:
    model, batch = model or toy_model(), batch or toy_batch(len(maps), side=maps.shape[-1])
    metric = registry.make("metrics", name, params)
    with prepared(model.net) as meter:
        probe = Probe(model, batch, target=torch.zeros(len(maps)).long(), meter=meter)
        found: Tensor = metric(Explanation(probe, maps))
        return found


def random_maps(count: int = 4, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, side, side, generator=generator, dtype=torch.float64)


class Sees(nn.Module):
    """Keeps what it is shown; the first class has the images' mean as its probability."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        mean = images.mean((1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        return torch.stack((mean.log(), (1 - mean).log()), dim=1)


def shown(name: str, maps: Tensor, images: Tensor, **params: Any) -> Tensor:
    """(S, 3, H, W): the images that one map's score is made of, in pixels."""
    net = Sees()
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    score(name, maps, Model("sees", net), batch, **params)
    return torch.cat(net.seen[1:])


# --- by hand --------------------------------------------------------------------------------------


def test_on_a_bright_object_road_is_known_by_hand() -> None:
    """A row of ten pixels, 1 on the left half and 0 on the right, whose mean is the probability.

    Without noise, imputing the salient left half gives zeros throughout, the right half ones.
    """
    images = torch.zeros(1, 3, 1, 10, dtype=torch.float64)
    images[..., :5] = 1
    saliency = torch.linspace(1, 0, 10, dtype=torch.float64)[None, None]
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    params = {"levels": (0.5,), "noise": 0.0}
    found = [score(name, saliency, Model("sees", Sees()), batch, **params) for name in NAMES]
    assert [float(value) for value in found] == pytest.approx([0.5, 0, 1], abs=1e-5)


def test_an_imputed_pixel_is_the_mean_of_its_neighbours_and_noise() -> None:
    images = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    saliency = torch.zeros(1, 3, 3, dtype=torch.float64)
    saliency[0, 1, 1] = 1
    (image,) = shown("road_morf", saliency, images, levels=(0.1,), noise=0.0)
    expected = images[0].clone()
    direct = expected[:, [0, 1, 1, 2], [1, 0, 2, 1]].sum(1) / 6
    expected[:, 1, 1] = direct + expected[:, [0, 0, 2, 2], [0, 2, 0, 2]].sum(1) / 12
    torch.testing.assert_close(image, expected)


def test_road_of_a_classifier_that_sees_nothing_is_zero() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([0.3, 0.7]).log().expand(len(images), 2)

    model = Model("fixed", Fixed())
    expected = {"road": 0.0, "road_morf": 0.3, "road_lerf": 0.3}
    for name, value in expected.items():
        found = score(name, random_maps(), model)
        torch.testing.assert_close(found, torch.full((4,), value, dtype=torch.float64))


# --- what goes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_removing_a_share_removes_that_share_on_maps_with_many_equal_zeros(share: float) -> None:
    """On a map with 62 % zeros, pytorch-grad-cam imputes the whole image at either level."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 20, 20, generator=generator, dtype=torch.float64)
    saliency = torch.rand(1, 20, 20, generator=generator, dtype=torch.float64)
    saliency[saliency < 0.62] = 0
    for name in ("road_morf", "road_lerf"):
        (image,) = shown(name, saliency, images, levels=(share,))
        changed = (image != images[0]).any(0)
        assert int(changed.sum()) == round(400 * share)
    morf, lerf = (
        (shown(name, saliency, images, levels=(share,))[0] != images[0]).any(0)
        for name in ("road_morf", "road_lerf")
    )
    assert not (morf & lerf).any()


def test_equal_values_go_in_the_seeded_order_of_all_metrics() -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    (image,) = shown("road_morf", torch.zeros(1, 8, 8).double(), images, levels=(0.25,))
    gone = (image != images[0]).any(0).flatten()
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    order = Probe(Model("sees", Sees()), batch)[Permutation()][0]
    assert sorted(order[:16].tolist()) == gone.nonzero()[:, 0].tolist()


def test_the_complement_keeps_the_most_salient_share() -> None:
    maps = random_maps()
    share = score("road_lerf", maps, levels=(0.2, 0.6))
    complement = score("road_lerf", maps, levels=(0.8, 0.4), lerf="complement")
    torch.testing.assert_close(share, complement)


def test_the_negated_map_has_the_negated_score() -> None:
    maps = random_maps()
    torch.testing.assert_close(score("road", -maps), -score("road", maps), rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [lambda m: 3 * m + 7, torch.exp], ids=["affine", "exp"])
def test_an_increasing_transform_moves_nothing(transform: Any) -> None:
    maps = random_maps()
    assert torch.equal(score("road", transform(maps)), score("road", maps))


def test_road_is_half_the_difference_of_its_parts() -> None:
    maps = random_maps()
    road, morf, lerf = (score(name, maps) for name in NAMES)
    torch.testing.assert_close(road, (lerf - morf) / 2)
    complement = score("road", maps, preset="road-2022")
    morf, lerf = (score(name, maps, preset="road-2022") for name in NAMES[1:])
    torch.testing.assert_close(complement, (lerf - morf) / 2)


def test_the_object_beats_its_negation() -> None:
    model, batch = planted_batch()
    assert batch.masks is not None
    right, wrong = (score("road", maps, model, batch) for maps in (batch.masks, -batch.masks))
    assert (right > wrong).all()


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_seeded_and_belongs_to_the_images_key() -> None:
    maps, batch = random_maps(), toy_batch(4)
    plain = score("road", maps, batch=batch)
    assert torch.equal(score("road", maps, batch=batch), plain)
    turned = Batch(batch.images.flip(0), batch.labels, batch.keys[::-1])
    found = score("road", maps.flip(0), batch=turned)
    torch.testing.assert_close(found.flip(0), plain, rtol=0, atol=1e-12)
    renamed = Batch(batch.images, batch.labels, ("a", "b", "c", "d"))
    assert not torch.equal(score("road", maps, batch=renamed), plain)


@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_noise_has_its_standard_deviation_in_the_space_that_is_named(space: str) -> None:
    """On a network with std 0.2, 0.25 and 0.3; imputed grey stays grey but for the noise."""
    model = toy_model()
    net = Sees()
    wide = Model("sees", net, model.mean, model.std)
    images = torch.full((1, 3, 64, 64), 0.5, dtype=torch.float64)
    batch = Batch(images, torch.zeros(1).long(), ("a",))
    score("road_morf", random_maps(1, 64), wide, batch, levels=(0.5,), noise=0.02, space=space)
    change = net.seen[-1][0] - wide.normalise(images)[0]
    spread = change[:, (change != 0).any(0)].std(1)
    expected = torch.full((3,), 0.02).double()
    if space == "pixels":
        expected = expected / torch.tensor(model.std)
    torch.testing.assert_close(spread, expected, rtol=0.05, atol=0)


# --- known defects of others ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 10, 20])
def test_a_mean_over_images_uses_all_batches(size: int) -> None:
    """20 images, the latter half with the other class as target: 0.5, whatever the batch size."""

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_tensor([50.0, -50.0]).expand(len(images), 2)

    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0] * 10 + [1] * 10)
    maps = torch.rand(20, 8, 8)
    found = api_score(
        Fixed(), images, maps, "road_morf", target=target, batch_size=size, levels=(0.5,)
    )
    assert float(found.mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_and_of_three_channels_are_imputed(channels: int) -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3))
            return torch.stack((mean, -mean), dim=1)

    images = torch.rand(2, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    found = api_score(Mean(), images, torch.rand(2, 12, 12), "road")
    assert found.isfinite().all()


def test_a_batch_and_its_images_alone_have_the_same_scores() -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    maps = random_maps(7)
    whole = api_score(toy_network(), images, maps, "road")
    for size in (1, 2, 3):
        found = api_score(toy_network(), images, maps, "road", batch_size=size)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_in_float32_a_subset_at_the_same_batch_size_has_the_same_bits() -> None:
    images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps, net = random_maps(7).float(), toy_network().float()
    whole = api_score(net, images, maps, "road", batch_size=5)
    for chosen in ([6], [3, 0], [6, 5, 4, 3, 2]):
        found = api_score(net, images[chosen], maps[chosen], "road", batch_size=5)
        assert torch.equal(found, whole[chosen])


def test_an_image_of_which_nothing_is_left_becomes_the_mean_colour() -> None:
    """Of a single pixel, the nearest number to nine tenths is all."""
    net = Sees()
    model = Model("sees", net, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    batch = Batch(torch.rand(1, 3, 1, 1).double(), torch.zeros(1).long(), ("a",))
    saliency = torch.zeros(1, 1, 1).double()
    score("road_morf", saliency, model, batch, levels=(0.1, 0.9), noise=0.0)
    kept, gone = torch.cat(net.seen[1:])
    assert torch.equal(kept, model.normalise(batch.images)[0])
    assert not gone.any()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_is_passed_is_used(name: str) -> None:
    maps = random_maps()
    plain = score(name, maps, levels=(0.3, 0.4))
    changes: list[dict[str, Any]] = [
        {"levels": (0.3,)},
        {"noise": 0.5},
        {"space": "normalised", "noise": 0.5},
        {"sign": "magnitude"},
        {"read": "logit"},
    ]
    if name != "road_morf":
        changes.append({"lerf": "complement"})
    for change in changes:
        found = score(name, maps, **{"levels": (0.3, 0.4), **change})
        assert not torch.equal(found, plain), change
    loud = score(name, maps, levels=(0.3, 0.4), noise=0.5)
    assert not torch.equal(
        score(name, maps, levels=(0.3, 0.4), noise=0.5, space="normalised"), loud
    )


def test_parts_share_the_forwards_of_the_whole() -> None:
    model = toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, toy_batch(4), meter=meter)
        explanation = Explanation(probe, random_maps())
        registry.make("metrics", "road")(explanation)
        assert probe.spent.forward == 1 + 2 * 9
        for name in NAMES:
            for params in ({}, {"read": "logit"}, {"levels": (0.2, 0.4)}):
                registry.make("metrics", name, params)(explanation)
        assert probe.spent.forward == 1 + 2 * 9


def test_presets_are_the_sources_levels_and_noise() -> None:
    paper, library = (
        registry.make("metrics", "road", {"preset": preset}) for preset in ("road-2022", "pgc-1.5")
    )
    assert paper.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    assert (paper.noise, paper.space, paper.read) == (0.01, "pixels", "probability")
    assert library.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert (library.noise, library.space, library.read) == (0.01, "normalised", "logit")


@pytest.mark.parametrize(
    "params", [{"levels": ()}, {"levels": (0.0,)}, {"levels": (0.5, 1.0)}, {"noise": -0.1}]
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="metric 'road'"):
        registry.make("metrics", "road", params)
