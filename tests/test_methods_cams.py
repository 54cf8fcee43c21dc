"""Laws of class activation maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported, UsageError
from xbench.maps import is_constant, unit_range, upsample
from xbench.probe import ImageGradient, LayerGradient, Probe
from xbench.sweeps import GuidedGradient
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

CAMS = ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam", "eigen_grad_cam")
"""Those that read any layer and its gradient."""

ALL = ("cam", *CAMS, "eigen_cam", "smooth_grad_cam_plus_plus", "guided_grad_cam")

TARGET = torch.tensor([4, 0, 2])


def explain(
    name: str, model: Model | None = None, batch: Batch | None = None, **params: Any
) -> Tensor:
    model = model or toy_model()
    with prepared(model.net) as meter:
        probe = Probe(model, batch or toy_batch(3), target=TARGET, meter=meter)
        return probe.explain(registry.make("methods", name, params)).raw


def layer(model: Model | None = None, path: str = "last_conv") -> tuple[Tensor, Tensor]:
    model = model or toy_model()
    with prepared(model.net) as meter:
        return Probe(model, toy_batch(3), target=TARGET, meter=meter)[LayerGradient(path)]


def cam(name: str, activation: Tensor, gradient: Tensor, **params: Any) -> Tensor:
    given = (activation,) if name == "eigen_cam" else (activation, gradient)
    found: Tensor = registry.make("methods", name, params).cam(*given)
    return found


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --- by hand --------------------------------------------------------------------------------------

A = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]], dtype=torch.float64)  # two channels of 1 x 2
G = torch.tensor([[[[2.0, -1.0]], [[-4.0, 1.0]]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cam", [1 * 1 - 3 * 2, 1 * 3]),  # gradients add up to 1 and -3
        ("grad_cam", [0.5 * 1 - 1.5 * 2, 0.5 * 3]),  # mean gradients 0.5 and -1.5
        # 1 / (2 + g sum A) = 1/10 and 1/4 for the positive gradients 2 and 1
        ("grad_cam_plus_plus", [0.2 * 1 + 0.25 * 2, 0.2 * 3]),
        ("xgrad_cam", [-0.25 * 1 - 4 * 2, -0.25 * 3]),  # (2 - 3) / 4 and -8 / 2
        ("hires_cam", [2 - 8, -3]),
        ("layer_cam", [2, 0]),
    ],
)
def test_a_cam_of_two_channels_is_known_by_hand(name: str, expected: list[float]) -> None:
    found = cam(name, A, G)
    torch.testing.assert_close(found, torch.tensor([[expected]], dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.5])
def test_grad_cam_plus_plus_is_the_printed_equation(epsilon: float) -> None:
    """w = g^2 / (2 g^2 + g^3 sum A + epsilon), zero where g = 0, times the positive part of g."""
    activation, gradient = layer(path="1")
    gradient = gradient.clone()
    gradient[0, 0, :3] = 0
    square, cube = gradient**2, gradient**3
    share = square / (2 * square + cube * activation.sum((2, 3), keepdim=True) + epsilon)
    share[gradient == 0] = 0
    weight = (share * gradient.clamp(min=0)).sum((2, 3), keepdim=True)
    expected = (weight * activation).sum(1)
    found = cam("grad_cam_plus_plus", activation, gradient, epsilon=epsilon)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30])
def test_grad_cam_plus_plus_has_no_smallest_gradient(scale: float) -> None:
    """Where sum A is small, w tends to 1/2: no square underflows and nothing is added to it."""
    activation, gradient = layer()
    found = cam("grad_cam_plus_plus", activation * 1e-60, gradient * scale)
    weight = (gradient * scale).clamp(min=0).sum((2, 3), keepdim=True) / 2
    torch.testing.assert_close(found * 1e60 / scale, (weight / scale * activation).sum(1))


def test_an_xgrad_cam_channel_that_adds_up_to_zero_has_no_weight() -> None:
    activation = A.clone()
    activation[0, 0] = torch.tensor([[2.0, -2.0]])
    expected = -4 * activation[0, 1]
    torch.testing.assert_close(cam("xgrad_cam", activation, G)[0], expected)


def test_the_epsilon_of_xgrad_cam_is_added_to_each_channels_sum() -> None:
    found = cam("xgrad_cam", A, G, epsilon=1.0)
    expected = [-1 / 5 * 1 - 8 / 3 * 2, -1 / 5 * 3]
    torch.testing.assert_close(found, torch.tensor([[expected]], dtype=torch.float64))


@pytest.mark.parametrize("colour", [[3.0, 4.0], [-3.0, -4.0], [3.0, -4.0], [4.0, -3.0]])
def test_eigen_cam_of_one_pattern_is_the_pattern_towards_its_larger_cubes(
    colour: list[float],
) -> None:
    pattern = torch.tensor([[1.0, 2.0], [-3.0, 5.0]]).double()
    features = torch.tensor(colour).double()[None, :, None, None] * pattern
    found = cam("eigen_cam", features, G)
    torch.testing.assert_close(found[0], 5 * pattern)  # 1 + 8 - 27 + 125 > 0
    # the mean over positions, 1.25, is what centring takes away; then -4.25 outweighs 3.75
    centred = cam("eigen_cam", features, G, centred=True)
    torch.testing.assert_close(centred[0], 5 * (1.25 - pattern))


def test_eigen_grad_cam_is_eigen_cam_of_the_product_but_for_its_sign() -> None:
    found, without = cam("eigen_grad_cam", A, G), cam("eigen_cam", A * G, A)
    assert torch.equal(found.abs(), without.abs())
    assert (found * (A * G).sum(1)).sum() > 0
    assert without.pow(3).sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_behind_a_layer_norm_eigen_cam_keeps_its_sign_in_any_precision(dtype: torch.dtype) -> None:
    """The sum over channels is nothing but rounding there, and could turn the map either way."""
    features = functional.layer_norm(random(16, 4, 4, 24), (24,)).permute(0, 3, 1, 2)
    found = cam("eigen_cam", features.to(dtype), A).double()
    assert (found.pow(3).sum((1, 2)) > 0).all()
    torch.testing.assert_close(found, cam("eigen_cam", features, A), rtol=0, atol=1e-4)


# --- CAM ------------------------------------------------------------------------------------------


def test_before_pooling_and_a_linear_layer_cam_is_grad_xgrad_and_hires_cam() -> None:
    """CAM itself: the classifier's weights of the target, over the feature maps."""
    model = toy_model()
    activation, gradient = layer(model)
    weight = model.net.get_submodule("6").get_parameter("weight")[TARGET]
    by_classifier = torch.einsum("nc,nchw->nhw", weight, activation)
    torch.testing.assert_close(cam("cam", activation, gradient), by_classifier)
    for name in ("grad_cam", "xgrad_cam", "hires_cam"):
        mean = by_classifier / activation[0, 0].numel()
        torch.testing.assert_close(cam(name, activation, gradient), mean)
    expected = unit_range(upsample(by_classifier.relu(), like=toy_batch(3).images))
    for name in ("cam", "grad_cam", "xgrad_cam", "hires_cam"):
        torch.testing.assert_close(unit_range(explain(name)), expected)


