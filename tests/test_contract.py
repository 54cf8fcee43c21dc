"""The contract, over every built-in entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xbench import registry, testing
from xbench.autograd import prepared
from xbench.errors import Unsupported
from xbench.probe import Explanation, Probe
from xbench.scoring import evaluated
from xbench.types import Batch, Model

CHEAP: dict[str, dict[str, Any]] = {
    "captum/FeatureAblation": {"patches": 2},
    "captum/IntegratedGradients": {"n_steps": 3},
    "captum/InternalInfluence": {"n_steps": 3},
    "captum/KernelShap": {"patches": 2, "n_samples": 8},
    "captum/LayerConductance": {"n_steps": 3},
    "captum/LayerFeatureAblation": {"patches": 2},
    "captum/LayerIntegratedGradients": {"n_steps": 3},
    "captum/Lime": {"patches": 2, "n_samples": 8, "alpha": 1e-6},  # else it weighs nothing here
    "captum/Occlusion": {"window": 5, "stride": 4},
    "captum/ShapleyValueSampling": {"patches": 2, "n_samples": 2},
    "gradcam/SESS": {"num_scales": 2},
    "rise": {"samples": 5},
    "avg_sensitivity": {"samples": 2},
    "max_sensitivity": {"samples": 2},
    "model_randomisation": {"stages": 2},
    "arcc": {"levels": [0.2, 0.6]},
    "road": {"levels": [0.2, 0.6]},
    "road_lerf": {"levels": [0.2, 0.6]},
    "road_morf": {"levels": [0.2, 0.6]},
}
"""Parameters for methods and metrics whose defaults are dear."""

APART = {f"quantus/{name}" for name in (
    "Continuity", "Monotonicity", "RandomLogit", "RegionPerturbation", "RelativeInputStability",
    "RelativeOutputStability",
)}  # fmt: skip
"""Library's metrics that the object's mask need not win: they ask about the method, whatever map is
given, or judge what so small a network does not show.
"""

ELSEWHERE = {f"quantus/{name}" for name in (
    "IROF", "NonSensitivity", "RelativeRepresentationStability",
)}  # fmt: skip
"""Library's metrics that need superpixels, very small images, or layers: they have tests of their
own.
"""

METRICS = [name for name in registry.entries("metrics") if name not in ELSEWHERE]


def cheap(name: str, sides: tuple[int, int] = (testing.SIDE, testing.SIDE)) -> dict[str, Any]:
    """Parameters of a metric that is quick to score on images of this size."""
    if not name.startswith("quantus/"):
        return CHEAP.get(name, {})
    pixels, patch = math.prod(sides), math.gcd(*sides)
    wanted: dict[str, Any] = {
        "features_in_step": pixels,  # hence three steps
        "k": max(1, min(9, pixels - 1)),
        "nr_runs": 5,
        "nr_samples": 2,
        "nr_steps": 2,
        "patch_size": patch // 2 if patch % 2 == 0 else 1,
        "perturb_patch_sizes": (patch,),
        "subset_size": max(1, pixels // 2),
    }
    own = {field.name for field in registry.fields(registry.find("metrics", name))}
    return {key: value for key, value in wanted.items() if key in own}


@pytest.mark.parametrize("name", registry.entries("methods"))
def test_method_keeps_the_contract(name: str) -> None:
    testing.check_method(name, CHEAP.get(name))


@pytest.mark.parametrize("name", METRICS)
def test_metric_keeps_the_contract(name: str) -> None:
    testing.check_metric(name, cheap(name), finds_object=name not in APART)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        (name, preset)
        for name, entry in registry.entries("metrics").items()
        if not entry.installed and not entry.summary
        for preset in getattr(entry.load(), "presets", {})
    ],
)
def test_every_preset_of_a_metric_keeps_the_contract(name: str, preset: str) -> None:
    params = {**CHEAP.get(name, {}), "preset": preset}
    made = registry.make("metrics", name, params)
    if getattr(made, "steps", 0) > 100:
        params["steps"] = 9
    if getattr(made, "samples", 0) > 100:
        params["samples"] = 9
    testing.check_metric(name, params)


class Corners(nn.Module):
    """Two classes that any image of at least one pixel can be told apart by."""

    def __init__(self, gap: float = 4.0) -> None:
        super().__init__()
        self.gap = nn.Parameter(torch.tensor(gap))  # else no weight could be drawn anew

    def forward(self, images: Tensor) -> Tensor:
        seen = images.mean(1)
        logit = self.gap * (seen[:, 0, 0] - 0.5 * seen.mean((1, 2)))
        return torch.stack((logit, -logit), dim=1)


def strange_maps(height: int, width: int) -> Tensor:
    """Noise, negative noise, ones, zeros, tiny, huge, few values, and one that is not finite."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, height, width, generator=generator)
    noise[1] *= -1
    noise[2], noise[3] = 1, 0
    noise[4] *= 1e-37
    noise[5] = (noise[5] - 0.5) * 3e38
    noise[6] = noise[6].round()
    noise[7, -1, -1] = torch.inf
    return noise


