"""Laws of bad input: one clear message, the right exit status, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import Answer, last_run, small, suite_file
from PIL import Image
from safetensors.torch import save_file

from xbench.models.resnet import resnet20
from xbench.store import Store
from xbench.suite import FACTS

Command = Callable[..., Answer]


@pytest.fixture(autouse=True)
def elsewhere(saboteurs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XBENCH_DATA", raising=False)


@pytest.fixture
def run(command: Command) -> Callable[..., Answer]:
    """``xbench run`` of SMALL with changes."""

    def call(*words: object, **changes: Any) -> Answer:
        return command("run", suite_file(Path("suite.yaml"), **changes), *words)

    return call


def table() -> pd.DataFrame:
    frame = pd.read_csv(last_run(Path("results")) / "table.csv", dtype=str, keep_default_na=False)
    return frame.set_index(["method", "metric"])


def scores() -> dict[tuple[str, str, str], float]:
    rows = pd.read_parquet(last_run(Path("results")) / "per_image.parquet")
    keys = zip(rows["method"], rows["metric"], rows["image"], strict=True)
    return dict(zip(keys, rows["value"].tolist(), strict=True))


def refused(answer: Answer, words: str) -> None:
    """Before any work: status 2, a message that names it, and nothing written."""
    assert answer.status == 2, answer.err
    assert words in answer.err
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert not Path("results").exists()


def failed(answer: Answer, words: str) -> None:
    """The run went on to its table: status 3, with the reason."""
    assert answer.status == 3, answer.err
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert answer.out


# --- known before any work: 2 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["gradcam"]}, "unknown method 'gradcam'; did you mean 'grad_cam'"),
        ({"metrics": ["insertions"]}, "unknown metric 'insertions'; did you mean 'insertion'"),
        ({"models": ["resnet"]}, "unknown model 'resnet'"),
        ({"datasets": ["shape"]}, "unknown dataset 'shape'; did you mean 'shapes'"),
        ({"methods": [{"name": "smooth_grad", "sampels": 3}]}, "did you mean 'samples'?"),
        ({"methods": [{"name": "smooth_grad", "samples": "3"}]}, "samples = '3'"),
        ({"datasets": [{"name": "folder", "root": "gone"}]}, "gone"),
        ({"datasets": [{"name": "cifar100"}]}, "cifar"),
        (
            {"models": [{"name": "checkpoint", "architecture": "resnet20", "weights": "gone.pt"}]},
            "weights 'gone.pt' do not exist",
        ),
        (
            {"methods": [{"name": "grad_cam", "layer": "layer9"}]},
            "model 'plug/tiny' has no layer 'layer9' (asked for by grad_cam(layer=layer9))",
        ),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_before_any_work(
    change: dict[str, Any], words: str, run: Callable[..., Answer]
) -> None:
    refused(run(**change), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2", "suite.yaml:1: not valid YAML"),
        ("- a\n- b\n", "a suite is a mapping"),
        ("", "a suite is a mapping"),
        ("version: 1\nversion: 1\n", "suite.yaml:2 (version): key 'version' occurs twice"),
        ("a: !!python/object/apply:os.system [echo]\n", "a suite has no tag"),
        ("a: &x [*x]\n", "too many values"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(text: str, words: str, command: Command) -> None:
    Path("suite.yaml").write_text(text)
    refused(command("run", "suite.yaml"), words)


def test_problems_come_all_at_once_with_line_numbers(command: Command) -> None:
    Path("suite.yaml").write_text(
        "version: 1\nname: bad\nseed: none\ndatasets: [plug/noise]\nmodels: [plug/tinny]\n"
        "methods:\n  - gradient\n  - {name: grad_cam, layers: x}\nmetrics: [mae]\nruns: {}\n"
    )
    answer = command("run", "suite.yaml")
    refused(answer, "did you mean 'plug/tiny'")
    lines = {line.split()[1].rstrip(":") for line in answer.err.splitlines()}
    assert lines == {"suite.yaml:3", "suite.yaml:5", "suite.yaml:8", "suite.yaml:10"}


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture
def pictures() -> Path:
    """Six noisy pictures in a folder, of which two cannot be read."""
    folder = Path("pictures").resolve()
    folder.mkdir()
    for at in range(6):
        Image.effect_noise((16, 16), 90).convert("RGB").save(folder / f"{at}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "4.png").write_text("<html>not found</html>")
    return folder


def test_unreadable_pictures_are_named_and_counted_and_the_run_goes_on(
    pictures: Path, run: Callable[..., Answer]
) -> None:
    source = {"name": "folder", "root": str(pictures), "resize": None, "crop": None, "label": "p"}
    answer = run(datasets=[source])
    failed(answer, "2.png")
    assert "4.png" in answer.err
    rows = table()
    assert set(rows.loc[("gradient", "average_drop"), ["images", "failed", "reason"]]) == {
        "4", "2", "2 x failed: decode",
    }  # fmt: skip
    assert rows.loc[("gradient", "mae"), "status"] == "skipped"
    bad = scores()
    for name in ("2.png", "4.png"):
        (pictures / name).unlink()
    answer = run(datasets=[source])
    assert answer.status == 0
    assert all(bad[key] == value for key, value in scores().items())


def test_a_data_set_without_masks_skips_what_needs_them(run: Callable[..., Answer]) -> None:
    answer = run(datasets=[{"name": "plug/noise", "masks": False, "images": 4}])
    assert answer.status == 0
    row = table().loc[("gradient", "mae")]
    assert (row["status"], row["images"]) == ("skipped", "0")
    assert "has no object masks" in row["reason"]
    assert "has no object masks" in answer.out


# --- weights --------------------------------------------------------------------------------------


def checkpoint(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file({k: v.contiguous() for k, v in state.items()}, "w.safetensors")
    return {"name": "checkpoint", "architecture": "resnet20", "classes": 10, "label": "net",
            "weights": "w.safetensors"}  # fmt: skip


def test_weights_that_are_not_finite_fail_their_model_alone(run: Callable[..., Answer]) -> None:
    state = resnet20().state_dict()
    state["linear.weight"][0, 0] = float("nan")
    answer = run(models=[checkpoint(state), "plug/tiny"])
    failed(answer, "weights of 'net' hold NaN or infinity in 1 tensors, first in 'linear.weight'")
    rows = table().reset_index()
    assert set(rows.loc[rows["model"] == "net", "status"]) == {"error"}
    assert set(rows.loc[rows["model"] == "plug/tiny", "status"]) == {"ok"}


def test_weights_that_do_not_fit_fail_their_model_with_what_differs(
    run: Callable[..., Answer],
) -> None:
    state = resnet20().state_dict()
    state["linear.weight"] = torch.zeros(11, 64)
    failed(run(models=[checkpoint(state)]), "do not fit the architecture: 1 of another shape")


def test_weights_that_are_damaged_fail_their_model(run: Callable[..., Answer]) -> None:
    model = checkpoint(resnet20().state_dict())
    path = Path("w.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    failed(run(models=[model]), "cannot be read")


# --- methods and metrics --------------------------------------------------------------------------


@pytest.fixture
def undisturbed(run: Callable[..., Answer]) -> dict[tuple[str, str, str], float]:
    assert run("-o", "whole").status == 0
    rows = pd.read_parquet(last_run(Path("whole")) / "per_image.parquet")
    keys = zip(rows["method"], rows["metric"], rows["image"], strict=True)
    return dict(zip(keys, rows["value"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sabotage/raise", "error: ValueError: the method's own words"),
        ("sabotage/sys_exit", "error: SystemExit"),
        ("sabotage/shape", "a method must return maps of shape (4, 16, 16) (N, H, W)"),
    ],
)
def test_a_method_that_fails_costs_its_own_cells_and_is_tried_again(
    method: str,
    words: str,
    run: Callable[..., Answer],
    undisturbed: dict[tuple[str, str, str], float],
) -> None:
    methods = [method, *small()["methods"]]
    answer = run(methods=methods)
    failed(answer, words)
    found = scores()
    assert {key: found[key] for key in undisturbed} == undisturbed
    assert table().loc[(method, "mae"), "status"] == "error"
    stored = "\n".join(p.read_text() for p in last_run(Path("results")).glob("errors/*"))
    assert "Traceback" in stored
    assert words.split(":")[0] in stored
    again = run(methods=methods)
    failed(again, words)
    rows = [
        row
        for group in Store(Path("results/store")).groups()
        for part in group.parts()
        for row in part.rows["status"].to_pylist()
    ]
    metrics = len(small()["metrics"]) + 1 + len(FACTS)  # average gain comes along
    assert sum(status.startswith("error") for status in rows) == 2 * 10 * metrics  # both tried
    assert sum(status == "ok" for status in rows) == 3 * 10 * metrics  # and nothing else twice


def test_a_map_with_nan_fails_one_image(run: Callable[..., Answer]) -> None:
    method = {"name": "sabotage/nonfinite", "key": "noise/3", "label": "N"}
    answer = run(datasets=[{"name": "plug/noise", "count": 10}], methods=[method, "gradient"])
    assert answer.status == 3
    row = table().loc[("N", "mae")]
    assert (row["images"], row["failed"], row["status"]) == ("9", "1", "partial")
    assert row["reason"] == "1 x failed: nonfinite"
    assert table().loc[("gradient", "mae"), "status"] == "ok"
    assert "1 x failed: nonfinite" in answer.out


def test_a_constant_map_is_degenerate_and_fails_no_run(run: Callable[..., Answer]) -> None:
    answer = run(methods=["constant", "gradient"])
    assert answer.status == 0
    assert table().loc[("constant", "mae"), "degenerate"] == "10"


def test_a_method_that_declares_itself_unsuitable_is_skipped(run: Callable[..., Answer]) -> None:
    answer = run(methods=["sabotage/unsuitable", "gradient"])
    assert answer.status == 0
    row = table().loc[("sabotage/unsuitable", "mae")]
    assert row["status"] == "skipped"
    assert "it wants another network" in row["reason"]


def test_a_metric_that_raises_costs_its_own_cells(run: Callable[..., Answer]) -> None:
    answer = run(metrics=["sabotage/metric_raise", "mae"])
    failed(answer, "metric sabotage/metric_raise: error: ValueError: the metric's own words")
    assert set(table().loc[(slice(None), "mae"), "status"]) == {"ok"}


def test_a_disk_that_is_full_is_one_message_and_what_was_stored_stays(
    run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--images", 4)
    before = sorted(Path("results/store").rglob("*.parquet"))
    with monkeypatch.context() as patched:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("os.fsync", full)
        answer = run()
    assert answer.status == 1
    assert "cannot be written: No space left on device" in answer.err
    assert "Traceback" not in answer.err
    assert sorted(Path("results/store").rglob("*.parquet")) == before
    assert not list(Path("results").rglob("*.tmp"))
    assert run().status == 0