def test_elsewhere_they_differ() -> None:
    maps = [unit_range(explain(name, layer="1")) for name in CAMS]
    for at, one in enumerate(maps):
        for other in maps[at + 1 :]:
            assert (one - other).abs().max() > 1e-3


def behind(features: nn.Module, *head: nn.Module) -> Model:
    net = nn.Sequential(features, *head).double().eval().requires_grad_(False)
    return Model("behind", net, (0.0,) * 3, (1.0,) * 3, {"last_conv": "0"}, (16, 16))


CONVOLUTION = nn.Conv2d(3, 4, 3, padding=1)


@pytest.mark.parametrize(
    "head",
    [
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        (nn.Dropout(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(4, 5, bias=False)),
        (nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.Dropout()),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 5)),
    ],
)
def test_cam_finds_the_classifier_behind_any_average_pooling(head: Sequence[nn.Module]) -> None:
    model = behind(CONVOLUTION, *head)
    activation, _ = layer(model)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    weight = linear[-1].weight if len(linear) == 1 else linear[1].weight @ linear[0].weight
    expected = torch.einsum("nc,nchw->nhw", weight[TARGET], activation)
    torch.testing.assert_close(explain("cam", model, sign="signed"), expected)


def test_cam_works_where_the_features_have_their_channels_last_in_memory() -> None:
    """As after a permutation: average pooling is then another operation."""

    class Last(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(1, -1).contiguous().movedim(-1, 1)

    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    last, plain = behind(Last(3, 4, 3, padding=1), *head), behind(CONVOLUTION, *head)
    last.net.load_state_dict(plain.net.state_dict())
    torch.testing.assert_close(explain("cam", last), explain("cam", plain))


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (
            (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5)),
            "'0' is followed by more than global average pooling and a linear layer",
        ),
        (
            (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
            "the logits are not affine in it; grad_cam works there",
        ),
        (
            (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
            "the logits are not affine in it",
        ),
        (
            (nn.Flatten(), nn.Linear(4 * 256, 5)),
            "'0' is not followed by global average pooling: its 16 x 16 positions have different",
        ),
    ],
)
def test_where_there_is_no_such_classifier_cam_says_what_there_is(
    head: Sequence[nn.Module], found: str
) -> None:
    with pytest.raises(Unsupported, match=found):
        explain("cam", behind(CONVOLUTION, *head))


