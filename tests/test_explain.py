"""One picture explained, from Python and from the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import xbench
from xbench.cli import cli
from xbench.datasets.shapes import generate
from xbench.explain import explain, predicted
from xbench.suite import read_choices


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of the data set that the embedded network knows, as a file."""
    images, _, _ = generate(0, "test", range(1))
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "one.png")
    return tmp_path / "one.png"


MODEL = read_choices("models", ["shapes/resnet"], "test")[0]
METHODS = read_choices(
    "methods", ["gradient", "{name: layer_cam, layer: layer2}", "attention"], "t"
)
METRICS = read_choices("metrics", ["rcap", "mae"], "t")


def test_maps_and_scores_are_those_of_the_notebook(picture: Path) -> None:
    found = explain(picture, MODEL, METHODS, METRICS)
    network = MODEL.make().describe(None)
    net = network.build().eval()
    net.load_state_dict(xbench_weights(network.weights))
    given = {"mean": network.mean, "std": network.std, "layer": "layer3"}
    maps = xbench.attribute(net, found.image, "gradient", **given)
    assert torch.equal(found.maps["gradient"], maps)
    given.pop("layer")
    score = xbench.score(net, found.image, maps, "rcap", **given)
    assert found.scores["gradient", "rcap"][0] == float(score)
    assert found.target == found.classes[0][0]


def xbench_weights(path: Path | None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    assert path is not None
    return load_file(path)


def test_what_cannot_be_had_is_said_and_the_rest_is_there(picture: Path) -> None:
    found = explain(picture, MODEL, METHODS, METRICS)
    assert list(found.maps) == ["gradient", "layer_cam(layer=layer2)"]
    assert "no attention" in found.skipped["attention"]
    assert found.scores["gradient", "mae"][1].startswith("skipped: ")


def test_another_class_gives_another_map_and_is_named(picture: Path) -> None:
    best = explain(picture, MODEL, METHODS[:1])
    other = explain(picture, MODEL, METHODS[:1], target=(best.target + 1) % 12)
    assert not torch.equal(best.maps["gradient"], other.maps["gradient"])
    assert f"explained: class {other.target}" in predicted(other)


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_command_draws_a_figure_and_prints_scores(
    picture: Path, form: str, tmp_path: Path
) -> None:
    out = tmp_path / f"figure.{form}"
    words = [str(picture), "--methods", "gradient", "--metrics", "rcap", "-o", str(out)]
    done = CliRunner().invoke(cli, ["explain", *words], catch_exceptions=False)
    assert "gradient  RCAP 0." in done.output
    assert str(out) in done.output
    assert out.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png"], "cannot be used: No such file"),
        (["one.png", "-o", "x.gif"], r"must end in one of \.png"),
        (["one.png", "--target", "99"], "tells 12 classes apart, 0 to 11"),
        (["one.png", "--methods", "grad_camm"], "did you mean 'grad_cam'"),
        (["one.png", "--methods", "{name: grad_cam, layr: x}"], "did you mean 'layer'"),
        (["one.png", "--model", "{name: x"], "not valid YAML"),
    ],
)
def test_mistakes_are_told_with_the_way_out(
    picture: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    with pytest.raises(xbench.XbenchError, match=message):
        CliRunner().invoke(cli, ["explain", *words], catch_exceptions=False)
