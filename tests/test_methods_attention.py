"""Laws of transformers: layers, layouts and attention maps are right without a word from the user.

Every family stands for itself by a small network; ``benchmarks/agreement`` has the comparisons.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

import xbench
from xbench import registry
from xbench.autograd import prepared
from xbench.errors import Unsupported
from xbench.features import FeatureLayout
from xbench.layers import last_feature_map
from xbench.methods.attention import Attentions, SelfAttention, _token_layout
from xbench.models.loading import describe_layers
from xbench.plan import batch_needs
from xbench.probe import LayerGradient, Need, Probe
from xbench.testing import toy_batch, toy_model, toy_transformer
from xbench.types import Batch, Model, Network, Passes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "agreement"))
families = importlib.import_module("families")
FAMILIES: dict[str, Any] = families.FAMILIES
GLOBAL = [name for name, family in FAMILIES.items() if family.attends]
WINDOWED = [name for name, family in FAMILIES.items() if not family.attends]
READS_FIRST = [name for name in GLOBAL if FAMILIES[name].read]

CAMS = ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam")
MAPS = ("attention", "attention_rollout", "gradient_rollout")
EVERY = pytest.mark.parametrize("name", FAMILIES)


@contextmanager
def probing(model: Model, batch: Batch, **how: Any) -> Iterator[Probe]:
    with prepared(model.net) as meter:
        yield Probe(model, batch, meter=meter, **how)


def value(model: Model, batch: Batch, need: Need[Any]) -> Any:
    with probing(model, batch) as probe:
        return probe[need]


def attentions(name: str) -> SelfAttention:
    found: SelfAttention = value(FAMILIES[name].model(), FAMILIES[name].batch(), Attentions())
    return found


# --- layers without a word from the user ----------------------------------------------------------


@EVERY
def test_the_last_feature_map_of_every_family_is_found_also_without_weights(name: str) -> None:
    family = FAMILIES[name]
    assert last_feature_map(family.model().net, family.batch().images[:1]) == family.role
    network = Network(family.build, None, (0.5,) * 3, (0.25,) * 3)
    assert describe_layers(network, family.size)[1] == {"last_conv": family.role}


@EVERY
@pytest.mark.parametrize("method", CAMS)
def test_every_cam_explains_every_family_without_a_layer_or_a_reshape(
    name: str, method: str
) -> None:
    family = FAMILIES[name]
    images = family.batch().images
    found = xbench.attribute(family.model().net, images, method)
    assert found.shape == (4, *family.size)
    assert found.isfinite().all()
    assert found.any()


@EVERY
def test_a_layers_gradient_is_of_feature_maps(name: str) -> None:
    family = FAMILIES[name]
    activation, gradient = value(family.model(), family.batch(), LayerGradient())
    assert activation.shape == gradient.shape == (4, 16 if family.attends else 24, *family.grid)
    assert gradient.abs().amax(1).flatten(1).gt(0).all()  # every position matters to every image


@EVERY
def test_feature_maps_show_a_patch_where_the_image_has_it(name: str) -> None:
    """Before any mixing, a pixel moves the one position of its own patch."""
    family = FAMILIES[name]
    model, batch = family.model(), family.batch(1)
    paths = dict(model.net.named_modules())
    firsts = ("encoder.dropout", "pos_drop", "features.0", "patch_embed")
    first = next(path for path in firsts if path in paths)
    plain, _ = value(model, batch, LayerGradient(first))
    height, width = plain.shape[-2:]
    for row, column in ((0, width - 1), (height - 1, 0), (1, 2)):
        images = batch.images.clone()
        side = family.size[0] // height
        images[:, :, row * side + 1, column * side] += 1
        changed, _ = value(model, Batch(images, batch.labels, batch.keys), LayerGradient(first))
        moved = (changed != plain).any(1)[0].nonzero().tolist()
        assert moved == [[row, column]]


@pytest.mark.parametrize("name", READS_FIRST)
def test_a_layer_after_the_last_attention_is_refused_with_the_one_that_works(name: str) -> None:
    family = FAMILIES[name]
    for late in ("encoder.ln", "encoder") if "torchvision" in name else ("norm", "blocks.1"):
        with pytest.raises(Unsupported, match=rf"layer '{late}' .* such as the class token"):
            value(family.model(), family.batch(), LayerGradient(late))
        with pytest.raises(Unsupported, match=rf"name the role last_conv \('{family.role}'\)"):
            value(family.model(), family.batch(), LayerGradient(late))


def test_a_pooled_network_may_be_read_after_the_last_attention() -> None:
    family = FAMILIES["timm ViT, registers, pooled"]
    _, gradient = value(family.model(), family.batch(), LayerGradient("norm"))
    assert gradient.abs().amax(1).gt(0).all()


def test_a_target_that_depends_on_nothing_has_zero_maps_as_on_other_networks() -> None:
    model = toy_transformer()
    model.net.get_parameter("heads.head.weight").zero_()
    _, gradient = value(model, toy_batch(2), LayerGradient())
    assert not gradient.any()


@pytest.mark.parametrize(
    ("name", "layer"),
    [("timm Swin", "layers.1.blocks.1.attn"), ("timm Swin V2", "layers.0.blocks.0.attn.proj")],
)
def test_a_layer_within_windows_is_refused(name: str, layer: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(Unsupported, match=rf"layer '{layer}' returns \d+ rows for 4 images"):
        value(family.model(), family.batch(), LayerGradient(layer))


# --- roles of other networks ----------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a layer after it, as many write it by hand."""

    def __init__(self, weights: bool = False, functional: bool = False) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.softmax = nn.Softmax(dim=-1)
        self.weights, self.functional = weights, functional

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.functional:
            a = self.attention
            q, k, v = (y @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, dim=2)
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (q, k, v))
            mixed = self.softmax(q @ k.mT / 2) @ v
            y = a.out_proj(mixed.transpose(1, 2).flatten(2))
        else:
            y, _ = self.attention(y, y, y, need_weights=self.weights)
        x = x + y
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Written(nn.Module):
    """A vision transformer written by hand, from blocks to the class token's logits."""

    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(Block(**how), Block(**how))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat((self.token.expand(len(tokens), -1, -1), tokens), dim=1)
        return self.head(self.blocks(tokens)[:, 0])  # type: ignore[no-any-return]