# --- sign, upsampling, scaling --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cam", *CAMS, "eigen_cam"])
def test_a_cam_is_the_upsampled_positive_part_of_its_sum(name: str) -> None:
    path = "3" if name == "cam" else "1"
    small = cam(name, *layer(path=path)).relu()
    found = explain(name, layer=path)
    assert torch.equal(found, upsample(small, like=toy_batch(3).images))
    assert found.min() >= 0
    assert found.shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["cam", *CAMS, "eigen_cam", "smooth_grad_cam_plus_plus"])
def test_the_positive_part_of_the_signed_map_is_the_map(name: str) -> None:
    """Under nearest neighbour, which a ReLU passes; others mix signs."""
    params = {"upsampling": "nearest", **({"centred": True} if "eigen" in name else {})}
    signed = explain(name, sign="signed", **params)
    assert torch.equal(signed.relu(), explain(name, **params))
    if name not in ("layer_cam", "grad_cam_plus_plus", "smooth_grad_cam_plus_plus"):
        assert (signed < 0).any()  # else this shows nothing


def test_a_signed_guided_grad_cam_keeps_where_grad_cam_is_negative() -> None:
    kept, whole = explain("guided_grad_cam"), explain("guided_grad_cam", sign="signed")
    negative = explain("grad_cam", sign="signed") < 0
    assert whole[negative].any()
    assert (kept != whole).any()


@pytest.mark.parametrize("name", ALL)
def test_upsampling_acts_on_the_layers_map(name: str) -> None:
    maps = [explain(name, upsampling=how) for how in ("bilinear", "corners", "nearest")]
    for at, one in enumerate(maps):
        for other in maps[at + 1 :]:
            assert (one != other).any()
    if name != "guided_grad_cam":
        assert torch.equal(maps[2], maps[2][:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("name", [name for name in ALL if name != "guided_grad_cam"])
def test_scaled_as_pytorch_grad_cam_a_map_reaches_from_zero_to_almost_one(name: str) -> None:
    flat = explain(name, sign="signed", scaling="pgc").flatten(1)
    assert torch.equal(flat.amin(1), torch.zeros(3, dtype=torch.float64))
    assert ((flat.amax(1) < 1) & (flat.amax(1) > 1 - 1e-4)).all()


@pytest.mark.parametrize("name", ALL)
def test_the_layer_is_a_role_or_a_path(name: str) -> None:
    assert torch.equal(explain(name), explain(name, layer="3"))
    if name != "cam":
        assert not torch.equal(explain(name), explain(name, layer="1"))


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"sign": "negative"}, "sign = 'negative'"),
        ({"upsampling": "cubic"}, "upsampling = 'cubic'"),
        ({"scaling": "max"}, "scaling = 'max'"),
        ({"epsilon": -1.0}, "epsilon = -1.0"),
        ({"preset": "pgc-1.4"}, "no preset 'pgc-1.4'"),
    ],
)
def test_a_wrong_parameter_is_named(params: dict[str, Any], shown: str) -> None:
    with pytest.raises(UsageError, match=shown):
        registry.make("methods", "xgrad_cam", params)


