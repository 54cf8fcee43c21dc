"""Laws of maps that were made before: scored as if their method had just made them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, suite_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from xbench import registry
from xbench.autograd import prepared
from xbench.errors import UsageError
from xbench.mapfiles import open_maps
from xbench.maps import upsample
from xbench.plan import make_plan
from xbench.probe import Probe
from xbench.scoring import evaluated
from xbench.store import Store
from xbench.testing import toy_batch, toy_model

Run = Callable[..., Outcome]

METRICS: list[Any] = ["average_drop", {"name": "deletion", "steps": 4}, "rcap", "road", "mae"]
METHODS: list[Any] = ["gradient", {"name": "grad_cam", "sign": "signed"}, "centre"]
FOLDERS = ("gradient", "grad_cam-sign-signed", "centre")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: Path) -> None:
    """Paths of maps are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def explained(name: str = "maps/here", **params: Any) -> Any:
    batch, model = toy_batch(3), toy_model()
    with prepared(model.net):
        return Probe(model, batch).explain(registry.make("methods", name, params))


def toy_maps(side: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(side, side, generator=generator) for key in toy_batch(3).keys}


def save(maps: dict[str, Tensor], name: str = "here") -> None:
    Path(name).mkdir(exist_ok=True)
    save_file(maps, f"{name}/maps.safetensors")


# --- the round trip -------------------------------------------------------------------------------


def test_saved_maps_score_as_their_methods_did_bit_by_bit(run: Run, tmp_path: Path) -> None:
    changes = {"methods": METHODS, "metrics": METRICS}
    made = run(out=tmp_path / "made", **changes, run={"save_maps": "saved"})
    assert made.status == 0
    names = [f"maps/saved/plug-noise/plug-tiny/{folder}" for folder in FOLDERS]
    read = run(out=tmp_path / "read", **{**changes, "methods": names})
    assert read.status == 0
    label = dict(zip(names, dict.fromkeys(made.scores["method"]), strict=True))
    label = dict(zip(names, ["gradient", "grad_cam(sign=signed)", "centre"], strict=True))
    assert {(label[m], c, i): v for (m, c, i), v in read.values().items()} == made.values()
    assert read.run["passes"]["backward"] == 0
    for key in ("forward", "backward"):
        assert read.run["passes"]["planned"][key] == read.run["passes"][key]


def test_saving_goes_on_where_it_was_interrupted_and_saves_no_map_twice(
    run: Run, tmp_path: Path
) -> None:
    saving = {"methods": METHODS, "run": {"save_maps": "saved"}}
    run(methods=METHODS, run={"images": 5})
    run(methods=METHODS[:2], run={"images": 7, "save_maps": "saved", "slice": 3})
    last = run(**saving)
    passes = last.run["passes"]
    assert passes["planned"]["forward"] == passes["forward"]
    again = run(**saving)
    assert "nothing to do" in again.err
    fresh = run(out=tmp_path / "fresh", methods=METHODS, run={"save_maps": "fresh_maps"})
    assert fresh.csv == again.csv
    for folder in FOLDERS:
        whole, pieces = (
            [load_file(file) for file in sorted(Path(root).rglob(f"*/{folder}/*.safetensors"))]
            for root in ("fresh_maps", "saved")
        )
        assert sum(map(len, whole)) == sum(map(len, pieces)) == 10
        one = {key: value for part in whole for key, value in part.items()}
        other = {key: value for part in pieces for key, value in part.items()}
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_with_the_maps_of_another_seed_is_refused_before_any_work(run: Run) -> None:
    run(methods=["random"], run={"save_maps": "saved"})
    with pytest.raises(UsageError, match="holds maps of other weights, images, parameters"):
        run(methods=["random"], seed=1, run={"save_maps": "saved"})


def test_labels_that_would_share_a_folder_are_refused(run: Run) -> None:
    methods = [{"name": "gradient", "label": "a b"}, {"name": "grad_cam", "label": "a-b"}]
    with pytest.raises(UsageError, match="give one of them another label"):
        run(methods=methods, run={"save_maps": "saved"})


def test_long_and_strange_labels_have_folders_of_their_own(run: Run) -> None:
    methods = [
        {"name": "gradient", "label": "é" * 90},
        {"name": "grad_cam", "label": "ü" * 90},
        {"name": "random", "label": "../../x"},
    ]
    assert run(methods=methods, run={"save_maps": "saved"}).status == 0
    folders = [path for path in Path("saved/plug-noise/plug-tiny").iterdir() if path.is_dir()]
    assert len(folders) == 3
    assert "x" in {path.name for path in folders}


def test_saving_changes_no_score_and_no_id(run: Run, tmp_path: Path) -> None:
    plain = run(out=tmp_path / "plain", methods=METHODS)
    saving = run(out=tmp_path / "saving", methods=METHODS, run={"save_maps": "saved"})
    assert plain.csv == saving.csv
    assert plain.values() == saving.values()


# --- anybody's files ------------------------------------------------------------------------------


