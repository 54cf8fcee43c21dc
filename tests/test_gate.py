"""The gate as CI uses it: a slip in the code, made on purpose, is caught."""

from __future__ import annotations

from pathlib import Path

from conftest import Answer, finish, start

SLIP = """
import torch

from xbench import baselines

right = baselines.baseline_image


def forgets_to_normalise(name, model, inputs):
    if name == "black":
        return torch.zeros_like(right(name, model, inputs))
    return right(name, model, inputs)


baselines.baseline_image = forgets_to_normalise
"""
"""Zeros where the network sees them, not where pixels are black: the usual mistake."""

QUICK = ("quick", "--models", "shapes/resnet", "--methods", "random", "--metrics", "deletion")


def test_a_wrong_baseline_does_not_pass_the_gate(tmp_path: Path) -> None:
    def xbench(*words: object) -> Answer:
        return finish(start(*words, folder=tmp_path))

    (tmp_path / "slip.py").write_text(SLIP)
    for out, plugin in (("base", ()), ("slipped", ("--plugin", "slip.py"))):
        xbench("run", *QUICK, "--images", 48, "--out", out, "--no-page", "--quiet", *plugin)

    caught = xbench("compare", "base", "slipped")

    assert caught.status == 4
    assert "deletion" in caught.out
