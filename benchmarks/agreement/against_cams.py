"""Class activation maps and FullGrad beside pytorch-grad-cam, captum and their definitions.

pytorch-grad-cam scales to [0, 1] twice, in float32 and around cv2's resizing. Our preset
``pgc-1.5`` is held against its final maps; our plain maps against its maps before any scaling, at a
layer as large as the image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytorch_grad_cam
import torch
from comparison import TARGET, Comparison, explained
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from xbench.autograd import prepared
from xbench.probe import Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Model

LARGE, SMALL = "1", "3"
"""Layers of the toy network: as large as the image, and half of it."""

PGC = "pytorch-grad-cam 1.5.7"
FLOAT32 = "the library resizes (cv2) and returns float32"


class Residual(nn.Module):
    """Batch normalisation with statistics of its own, a residual sum, an activation used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1)
        self.relu, self.hidden, self.head = nn.ReLU(inplace=True), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(images)))
        x = self.relu(x + self.inner_norm(self.inner(x)))
        x = self.relu(self.last(self.pool(x)))
        return self.head(self.relu(self.hidden(x.mean((2, 3)))))  # type: ignore[no-any-return]


def residual_model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Residual().double()
        for norm in (net.norm, net.inner_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
    plain = toy_model()
    net.eval().requires_grad_(False)
    return Model("residual", net, plain.mean, plain.std, {"last_conv": "last"}, plain.size)


def given(model: Model) -> Tensor:
    """The four toy images in the network's input space."""
    return model.normalise(toy_batch(len(TARGET)).images)


# --- pytorch-grad-cam -----------------------------------------------------------------------------


def of_library(cls: type[Any], layer: str, model: Model) -> tuple[Tensor, Tensor]:
    """(final maps, maps at the layer's resolution before any scaling)."""
    raw = []

    class Kept(cls):  # type: ignore[misc]
        def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
            raw.append(self.turned(super().get_cam_image(*args, **kwargs), *args))
            return raw[0]

        def turned(self, cam: Any, *args: Any) -> Any:
            """An eigenvector's sign is LAPACK's chance; here it is ours."""
            if "Eigen" not in cls.__name__:
                return cam
            if "Grad" in cls.__name__:
                product = args[4] * args[3]
                whole = product.sum(1) - product.sum(1).mean((1, 2), keepdims=True)
                sign = (cam * whole).sum((1, 2), keepdims=True)
            else:
                sign = (cam**3).sum((1, 2), keepdims=True)
            return np.where(sign < 0, -cam, cam)

    with prepared(model.net), Kept(model.net, [model.net.get_submodule(layer)]) as library:
        targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
        final = library(given(model).requires_grad_(), targets)
    return torch.from_numpy(final), torch.from_numpy(raw[0])


def beside_library(
    cls: type[Any], name: str, params: Mapping[str, Any], model: Model
) -> tuple[Tensor, Tensor]:
    final, raw = of_library(cls, params["layer"], model)
    return explained(name, params, model=model), final if "preset" in params else raw


LIBRARY = {
    "grad_cam": (pytorch_grad_cam.GradCAM, {}),
    "grad_cam_plus_plus": (pytorch_grad_cam.GradCAMPlusPlus, {"epsilon": 1e-6}),
    "xgrad_cam": (pytorch_grad_cam.XGradCAM, {"epsilon": 1e-7}),
    "hires_cam": (pytorch_grad_cam.HiResCAM, {}),
    "layer_cam": (pytorch_grad_cam.LayerCAM, {}),
    "eigen_cam": (pytorch_grad_cam.EigenCAM, {"centred": True}),
    "eigen_grad_cam": (pytorch_grad_cam.EigenGradCAM, {"centred": True}),
}


def with_the_library() -> tuple[Comparison, ...]:
    found = []
    for name, (cls, quirks) in LIBRARY.items():
        eigen = name.startswith("eigen")
        sign = ", its sign turned to ours" if eigen else ""
        params = {**quirks, "layer": LARGE, "sign": "signed"}
        found.append(
            Comparison(
                name,
                f"{PGC} {cls.__name__}, before scaling{sign}",
                partial(beside_library, cls, name, params, toy_model()),
                params,
                *((1e-6, "the library returns projections in float32") if eigen else ()),
            )
        )
        for words, layer, make in (
            ("", SMALL, toy_model),
            (" on a residual network", "last", residual_model),
        ):
            params = {"preset": "pgc-1.5", "layer": layer}
            found.append(
                Comparison(
                    name,
                    f"{PGC} {cls.__name__}{words}{sign}",
                    partial(beside_library, cls, name, params, make()),
                    params,
                    1e-6,
                    FLOAT32,
                )
            )
    return tuple(found)


def full_grad_of_library(model: Model) -> tuple[Tensor, Tensor]:
    with prepared(model.net), pytorch_grad_cam.FullGrad(model.net, []) as library:
        targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
        theirs = torch.from_numpy(library(given(model), targets))
    return explained("full_grad", {"preset": "pgc-1.5"}, model=model), theirs


# --- captum ---------------------------------------------------------------------------------------


def captum_grad_cam() -> tuple[Tensor, Tensor]:
    model = toy_model()
    library = captum.attr.LayerGradCam(model.net, model.net.get_submodule(LARGE))
    theirs = library.attribute(given(model).requires_grad_(), TARGET, relu_attributions=True)
    return explained("grad_cam", {"layer": LARGE}, model=model), theirs[:, 0]


def captum_guided_grad_cam(params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    model = toy_model()
    library = captum.attr.GuidedGradCam(model.net, model.net.get_submodule(SMALL))
    growth = params.get("upsampling", "bilinear")
    with warnings.catch_warnings():  # captum says that it sets hooks
        warnings.simplefilter("ignore")
        inputs = given(model).requires_grad_()
        theirs = library.attribute(inputs, TARGET, interpolate_mode=growth)
    whole = theirs.sum(1) if params.get("channels") == "sum" else theirs.abs().sum(1)
    return explained("guided_grad_cam", params, model=model), whole


# --- definitions, by loops over images ------------------------------------------------------------


def grown(small: Tensor, size: tuple[int, int], corners: bool = False) -> Tensor:
    """(h, w) to (H, W): bilinear, pixel by pixel."""

    def places(few: int, many: int) -> list[tuple[int, int, float]]:
        found = []
        for at in range(many):
            place = at * (few - 1) / (many - 1) if corners else (at + 0.5) * few / many - 0.5
            place = min(max(place, 0), few - 1)
            below = int(place)
            found.append((below, min(below + 1, few - 1), place - below))
        return found

    large = torch.empty(size, dtype=small.dtype)
    for row, (top, bottom, down) in enumerate(places(small.shape[0], size[0])):
        for column, (left, right, along) in enumerate(places(small.shape[1], size[1])):
            upper = small[top, left] * (1 - along) + small[top, right] * along
            lower = small[bottom, left] * (1 - along) + small[bottom, right] * along
            large[row, column] = upper * (1 - down) + lower * down
    return large


def features_and_gradient(inputs: Tensor, target: int, layer: int = 3) -> tuple[Tensor, Tensor]:
    """(C, h, w) of the toy network cut in two behind a layer, and the target logit's gradient."""
    net = toy_model().net
    features = net[: layer + 1](inputs[None]).requires_grad_()
    net[layer + 1 :](features)[0, target].backward()
    return features.detach()[0], features.grad[0]


def one_by_one(of_image: Callable[[Tensor, int], Tensor], size: int = 16) -> Tensor:
    """Maps of the four toy images, each upsampled by hand from what ``of_image`` gives."""
    images = given(toy_model())
    pairs = zip(images, TARGET.tolist(), strict=True)
    return torch.stack([grown(of_image(*pair), (size, size)) for pair in pairs])


def cam_by_definition() -> tuple[Tensor, Tensor]:
    def of_image(image: Tensor, target: int) -> Tensor:
        features, _ = features_and_gradient(image, target)
        row = toy_model().net[6].weight[target]
        return sum(w * feature for w, feature in zip(row, features, strict=True)).relu()

    return explained("cam"), one_by_one(of_image)


def plus_plus_weight(first: Tensor, second: Tensor, third: Tensor, feature: Tensor) -> Tensor:
    """Equations 3 and 4, position by position, for one channel."""
    weight = torch.zeros(()).double()
    for g1, g2, g3 in zip(first.flatten(), second.flatten(), third.flatten(), strict=True):
        if g2 != 0:
            weight = weight + g2 / (2 * g2 + feature.sum() * g3) * max(g1, 0)
    return weight


def plus_plus_by_definition() -> tuple[Tensor, Tensor]:
    def of_image(image: Tensor, target: int) -> Tensor:
        features, gradient = features_and_gradient(image, target)
        parts = [
            plus_plus_weight(g, g**2, g**3, feature) * feature
            for feature, g in zip(features, gradient, strict=True)
        ]
        return torch.stack(parts).sum(0).relu()

    return explained("grad_cam_plus_plus"), one_by_one(of_image)


def xgrad_by_definition() -> tuple[Tensor, Tensor]:
    def of_image(image: Tensor, target: int) -> Tensor:
        parts = [
            (g * feature).sum() / feature.sum() * feature
            for feature, g in zip(*features_and_gradient(image, target), strict=True)
            if feature.sum() > 0
        ]
        return torch.stack(parts).sum(0).relu()

    return explained("xgrad_cam"), one_by_one(of_image)


def smooth_plus_plus_by_definition(params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    model, noise, samples = toy_model(), params["noise"], params["samples"]
    with prepared(model.net) as meter:  # the noise belongs to the images' keys
        probe = Probe(model, toy_batch(len(TARGET)), target=TARGET, meter=meter)
        draws = torch.stack([probe.normal("gaussian", draw) for draw in range(samples)], dim=1)
    own = iter(draws)

    def of_image(image: Tensor, target: int) -> Tensor:
        sigma = noise * (image.max() - image.min())
        gradients = torch.stack(
            [features_and_gradient(image + sigma * draw, target, 1)[1] for draw in next(own)]
        )
        features, _ = features_and_gradient(image, target, 1)
        parts = [
            plus_plus_weight(*((gradients[:, at] ** p).mean(0) for p in (1, 2, 3)), features[at])
            * features[at]
            for at in range(len(features))
        ]
        return torch.stack(parts).sum(0).relu()

    return explained("smooth_grad_cam_plus_plus", params), one_by_one(of_image)


def eigen_by_definition(name: str) -> tuple[Tensor, Tensor]:
    def of_image(image: Tensor, target: int) -> Tensor:
        features, gradient = features_and_gradient(image, target)
        product = features if name == "eigen_cam" else features * gradient
        rows = product.flatten(1).T.numpy()
        _, _, right = np.linalg.svd(rows)
        projection = rows @ right[0]
        sign = 1 if projection @ rows.sum(1) >= 0 else -1
        return torch.from_numpy(sign * projection).view(features.shape[1:]).relu()

    return explained(name), one_by_one(of_image)


def full_grad_by_definition(
    model: Model, params: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's bias is its output for zeros, its gradient that of zeros added to its output."""
    corners = bool(params)
    epsilon = 1e-6 if params else 0.0
    maps = []
    for image, target in zip(given(model), TARGET.tolist(), strict=True):
        biases: list[Tensor] = []
        zeros: list[Tensor] = []

        def add_zeros(
            module: nn.Module, args: Any, output: Tensor, biases: Any = biases, zeros: Any = zeros
        ) -> Tensor:
            biases.append(type(module).forward(module, torch.zeros_like(args[0])).detach())
            zeros.append(torch.zeros_like(output, requires_grad=True))
            return output + zeros[-1]

        with prepared(model.net):
            layers = [
                module
                for module in model.net.modules()
                if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
            ]
            handles = [layer.register_forward_hook(add_zeros) for layer in layers]
            inputs = image[None].clone().requires_grad_()
            logit = model.net(inputs)[0, target]
            for handle in handles:
                handle.remove()
        found = torch.autograd.grad(logit, [inputs, *zeros])
        total = torch.zeros(16, 16).double()
        for factor, gradient in zip([inputs, *biases], found, strict=True):
            part = (factor * gradient)[0].detach().abs()
            part = part - part.min()
            if part.max() > 0:
                part = part / (part.max() + epsilon)
            for channel in part:
                total += grown(channel, (16, 16), corners)
        maps.append(total)
    return explained("full_grad", params, model=model), torch.stack(maps)


def opti_cam_by_definition(model: Model, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """torch's Adam on each image alone, masked in pixel space."""
    ours = explained("opti_cam", params, model=model)
    iterations = params.get("iterations", 50)
    maps = []
    pixels = toy_batch(len(TARGET)).images
    for image, target in zip(pixels[:, None], TARGET.tolist(), strict=True):
        kept: list[Tensor] = []
        layer = model.net.get_submodule(model.layers["last_conv"])
        handle = layer.register_forward_hook(
            lambda module, args, output, kept=kept: kept.append(output)
        )
        clean = model.net(model.normalise(image)).detach()
        handle.remove()
        features = kept[0].relu()
        weight = torch.full((1, features.shape[1], 1, 1), 0.5).double().requires_grad_()
        adam = torch.optim.Adam([weight], lr=params.get("learning_rate", 0.1))

        def saliency(weight: Tensor = weight, features: Tensor = features) -> Tensor:
            small = (weight.softmax(1) * features).sum(1, keepdim=True)
            large = nn.functional.interpolate(small, (16, 16), mode="bilinear")
            return (large - large.min()) / (large.max() - large.min())

        before, final = float("inf"), None
        for step in range(iterations):
            mask = saliency()
            loss = (clean - model.net(model.normalise(mask * image)))[0, target]
            adam.zero_grad()
            loss.backward()
            adam.step()
            if step % max(1, iterations // 10) == 0:
                if loss > before:
                    final = mask
                    break
                before = float(loss.detach())
        maps.append((saliency() if final is None else final).detach()[0, 0])
    return ours, torch.stack(maps)


SMOOTH = {"noise": 0.2, "samples": 5, "layer": LARGE}
AUTHORS = {"preset": "fullgrad-2019"}
FAST = {"iterations": 30, "learning_rate": 0.5}  # stops after 8 to 30, image by image

COMPARISONS: tuple[Comparison, ...] = (
    *with_the_library(),
    Comparison("grad_cam", "captum LayerGradCam", captum_grad_cam, {"layer": LARGE}),
    Comparison("cam", "definition in float64", cam_by_definition),
    Comparison("grad_cam_plus_plus", "definition in float64", plus_plus_by_definition),
    Comparison("xgrad_cam", "definition in float64", xgrad_by_definition),
    Comparison(
        "smooth_grad_cam_plus_plus",
        "definition in float64",
        partial(smooth_plus_plus_by_definition, SMOOTH),
        SMOOTH,
    ),
    *(
        Comparison(name, "numpy's SVD in float64", partial(eigen_by_definition, name))
        for name in ("eigen_cam", "eigen_grad_cam")
    ),
    *(
        Comparison(
            "guided_grad_cam",
            "captum GuidedGradCam",
            partial(captum_guided_grad_cam, params),
            params,
        )
        for params in ({}, {"channels": "sum"}, {"upsampling": "nearest"})
    ),
    *(
        Comparison(
            "full_grad",
            f"definition in float64{words}",
            partial(full_grad_by_definition, make(), params),
            params,
        )
        for params in ({}, AUTHORS)
        for words, make in (("", toy_model), (" on a residual network", residual_model))
    ),
    *(
        Comparison(
            "full_grad",
            f"{PGC} FullGrad{words}",
            partial(full_grad_of_library, make()),
            {"preset": "pgc-1.5"},
            1e-6,
            FLOAT32,
        )
        for words, make in (("", toy_model), (" on a residual network", residual_model))
    ),
    *(
        Comparison(
            "opti_cam",
            f"torch's Adam in float64, image by image{words}",
            partial(opti_cam_by_definition, make(), params),
            params,
        )
        for words, make in (("", toy_model), (" on a residual network", residual_model))
        for params in ({}, FAST)
    ),
)
