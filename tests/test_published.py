"""Laws of the published tables: what is printed, which suites measure it, and what is concluded."""

from __future__ import annotations

import functools
import html
import io
import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Answer, suite_of
from PIL import Image
from safetensors.torch import save_file

from xbench import published, registry
from xbench.errors import UsageError
from xbench.models.architectures import architecture
from xbench.plan import make_plan
from xbench.published import Claim, printed_verdicts, tables
from xbench.published.printed import ACCURACY, HERE, better_of
from xbench.suite import Suite, load_suite, read_suite
from xbench.tables import Results
from xbench.training.recipe import load_recipe, read_recipe

GAG = [f"guided-absolutegrad/table{n}" for n in (1, 2, 3)]
IG = [f"interpretable-gradients/table{n}" for n in (1, 2, 3, 4)]
Command = Callable[..., Answer]


@functools.cache
def built_in(name: str) -> Suite:
    return load_suite(read_suite(name))


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), zip(GAG + IG, [99, 154, 55, 4, 100, 30, 54], strict=True)
)
def test_every_printed_number_is_there_once(name: str, count: int) -> None:
    printed = tables()[name].printed
    assert len(printed) == count
    assert all(math.isfinite(float(value)) for value in printed.values())
    rows = (HERE / tables()[name].values).read_text().splitlines()
    assert len(rows) == count + 1  # no two rows share a key


def test_some_numbers_are_those_of_the_papers() -> None:
    def of(name: str, *key: str) -> float:
        return tables()[name].value(key)  # type: ignore[arg-type]

    assert of(GAG[1], "ImageNet-S", "ResNet-50", "GAG", "RCAP") == 0.4377
    assert of(GAG[2], "Places365", "DenseNet-161", "GA", "RCAP") == 3.32
    place = ("CIFAR-100", "MobileNet-V2, ours", "Score-CAM")
    assert of(IG[1], *place, "AD") == 36.34  # percent is the metric's own unit
    assert of(IG[1], *place, "INS") == pytest.approx(0.4635)  # but an area is a share
    assert tables()[IG[1]].digits((*place, "INS")) == 4


def test_directions_are_those_of_the_metrics_that_measure_them() -> None:
    for name in GAG + IG:
        for choice in built_in(name).metrics:
            row = published.row_of(choice.label)
            if any(key[3] == row for key in tables()[name].printed):
                assert choice.make().better == better_of(row), (name, row)


@pytest.mark.parametrize("name", GAG + IG)
def test_every_pattern_of_a_doubt_and_every_name_of_a_claim_is_printed(name: str) -> None:
    table = tables()[name]
    for doubt in table.doubts:
        assert any(doubt.is_about(key) for key in table.printed), doubt.words
    methods = {key[2] for key in table.printed}
    models = {key[1] for key in table.printed}
    for claim in table.claims:
        named = {one for pair in claim.pairs() for one in pair} | set(
            map(published.row_of, claim.improves)
        )
        assert named <= (models if claim.of == "model" else methods), claim.words
        assert set(claim.metrics) <= {key[3] for key in table.printed}
        assert set(claim.datasets) <= {key[0] for key in table.printed}
        assert named


@pytest.mark.parametrize("name", GAG + IG)
def test_every_printed_cell_has_a_cell_of_the_suite_and_only_the_ratios_of_it(name: str) -> None:
    suite, table = built_in(name), tables()[name]
    rows = {
        (d.label, m.label, published.row_of(x.label), published.row_of(k.label))
        for d in suite.datasets
        for m in suite.models
        for x in suite.methods
        for k in suite.metrics
        if not suite.excludes(d, m, x, k)
    }
    wanted = {key for key in table.printed if key[3] != ACCURACY}
    if table.ratios:
        wanted = {
            (*key[:2], one, key[3])
            for key in wanted
            for pair in table.ratios[key[2]]
            for one in pair
        }
    assert wanted <= rows
    cells = [  # no printed cell has two methods: settings behind a comma are of one data set each
        (d.label, m.label, published.row_of(x.label))
        for d in suite.datasets
        for m in suite.models
        for x in suite.methods
        if not all(suite.excludes(d, m, x, k) for k in suite.metrics)
    ]
    assert len(cells) == len(set(cells))


