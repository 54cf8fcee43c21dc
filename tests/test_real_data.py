"""Real photographs and weights, where XBENCH_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from xbench import registry
from xbench.models.loading import load_model
from xbench.selection import select
from xbench.suite import Selection

DATA = Path(os.environ.get("XBENCH_DATA", "/nonexistent"))
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason="XBENCH_DATA names no directory of real data"),
]

GREY = (128 / 255,) * 3
MOBILENET: dict[str, Any] = {
    "architecture": "torchvision/mobilenet_v2",
    "weights": "weights/mobilenet_v2_imagenet.safetensors",
    "mean": GREY,
    "std": GREY,
}


def accuracy(dataset: dict[str, Any], model: dict[str, Any], images: int) -> float:
    name = dataset.pop("name")
    source = registry.make("datasets", name, dataset).open(DATA)
    network = registry.make("models", "checkpoint", model).describe(DATA)
    ready = load_model(network, "model", {}, "cpu")
    chosen = [position for position, _ in select(source, Selection(images=images), name)]
    right = 0
    for start in range(0, images, 32):
        samples = source.load(chosen[start : start + 32])
        batch = torch.stack([sample.image for sample in samples])
        with torch.inference_mode():
            predicted = ready.logits(ready.normalise(batch)).argmax(1)
        right += sum(int(p) == sample.label for p, sample in zip(predicted, samples, strict=True))
    return right / images


def test_mobilenet_reaches_its_accuracy_only_with_the_padding_it_was_trained_with() -> None:
    photographs = {"name": "folder", "root": "imagenet/val", "classes": "../classes.csv"}
    same = accuracy(dict(photographs), {**MOBILENET, "padding": "same_tensorflow"}, 256)
    symmetric = accuracy(dict(photographs), MOBILENET, 256)
    # 0.885 on all 800: two standard errors of 256 draws are 0.04
    assert same == pytest.approx(0.885, abs=0.04)
    assert symmetric < same


def test_resnet20_reaches_its_accuracy_on_cifar100() -> None:
    resnet = {
        "architecture": "resnet20",
        "classes": 100,
        "weights": "weights/resnet20_cifar100.safetensors",
    }
    # 0.6588 on all 10,000: two standard errors of 1,024 draws are 0.03
    assert accuracy({"name": "cifar100"}, resnet, 1024) == pytest.approx(0.6588, abs=0.03)
