"""Sanity and robustness beside captum, Quantus, SciPy, scikit-image and loops.

Sensitivities are fed the same perturbations, which the libraries take from a function. Random
weights are drawn by the loop itself, on a deep copy of the network, after the documented stream.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import quantus
import torch
from captum.metrics import sensitivity_max
from comparison import TARGET, Comparison
from numpy.typing import NDArray
from scipy import stats
from skimage import metrics as skimage
from torch import Tensor, nn

from xbench import registry
from xbench.autograd import prepared
from xbench.models.resnet import shapes_resnet
from xbench.probe import Probe
from xbench.testing import toy_batch, toy_model
from xbench.types import Batch, Model

Array = NDArray[np.float64]
Alike = Callable[[Array, Array], float]


def network(kind: str, classes: int = 5) -> Model:
    """Two convolutions, or a residual network with batch normalisation, in float64."""
    if kind == "toy":
        return toy_model(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = shapes_resnet().double().eval().requires_grad_(False)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # as training would have left it
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
    return Model("residual", net, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), {}, (16, 16))


def images(kind: str) -> Batch:
    return toy_batch(len(TARGET), side=16 if kind == "toy" else 32)


def ours(
    metric: str, params: Mapping[str, Any], method: str, model: Model, batch: Batch, target: Tensor
) -> Tensor:
    with prepared(model.net) as meter:
        explanation = Probe(model, batch, target=target, meter=meter).explain(
            registry.make("methods", method)
        )
        found: Tensor = registry.make("metrics", metric, params)(explanation)
    return found


def gradient_map(net: nn.Module, inputs: Tensor, target: Tensor, times_input: bool) -> Tensor:
    """(N, H, W) |gradient| or |input x gradient| of each logit, one image at a time."""
    maps = []
    for image, wanted in zip(inputs, target.tolist(), strict=True):
        leaf = image[None].detach().clone().requires_grad_()
        net(leaf)[0, wanted].backward()
        assert leaf.grad is not None
        product = leaf.grad * leaf.detach() if times_input else leaf.grad
        maps.append(product[0].abs().sum(0))
    return torch.stack(maps)


# --- similarities, by others ----------------------------------------------------------------------


def spearman(one: Array, other: Array) -> float:
    return float(stats.spearmanr(one.ravel(), other.ravel()).statistic)


def scikit_ssim(one: Array, other: Array, span: float) -> float:
    return float(
        skimage.structural_similarity(
            one, other, data_range=span, gaussian_weights=True, use_sample_covariance=False
        )
    )


def ssim(one: Array, other: Array) -> float:
    low, high = ((each - each.min()) / (each.max() - each.min()) for each in (one, other))
    return scikit_ssim(low, high, 1.0)


def ssim_second_moment(one: Array, other: Array) -> float:
    scaled = [each / np.sqrt(np.mean(each**2)) for each in (one, other)]
    return scikit_ssim(*scaled, float(np.max(scaled) - np.min(scaled)))


ALIKE: Mapping[str, Alike] = {
    "spearman": spearman,
    "ssim": ssim,
    "ssim_second_moment": ssim_second_moment,
}


def alike_of(similarity: str, maps: Tensor, others: Tensor) -> Tensor:
    pairs = zip(maps.numpy(), others.numpy(), strict=True)
    return torch.tensor([ALIKE[similarity](*pair) for pair in pairs], dtype=torch.float64)


# --- random networks ------------------------------------------------------------------------------


def reset_on_a_copy(net: nn.Module, path: str) -> None:
    """The layer's own initialisation in float32, from the stream of its path."""
    digest = hashlib.blake2b(f"0\0{path}\0random weights\0000".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") & 0xFFFFFFFF)
    layer: Any = net.get_submodule(path)
    layer.float().reset_parameters()
    layer.double()


def by_copies(
    kind: str, order: str, stages: int, similarity: str, times_input: bool
) -> tuple[Tensor, Tensor]:
    method = "input_x_gradient" if times_input else "gradient"
    params = {"order": order, "stages": stages, "similarity": similarity}
    model, batch = network(kind), images(kind)
    inputs = model.normalise(batch.images)
    maps = gradient_map(model.net, inputs, TARGET, times_input)
    layers = [path for path, module in model.net.named_modules() if module._parameters]
    edges = [at * len(layers) // stages for at in range(stages + 1)]
    groups = [layers[edges[at] : edges[at + 1]] for at in range(stages)]
    if order == "top_down":
        groups.reverse()
    found = []
    with torch.random.fork_rng(devices=[]):
        for at, group in enumerate(groups):
            copied = copy.deepcopy(model.net)
            for drawn in [group] if order == "independent" else groups[: at + 1]:
                for path in drawn:
                    reset_on_a_copy(copied, path)
            found.append(
                alike_of(similarity, maps, gradient_map(copied, inputs, TARGET, times_input))
            )
    got = ours("model_randomisation", params, method, model, batch, TARGET)
    return got, torch.stack(found).mean(0)


def by_the_other_class(kind: str, similarity: str) -> tuple[Tensor, Tensor]:
    """Of two classes, so that the other one is known."""
    model, batch, target = toy_model(classes=2), images(kind), torch.tensor([0, 1, 1, 0])
    inputs = model.normalise(batch.images)
    maps, others = (
        gradient_map(model.net, inputs, wanted, False) for wanted in (target, 1 - target)
    )
    got = ours("random_logit", {"similarity": similarity}, "gradient", model, batch, target)
    return got, alike_of(similarity, maps, others)


# --- sensitivities --------------------------------------------------------------------------------


def perturbations(batch: Batch, model: Model, samples: int, radius: float) -> Tensor:
    """(N, samples, 3, H, W) the draws that our metric makes."""
    probe = Probe(model, batch)
    draws = [probe.uniform("perturbation", draw) for draw in range(3 * samples)]
    return (2 * torch.stack(draws, dim=1).unflatten(1, (samples, 3)) - 1) * radius


def by_captum(kind: str, times_input: bool) -> tuple[Tensor, Tensor]:
    method = "input_x_gradient" if times_input else "gradient"
    model, batch, params = network(kind), images(kind), {"preset": "captum-0.9"}
    noise = perturbations(batch, model, 10, 0.02).flatten(0, 1)

    def explain(inputs: Any, target: Tensor) -> Any:
        if isinstance(inputs, tuple):  # the images themselves; it expects a tuple in return
            return (explain(inputs[0], target),)
        return gradient_map(model.net, inputs, target, times_input)[:, None]

    theirs = sensitivity_max(
        torch.enable_grad()(explain),
        model.normalise(batch.images),
        perturb_func=lambda inputs: inputs + noise,
        n_perturb_samples=10,
        target=TARGET,
    )
    return ours("max_sensitivity", params, method, model, batch, TARGET), theirs


def by_quantus(kind: str, metric: str, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    model, batch = network(kind), images(kind)
    made = registry.make("metrics", metric, params)
    inputs = model.normalise(batch.images)
    draws = iter(perturbations(batch, model, made.samples, made.radius).unbind(1))

    def explain(model: nn.Module, inputs: Array, targets: Array, **_: Any) -> Array:
        given = (torch.as_tensor(inputs), torch.as_tensor(targets))
        return gradient_map(model, *given, False)[:, None].numpy()

    def perturb(arr: Array, **_: Any) -> Array:
        return arr + next(draws).flatten(1).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = {
            "max_sensitivity": quantus.MaxSensitivity,
            "avg_sensitivity": quantus.AvgSensitivity,
        }
        theirs = scorer[metric](
            nr_samples=made.samples, perturb_func=perturb, disable_warnings=True, abs=False
        )(
            model=model.net,
            x_batch=inputs.numpy(),
            y_batch=TARGET.numpy(),
            a_batch=gradient_map(model.net, inputs, TARGET, False)[:, None].numpy(),
            explain_func=explain,
            device="cpu",
        )
    got = ours(metric, params, "gradient", model, batch, TARGET)
    return got, torch.as_tensor(np.asarray(theirs, dtype=np.float64))


def by_pixels(metric: str) -> tuple[Tensor, Tensor]:
    """In pixels, beside a loop over samples and images."""
    model, batch = toy_model(), images("toy")
    noise = perturbations(batch, model, 10, 0.02)
    maps = gradient_map(model.net, model.normalise(batch.images), TARGET, True)
    changes = []
    for draw in range(10):
        inputs = model.normalise(batch.images + noise[:, draw])
        others = gradient_map(model.net, inputs, TARGET, True)
        changes.append(
            [
                np.linalg.norm(other - one) / np.linalg.norm(one)
                for one, other in zip(maps.numpy(), others.numpy(), strict=True)
            ]
        )
    summed = np.max if metric == "max_sensitivity" else np.mean
    theirs = torch.as_tensor(summed(changes, axis=0))
    return ours(metric, {}, "input_x_gradient", model, batch, TARGET), theirs


def _randomisation() -> Sequence[Comparison]:
    words = {
        "spearman": "deep copies by a loop, SciPy spearmanr",
        "ssim": "deep copies by a loop, scikit-image SSIM",
        "ssim_second_moment": "deep copies by a loop, scikit-image SSIM",
    }
    cases = [
        ("toy", "top_down", 3, "spearman", False),
        ("toy", "bottom_up", 3, "ssim", True),
        ("toy", "independent", 2, "ssim_second_moment", False),
        ("residual", "top_down", 3, "spearman", True),
        ("residual", "independent", 5, "ssim", False),
        ("residual", "bottom_up", 15, "ssim_second_moment", True),
    ]
    return [
        Comparison(
            "model_randomisation",
            f"{words[similarity]}; {'input x gradient' if times_input else 'gradient'}, {kind}",
            partial(by_copies, kind, order, stages, similarity, times_input),
            {"order": order, "stages": stages, "similarity": similarity},
            kind="metrics",
        )
        for kind, order, stages, similarity, times_input in cases
    ]


COMPARISONS: tuple[Comparison, ...] = (
    *_randomisation(),
    *(
        Comparison(
            "random_logit",
            f"the other of two classes, {library}",
            partial(by_the_other_class, "toy", similarity),
            {"similarity": similarity},
            kind="metrics",
        )
        for similarity, library in (
            ("spearman", "SciPy spearmanr"),
            ("ssim", "scikit-image SSIM"),
            ("ssim_second_moment", "scikit-image SSIM"),
        )
    ),
    *(
        Comparison(
            "max_sensitivity",
            f"captum sensitivity_max, same perturbations; {kind}",
            partial(by_captum, kind, times_input),
            {"preset": "captum-0.9"},
            kind="metrics",
        )
        for kind, times_input in (("toy", True), ("residual", False))
    ),
    *(
        Comparison(
            metric,
            f"Quantus {library}, same perturbations",
            partial(by_quantus, "residual", metric, params),
            params,
            kind="metrics",
        )
        for metric, library, params in (
            ("max_sensitivity", "MaxSensitivity", {"preset": "quantus-0.6", "samples": 20}),
            ("max_sensitivity", "MaxSensitivity", {"preset": "latec-2024"}),
            ("avg_sensitivity", "AvgSensitivity", {"preset": "quantus-0.6", "samples": 20}),
        )
    ),
    *(
        Comparison(metric, "definition, by a loop", partial(by_pixels, metric), kind="metrics")
        for metric in ("max_sensitivity", "avg_sensitivity")
    ),
)