@pytest.mark.parametrize("name", IG)
def test_the_networks_of_a_suite_are_where_training_leaves_them(name: str) -> None:
    left = {}
    for recipe in map(
        load_recipe, map(read_recipe, ("cifar100-resnet18", "cifar100-mobilenet-v2"))
    ):
        for variant in (None, *recipe.variants):
            label = variant or recipe.regulariser["name"]
            folder = f"training/{recipe.name}-{label}-seed{recipe.seed}"
            left[f"{folder}/weights.safetensors"] = recipe.architecture
    for choice in built_in(name).models:
        params = dict(choice.params)
        assert left[params["weights"]] == params["architecture"]


# --- what papers claim of their own numbers -------------------------------------------------------


def test_the_printed_tables_contradict_what_the_specifications_say_they_do() -> None:
    found = {name: [v.printed for v in printed_verdicts(name)] for name in GAG + IG}
    assert found == {
        GAG[0]: ["holds", "holds", "fails", "fails"],
        GAG[1]: ["holds", "holds", "holds", "holds", "holds", "fails"],
        GAG[2]: ["undecided", "fails", "holds", "holds", "-", "-"],
        IG[0]: ["fails", "holds"],
        IG[1]: ["holds", "holds", "holds", "holds"],
        IG[2]: ["holds", "fails", "fails", "holds", "fails", "holds"],
        IG[3]: ["holds", "holds", "fails"],
    }
    reversed_ = printed_verdicts(GAG[1])[-1]
    assert reversed_.printed_counts == (53, 2, 0)
    assert reversed_.against_printed == (
        "IG against IG-R in RCAP, ISIC", "GB against GB-R in RCAP, ISIC",
    )  # fmt: skip
    assert printed_verdicts(GAG[0])[2].against_printed == (
        "GAG-15 against GAG-0 in MAE, ImageNet-S",
    )
    assert all(v.measured == "-" for name in GAG + IG for v in printed_verdicts(name))


def test_a_chain_compares_neighbouring_steps_and_a_step_all_its_members() -> None:
    claim = Claim(words="", metrics=["x"], order=[["a", ["b", "c"], "d"], ["e", "f"]])
    assert list(claim.pairs()) == [
        ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("e", "f"),
    ]  # fmt: skip


# --- made-up scores with a known answer -----------------------------------------------------------


def results(suite: Suite, rows: dict[tuple[str, str, str, str], Sequence[float]]) -> Results:
    """As if these scores were stored; the network is right in the first three of four images."""
    frames = []
    for (dataset, model, method, metric), scores in rows.items():
        count = len(scores)
        wrong = [int(at % 4 == 3) for at in range(count)]
        frames.append(
            pd.DataFrame(
                {
                    "dataset": dataset, "model": model, "method": method, "metric": metric,
                    "image": [f"{at:04d}" for at in range(count)], "value": scores,
                    "status": "ok", "label": 0, "predicted": wrong,
                }
            )
        )  # fmt: skip
    groups = [_Group(d, m) for d in suite.datasets for m in suite.models if suite.pairs(d, m)]
    plan: Any = _Plan(suite, groups)
    nothing: Any = None
    return Results(nothing, pd.concat(frames, ignore_index=True), pd.DataFrame(), (), {}, plan=plan)


class _Group:
    def __init__(self, dataset: Any, model: Any) -> None:
        self.dataset, self.model = dataset, model


class _Plan:
    def __init__(self, suite: Suite, groups: Any) -> None:
        self.suite, self.groups = suite, groups


PLACE = ("CIFAR-100", "ResNet-18, baseline")


def camlike(seed: int, mean: float, spread: float = 5.0, count: int = 400) -> list[float]:
    stream = np.random.default_rng(seed)
    return list(stream.normal(mean, spread, count))


def test_a_printed_number_is_inside_if_its_digits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = built_in(IG[1])
    near, far = camlike(0, 30.16), camlike(1, 50.0)
    found = published.values(
        results(
            suite,
            {
                (*PLACE, "Grad-CAM", "AD"): near,
                (*PLACE, "Grad-CAM", "AD, mean colour"): far,
                (*PLACE, "Grad-CAM", "INS"): [0.58471, 0.58469] * 200,
            },
        )
    )
    measured = {(v.method, v.metric, v.label): v for v in found if not math.isnan(v.measured)}
    as_text = measured["Grad-CAM", "AD", ""]
    assert as_text.inside is True
    assert as_text.measured == pytest.approx(np.mean(near))
    assert as_text.low < as_text.measured < as_text.high
    assert as_text.difference == pytest.approx(np.mean(near) - 30.16)
    assert measured["Grad-CAM", "AD", "AD, mean colour"].inside is False
    shares = measured["Grad-CAM", "INS", ""]
    assert shares.published == pytest.approx(0.5847)
    assert shares.inside is True  # the interval is narrower than the last digit
    assert len(measured) == 3
    assert len(found) == 100 + 1  # one column has two readings