def test_an_image_without_a_map_fails_alone_with_the_reason() -> None:
    maps = toy_maps()
    missing, *_ = maps
    save({key: value for key, value in maps.items() if key != missing})
    explanation = explained()
    metric = registry.make("metrics", "sparseness")
    (_, status), *others = evaluated(metric, explanation)
    assert status == "failed: the files have no finite map of this image"
    assert [word for _, word in others] == ["ok", "ok"]
    assert torch.equal(explanation.saliency[1], maps[list(maps)[1]].double())


def test_a_map_of_another_size_is_refused_unless_an_upsampling_is_named() -> None:
    maps = toy_maps(7)
    save(maps)
    with pytest.raises(UsageError, match=r"is 7 x 7, but the image is 16 x 16: .* upsampling"):
        explained()
    found = explained(upsampling="bilinear").saliency
    like = toy_batch(3).images
    expected = upsample(torch.stack(list(maps.values())).double(), like)
    assert torch.equal(found, expected)


def test_a_map_with_colour_channels_is_refused() -> None:
    save({key: torch.rand(3, 16, 16) for key in toy_maps()})
    with pytest.raises(UsageError, match="is 3 x 16 x 16"):
        explained(upsampling="nearest")


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    save(toy_maps())

    def cell() -> str:
        (one,) = make_plan(suite_of(methods=["maps/here"], metrics=["mae"]), None).cells
        return one.id

    before = cell()
    Path("here/maps.safetensors").rename("here/other.safetensors")
    assert cell() == before
    Path("here/other.safetensors").unlink()
    save({key: value + 1 for key, value in toy_maps().items()})
    assert cell() != before


def test_a_pinned_hash_must_be_that_of_the_files() -> None:
    save(toy_maps())
    right = open_maps(Path("here")).sha256
    made = registry.make("methods", "maps/here", {"sha256": right})
    assert made == registry.make("methods", "maps/here")
    with pytest.raises(UsageError, match="have another SHA-256"):
        registry.make("methods", "maps/here", {"sha256": "0" * 64})


def test_maps_that_are_not_there_are_a_mistake_of_the_suite() -> None:
    with pytest.raises(UsageError, match="there are no maps in 'nowhere'"):
        suite_of(methods=["maps/nowhere"])
    Path("empty").mkdir()
    with pytest.raises(UsageError, match="there are no maps in 'empty'"):
        suite_of(methods=["maps/empty"])


@pytest.mark.parametrize("name", ["maps", "maps/", "maps/../here", "maps//here"])
def test_a_name_that_is_none_is_unknown(name: str) -> None:
    with pytest.raises(UsageError, match="unknown method"):
        registry.find("methods", name)


def test_any_path_can_be_given_beside_a_name() -> None:
    save(toy_maps(), "a folder")
    made = registry.make("methods", "maps/mine", {"path": "a folder"})
    assert registry.label(made) == "maps/mine"
    assert pickle.loads(pickle.dumps(made)) == made
    assert hash(made) == hash(registry.make("methods", "maps/mine", registry.parameters(made)))


def test_metrics_that_run_the_method_again_are_skipped_with_the_reason(
    run: Run, tmp_path: Path
) -> None:
    run(methods=["gradient"], metrics=["mae"], run={"save_maps": "saved"})
    name = "maps/saved/plug-noise/plug-tiny/gradient"
    outcome = run(methods=[name, {"name": "inverted", "of": name}], metrics=["coherency", "mae"])
    assert outcome.status == 0
    rows = outcome.table.set_index(["method", "metric"])
    for method in (name, f"inverted({name})"):
        assert rows.loc[(method, "coherency"), "status"] == "skipped"
        assert "its maps were made before" in rows.loc[(method, "coherency"), "reason"]
        assert rows.loc[(method, "mae"), "status"] == "ok"


def test_a_map_depends_on_its_own_image_only() -> None:
    save(toy_maps())
    whole = explained().raw
    model, batch = toy_model(), toy_batch(3)
    method = registry.make("methods", "maps/here")
    for at in (2, 0, 1):
        one = Probe(model, batch.part(slice(at, at + 1)), rows=2).explain(method)
        assert torch.equal(one.raw[0], whole[at])


def test_workers_read_the_maps_too(run: Run, tmp_path: Path) -> None:
    run(out=tmp_path / "made", methods=["gradient"], run={"save_maps": "saved", "workers": 2,
                                                          "slice": 5})  # fmt: skip
    name = "maps/saved/plug-noise/plug-tiny/gradient"
    alone = run(out=tmp_path / "one", methods=[name])
    team = run(out=tmp_path / "two", methods=[name], run={"workers": 2, "slice": 5})
    assert team.status == 0, team.err
    assert alone.values() == team.values()


def test_maps_of_an_earlier_store_are_kept_too(run: Run, tmp_path: Path) -> None:
    run(methods=["gradient"], run={"save_maps": "saved"})
    name = "maps/saved/plug-noise/plug-tiny/gradient"
    run(methods=[name])
    (group,) = Store(tmp_path / "out" / "store").groups()
    assert len(group.kept.parts()) >= 2
