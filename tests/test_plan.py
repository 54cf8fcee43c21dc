"""Laws of the plan: what a cell is called, what is missing, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import suite_of
from test_contract import CHEAP
from torch import Tensor

from xbench import registry
from xbench.document import Document
from xbench.engines import _restricted
from xbench.errors import Unsupported, UsageError
from xbench.plan import Cell, Outlay, Plan, make_plan
from xbench.probe import LayerGradient, Need, Probe
from xbench.runner import run_unit
from xbench.selection import select
from xbench.store import Store
from xbench.suite import Choice, Selection, load_suite
from xbench.types import Model, Network, Passes

pytestmark = pytest.mark.usefixtures("plugin")


def plan_of(data: Path | None = None, **changes: Any) -> Plan:
    return make_plan(suite_of(**changes), data)


def ids(**changes: Any) -> dict[tuple[str, str], str]:
    """Cell id by method's and metric's name."""
    return {(c.method.name, c.metric.name): c.id for c in plan_of(**changes).cells}


def only(**changes: Any) -> Cell:
    (cell,) = plan_of(**{"methods": ["grad_cam"], "metrics": ["average_drop"], **changes}).cells
    return cell


# --- identity -------------------------------------------------------------------------------------


def test_ids_are_sixteen_hex_digits_and_all_differ() -> None:
    found = list(ids().values())
    assert len(set(found)) == len(found) == 9
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in found)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"target": "label"},
        {"datasets": [{"name": "plug/noise", "images": 10, "count": 63}]},
        {"datasets": [{"name": "plug/noise", "images": 10, "masks": False}]},
        {"models": [{"name": "plug/tiny", "classes": 4}]},
        {"models": [{"name": "plug/tiny", "seed": 1}]},
        {"models": [{"name": "plug/tiny", "mean": [0.4, 0.5, 0.5]}]},
        {"methods": ["xgrad_cam"]},
        {"methods": [{"name": "grad_cam", "layer": "0"}]},
        {"metrics": ["average_gain"]},
        {"metrics": [{"name": "average_drop", "baseline": "blur"}]},
        {"metrics": [{"name": "average_drop", "sign": "positive"}]},
    ],
    ids=str,
)
def test_whatever_makes_the_numbers_is_in_the_id(change: dict[str, Any]) -> None:
    assert only(**change).id != only().id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"description": "of the suite"},
        {"run": {"batch_size": 7}},
        {"run": {"workers": 2}},
        {"run": {"slice": 3}},
        {"run": {"images": 5}},
        {"datasets": [{"name": "plug/noise", "images": 20}]},
        {"datasets": [{"name": "plug/noise", "label": "L"}]},
        {"models": [{"name": "plug/tiny", "label": "L"}]},
        {"methods": [{"name": "grad_cam", "label": "L"}]},
        {"metrics": [{"name": "average_drop", "label": "L"}]},
        {"exclude": [{"model": "vit*"}]},
    ],
    ids=str,
)
def test_what_makes_no_number_is_not_in_the_id(change: dict[str, Any]) -> None:
    assert only(**change).id == only().id


def test_other_entries_of_the_suite_are_not_in_the_id() -> None:
    more = ids(methods=["random", "gradient", "grad_cam"], metrics=["rcap", "average_drop"])
    assert more["grad_cam", "average_drop"] == only().id


@pytest.mark.parametrize(
    ("kind", "name"),
    [("methods", "grad_cam"), ("metrics", "average_drop"), ("models", "plug/tiny"),
     ("datasets", "plug/noise")],
)  # fmt: skip
def test_the_version_of_each_class_is_in_the_id(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = only().id
    monkeypatch.setattr(registry.find(kind, name), "version", 99, raising=False)
    assert only().id != before


def test_weights_are_in_the_id_by_their_content_not_by_their_path(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from xbench.models.resnet import resnet20

    state = {key: value.contiguous() for key, value in resnet20().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    state["linear.bias"] = state["linear.bias"] + 1
    save_file(state, tmp_path / "c.safetensors")

    def cell(name: str) -> str:
        model = {"name": "checkpoint", "architecture": "resnet20", "classes": 10,
                 "weights": str(tmp_path / name)}  # fmt: skip
        return only(models=[model]).id

    assert cell("a.safetensors") == cell("b.safetensors") != cell("c.safetensors")


def test_a_role_and_the_path_that_it_stands_for_are_one_layer() -> None:
    plan = plan_of(methods=["grad_cam", {"name": "grad_cam", "layer": "0"}])
    assert plan.groups[0].sketch.layers["last_conv"] == "3"


# --- selection ------------------------------------------------------------------------------------


def test_the_selection_of_fewer_images_begins_that_of_more(plugin: Path) -> None:
    source = registry.make("datasets", "plug/noise").open(None)
    ten, all_of_them = select(source, Selection(images=10), "d"), select(source, Selection(), "d")
    assert ten == all_of_them[:10]
    assert sorted(at for at, _ in all_of_them) == list(range(64))


def test_more_images_than_there_are_is_an_error() -> None:
    with pytest.raises(UsageError, match="'plug/noise' has 64 images, but 65 were asked for"):
        plan_of(datasets=[{"name": "plug/noise", "images": 65}])


# --- cost -----------------------------------------------------------------------------------------


def everything() -> tuple[list[Any], list[Any]]:
    """Built-in methods that spend what they declare, and a plug-in's; all built-in metrics.

    The contract looks at what the libraries' classes spend.
    """
    own = {
        name: {field.name for field in registry.fields(entry.load())}
        for name, entry in registry.entries("methods").items()
        if entry.origin.startswith("xbench.")
        and not entry.summary
        and not hasattr(entry.load(), "passes_bound")
    }
    methods: list[Any] = [name for name, fields in own.items() if "samples" not in fields]
    sampled = [{"name": name, "samples": 3} for name in own if name not in methods]
    metrics = [
        {"name": name, **CHEAP.get(name, {})}
        for name, entry in registry.entries("metrics").items()
        if entry.origin.startswith("xbench.") and not entry.summary
    ]
    # a method for transformers is skipped on a convolutional network
    methods = [n for n in methods if not hasattr(registry.find("methods", n), "architecture")]
    return [*methods, *sampled, "plug/two_gradients"], metrics


def test_every_cell_spends_alone_what_the_plan_says_of_it(tmp_path: Path) -> None:
    """Ten images in batches of four: the last one is filled up, and the filling is not counted.

    All methods with a metric that masks and one that runs them again; all metrics with a few.
    """
    methods, metrics = everything()
    plan = plan_of(methods=methods, metrics=metrics, run={"slice": 10})
    ((job, _),) = plan.jobs(Store(tmp_path))
    assert len(plan.cells) == len(methods) * len(metrics) > 100
    few = {"gradient", "grad_cam", "random", "plug/two_gradients"}
    for cell in plan.cells:
        if cell.method.name not in few and cell.metric.name not in ("average_drop", "coherency"):
            continue
        report = run_unit(_restricted(job, cell.id.__eq__))
        planned = plan.groups[0].outlay([cell])
        assert planned.unknown == 0
        words = f"{cell.method.label} x {cell.metric.label}"
        assert report.passes == planned.passes.times(10), words
        assert set(report.rows) <= {"ok", "degenerate"}, words


def test_a_method_that_stops_by_itself_spends_at_most_what_the_plan_says(tmp_path: Path) -> None:
    plan = plan_of(
        models=[{"name": "plug/tiny", "seed": 2}],
        methods=[{"name": "opti_cam", "learning_rate": 0.3}],
        metrics=["average_drop"],
        run={"slice": 10},
    )
    ((job, outlay),) = plan.jobs(Store(tmp_path))
    report = run_unit(job)
    assert outlay.is_bound
    # the clean image, the iterations, and the metric's masked image
    assert outlay.passes == Passes(1 + 50 + 1, 50).times(10)
    assert report.passes.forward < outlay.passes.forward
    assert report.passes.backward < outlay.passes.backward


def test_a_whole_suite_spends_what_the_plan_says_and_less_than_its_cells_alone(
    run: Callable[..., Any],
) -> None:
    methods, metrics = everything()
    outcome = run(methods=methods, metrics=metrics)
    passes = outcome.run["passes"]
    assert outcome.status == 0
    assert passes["planned"] == {
        "forward": passes["forward"], "backward": passes["backward"], "methods_unknown": 0,
        "is_bound": False,
    }  # fmt: skip
    alone = outcome.table[["forwards", "backwards"]].astype(int).sum() * 10
    assert 0 < passes["forward"] < alone["forwards"]
    assert 0 < passes["backward"] < alone["backwards"] / 3


BLACK = {"baseline": "black"}
PARTITIONS = {**BLACK, "steps": 10, "sign": "magnitude", "ties": "partition"}


def named(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, **params}


@pytest.mark.parametrize(
    ("metrics", "forwards"),
    [
        (["average_drop", "average_gain", "average_increase"], 1),
        ([named("average_drop", baseline=each) for each in ("black", "mean", "noise")], 3),
        ([named("average_drop", read=each) for each in ("probability", "logit")], 1),
        (["deletion", "morf"], 1 + 27),
        ([named("insertion", **BLACK), "lerf"], 1 + 27),
        (["deletion", "morf", "lerf", "abpc", named("insertion", **BLACK)], 1 + 2 * 27),
        ([named("deletion", area=each) for each in ("raw", "relative", "corrected")], 1 + 27),
        ([named("deletion", steps=each) for each in (4, 8, 12)], 1 + 3 + 4 + 8),  # quarters common
        (["rcap", "rcap_saliency", "rcap_probability"], 5),
        (["rcap", named("insertion", **PARTITIONS)], 1 + 9),
        (["lerf", named("average_drop", mask="top", sign="signed")], 1 + 27),
        (["road", "road_morf", "road_lerf"], 2 * 9),
        (["complexity"], 0),
    ],
    ids=str,
)
def test_metrics_that_mask_alike_share_their_forwards(
    metrics: list[Any], forwards: int, tmp_path: Path
) -> None:
    """The plan says so, and the count proves it; the baseline alone is forwarded once for all."""
    plan = plan_of(methods=["centre"], metrics=metrics, run={"slice": 10})
    ((job, outlay),) = plan.jobs(Store(tmp_path))
    assert outlay.passes == Passes(1 + forwards, 0).times(10)
    assert run_unit(job).passes == outlay.passes


def test_the_baseline_alone_is_forwarded_once_for_all_maps_and_metrics(tmp_path: Path) -> None:
    """Of curves in either direction, of any order of ties, and of a method that asks for it."""
    metrics: list[Any] = [named("deletion", steps=1), named("lerf", steps=1, ties="first")]
    metrics.append(named("insertion", steps=1, sign="magnitude", **BLACK))
    plan = plan_of(methods=["centre", "random", "score_cam"], metrics=metrics, run={"slice": 10})
    ((job, outlay),) = plan.jobs(Store(tmp_path))
    channels = run_unit(job).passes.forward // 10 - 2
    assert outlay.passes == Passes(1 + 1 + channels, 0).times(10)
    alone = plan_of(methods=["score_cam"], metrics=["complexity"], run={"slice": 10})
    assert alone.groups[0].outlay(alone.cells).passes == Passes(1 + 1 + channels, 0)


def test_running_a_method_again_is_part_of_the_plan(tmp_path: Path) -> None:
    methods: list[Any] = [named("smooth_grad", samples=3), "grad_cam", "random"]
    plan = plan_of(methods=methods, metrics=["coherency", "adcc"], run={"slice": 10})
    ((job, outlay),) = plan.jobs(Store(tmp_path))
    # the clean pass, the methods, once more for each on masked images, and the masked images
    first, again, masked = Passes(1 + 3, 1 + 3), Passes(4 + 1 + 1, 3 + 1), Passes(3, 0)
    assert outlay.passes == first.plus(again).plus(masked).times(10)
    assert run_unit(job).passes == outlay.passes


def test_the_passes_of_a_method_that_declares_none_are_unknown() -> None:
    plan = plan_of(methods=["plug/ramp", "gradient"])
    assert plan.groups[0].outlay(plan.cells).unknown == 1


def test_passes_that_cannot_be_told_for_a_model_are_unknown_and_the_others_are_planned() -> None:
    group = plan_of(methods=["gradient", "grad_cam"]).groups[0]
    known = group.outlay(group.cells)

    def untold(self: Any, model: Model) -> Passes:
        raise Unsupported("the layer cannot be recorded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerGradient, "passes", untold)
        assert group.outlay(group.cells) == Outlay(known.passes, unknown=1)


def test_jobs_cover_every_missing_score_once_and_nothing_stored(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    run(methods=["gradient"], out=tmp_path / "out")
    plan = plan_of()
    jobs = [job for job, _ in plan.jobs(Store(tmp_path / "out" / "store"))]
    asked = [
        (cell, key)
        for job in jobs
        for cells, images in job.portions
        for cell, _, metric in cells
        if isinstance(metric, Choice)
        for _, key in images
    ]
    missing = {c.id for c in plan.cells if c.method.name != "gradient"}
    keys = {key for _, key in plan.groups[0].images}
    assert len(asked) == len(set(asked)) == sum(job.scores for job in jobs)
    assert set(asked) == {(cell, key) for cell in missing for key in keys}
    assert [job.images for job in jobs] == [8, 2]


# --- refusals -------------------------------------------------------------------------------------


def test_a_layer_that_the_network_lacks_is_refused_with_its_roles() -> None:
    with pytest.raises(
        UsageError,
        match=r"model 'plug/tiny' has no layer 'layer5' \(asked for by .*its roles are last_conv",
    ):
        plan_of(methods=[{"name": "grad_cam", "layer": "layer5"}])


def test_a_layer_path_of_the_network_is_taken() -> None:
    assert only(methods=[{"name": "grad_cam", "layer": "1"}]).skipped == ""


def test_weights_that_are_not_there_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = {"name": "checkpoint", "architecture": "resnet20", "weights": "no.safetensors"}
    with pytest.raises(UsageError, match=r"weights 'no.safetensors' do not exist.*--data DIR"):
        plan_of(models=[model], data=tmp_path)


def test_an_architecture_that_nobody_knows_is_refused_with_a_suggestion() -> None:
    model = {"name": "checkpoint", "architecture": "resnet21", "weights": "w"}
    with pytest.raises(UsageError, match=r"'resnet21'; did you mean 'resnet20'"):
        plan_of(models=[model])


def test_a_network_that_cannot_take_these_images_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"")
    model = {"name": "checkpoint", "architecture": "torchvision/vit_b_16", "label": "ViT",
             "weights": str(tmp_path / "w.safetensors")}  # fmt: skip
    with pytest.raises(UsageError, match=r"model 'ViT' cannot take images of 16 x 16"):
        plan_of(models=[model])


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no GPU; use --device cpu"):
        plan_of(run={"device": "cuda:3"})


def test_a_metric_that_needs_masks_is_skipped_where_there_are_none() -> None:
    plan = plan_of(datasets=[{"name": "plug/noise", "masks": False}])
    skipped = {c.metric.name: c.skipped for c in plan.cells if c.skipped}
    assert skipped == {"mae": "data set 'plug/noise(masks=False)' has no object masks"}
    assert "mae" not in {c.metric.name for c in plan.groups[0].active}


def test_a_suite_that_excludes_all_its_cells_is_refused() -> None:
    with pytest.raises(UsageError, match="no cell is left"):
        plan_of(exclude=[{"method": "*"}])


# --- the pinned forward shape ---------------------------------------------------------------------


def test_the_first_forward_shape_of_a_group_stays_and_a_notice_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert plan_of(run={"batch_size": 4}).pin(store) == []
    (notice,) = plan_of(run={"batch_size": 7}).pin(store)
    assert "was begun with batch size 4, which stays" in notice
    ((job, _), *_) = plan_of(run={"batch_size": 7}).jobs(store)
    assert job.rows == 4
    assert plan_of(run={"batch_size": "auto"}).pin(store) == []


def test_the_automatic_shape_is_no_larger_than_a_slice() -> None:
    suite = load_suite(Document({**suite_of().resolved(), "run": {"slice": 5}}, "s", {}))
    assert make_plan(suite, None).shape() == {"rows": 5, "threads": 1}


@pytest.mark.usefixtures("own_names")
def test_a_models_own_parameters_are_in_the_id_also_where_its_weights_are_the_same() -> None:
    @registry.model("warm")
    class Warm:
        """A network whose logits a parameter scales."""

        temperature: float = 1.0

        def describe(self, data: Path | None) -> Network:
            return registry.make("models", "plug/tiny").describe(data)  # type: ignore[no-any-return]

    cold, hot = (ids(models=[{"name": "warm", "temperature": t}]) for t in (1.0, 9.0))
    assert not set(cold.values()) & set(hot.values())


@pytest.mark.usefixtures("own_names")
def test_a_layer_that_any_field_names_is_resolved_before_anything_runs() -> None:
    @registry.method("elsewhere")
    class Elsewhere:
        """A layer under another name than the CAMs'."""

        block: str = "last_conv"

        @property
        def needs(self) -> tuple[Need[Any], ...]:
            return (LayerGradient(self.block),)

        def __call__(self, probe: Probe) -> Tensor:
            return probe[LayerGradient(self.block)][0].mean(1)

    assert ids(methods=["elsewhere"])
    with pytest.raises(UsageError, match=r"no layer 'layer9' \(asked for by elsewhere"):
        plan_of(methods=[{"name": "elsewhere", "block": "layer9"}])


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    missing: dict[str, Any] = {
        "datasets": ["plug/noise", "cifar100", "cub200"],
        "models": [
            "plug/tiny",
            {"name": "checkpoint", "weights": "gone.pt", "architecture": "resnet20"},
        ],
    }
    with pytest.raises(UsageError) as refused:
        make_plan(suite_of(**missing), tmp_path)
    lines = str(refused.value).splitlines()
    for line, word in zip(lines, ("'cifar100'", "'cub200'", "'gone.pt'"), strict=True):
        assert word in line