# --- by property ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cam", "grad_cam", "xgrad_cam", "hires_cam", "layer_cam", "eigen_grad_cam"]
)
def test_a_cam_grows_with_the_gradient(name: str) -> None:
    activation, gradient = layer(path="1")
    torch.testing.assert_close(
        cam(name, activation, 3 * gradient), 3 * cam(name, activation, gradient)
    )


def test_xgrad_cam_conserves_the_sum_of_gradient_times_activation() -> None:
    """Fu et al.'s axiom: a channel's map adds up to its part of the first-order expansion."""
    activation, gradient = layer(path="1")
    total = cam("xgrad_cam", activation, gradient).sum((1, 2))
    torch.testing.assert_close(total, (gradient * activation).sum((1, 2, 3)))


def test_layer_cam_of_positive_gradients_is_hires_cam() -> None:
    activation, gradient = layer(path="1")
    gradient = gradient.abs()
    assert torch.equal(
        cam("layer_cam", activation, gradient), cam("hires_cam", activation, gradient)
    )


def test_layer_cam_cuts_negative_gradients_not_negative_activations() -> None:
    activation, gradient = A.clone(), G.clone()
    activation[0, 0, 0, 0] = -3
    assert cam("layer_cam", activation, gradient).tolist() == [[[2 * -3, 0]]]
    assert cam("hires_cam", activation, gradient).tolist() == [[[2 * -3 - 8, -3]]]


@pytest.mark.parametrize("name", ["cam", *CAMS, "eigen_cam"])
def test_the_order_of_channels_does_not_matter(name: str) -> None:
    activation, gradient = layer(path="1")
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(
        cam(name, activation[:, order], gradient[:, order]), cam(name, activation, gradient)
    )


# --- Eigen-CAM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("channels", [2, 12, 13, 40])
def test_eigen_cam_is_the_best_map_of_rank_one(channels: int, centred: bool) -> None:
    """Whether there are more channels or positions; its length is the first singular value."""
    features = random(5, channels, 3, 4)
    found = cam("eigen_cam", features, features, centred=centred).flatten(1)
    rows = features.flatten(2)
    if centred:
        rows = rows - rows.mean(2, keepdim=True)
    left, values, right = torch.linalg.svd(rows)
    torch.testing.assert_close(found.norm(dim=1), values[:, 0])
    projection = values[:, :1] * right[:, 0]
    torch.testing.assert_close(found.abs(), projection.abs())
    assert (found.pow(3).sum(1) > 0).all()
    assert left.shape[1] == channels


def test_eigen_cam_of_rectified_features_is_non_negative() -> None:
    for channels in (5, 50):
        assert cam("eigen_cam", random(8, channels, 4, 4).relu(), A).min() > -1e-14


def test_a_centred_eigen_cam_adds_up_to_zero() -> None:
    found = cam("eigen_cam", random(8, 5, 4, 4).relu(), A, centred=True)
    torch.testing.assert_close(found.sum((1, 2)), torch.zeros(8).double())


