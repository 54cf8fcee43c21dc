"""The grad-cam library's results on a fixed toy network, in float64, at the layer's resolution.

There nothing but the formulas differs. Beyond it the library scales to [0, 1] before and after
cv2's resizing, in float32 and with 1e-7 added to each range.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.maps import unit_range
from xbench.probe import LayerGradient, Probe
from xbench.testing import toy_batch, toy_model

TARGET = torch.tensor([4, 0, 2, 2])
THEIRS = {
    "grad_cam": pytorch_grad_cam.GradCAM,
    "grad_cam_plus_plus": pytorch_grad_cam.GradCAMPlusPlus,
    "xgrad_cam": pytorch_grad_cam.XGradCAM,
    "hires_cam": pytorch_grad_cam.HiResCAM,
    "layer_cam": pytorch_grad_cam.LayerCAM,
}


@contextmanager
def probing() -> Iterator[Probe]:
    model = toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, toy_batch(4), target=TARGET, meter=meter)


class Caught:
    """Runs the library and keeps its map before any scaling."""

    def __init__(self, name: str, layer: str, probe: Probe) -> None:
        # the library asks the first parameter for a gradient through the input
        with THEIRS[name](probe.model.net, [probe.model.net.get_submodule(layer)]) as library:
            inner = library.get_cam_image

            def get_cam_image(*args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
                self.raw = torch.from_numpy(inner(*args, **kwargs))
                self.activation, self.gradient = (
                    torch.from_numpy(part[0].numpy())
                    for part in (
                        library.activations_and_grads.activations,
                        library.activations_and_grads.gradients,
                    )
                )
                return self.raw.numpy()

            library.get_cam_image = get_cam_image
            targets = [ClassifierOutputTarget(int(target)) for target in TARGET]
            inputs = probe.inputs.clone().requires_grad_()
            self.final = torch.from_numpy(library(inputs, targets))


def ours(name: str, layer: str, probe: Probe) -> Tensor:
    found: Tensor = registry.make("methods", name).cam(*probe[LayerGradient(layer)])
    return found


@pytest.mark.parametrize("layer", ["1", "3"])
def test_activations_and_gradients_are_the_librarys(layer: str) -> None:
    with probing() as probe:
        caught = Caught("grad_cam", layer, probe)
        activation, gradient = probe[LayerGradient(layer)]
    torch.testing.assert_close(activation, caught.activation, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, caught.gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", ["1", "3"])
@pytest.mark.parametrize("name", ["grad_cam", "hires_cam", "layer_cam"])
def test_cams_without_an_epsilon_are_the_librarys(name: str, layer: str) -> None:
    with probing() as probe:
        caught = Caught(name, layer, probe)
        torch.testing.assert_close(ours(name, layer, probe), caught.raw, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", ["1", "3"])
def test_xgrad_cam_is_the_librarys_but_for_its_epsilon(layer: str) -> None:
    """The library divides by sum A + 1e-7; put back, the weights are equal."""
    with probing() as probe:
        caught = Caught("xgrad_cam", layer, probe)
        activation, gradient = probe[LayerGradient(layer)]
        total = activation.sum((2, 3))
        shrunk = (gradient * activation) * (total / (total + 1e-7))[:, :, None, None]
        cam = registry.make("methods", "xgrad_cam").cam(
            activation, shrunk / activation.where(activation != 0, 1)
        )
        torch.testing.assert_close(cam, caught.raw, rtol=0, atol=1e-10)
        # the epsilon itself weighs at most 1e-7 of the smallest total that is not zero
        share = 1e-7 / float(total[total > 0].min())
        torch.testing.assert_close(
            ours("xgrad_cam", layer, probe), caught.raw, rtol=0, atol=share * 10
        )


@pytest.mark.parametrize("layer", ["1", "3"])
def test_grad_cam_plus_plus_is_the_librarys_but_for_its_epsilon(layer: str) -> None:
    """The library adds 1e-6 to 2 g^2 + g^3 sum A, which is not small beside squared gradients.

    As the formula takes the gradient's scale only through g sum A, large gradients and small
    activations make the same map, and there the epsilon is nothing.
    """
    library = pytorch_grad_cam.GradCAMPlusPlus
    scale = 1e12
    with probing() as probe:
        activation, gradient = probe[LayerGradient(layer)]
        cam = ours("grad_cam_plus_plus", layer, probe)

        def theirs(activation: Tensor, gradient: Tensor) -> Tensor:
            weight = library.get_cam_weights(
                None, None, None, None, activation.numpy(), gradient.numpy()
            )
            return torch.einsum("nc,nchw->nhw", torch.from_numpy(weight), activation)

        as_it_is = theirs(activation, gradient)
        torch.testing.assert_close(as_it_is, Caught("grad_cam_plus_plus", layer, probe).raw)
        large = theirs(activation / scale, gradient * scale)
    torch.testing.assert_close(cam, large, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", THEIRS)
def test_upsampled_maps_are_the_librarys_to_its_float32_and_epsilons(name: str) -> None:
    layer = "1"  # as large as the image, so that the library's two scalings do not matter
    with probing() as probe:
        caught = Caught(name, layer, probe)
        found = unit_range(caught.raw.relu())
    # both scalings add 1e-7 to the range; the maps' ranges are known, and float32 has 6e-8
    span = caught.raw.relu().amax((1, 2)) - caught.raw.relu().amin((1, 2))
    tolerance = 1e-6 + 1e-7 / float(span.min())
    torch.testing.assert_close(found.float(), caught.final.float(), rtol=0, atol=tolerance)
