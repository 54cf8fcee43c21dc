"""Adapters of captum and pytorch-grad-cam beside the libraries, called by hand: nothing is added.

Whoever asks captum for a map of its own network gets the map that the adapter returns: the whole
batch at once, or for random methods image by image after seeding the generators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import captum.attr
import numpy as np
import pytorch_grad_cam
import torch
from captum._utils.models.linear_model import SkLearnLasso
from comparison import TARGET, Comparison, explained
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional

from xbench import noise
from xbench.testing import toy_batch, toy_model
from xbench.types import Model

FLOAT32 = "the library computes in float32"
BATCH = toy_batch(len(TARGET))
MODEL = toy_model()
INPUTS = MODEL.normalise(BATCH.images)
BLACK = MODEL.normalise(torch.zeros_like(BATCH.images))
WHITE = MODEL.normalise(torch.ones_like(BATCH.images))
LAYER = MODEL.net.get_submodule("3")


class Twice(nn.Module):
    """A residual block as torchvision writes it: one ReLU for two places, and one as a function."""

    def __init__(self, *, relus: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(relus))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        one, two = self.relus[0], self.relus[-1]
        start = one(self.norm(self.stem(images)))
        inner = self.second(
            functional.relu(self.first(start))
            if len(self.relus) == 1
            else self.relus[1](self.first(start))
        )
        return self.head(two(inner + start).mean((2, 3)))


def residual(relus: int) -> Model:
    """Equal weights, whether a ReLU is used twice (1) or every ReLU is a module of its own (3)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Twice(relus=relus).double()
        net.norm.running_mean.uniform_(-0.5, 0.5)
    return Model("residual", net.eval().requires_grad_(False), layers={"last_conv": "second"})


def patches(side: int) -> Tensor:
    place = torch.arange(16) * side // 16
    return (place[:, None] * side + place)[None, None]