def test_accuracy_comes_from_predictions_and_a_margin_needs_its_interval() -> None:
    suite = built_in(IG[0])
    rows = {
        ("CIFAR-100", m.label, "gradient", "degenerate_maps"): [0.0] * 400 for m in suite.models
    }
    made = results(suite, rows)
    assert {(v.measured, v.images) for v in published.values(made)} == {(75.0, 400)}
    within, improved = published.verdicts(made)
    assert (within.printed, within.measured) == ("fails", "holds")
    assert (improved.printed, improved.measured) == ("holds", "undecided")


@pytest.mark.parametrize(
    ("shift", "expected"), [(4.0, "holds"), (-4.0, "fails"), (0.02, "undecided")]
)
def test_an_order_takes_evidence_either_way(shift: float, expected: str) -> None:
    suite = built_in(IG[1])
    rows = {}
    for model in suite.models:
        for at, method in enumerate(suite.methods):
            for column in ("AD", "AG", "AI", "INS", "DEL"):
                scores = np.array(camlike(at, 30.0))
                gain = shift * (method.label == "Score-CAM")
                scores = scores - gain if column == "AD" else scores + gain
                rows["CIFAR-100", model.label, method.label, column] = list(scores)
    *_, best = published.verdicts(results(suite, rows))
    assert best.measured == expected
    assert sum(best.measured_counts) == 48
    assert best.missing == 0


def test_what_is_missing_leaves_a_claim_open_but_never_hides_a_contradiction() -> None:
    suite = built_in(IG[1])
    place = [(*PLACE, method, "AD") for method in ("Score-CAM", "Grad-CAM")]
    good = results(suite, dict(zip(place, [camlike(0, 20.0), camlike(1, 30.0)], strict=True)))
    bad = results(suite, dict(zip(place, [camlike(0, 30.0), camlike(1, 20.0)], strict=True)))
    *_, best = published.verdicts(good)
    assert (best.measured, best.measured_counts, best.missing) == ("undecided", (1, 0, 0), 47)
    *_, best = published.verdicts(bad)
    assert best.measured == "fails"
    assert best.against_measured == ("Score-CAM against Grad-CAM in AD, CIFAR-100",)


def test_ratios_are_means_of_ratios_of_means_with_and_without_the_doubtful_row() -> None:
    suite = built_in(GAG[2])
    place = ("ISIC", "EfficientNet-B4")
    methods = [
        x.label for x in suite.methods
        if not suite.excludes(suite.datasets[1], suite.models[1], x, suite.metrics[2])
    ]  # fmt: skip
    means = {label: 0.2 + 0.01 * at for at, label in enumerate(methods)}
    rows = {(*place, label, "RCAP"): [mean - 0.1, mean + 0.1] * 50 for label, mean in means.items()}
    found = published.values(results(suite, rows))
    named = {published.row_of(label): mean for label, mean in means.items()}
    bases = ("SG", "IG", "Guided IG", "BlurIG")
    four = [named[f"{base} +"] / named[base] for base in bases]
    by_label = {
        v.label: v for v in found if (v.dataset, v.method, v.metric) == ("ISIC", "+", "RCAP")
    }
    assert by_label["+, without GB"].measured == pytest.approx(np.mean(four))
    assert by_label[""].measured == pytest.approx(np.mean([*four, named["GB"] / named["VG"]]))
    assert by_label[""].low < by_label[""].measured < by_label[""].high
    assert by_label[""].published == 1.0
    verdicts = {v.words: v for v in published.verdicts(results(suite, rows))}
    guided = verdicts["The variance guide improves RCAP on every data set"]
    assert (guided.measured_counts, guided.missing) == ((1, 0, 0), 2)
    assert guided.measured == "undecided"


def test_a_suite_without_a_printed_table_names_those_that_have_one(plugin: Path) -> None:
    with pytest.raises(UsageError, match=r"no published numbers belong to suite 'small'; they do"):
        published.table_of(suite_of())


