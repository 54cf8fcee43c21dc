"""Small vision transformers of every family, with weights drawn at random, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from xbench.testing import toy_batch
from xbench.types import Batch, Model


@dataclass(frozen=True)
class Family:
    """A family of networks, by one small member.

    Args:
        build: makes it.
        size: (H, W) of its images.
        role: the layer that class activation maps are meant for.
        grid: (h, w) of that layer.
        prefix: tokens before the grid.
        read: tokens that the logits read, counted from the first; None means every patch.
        attends: whether all tokens attend to all others.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    role: str
    grid: tuple[int, int]
    prefix: int = 0
    read: tuple[int, ...] | None = None
    attends: bool = True

    def model(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            net = self.build()
            for parameter in net.parameters():  # many begin as zeros, or all alike
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        net = net.double().eval().requires_grad_(False)
        return Model("family", net, (0.5,), (0.25,), {"last_conv": self.role}, self.size)

    def batch(self, count: int = 4) -> Batch:
        square = toy_batch(count, side=max(self.size))
        return Batch(
            square.images[:, :, : self.size[0], : self.size[1]], square.labels, square.keys
        )


def _timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **more)
        return net

    return build


def _timm_vit(name: str, size: tuple[int, int]) -> Callable[[], nn.Module]:
    return _timm(name, img_size=size, patch_size=8, embed_dim=16, depth=2, num_heads=2)


def _timm_swin(name: str, size: tuple[int, int]) -> Callable[[], nn.Module]:
    return _timm(
        name,
        img_size=size,
        patch_size=2,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
    )


def _torchvision_swin(**more: Any) -> Callable[[], nn.Module]:
    return lambda: SwinTransformer([2, 2], 12, [2, 2], [2, 2], [4, 4], num_classes=5, **more)


FAMILIES = {
    "torchvision ViT": Family(
        lambda: VisionTransformer(32, 8, 2, 2, hidden_dim=16, mlp_dim=32, num_classes=5),
        (32, 32), "encoder.layers.encoder_layer_1.ln_1", (4, 4), prefix=1, read=(0,),
    ),
    "timm ViT": Family(
        _timm_vit("vit_tiny_patch16_224", (32, 48)),
        (32, 48), "blocks.1.norm1", (4, 6), prefix=1, read=(0,),
    ),
    "timm DeiT": Family(
        _timm_vit("deit_tiny_patch16_224", (48, 32)),
        (48, 32), "blocks.1.norm1", (6, 4), prefix=1, read=(0,),
    ),
    "timm DeiT, distilled": Family(
        _timm_vit("deit_tiny_distilled_patch16_224", (32, 48)),
        (32, 48), "blocks.1.norm1", (4, 6), prefix=2, read=(0, 1),
    ),
    "timm DeiT-3": Family(
        _timm_vit("deit3_small_patch16_224", (32, 32)),
        (32, 32), "blocks.1.norm1", (4, 4), prefix=1, read=(0,),
    ),
    "timm ViT, registers": Family(
        _timm_vit("vit_small_patch14_reg4_dinov2", (32, 48)),
        (32, 48), "blocks.1.norm1", (4, 6), prefix=5, read=(0,),
    ),
    "timm ViT, registers, pooled": Family(
        _timm_vit("vit_medium_patch16_reg4_gap_256", (32, 48)),
        (32, 48), "blocks.1.norm1", (4, 6), prefix=4,
    ),
    "timm ViT, pooled": Family(
        _timm_vit("vit_medium_patch16_gap_240", (32, 48)), (32, 48), "norm", (4, 6)
    ),
    "torchvision Swin": Family(
        _torchvision_swin(), (32, 64), "permute", (8, 16), attends=False
    ),
    "torchvision Swin V2": Family(
        _torchvision_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (64, 32), "permute", (16, 8), attends=False,
    ),
    "timm Swin": Family(
        _timm_swin("swin_tiny_patch4_window7_224", (32, 64)),
        (32, 64), "norm", (8, 16), attends=False,
    ),
    "timm Swin V2": Family(
        _timm_swin("swinv2_tiny_window8_256", (64, 32)),
        (64, 32), "norm", (16, 8), attends=False,
    ),
}  # fmt: skip