def outcomes(name: str, images: Tensor, maps: Tensor, net: nn.Module) -> list[tuple[float, str]]:
    count, _, height, width = images.shape
    metric = registry.make("metrics", name, cheap(name, (height, width)))
    masks = (torch.arange(height * width) % 2 == 0).view(1, height, width).expand(count, -1, -1)
    keys = tuple(map(str, range(count)))
    batch = Batch(images, torch.zeros(count).long(), keys, masks.to(images.dtype))
    model = Model("corners", net, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), {}, (height, width))
    with prepared(net):
        probe = Probe(model, batch, target=torch.zeros(count).long())
        method = registry.make("methods", "input_x_gradient")
        return evaluated(metric, Explanation(probe, maps, method))


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (5, 2), (2, 2), (33, 17)])
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_has_a_value_or_a_reason_for_any_map_of_any_image(
    name: str, sides: tuple[int, int]
) -> None:
    images = torch.rand(8, 3, *sides, generator=torch.Generator().manual_seed(1))
    is_theirs = name.startswith("quantus/")
    try:
        found = outcomes(name, images, strange_maps(*sides), Corners())
    except Unsupported:  # a plan skips the cell, with the reason
        assert is_theirs
        assert sides != (33, 17)
        return
    undefined = getattr(registry.make("metrics", name), "undefined", "nothing")
    for value, status in found:
        assert math.isfinite(value) == (status in ("ok", "degenerate")), (value, status)
        assert status in ("ok", "degenerate", "failed: nonfinite", undefined)
    assert found[7][1] == "failed: nonfinite"
    if is_theirs:
        return
    if sides == (33, 17):
        statuses = [status for _, status in found]
        assert statuses[0] == statuses[4] == statuses[5] == statuses[6] == "ok"
        assert statuses[2] == statuses[3] == "degenerate"


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_scores_images_of_512_pixels(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 512, 512, generator=generator)
    ((value, status),) = outcomes(name, images, torch.rand(1, 512, 512), Corners())
    if name.startswith("quantus/") and math.isnan(value):  # the target's logit hardly varies
        assert status.startswith("undefined: ")
        return
    assert math.isfinite(value)
    assert status == "ok"


@pytest.mark.parametrize("gap", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("name", METRICS)
def test_a_certain_network_makes_no_score_infinite(name: str, gap: float) -> None:
    """The target's probability is 0 or 1, on the image or on what is left of it."""
    images = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    images[::2, :, 0, 0] = 0
    undefined = getattr(registry.make("metrics", name), "undefined", "nothing")
    for value, status in outcomes(name, images, strange_maps(9, 9), Corners(gap)):
        assert math.isfinite(value) == (status in ("ok", "degenerate")), (value, status)
        assert status in ("ok", "degenerate", "failed: nonfinite", undefined)


def test_embedded_model_keeps_the_contract() -> None:
    testing.check_model("shapes/resnet", side=64)


def test_generated_data_set_keeps_the_contract() -> None:
    testing.check_dataset("shapes")