@pytest.mark.parametrize("channels", [64, 512])
def test_eigen_cam_of_float32_features_has_their_digits(channels: int) -> None:
    """A Gram matrix in float32 would leave half of them."""
    features = random(4, channels, 7, 7, dtype=torch.float32).relu() * 1e-12
    found = cam("eigen_cam", features, features)
    assert found.dtype == torch.float32
    exact = cam("eigen_cam", features.double(), features.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_eigen_cam_asks_nothing_about_the_class_and_eigen_grad_cam_does() -> None:
    maps = {}
    for name in ("eigen_cam", "eigen_grad_cam"):
        with prepared((model := toy_model()).net):
            probe = Probe(model, toy_batch(3), target=(TARGET + 1) % 5)
            maps[name] = probe.explain(registry.make("methods", name, {"layer": "1"})).raw
    assert torch.equal(maps["eigen_cam"], explain("eigen_cam", layer="1"))
    assert not torch.equal(maps["eigen_grad_cam"], explain("eigen_grad_cam", layer="1"))


# --- Smooth Grad-CAM++, Guided Grad-CAM -----------------------------------------------------------


def test_without_noise_smooth_grad_cam_plus_plus_is_grad_cam_plus_plus() -> None:
    found = explain("smooth_grad_cam_plus_plus", layer="1", noise=0.0, samples=3)
    torch.testing.assert_close(found, explain("grad_cam_plus_plus", layer="1"), rtol=1e-12, atol=0)
    noisy = explain("smooth_grad_cam_plus_plus", layer="1", noise=0.3, samples=3)
    assert (noisy - found).abs().max() > 1e-3 * found.max()


def test_guided_grad_cam_is_the_product_of_its_two_parts() -> None:
    model = toy_model()
    with prepared(model.net):
        guided = Probe(model, toy_batch(3), target=TARGET)[GuidedGradient()]
    product = explain("grad_cam", upsampling="corners")[:, None] * guided
    for channels, expected in (
        ("absolute_sum", product.abs().sum(1)),
        ("sum", product.sum(1)),
        ("max", product.abs().amax(1)),
    ):
        found = explain("guided_grad_cam", upsampling="corners", channels=channels)
        torch.testing.assert_close(found, expected)


def test_guided_grad_cam_needs_a_relu_or_leave() -> None:
    model = behind(CONVOLUTION, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(Unsupported, match="no ReLU"):
        explain("guided_grad_cam", model)
    found = explain("guided_grad_cam", model, allow_no_relu=True, channels="sum")
    with prepared(model.net):
        gradient = Probe(model, toy_batch(3), target=TARGET)[ImageGradient()]
    torch.testing.assert_close(found, (explain("grad_cam", model)[:, None] * gradient).sum(1))


# --- degenerate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name != "eigen_cam"])
def test_without_any_gradient_a_cam_is_zero(name: str) -> None:
    model = toy_model()
    model.net.get_submodule("6").get_parameter("weight").zero_()
    assert not explain(name, model).any()


@pytest.mark.parametrize("name", ALL)
def test_without_any_activation_a_cam_is_zero(name: str) -> None:
    model = toy_model()
    convolution = model.net.get_submodule("2")
    convolution.get_parameter("weight").zero_()
    convolution.get_parameter("bias").fill_(-1)
    for scaling in ("none", "pgc"):
        assert not explain(name, model, scaling=scaling).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cam", *CAMS, "eigen_cam"])
def test_a_cam_of_constant_feature_maps_is_constant(name: str, dtype: torch.dtype) -> None:
    """To the last bit: min-max would make a map of rounding."""
    activation, gradient = (
        random(3, 512, 1, 1, seed=seed, dtype=dtype).expand(-1, -1, 7, 7).contiguous()
        for seed in (0, 1)
    )
    assert is_constant(cam(name, activation, gradient)).all()
    if name.startswith("eigen"):
        centred = cam(name, activation, gradient, centred=True)
        assert is_constant(centred).all()


@pytest.mark.parametrize("name", ALL)
def test_the_cam_of_a_single_position_is_constant(name: str) -> None:
    """Rounding of the upsampling must not look like a map."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)
    ).double().requires_grad_(False)  # fmt: skip
    for parameter in net.parameters():
        parameter.abs_().add_(0.1)  # so that no map is zero
    model = Model("narrow", net, (0.0,) * 3, (1.0,) * 3, {"last_conv": "1"}, (16, 16))
    found = explain(name, model)
    if name == "guided_grad_cam":
        guided = explain("guided_backprop", model)
        found = found / guided
    assert found.min() > 0
    ratio = found.flatten(1) / found.flatten(1)[:, :1]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-14, atol=0)
    assert name == "guided_grad_cam" or is_constant(found).all()


@pytest.mark.parametrize("name", ALL)
def test_an_image_with_nan_spoils_its_own_map_alone(name: str) -> None:
    batch = toy_batch(3)
    images = batch.images.clone()
    images[1, 0, 5, 5] = torch.nan
    broken = explain(name, batch=replace(batch, images=images))
    whole = explain(name)
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])
    assert broken[1].isnan().any()


@pytest.mark.parametrize("name", ALL)
def test_neighbours_and_place_change_no_bit(name: str) -> None:
    batch = toy_batch(3)
    order = [2, 0, 1]
    moved = Batch(
        batch.images[order], batch.labels[order], tuple(batch.keys[at] for at in order), None
    )
    model = toy_model()
    with prepared(model.net):
        probe = Probe(model, moved, target=TARGET[order])
        found = probe.explain(registry.make("methods", name)).raw
    assert torch.equal(found, explain(name)[order])
