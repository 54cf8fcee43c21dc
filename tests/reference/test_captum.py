"""captum's results on a fixed toy network, in float64: the same to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import captum.attr
import pytest
import torch
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import channel_sum
from xbench.probe import LayerGradient, Probe
from xbench.testing import toy_batch, toy_model

TARGET = torch.tensor([4, 0, 2, 2])


@contextmanager
def probing() -> Iterator[Probe]:
    model = toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, toy_batch(4), target=TARGET, meter=meter)


def explain(probe: Probe, name: str, **params: object) -> Tensor:
    return probe.explain(registry.make("methods", name, params)).raw


def test_gradient_is_captums_saliency() -> None:
    with probing() as probe:
        theirs = captum.attr.Saliency(probe.model.net).attribute(
            probe.inputs.clone().requires_grad_(), target=TARGET
        )
        torch.testing.assert_close(explain(probe, "gradient"), channel_sum(theirs))


def test_input_x_gradient_is_captums() -> None:
    with probing() as probe:
        theirs = captum.attr.InputXGradient(probe.model.net).attribute(
            probe.inputs.clone().requires_grad_(), target=TARGET
        )
        torch.testing.assert_close(explain(probe, "input_x_gradient"), channel_sum(theirs))


# captum says that it sets hooks, and where it wants gradients
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU", "ignore:Input Tensor 0")
def test_guided_backprop_is_captums() -> None:
    with probing() as probe:
        theirs = captum.attr.GuidedBackprop(probe.model.net).attribute(
            probe.inputs.clone().requires_grad_(), target=TARGET
        )
        torch.testing.assert_close(explain(probe, "guided_backprop"), channel_sum(theirs))


@pytest.mark.parametrize("layer", ["1", "3"])
def test_grad_cam_is_captums_layer_grad_cam(layer: str) -> None:
    with probing() as probe:
        module = probe.model.net.get_submodule(layer)
        theirs = captum.attr.LayerGradCam(probe.model.net, module).attribute(
            probe.inputs.clone().requires_grad_(), target=TARGET, relu_attributions=True
        )
        ours = registry.make("methods", "grad_cam").cam(*probe[LayerGradient(layer)]).relu()
        torch.testing.assert_close(ours, theirs[:, 0])


NOISE, SAMPLES = 0.2, 6


@pytest.mark.parametrize(
    ("name", "tunnel"),
    [
        ("smooth_grad", "smoothgrad"),
        ("smooth_grad_squared", "smoothgrad_sq"),
        ("var_grad", "vargrad"),
    ],
)
def test_noise_methods_are_captums_noise_tunnel_over_the_same_noise(
    name: str, tunnel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with probing() as probe:
        ours = explain(probe, name, noise=NOISE, samples=SAMPLES)
        draws = torch.stack([probe.normal("gaussian", draw) for draw in range(SAMPLES)])
        saliency = captum.attr.Saliency(probe.model.net)
        theirs = []
        for at, image in enumerate(probe.inputs):  # captum's noise is as wide for all images
            own = draws[:, at]
            monkeypatch.setattr(torch, "normal", lambda mean, stdev, own=own: own * stdev)
            theirs.append(
                captum.attr.NoiseTunnel(saliency).attribute(
                    image[None].clone(),
                    nt_type=tunnel,
                    nt_samples=SAMPLES,
                    stdevs=float(NOISE * (image.max() - image.min())),
                    target=int(TARGET[at]),
                    abs=False,
                )
            )
    expected = channel_sum(torch.cat(theirs))
    if name == "var_grad":  # captum divides by the number of samples, not by one less
        expected = expected * SAMPLES / (SAMPLES - 1)
    torch.testing.assert_close(ours, expected)
