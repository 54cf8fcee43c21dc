"""The page: whole, harmless whatever names say, and the same for the same results."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import suite_file, suite_of
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import xbench
from xbench import plot, registry, report
from xbench.errors import UsageError
from xbench.noise import stream_keys, uniform
from xbench.plan import make_plan
from xbench.report import page as pages
from xbench.report import pictures
from xbench.report.intervals import axis, intervals
from xbench.report.svg import Drawn
from xbench.sheets import write
from xbench.store import COLUMNS, Piece, Store, kept_table
from xbench.suite import Suite
from xbench.tables import collect
from xbench.views import View, sheets

ATTACK = "<script>alert(1)</script>"
SPITE = f"\"'><img src=x onerror=alert(2)>{ATTACK} $\\frac$ {{{{ 7*7 }}}}"
CLOSING = "</script><img src=x onerror=alert(3)>`<b>|[x](javascript:alert(4))\\"
FORMULA = "=cmd() @SUM(A1)"


class Spite:
    """Pictures whose keys and classes want to be markup."""

    classes = (ATTACK, SPITE, CLOSING)
    revision = "1"
    size = (16, 16)
    has_masks = True
    ids = tuple(f"{at}" for at in range(10))

    def key(self, index: int) -> str:
        return f"{FORMULA}{CLOSING}{index}"

    def load(self, indices: Sequence[int]) -> list[xbench.Sample]:
        found = []
        for index in indices:
            key = stream_keys(0, [self.key(index)], "picture")
            mask = torch.zeros(16, 16)
            mask[4:10, 4:10] = 1
            image = uniform(key, 3 * 256).view(3, 16, 16)
            found.append(xbench.Sample(image, index % 3, mask))
        return found


@xbench.dataset("report-test/spite")
class SpiteData:
    """See Spite."""

    version: ClassVar[int] = 1

    def open(self, data: Path | None) -> Spite:
        return Spite()


class Failing:
    """Fails with words that want to be markup."""

    def __call__(self, probe: xbench.Probe) -> torch.Tensor:
        raise ValueError(f"{CLOSING} {ATTACK} {SPITE}")


def spiteful_suite() -> Suite:
    """Registers its failing method only now: tests of all methods must not meet it."""
    if "report-test/failing" not in registry.entries("methods"):
        xbench.method("report-test/failing")(Failing)
    return suite_of(**WANTED)


WANTED: dict[str, Any] = {
    "name": "spite",
    "datasets": [{"name": "report-test/spite", "label": CLOSING, "images": 10}],
    "models": ["plug/tiny", {"name": "plug/tiny", "seed": 1, "label": f"tiny {ATTACK}"}],
    "methods": [
        "gradient",
        "grad_cam",
        {"name": "gradient", "channels": "sum", "label": ATTACK},
        {"name": "gradient", "channels": "max", "label": SPITE},
        "attention_rollout",
        {"name": "report-test/failing", "label": FORMULA},
        "random",
    ],
    "metrics": [
        {"name": "average_drop", "label": f"=cmd {ATTACK}"},
        {"name": "deletion", "steps": 4},
        "rcap",
    ],
}


class Elements(HTMLParser):
    """Start tags with their attributes, and the texts of scripts and style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.shown: list[str] = []
        self._within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in self.texts:
            self.texts[self._within].append(data)
        else:
            self.shown.append(data)

    def values(self, *names: str) -> Iterator[str]:
        for _, attributes in self.found:
            for name in names:
                if (value := attributes.get(name)) is not None:
                    yield value


