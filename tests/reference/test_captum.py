"""captum's results on a fixed toy network, in float64: the same to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import captum.attr
import pytest
import torch

from xbench import registry
from xbench.autograd import prepared
from xbench.probe import LayerGradient, Probe
from xbench.testing import toy_batch, toy_model

TARGET = torch.tensor([4, 0, 2, 2])


@contextmanager
def probing() -> Iterator[Probe]:
    model = toy_model()
    with prepared(model.net) as meter:
        yield Probe(model, toy_batch(4), target=TARGET, meter=meter)


@pytest.mark.parametrize("layer", ["1", "3"])
def test_grad_cam_is_captums_layer_grad_cam(layer: str) -> None:
    with probing() as probe:
        module = probe.model.net.get_submodule(layer)
        theirs = captum.attr.LayerGradCam(probe.model.net, module).attribute(
            probe.inputs.clone().requires_grad_(), target=TARGET, relu_attributions=True
        )
        ours = registry.make("methods", "grad_cam").cam(*probe[LayerGradient(layer)]).relu()
        torch.testing.assert_close(ours, theirs[:, 0])