def test_what_a_suite_has_changed_is_said() -> None:
    settings = [
        ("datasets.1.images", 7, "--set"),
        ("methods.0.layer", "layer3", "--set"),
        ("models.0", {"name": "shapes/resnet", "label": "ResNet-50"}, "--set"),
        ("target", "predicted", "--set"),
    ]
    suite = load_suite(read_suite(GAG[1]), settings)
    assert published.deviations(suite) == [
        "ResNet-50 is shapes/resnet, not torchvision/resnet50",
        "Grad-CAM, ImageNet-S has other layer",
        "ISIC has another selection of images",
        "the predicted class is explained, not the label",
    ]
    assert published.deviations(built_in(GAG[1])) == []


# --- the suites, end to end on small stand-ins ----------------------------------------------------

STAND_INS = '''
"""Networks of a few channels, with the module paths that the suites name."""

import torch
from torch import nn

import xbench


def network(classes, path, rectifier):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), rectifier(), nn.Conv2d(6, 8, 3, 2, 1), rectifier()
        )
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    net = nn.Sequential()
    inner = net
    *outer, last = path.split(".")
    for name in outer:
        inner.add_module(name, nn.Sequential())
        inner = inner.get_submodule(name)
    inner.add_module(last, body)
    net.add_module("head", head)
    return net


@xbench.model("stand/in")
class StandIn:
    """As small as a network can be."""

    classes: int
    path: str
    smooth: bool = False

    def describe(self, data):
        return xbench.Network(
            build=lambda: network(self.classes, self.path, nn.SiLU if self.smooth else nn.ReLU),
            weights=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layers={},
        )
'''


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "stand_in.py"
    path.write_text(STAND_INS)
    registry.load_plugin(str(path))
    return path


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Replicas of all data sets in their own layouts, a few pictures each."""
    home = tmp_path / "data"
    tench, goldfish = "n01440764", "n01443537"
    from xbench.datasets import imagenet

    wnids = list(imagenet.classes().labels)[:50]
    root = home / "ImageNetS50"
    root.mkdir(parents=True)
    (root / "categories.txt").write_text("\n".join(wnids))
    for at, wnid in enumerate((tench, goldfish)):
        picture(root / "validation" / wnid / "a.JPEG", at)
        ids = np.zeros((48, 40, 3), dtype=np.uint8)
        ids[10:30, 10:30, 0] = wnids.index(wnid) + 1
        mask = root / "validation-segmentation" / wnid / "a.png"
        mask.parent.mkdir(parents=True)
        Image.fromarray(ids).save(mask)
    for at in (1, 2):
        picture(home / f"isic/train/ISIC_{at}.jpg", at)
        picture(home / f"places365/val_256/Places365_val_{at:08d}.jpg", at)
    (home / "isic/ISIC_2020_Training_GroundTruth.csv").write_text(
        "image_name,diagnosis\nISIC_1,nevus\nISIC_2,melanoma\n"
    )
    (home / "places365/categories_places365.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    (home / "places365/places365_val.txt").write_text(
        "Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n"
    )
    stream = np.random.default_rng(0)
    folder = home / "cifar-100-python"
    folder.mkdir()
    names = [f"class_{at:02d}" for at in range(100)]
    content = {
        "filenames": [f"{at}.png" for at in range(4)],
        "batch_label": "testing batch 1 of 1",
        "fine_labels": [3, 5, 99, 0],
        "coarse_labels": [1, 1, 2, 0],
        "data": stream.integers(0, 256, (4, 3072), dtype=np.uint8),
    }
    (folder / "test").write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": names, "coarse_label_names": names[:20]}, 2)
    )
    return home


def small_networks(suite: Suite, data: Path) -> list[str]:
    """Fresh ResNet-20s where a suite looks for trained networks, and the settings to take them."""
    for seed, choice in enumerate(suite.models):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = architecture("resnet20")(100)
        file = data / str(dict(choice.params)["weights"])
        file.parent.mkdir(parents=True)
        save_file(net.state_dict(), file)
    networks = [f"models.{at}.architecture=resnet20" for at in range(len(suite.models))]
    return [*networks, "datasets.0.images=2"]


NETWORKS = [
    "models.0={name: stand/in, label: ResNet-50, classes: 1000, path: layer4}",
    "models.1={name: stand/in, label: EfficientNet-B4, classes: 9, path: blocks.6, smooth: true}",
    "models.2={name: stand/in, label: DenseNet-161, classes: 2, path: features.denseblock4}",
]
PICTURES = [
    "datasets.0.variant=50", "datasets.0.categories=categories.txt", "datasets.0.resize=[32, 32]",
    "datasets.0.images=2", "datasets.0.min_confidence=0.0001",
    "datasets.1.resize=[32, 32]", "datasets.1.images=2",
    "datasets.2.resize=[32, 32]", "datasets.2.crop=null", "datasets.2.images=2",
    "datasets.2.min_confidence=0.0001",
]  # fmt: skip


@pytest.mark.parametrize("name", GAG + IG)
def test_every_suite_runs_on_stand_ins_and_is_set_beside_its_table(
    name: str, stand_in: Path, data: Path, tmp_path: Path, command: Command
) -> None:
    suite = built_in(name)
    settings = NETWORKS + PICTURES if name in GAG else small_networks(suite, data)
    common: list[Any] = ["--data", data, "--out", tmp_path / "out", "--plugin", stand_in]
    common += [word for setting in settings for word in ("--set", setting)]
    common += ["--device", "cpu", "--workers", "1", "--batch-size", "8"]
    ran = command("run", name, "-q", *common)
    assert ran.status == 0, ran.err
    facts = json.loads(command("table", name, "--published", "--format", "json", *common).out)
    printed = {(v["dataset"], v["model"], v["method"], v["metric"]) for v in facts["values"]}
    assert printed == set(tables()[name].printed)
    lacking = [v for v in facts["values"] if v["measured"] is None]
    assert not lacking
    assert facts["deviations"]
    assert [claim["words"] for claim in facts["claims"]] == [c.words for c in tables()[name].claims]
    assert {claim["measured"] for claim in facts["claims"]} <= {"holds", "fails", "undecided"}
    page = next((tmp_path / "out").rglob("index.html")).read_text(encoding="utf-8")
    shown = html.unescape(page[page.index("Published beside measured</h2>") :].replace("<wbr>", ""))
    assert f"<p>{tables()[name].title}: printed and measured" in shown
    assert shown.count('<th scope="row">') >= len(facts["values"]) + len(facts["claims"])
    assert all(f'<th scope="row">{claim["words"]}</th>' in shown for claim in facts["claims"])
    if name != IG[0]:
        return
    assert command("plan", name, *common).status == 0
    text = command("table", name, "--published", *common).out
    assert "Interpretable gradients, Table 1 (arXiv:2404.15024): printed and measured" in text
    assert "Not the suite of the table: ResNet-18, baseline has other architecture" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["CIFAR-100", "ResNet-18,", "ours", "ACC", "72.86"] in [line[:5] for line in lines]
    assert (
        command("table", name, "--published", "--format", "md", *common).out.count(
            "| `CIFAR-100` |"
        )
        == 4
    )
    latex = command("table", name, "--published", "--format", "latex", *common).out
    assert "CIFAR-100 & ResNet-18, ours &" in latex
    assert "& 72.86 &" in latex
    table = pd.read_csv(
        io.StringIO(command("table", name, "--published", "--format", "csv", *common).out)
    )
    assert len(table) == 4


@pytest.mark.parametrize("name", GAG + IG)
def test_without_data_a_plan_says_what_to_put_where(
    name: str, tmp_path: Path, command: Command
) -> None:
    answer = command("plan", name, "--data", tmp_path)
    assert answer.status == 2
    wanted = "ImageNetS919" if name in GAG else "cifar-100-python"
    assert wanted in answer.err


def test_without_trained_networks_a_plan_names_the_file(data: Path, command: Command) -> None:
    answer = command("plan", IG[1], "--data", data)
    assert answer.status == 2
    assert "training/cifar100-resnet18-none-seed0/weights.safetensors' do not exist" in answer.err


def test_a_pair_that_every_cell_excludes_is_not_looked_at(plugin: Path) -> None:
    suite = suite_of(
        models=["plug/tiny", {"name": "plug/tiny", "label": "other", "classes": 4}],
        exclude=[{"dataset": "plug/noise", "model": "other"}],
    )
    assert [group.model.label for group in make_plan(suite, None).groups] == ["plug/tiny"]
    partly = replace(
        suite, exclude=({"dataset": "*", "model": "other", "method": "random", "metric": "*"},)
    )
    assert len(make_plan(partly, None).groups) == 2