def written(**how: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Written(**how).double()


IMAGES = toy_batch(4).images


@pytest.mark.parametrize(
    ("how", "role"),
    [
        ({}, "blocks.1.norm"),
        ({"weights": True}, "blocks.1.norm"),
        ({"functional": True}, "blocks.0"),  # the attention is the block's own
    ],
    ids=["module", "with weights", "written out"],
)
def test_the_last_map_of_a_network_written_by_hand_precedes_its_last_attention(
    how: dict[str, bool], role: str
) -> None:
    assert last_feature_map(written(**how), IMAGES) == role


def test_a_pooling_attention_is_no_feature_map() -> None:
    net = timm.create_model(
        "vit_base_patch16_siglip_224",
        pretrained=False,
        num_classes=5,
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
    ).double()
    images = FAMILIES["torchvision ViT"].batch().images
    assert last_feature_map(net, images) == "norm"
    assert xbench.attribute(net.eval(), images, "grad_cam").any()
    with pytest.raises(Unsupported, match="layers attend from 1 to 16, 16 to 16 tokens"):
        xbench.attribute(net, images, "attention")


class Hybrid(nn.Module):
    """Convolutions, whose maps are pooled by attention with their mean as query, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layer4 = nn.ReLU()
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.layer4(self.stem(images)).flatten(2).mT
        mean = tokens.mean(1, keepdim=True)
        return self.head(self.pool(mean, tokens, tokens)[0][:, 0])  # type: ignore[no-any-return]


def test_the_last_map_of_a_hybrid_network_is_its_last_convolutional_one() -> None:
    assert last_feature_map(Hybrid().double(), IMAGES) == "layer4"


def test_a_network_that_leaves_torch_has_no_last_map_and_no_error() -> None:
    class Outside(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy(images.numpy().reshape(len(images), -1)[:, :5].copy())

    assert last_feature_map(Outside(), IMAGES) is None


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLOBAL)
def test_attention_of_every_token_adds_up_to_one(name: str) -> None:
    family, found = FAMILIES[name], attentions(name)
    tokens = family.prefix + family.grid[0] * family.grid[1]
    assert (found.tokens, found.layout.prefix, found.layout.size) == (
        tokens,
        family.prefix,
        family.grid,
    )
    assert len(found.weights) == len(found.gradients) == 2
    for weights, gradient in zip(found.weights, found.gradients, strict=True):
        assert weights.shape == gradient.shape == (4, 2, tokens, tokens)
        assert weights.min() > 0
        torch.testing.assert_close(weights.sum(3), torch.ones(4, 2, tokens, dtype=torch.float64))


@pytest.mark.parametrize("name", GLOBAL)
def test_the_map_is_the_row_of_the_tokens_that_the_logits_read(name: str) -> None:
    family, found = FAMILIES[name], attentions(name)
    relevance = torch.rand(4, found.tokens, found.tokens, dtype=torch.float64)
    rows = list(family.read or range(family.prefix, found.tokens))
    expected = relevance[:, rows, family.prefix :].mean(1).view(4, *family.grid)
    torch.testing.assert_close(found.patches(relevance), expected)


def test_the_layers_are_in_the_order_of_the_forward() -> None:
    """Zeroed queries of the first layer alone make its attention uniform."""
    model = toy_transformer()
    model.net.get_parameter("encoder.layers.encoder_layer_0.self_attention.in_proj_weight")[:8] = 0
    model.net.get_parameter("encoder.layers.encoder_layer_0.self_attention.in_proj_bias")[:8] = 0
    first, second = value(model, toy_batch(2), Attentions()).weights
    torch.testing.assert_close(first, torch.full_like(first, 1 / 17))
    assert second.std() > 1e-3


def test_the_gradient_of_attention_is_its_finite_difference() -> None:
    """Moved by adding to a score: softmax's derivative links both."""
    net = written(functional=True).requires_grad_(False)
    target, step = torch.tensor([1, 2, 3, 4]), 1e-6
    model = Model("written", net, layers={"last_conv": "blocks.0"})
    with probing(model, toy_batch(4), target=target) as probe:
        found = probe[Attentions()]
    weights, gradient = found.weights[0][:, 1], found.gradients[0][:, 1]
    # d logit / d score_ij = A_ij (G_ij - sum_k A_ik G_ik)
    by_chain = weights * (gradient - (weights * gradient).sum(2, keepdim=True))

    def logit(moved: float, row: int, column: int) -> Tensor:
        def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            scores = args[0].clone()
            scores[:, 1, row, column] += moved
            return (scores,)

        handle = net.get_submodule("blocks.0.softmax").register_forward_pre_hook(add)
        logits: Tensor = net(toy_batch(4).images)
        handle.remove()
        return logits.gather(1, target[:, None])[:, 0]

    for row, column in ((0, 3), (5, 0), (16, 7)):
        slope = (logit(step, row, column) - logit(-step, row, column)) / (2 * step)
        torch.testing.assert_close(by_chain[:, row, column], slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", GLOBAL)
def test_to_see_attention_changes_no_logit(name: str) -> None:
    """The softmax is taken in steps instead of at once, hence rounding."""
    family = FAMILIES[name]
    model, batch = family.model(), family.batch()
    inputs = model.normalise(batch.images)
    plain = model.logits(inputs)
    with probing(model, batch) as probe:
        seen: list[Tensor] = []
        handle = model.net.register_forward_hook(lambda _, __, logits: seen.append(logits))
        probe[Attentions()]
        handle.remove()
    torch.testing.assert_close(seen[-1].detach(), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", MAPS)
def test_however_attention_is_written_its_map_is_the_same(method: str) -> None:
    maps = [
        xbench.attribute(written(**how).eval(), IMAGES, method)
        for how in ({}, {"weights": True}, {"functional": True})
    ]
    assert maps[0].std() > 0
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", MAPS)
def test_fused_or_not_timms_attention_has_the_same_map(method: str) -> None:
    family = FAMILIES["timm ViT"]
    images = family.batch().images
    fused = xbench.attribute(family.model().net, images, method)
    set_fused_attn(False)
    try:
        net = family.model().net
    finally:
        set_fused_attn(True)
    assert [m.fused_attn for m in net.modules() if hasattr(m, "fused_attn")] == [False, False]
    torch.testing.assert_close(xbench.attribute(net, images, method), fused, rtol=1e-10, atol=1e-12)


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("method", MAPS)
def test_every_attention_map_explains_every_family_in_which_all_tokens_meet(
    name: str, method: str
) -> None:
    family = FAMILIES[name]
    found = xbench.attribute(family.model().net, family.batch().images, method)
    assert found.shape == (4, *family.size)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert (found.flatten(1).std(1) > 0).all()


@pytest.mark.parametrize("method", [*MAPS, "grad_cam", "hires_cam"])
@pytest.mark.parametrize("name", ["torchvision ViT", "timm ViT", "timm ViT, registers"])
def test_without_positions_a_map_moves_with_the_patches(name: str, method: str) -> None:
    """Attention knows order from its position embedding alone; a transposed grid would show."""
    family = FAMILIES[name]
    model = family.model()
    for path, parameter in model.net.named_parameters():
        if "pos_emb" in path:
            parameter.zero_()
    images = family.batch().images
    side = family.size[0] // family.grid[0]

    def rolled(maps: Tensor) -> Tensor:
        return maps.roll((side, -2 * side), dims=(-2, -1))

    def small(given: Tensor) -> Tensor:
        """At the grid's resolution, as bilinear borders do not move along."""
        batch = Batch(given, torch.zeros(4, dtype=torch.int64), tuple("abcd"))
        made = registry.make("methods", method)
        with probing(model, batch, target="label") as probe:
            if method in MAPS:
                found = probe[Attentions()]
                maps: Tensor = found.patches(made.relevance(found))
            else:
                activation, gradient = probe[LayerGradient()]
                hires = method == "hires_cam"
                weight = gradient if hires else gradient.mean((2, 3), keepdim=True)
                maps = (weight * activation).sum(1)
        return maps.repeat_interleave(side, 1).repeat_interleave(side, 2)

    torch.testing.assert_close(small(rolled(images)), rolled(small(images)), rtol=1e-9, atol=1e-12)


def test_in_one_layer_rollout_is_attention_and_gradient_rollout_its_positive_gradient() -> None:
    """Besides the patches' own half or whole, which the class token's row does not hold."""
    weights = torch.rand(3, 2, 5, 5, dtype=torch.float64).softmax(3)
    gradient = torch.zeros_like(weights)
    gradient[:, :, 0] = torch.randn(3, 2, 5, dtype=torch.float64)
    layout = FeatureLayout("tokens", (2, 2), 1)
    one = SelfAttention((weights,), (gradient,), layout)
    raw, rollout, weighted = (
        one.patches(registry.make("methods", name).relevance(one)) for name in MAPS
    )
    torch.testing.assert_close(rollout, raw / 2)
    by_hand = (weights * gradient).clamp(min=0).mean(1)[:, 0, 1:]
    torch.testing.assert_close(weighted, by_hand.view(3, 2, 2))


def test_uniform_attention_has_uniform_maps() -> None:
    weights = torch.full((1, 2, 5, 5), 0.2, dtype=torch.float64)
    gradient = torch.zeros_like(weights)
    gradient[:, :, 0] = 1
    layout = FeatureLayout("tokens", (2, 2), 1)
    two = SelfAttention((weights,) * 2, (gradient,) * 2, layout)
    raw, rollout, weighted = (
        float(two.patches(registry.make("methods", name).relevance(two)).unique()) for name in MAPS
    )
    assert raw == pytest.approx(0.2)
    assert rollout == pytest.approx(0.5 * 0.1 + 0.5 * 0.1 + 5 * 0.01)
    # R1 = I + A with only the first row of A: R2 = (I + A)(I + A); its first row, a patch's column
    assert weighted == pytest.approx(0.2 + 0.2 + 0.2 * 0.2)


@pytest.mark.parametrize("method", MAPS)
def test_a_map_grows_by_the_upsampling_that_is_asked_for(method: str) -> None:
    net = toy_transformer().net
    nearest = xbench.attribute(net, IMAGES, method, upsampling="nearest")
    blocks = nearest.unflatten(2, (4, 4)).unflatten(1, (4, 4))
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    bilinear = xbench.attribute(net, IMAGES, method)
    corners = xbench.attribute(net, IMAGES, method, upsampling="corners")
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        expected = nearest[:, corner[0], corner[1]]
        torch.testing.assert_close(corners[:, corner[0], corner[1]], expected)
        torch.testing.assert_close(bilinear[:, corner[0], corner[1]], expected)
    assert not torch.equal(bilinear, corners)


@pytest.mark.parametrize("method", MAPS)
def test_a_map_is_the_same_in_float32(method: str) -> None:
    model = toy_transformer()
    double = xbench.attribute(model.net, IMAGES, method, target=[0, 1, 2, 3])
    single = xbench.attribute(model.net.float(), IMAGES.float(), method, target=[0, 1, 2, 3])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [*MAPS, *CAMS])
def test_at_one_forward_shape_a_maps_bits_do_not_depend_on_its_companions(method: str) -> None:
    """With heads of 32 channels; a matrix product over fewer may round by its place in memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model(
            "vit_small_patch14_reg4_dinov2",
            pretrained=False,
            num_classes=5,
            img_size=(32, 48),
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=2,
        ).eval()
    images = FAMILIES["timm ViT, registers"].batch(6).images.float()
    together = xbench.attribute(net, images, method, target=[2] * 6)
    assert together.any()
    for part in ([3, 0, 4, 1, 2, 5], [5, 5], [1, 0, 4]):  # in another order; filled up
        found = xbench.attribute(net, images[part], method, target=[2] * len(part), batch_size=6)
        assert torch.equal(found, together[part])


# --- cost -----------------------------------------------------------------------------------------


def test_all_attention_maps_share_one_pass() -> None:
    methods = [registry.make("methods", name) for name in MAPS]
    model = toy_transformer()
    with probing(model, toy_batch(4), needs=batch_needs(methods, [])) as probe:
        for method in methods:
            probe.explain(method)
        assert probe.spent == Passes(2, 1)  # one forward for the logits


def test_raw_attention_knows_no_class_and_gradient_rollout_does() -> None:
    net = toy_transformer().net
    for method in MAPS:
        one, other = (xbench.attribute(net, IMAGES, method, target=[k] * 4) for k in (1, 2))
        assert torch.equal(one, other) == (method != "gradient_rollout")


# --- networks that attention maps do not fit ------------------------------------------------------


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("name", WINDOWED)
def test_attention_within_windows_is_refused(name: str, method: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(Unsupported, match=r"within windows or other parts.*activation maps work"):
        xbench.attribute(family.model().net, family.batch().images, method)


@pytest.mark.parametrize("method", MAPS)
def test_a_network_without_attention_is_refused(method: str) -> None:
    with pytest.raises(Unsupported, match=r"shows no attention.*activation maps work without"):
        xbench.attribute(toy_model().net, IMAGES, method)


def test_a_softmax_that_is_no_attention_is_not_taken_for_one() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = toy_model().net

        def forward(self, images: Tensor) -> Tensor:
            gate = images.mean((2, 3)).softmax(1)[:, :, None, None]  # of channels, (N, C)
            spread = images.softmax(1)  # over channels, not over the last axis
            return self.plain(images * gate + spread)  # type: ignore[no-any-return]

    with pytest.raises(Unsupported, match="shows no attention"):
        xbench.attribute(Gated(), IMAGES, "attention")


@pytest.mark.parametrize(
    "shapes",
    [
        [(64, 3, 16, 16)] * 2,  # 16 windows of each of 4 images
        [(4, 3, 16, 16), (64, 3, 16, 16)],
        [(4 * 16 * 3, 16, 16), (4 * 4 * 6, 16, 16)],  # heads beside them
        [(4, 4, 4, 16, 16)] * 2,
        [(6, 16, 16)] * 2,
        [(4, 3, 16, 16), (12, 16, 16)],
    ],
)
def test_weights_that_are_not_of_whole_images_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(Unsupported, match="within windows or other parts"):
        _token_layout(shapes, (4, 3, 32, 32))


class Stages(nn.Module):
    """Attention over every position, then over every fourth."""

    def __init__(self, sides: tuple[int, ...], prefix: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in sides)
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.sides, self.prefix = sides, prefix

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        for side, block in zip(self.sides, self.blocks, strict=True):
            maps = nn.functional.interpolate(maps, (side, side))
            tokens = nn.functional.pad(maps.flatten(2).mT, (0, 0, self.prefix, 0))
            maps = block(tokens)[:, self.prefix :].mT.unflatten(2, (side, side))
        return self.head(maps.mean((2, 3)))  # type: ignore[no-any-return]


def test_attention_over_changing_tokens_is_refused() -> None:
    with pytest.raises(Unsupported, match="layers attend from 4 to 4, 16 to 16 tokens"):
        xbench.attribute(Stages((4, 2)).double(), IMAGES, "attention_rollout")


def test_attention_over_tokens_that_are_no_grid_is_refused() -> None:
    net = Stages((4, 4), prefix=11).double()
    with pytest.raises(Unsupported, match="the network's attention has 27 tokens per image"):
        xbench.attribute(net, IMAGES, "attention_rollout")
    assert xbench.attribute(Stages((4, 4), prefix=2).double(), IMAGES, "attention").any()