@pytest.fixture(scope="module")
def spiteful(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The page of a run whose every name wants to be markup; and where its store is."""
    from xbench.run import run_suite

    out = tmp_path_factory.mktemp("spite")
    assert run_suite(spiteful_suite(), data=None, out=out, quiet=True) == 3  # one method fails
    return page_of(out), out


def page_of(out: Path, examples: int = 4, **changes: Any) -> str:
    store = Store(out / "store")
    plan = make_plan(suite_of(**{**WANTED, **changes}), None).selected(store)
    return report.html(collect(plan, store), store, examples=examples)


def test_no_name_becomes_an_element_an_attribute_or_a_script(spiteful: tuple[str, Path]) -> None:
    text, _ = spiteful
    page = Elements(text)
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 2
    assert tags.count("b") == 0
    assert all(f"{image['src']}".startswith("data:") for tag, image in page.found if tag == "img")
    assert ATTACK not in text
    assert CLOSING not in text
    assert all("alert(" not in script for script in page.texts["script"][1:])
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    shown = "".join(page.shown)
    assert ATTACK in shown
    assert "{{ 7*7 }}" in shown
    assert "$\\frac$" in shown
    for words in (CLOSING, FORMULA, f"error: ValueError: {CLOSING} {ATTACK}"):
        assert words in shown


def test_figures_hold_names_as_text(spiteful: tuple[str, Path]) -> None:
    figures = [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", spiteful[0], re.DOTALL)
    ]
    texts = {element.text for figure in figures for element in figure.iter("text")}
    assert {ATTACK, SPITE} <= texts
    assert not {"script", "img", "b"} & {
        element.tag for figure in figures for element in figure.iter()
    }


def test_no_name_becomes_an_element_or_a_link_in_markdown(spiteful: tuple[str, Path]) -> None:
    out = spiteful[1]
    (folder,) = (out / "runs").iterdir()
    written = (folder / "table.md").read_text(encoding="utf-8")
    results = collect(make_plan(suite_of(**WANTED), None), Store(out / "store"))
    others: list[View] = ["pivot", "pairs", "between-models", "agreement"]
    for text in (written, *(write(sheets(results, view), "md") for view in others)):
        page = Elements(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
        assert {"table", "td", "code"} <= {tag for tag, _ in page.found}
        assert not {"script", "img", "a", "b"} & {tag for tag, _ in page.found}
        assert ATTACK in "".join(page.shown)


@pytest.mark.parametrize("name", [ATTACK, FORMULA, "../spite", 'a"b'])
def test_a_suite_cannot_be_called_so(name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        suite_of(name=name)


def test_every_link_stays_on_the_page(spiteful: tuple[str, Path]) -> None:
    page = Elements(spiteful[0])
    ids = list(page.values("id"))
    assert len(ids) == len(set(ids))
    for link in page.values("href", "src", "xlink:href"):
        assert link.startswith(("#", "data:"))
        if link.startswith("#"):
            assert link[1:] in ids, link
    for name in re.findall(r"url\(#([^)]+)\)", spiteful[0]):
        assert name in ids


def test_the_policy_lets_only_the_page_s_own_style_and_script_work(
    spiteful: tuple[str, Path],
) -> None:
    page = Elements(spiteful[0])
    (policy,) = (a["content"] for t, a in page.found if a.get("http-equiv"))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    (style,) = page.texts["style"]
    script = page.texts["script"][-1]
    for key, code in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[key] == f"'sha256-{digest}'"


def test_each_cell_has_its_id_its_mean_and_interval_or_the_reason_for_none(
    spiteful: tuple[str, Path],
) -> None:
    text, out = spiteful
    store = Store(out / "store")
    results = collect(make_plan(suite_of(**WANTED), None), store)
    ids = set(Elements(text).values("id"))
    assert {f"cell-{cell}" for cell in results.table["cell"]} <= ids
    row = results.table[results.table["method"] == "grad_cam"].iloc[-1]
    assert f'data-order="{float(row["mean"])!r}"' in text
    assert text.count("skipped<") >= 3
    assert "the network shows no attention" in text


def test_the_download_is_the_table_without_a_formula(spiteful: tuple[str, Path]) -> None:
    text, out = spiteful
    (link,) = (
        a["href"] for _, a in Elements(text).found if (a.get("href") or "").startswith("data:text")
    )
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(str(link).split(",")[1]).decode())))
    table = collect(make_plan(suite_of(**WANTED), None), Store(out / "store")).table
    assert [row["cell"] for row in rows] == table["cell"].tolist()
    assert [row["mean"] for row in rows] == [
        "" if np.isnan(mean) else f"{mean:.6f}" for mean in table["mean"]
    ]
    for row in rows:
        for key in row:
            if key in ("mean", "std", "ci_low", "ci_high"):
                continue
            assert not row[key].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert any(row["metric"] == f"'=cmd {ATTACK}" for row in rows)


def test_the_same_results_give_the_same_page(spiteful: tuple[str, Path]) -> None:
    assert page_of(spiteful[1]) == spiteful[0]


def test_pictures_are_shown_with_a_scale_beside_each_map_and_can_be_left_out(
    spiteful: tuple[str, Path],
) -> None:
    page = Elements(spiteful[0])
    images = [a for tag, a in page.found if tag == "img"]
    bars = [a for _, a in page.found if (a.get("class") or "").startswith("bar ")]
    drawn = [a for a in images if " of picture " in str(a["alt"])]
    # 4 pictures x (5 methods with maps x 2 models, and the pairs of the first 4 ranked ones)
    assert len(drawn) == 4 * (5 * 2 + 4 * 2)
    assert len(images) == len(drawn) + 4 * 3
    assert len(bars) == len(drawn) + 2  # one for each heat map of agreement
    assert "<img" not in page_of(spiteful[1], examples=0)


def test_maps_of_two_models_share_their_scale(spiteful: tuple[str, Path]) -> None:
    text = spiteful[0]
    pairs = text[text.index('id="pairs"') :]
    said = re.findall(r'alt="(gradient) of (picture \d), [^"]*: from ([^"]*)"', pairs)
    ends: dict[str, set[str]] = {}
    for _, picture, scale in said:
        ends.setdefault(picture, set()).add(scale)
    assert len(said) == 8
    assert all(len(scales) == 1 for scales in ends.values())


def test_the_scatter_s_numbers_are_the_scores(spiteful: tuple[str, Path]) -> None:
    text, out = spiteful
    groups = json.loads(Elements(text).texts["script"][0])
    results = collect(make_plan(suite_of(**WANTED), None), Store(out / "store"))
    frame = results.per_image
    for group, name in zip(groups, ["plug/tiny", f"tiny {ATTACK}"], strict=True):
        metric, method = group["metrics"].index("Del ↓ black, steps=4"), "grad_cam"
        found = group["values"][metric][group["methods"].index(method)]
        here = frame[
            (frame["model"] == name) & (frame["method"] == method)
            & frame["metric"].str.startswith("deletion")
        ].set_index("image")["value"]  # fmt: skip
        assert found == pytest.approx(here[group["images"]].tolist(), rel=1e-3)


@pytest.mark.parametrize("value", ["a\x1b[31mb", "a\u202eb", "a\x00b", "a\u2066b"])
def test_characters_that_steer_a_display_are_replaced(value: str) -> None:
    assert pages._harmless(value).startswith("a\N{REPLACEMENT CHARACTER}")


def test_a_figure_has_no_inline_style_and_shares_no_id_with_another() -> None:
    drawn = Drawn()
    tables = {"a$b$": np.array([[0.0, 1.0], [0.2, 0.9]]), ATTACK: np.array([[1.0, 0.0]])}
    shares = dict.fromkeys(tables, np.array([0.0, 1.0]))
    figures = [
        ElementTree.fromstring(drawn(lambda: plot.curves(shares, tables, title="t"), "words"))
        for _ in range(2)
    ]
    ids = [
        element.get("id") for figure in figures for element in figure.iter() if element.get("id")
    ]
    assert len(ids) == len(set(ids)) > 10
    for figure in figures:
        texts = [text.text for text in figure.iter() if text.tag.endswith("text")]
        assert {"a$b$", ATTACK} <= set(texts)
        for element in figure.iter():
            assert "style" not in element.attrib
            assert not element.tag.endswith(("style", "metadata"))


@given(low=st.floats(-1e6, 1e6), width=st.floats(0, 1e6))
@example(low=0.0, width=0.0)
@example(low=0.0, width=5e-324)
@example(low=1e6, width=1e-9)
@example(low=0.1, width=0.3)
def test_an_axis_holds_all_values_and_has_lines_for_each_part(low: float, width: float) -> None:
    first, last, step = axis(low, low + width)
    slack = 1e-8 * step
    assert first * step <= low + slack
    assert low + width <= last * step + slack
    assert 1 <= last - first <= 6
    css = (pages.HERE / "page.css").read_text(encoding="utf-8")
    assert f".parts{last - first} {{ --part" in css or last - first == 1


def test_bars_stand_where_their_means_do() -> None:
    figure = intervals("AD", [("a", False, 10.0, 5.0, 20.0), (ATTACK, True, 80.0, 70.0, 90.0)])
    assert figure.ticks == ("0", "25", "50", "75", "100")
    assert [(bar.low, bar.at, bar.high) for bar in figure.bars] == [(5, 10, 20), (70, 80, 90)]
    assert [bar.is_control for bar in figure.bars] == [False, True]


def test_an_outline_surrounds_the_mask_and_nothing_else() -> None:
    mask = np.zeros((32, 32), dtype=np.float32)
    mask[8:16, 8:16] = 1
    grey = np.full((128, 128, 3), 100, dtype=np.uint8)
    shown = pictures._outlined(grey, mask)
    inside = np.kron(mask, np.ones((4, 4))) > 0
    assert (shown[inside] == 255).all(1).sum() == 4 * 31
    assert (shown[~inside] == 0).all(1).sum() == 4 * 32
    assert (pictures._outlined(grey, np.full((32, 32), np.nan)) == 100).all()


def test_a_map_without_finite_values_is_drawn_as_its_picture_alone() -> None:
    picture = np.full((4, 4, 3), 0.5)
    pixels, _ = plot.blend(picture, np.full((4, 4), np.nan))
    assert set(pixels.ravel()) <= {127, 128}


def test_pages_of_many_methods_show_fewer_pictures() -> None:
    class Group:
        cells = tuple(type("Cell", (), {"method": str(at)}) for at in range(60))
        images = tuple((at, str(at)) for at in range(8))
        dataset = model = type("Choice", (), {"label": "x"})
        artefacts = ()
        folder = ("x", "x")

    class Plan:
        groups = (Group,)

    asked = []

    class Nothing:
        def group(self, *_: str) -> Any:
            return self

        @property
        def kept(self) -> Any:
            return self

        def arrays(self, _: Any, images: frozenset[str]) -> Iterator[Any]:
            asked.append(len(images))
            return iter(())

    pictures.read(Plan(), Nothing(), 4)  # type: ignore[arg-type]
    assert set(asked) == {160 // 61}


def test_a_run_from_the_command_line_leaves_a_page_and_report_writes_the_same_again(
    command: Callable[..., Any], plugin: Path, tmp_path: Path
) -> None:
    suite = suite_file(tmp_path / "s.yaml", metrics=["average_drop", "average_gain"])
    words = ("--plugin", plugin, "-o", tmp_path / "out")
    command("run", suite, *words)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    page = folder / "index.html"
    first = page.read_bytes()
    page.unlink()
    answer = command("report", tmp_path / "out", "--plugin", plugin)
    assert (answer.status, answer.out.strip()) == (0, str(page))
    assert page.read_bytes() == first
    of_suite = command("report", suite, *words, "--examples", 0)
    assert of_suite.out.strip() == str(tmp_path / "out" / "small.html")
    assert b"<img" not in (tmp_path / "out" / "small.html").read_bytes()
    command("run", suite, *words, "--no-page")
    assert sum(path.name == "index.html" for path in (tmp_path / "out").rglob("*")) == 1


def test_nothing_stored_is_no_page(
    command: Callable[..., Any], plugin: Path, tmp_path: Path
) -> None:
    suite = suite_file(tmp_path / "s.yaml")
    answer = command("report", suite, "--plugin", plugin, "-o", tmp_path / "out")
    assert answer.status == 5
    assert "nothing of suite 'small' is stored" in answer.err


def test_another_order_is_that_of_table_page_and_report_alike(
    command: Callable[..., Any], plugin: Path, tmp_path: Path
) -> None:
    suite = suite_file(
        tmp_path / "s.yaml", methods=["gradient", "grad_cam"], metrics=["mae", "rcap"]
    )
    words = ("--plugin", plugin, "-o", tmp_path / "out", "--by", "localisation")
    wrong = command("run", suite, *words[:-1], "localization")
    assert (wrong.status, (tmp_path / "out").exists()) == (2, False)
    assert "did you mean 'localisation'?" in wrong.err
    ran = command("run", suite, *words)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    page = (folder / "index.html").read_bytes()
    assert b"Ordered by the mean rank over MAE." in page
    for text in (ran, command("table", suite, *words), command("table", folder, *words[-2:])):
        assert "Ordered by the mean rank over MAE." in text.out
    command("report", folder, *words)
    assert (folder / "index.html").read_bytes() == page
    assert "over RCAP." in command("table", suite, *words[:-2]).out


METHODS = (
    "gradient", "input_x_gradient", "smooth_grad", "smooth_grad_squared", "var_grad",
    "absolute_grad", "guided_absolute_grad", "guided_backprop", "integrated_gradients",
    "occlusion", "grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam",
    "score_cam", "ablation_cam", "random", "sobel", "constant",
)  # fmt: skip
METRICS = (
    "average_drop", "average_gain", "average_increase", "insertion", "deletion", "rcap", "mae",
    "log_cosh_dice", "pixel_ap", "sparseness", "entropy", "coherency",
)  # fmt: skip
POINTS_OF_CURVES = 225  # of insertion and deletion, at 224 x 224


def test_twenty_methods_and_twelve_metrics_make_less_than_three_megabytes(
    plugin: Path, tmp_path: Path
) -> None:
    """With four pictures of 224 x 224, as rough as pictures and gradients are, and curves."""
    dataset = {"name": "plug/noise", "count": 200, "images": 200}
    suite = suite_of(
        name="large", datasets=[dataset], models=["plug/tiny"], methods=[*METHODS],
        metrics=[*METRICS],
    )  # fmt: skip
    plan, store = make_plan(suite, None), Store(tmp_path)
    (group,) = plan.groups
    keys = [key for _, key in group.images]
    assert (len({cell.method for cell in group.cells}), len(keys)) == (20, 200)
    assert len({cell.metric for cell in group.cells}) == 12
    stream = np.random.default_rng(0)
    rows = [
        (cell.id, key, 0, at % 3, 0.9, value, "ok")
        for cell in group.cells
        for at, (key, value) in enumerate(zip(keys, stream.random(200).tolist(), strict=True))
    ]
    folder = store.group(*group.folder)
    folder.write("0", pd.DataFrame(rows, columns=list(COLUMNS)), {"provenance": {}})
    shares = np.linspace(0, 1, POINTS_OF_CURVES)
    coarse = stream.random((4, 14, 14, 3)).repeat(16, 1).repeat(16, 2)
    pieces = []
    for artefact in group.artefacts:
        for at, key in enumerate(keys[:4]):
            if artefact.metric.kind == "curves":
                array: Any = np.stack([shares, stream.random(POINTS_OF_CURVES)])
            elif artefact.metric.kind == "maps":
                array = (stream.standard_normal((224, 224)) ** 2).astype(np.float32)
            else:
                rough = coarse[at] + stream.random((224, 224, 3)) / 4
                array = (rough / rough.max() * 255).astype(np.uint8)
            name = {"maps": "map", "pictures": "picture"}.get(artefact.metric.kind, "")
            pieces.append(Piece(artefact.id, key, name, "ok", array))
    folder.kept.write("0", kept_table(pieces), {"provenance": {}})
    text = report.html(collect(plan, store), store)
    page = Elements(text)
    assert sum(tag == "img" for tag, _ in page.found) == 4 * 21
    assert sum("ranking" in str(a.get("class")) for tag, a in page.found if tag == "table") == 1
    assert "Curves of Ins" in text
    assert 1_000_000 < len(text.encode()) < 3_000_000