def one_by_one(name: str, explain: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each image after seeding the generators from its own stream."""
    found = []
    for image, target, key in zip(INPUTS, TARGET, BATCH.keys, strict=True):
        seed = int(noise.stream_keys(0, [key], name)) & 0xFFFFFFFF
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        found.append(explain(image[None], int(target)))
    return torch.cat(found)


def absolute_sum(attribution: Tensor) -> Tensor:
    return attribution.abs().sum(1)


def enlarged(attribution: Tensor) -> Tensor:
    kept = attribution.sum(1, keepdim=True).relu()
    return functional.interpolate(kept, (16, 16), mode="bilinear")[:, 0]


def inputs() -> Tensor:
    return INPUTS.clone().requires_grad_()


def cam(name: str, **params: Any) -> Tensor:
    made = getattr(pytorch_grad_cam, name)(MODEL.net, [LAYER])
    with made:
        targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
        return torch.from_numpy(made(inputs(), targets, **params))


def compare(
    method: str,
    theirs: Callable[[], Tensor],
    params: Mapping[str, Any] | None = None,
    *,
    model: Model | None = None,
    tolerance: float = 1e-9,
    reason: str = "",
    remark: str = "",
) -> Comparison:
    package, _, name = method.partition("/")
    library = {"captum": captum, "gradcam": pytorch_grad_cam}[package]
    version = f" {library.__version__}" if package == "captum" else ""
    words = {"captum": "captum", "gradcam": "pytorch-grad-cam"}[package]

    def both() -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum says that it sets hooks
            return explained(method, params, model=model), theirs()

    return Comparison(
        method,
        f"{words}{version} {name}{remark}",
        both,
        params or {},
        tolerance,
        reason,
    )


class Flat(nn.Module):
    """The toy network with its flattening as a function, since captum's LRP has no rule for it."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        *features, _, self.head = net
        self.body = nn.Sequential(*features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def attributed(made: Any, baselines: Tensor | None = None, **params: Any) -> Tensor:
    """By captum, of the whole batch."""
    given = params if baselines is None else {"baselines": baselines, **params}
    return made.attribute(inputs(), target=TARGET, **given)


COMPARISONS: tuple[Comparison, ...] = (
    compare(
        "captum/Saliency",
        lambda: absolute_sum(attributed(captum.attr.Saliency(MODEL.net))),
    ),
    compare(
        "captum/IntegratedGradients",
        lambda: absolute_sum(
            attributed(captum.attr.IntegratedGradients(MODEL.net), WHITE, n_steps=7)
        ),
        {"n_steps": 7, "baseline": "white"},
    ),
    compare(
        "captum/DeepLift",
        lambda: absolute_sum(attributed(captum.attr.DeepLift(MODEL.net), BLACK)),
    ),
    compare(
        "captum/DeepLift",
        lambda: absolute_sum(
            captum.attr.DeepLift(residual(3).net).attribute(
                BATCH.images.clone().requires_grad_(),
                torch.zeros_like(BATCH.images),
                target=TARGET,
            )
        ),
        model=residual(1),
        remark=", residual, a module for every ReLU; here one ReLU for two, and a function",
    ),
    compare(
        "captum/GuidedBackprop",
        lambda: absolute_sum(attributed(captum.attr.GuidedBackprop(MODEL.net))),
    ),
    compare(
        "captum/LRP",
        lambda: attributed(captum.attr.LRP(Flat(MODEL.net))).sum(1),
        {"channels": "sum"},
        tolerance=1e-6,
        reason="the rule's epsilon, 1e-9, acts once more, at the flattening",
    ),
    compare(
        "captum/Occlusion",
        lambda: attributed(
            captum.attr.Occlusion(MODEL.net),
            BLACK,
            sliding_window_shapes=(3, 5, 5),
            strides=(3, 4, 4),
        )[:, 0],
        {"window": 5, "stride": 4},
    ),
    compare(
        "captum/FeatureAblation",
        lambda: attributed(captum.attr.FeatureAblation(MODEL.net), WHITE, feature_mask=patches(4))[
            :, 0
        ],
        {"patches": 4, "baseline": "white"},
    ),
    compare(
        "captum/GradientShap",
        lambda: absolute_sum(
            one_by_one(
                "captum/GradientShap",
                lambda image, target: captum.attr.GradientShap(MODEL.net).attribute(
                    image.clone().requires_grad_(),
                    torch.cat((BLACK[:1], WHITE[:1])),
                    n_samples=6,
                    stdevs=0.1,
                    target=target,
                ),
            )
        ),
        {"baselines": ("black", "white"), "n_samples": 6, "stdevs": 0.1},
    ),
    compare(
        "captum/ShapleyValueSampling",
        lambda: one_by_one(
            "captum/ShapleyValueSampling",
            lambda image, target: captum.attr.ShapleyValueSampling(MODEL.net).attribute(
                image, BLACK[:1], target=target, feature_mask=patches(2), n_samples=3
            ),
        )[:, 0],
        {"patches": 2, "n_samples": 3},
        tolerance=1e-6,
        reason=FLOAT32,
    ),
    compare(
        "captum/Lime",
        lambda: one_by_one(
            "captum/Lime",
            lambda image, target: captum.attr.Lime(
                MODEL.net, interpretable_model=SkLearnLasso(alpha=1e-6)
            ).attribute(image, BLACK[:1], target=target, feature_mask=patches(3), n_samples=20),
        )[:, 0],
        {"patches": 3, "n_samples": 20, "alpha": 1e-6},
        tolerance=1e-6,
        reason=FLOAT32,
    ),
    compare(
        "captum/LayerGradCam",
        lambda: enlarged(attributed(captum.attr.LayerGradCam(MODEL.net, LAYER))),
    ),
    compare(
        "captum/LayerConductance",
        lambda: enlarged(
            attributed(captum.attr.LayerConductance(MODEL.net, LAYER), BLACK, n_steps=6)
        ),
        {"n_steps": 6},
    ),
    compare(
        "captum/LayerDeepLift",
        lambda: enlarged(attributed(captum.attr.LayerDeepLift(MODEL.net, LAYER), BLACK)),
    ),
    *(
        compare(
            f"captum/{name}",
            lambda name=name: absolute_sum(attributed(getattr(captum.attr, name)(MODEL.net))),
        )
        for name in ("InputXGradient", "Deconvolution")
    ),
    compare(
        "captum/GuidedGradCam",
        lambda: absolute_sum(attributed(captum.attr.GuidedGradCam(MODEL.net, LAYER))),
    ),
    compare(
        "captum/LayerActivation",
        lambda: enlarged(captum.attr.LayerActivation(MODEL.net, LAYER).attribute(inputs())),
    ),
    compare(
        "captum/LayerGradientXActivation",
        lambda: enlarged(attributed(captum.attr.LayerGradientXActivation(MODEL.net, LAYER))),
    ),
    *(
        compare(
            f"captum/{name}",
            lambda name=name: enlarged(
                attributed(getattr(captum.attr, name)(MODEL.net, LAYER), BLACK, n_steps=6)
            ),
            {"n_steps": 6},
        )
        for name in ("InternalInfluence", "LayerIntegratedGradients")
    ),
    compare(
        "captum/KernelShap",
        lambda: one_by_one(
            "captum/KernelShap",
            lambda image, target: captum.attr.KernelShap(MODEL.net).attribute(
                image, BLACK[:1], target=target, feature_mask=patches(3), n_samples=20
            ),
        )[:, 0],
        {"patches": 3, "n_samples": 20},
        tolerance=1e-6,
        reason=FLOAT32,
    ),
    compare(
        "captum/DeepLiftShap",
        lambda: absolute_sum(
            one_by_one(
                "captum/DeepLiftShap",
                lambda image, target: captum.attr.DeepLiftShap(MODEL.net).attribute(
                    image.clone().requires_grad_(),
                    torch.cat((BLACK[:1], WHITE[:1])),
                    target=target,
                ),
            )
        ),
        {"baselines": ("black", "white")},
    ),
    *(
        compare(f"gradcam/{name}", lambda name=name: cam(name), tolerance=1e-6, reason=FLOAT32)
        for name in (
            "AblationCAM",
            "EigenCAM",
            "EigenGradCAM",
            "FEM",
            "FullGrad",
            "GradCAM",
            "GradCAMElementWise",
            "GradCAMPlusPlus",
            "HiResCAM",
            "ScoreCAM",
            "SegEigenCAM",
            "XGradCAM",
        )
    ),
    compare(
        "gradcam/LayerCAM",
        lambda: cam("LayerCAM", aug_smooth=True),
        {"aug_smooth": True},
        tolerance=1e-6,
        reason=FLOAT32,
    ),
)
