"""The page of a run as a reader meets it, in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import suite_of
from test_report import CLOSING, FORMULA, SPITE, spiteful_suite

sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCRIPT = "<script>alert(1)</script>"
WANTED: dict[str, Any] = {
    "name": "page",
    "models": ["plug/tiny", {"name": "plug/tiny", "seed": 1, "label": f"tiny {SCRIPT}"}],
    "methods": [
        "gradient",
        "grad_cam",
        {"name": "gradient", "channels": "sum", "label": SCRIPT},
        "attention_rollout",
        "random",
    ],
    "metrics": ["average_drop", "average_gain", {"name": "deletion", "steps": 4}, "rcap", "mae"],
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]


@pytest.fixture(scope="module")
def folder(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose method and model are called as an attack would be."""
    from xbench.run import run_suite

    out = tmp_path_factory.mktemp("page")
    run_suite(suite_of(**WANTED), data=None, out=out, quiet=True, page=True)
    (found,) = (out / "runs").iterdir()
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Visit:
    """An open page, and what it did that a page should not."""

    def __init__(self, browser: Any, folder: Path, fragment: str = "", **settings: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = browser.new_page(**settings)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(f"{(folder / 'index.html').as_uri()}{fragment}")

    def methods(self, body: str = "tbody:not(.control-rows)") -> list[str]:
        """Of the first ranking, as they are seen, from top to bottom."""
        rows = self.page.locator(f"#group-0 .ranking {body} tr[data-method]:visible")
        return [str(row.get_attribute("data-method")) for row in rows.all()]


@pytest.fixture
def visit(browser: Any, folder: Path) -> Iterator[Visit]:
    opened = Visit(browser, folder)
    yield opened
    assert opened.complaints == []
    outside = [url for url in opened.requests if not url.startswith(("file:", "data:"))]
    assert outside == []
    assert sum(url.startswith("file:") for url in opened.requests) == 1
    opened.page.close()


def table_of(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "table.csv", dtype={"cell": str})
    return table[table["model"] == "plug/tiny"]


def shown_means(visit: Visit, folder: Path, metric: str) -> list[float]:
    """Of the ranked methods by a metric, from top to bottom; of those that have one."""
    table = table_of(folder)
    means = table[table["metric"] == metric].set_index("method")["mean"]
    methods = visit.methods()
    assert methods[-1] == "attention_rollout"  # which has no score, whatever the order
    return [float(means[method]) for method in methods[:-1]]


def test_a_heading_sorts_best_first_then_the_other_way_and_unknown_stays_last(
    visit: Visit, folder: Path
) -> None:
    head = visit.page.locator("#group-0 .ranking thead th", has_text="RCAP")
    button = head.locator("button")
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    falling = shown_means(visit, folder, "rcap")
    assert falling == sorted(falling, reverse=True)
    button.press("Enter")  # by keyboard
    assert head.get_attribute("aria-sort") == "ascending"
    assert shown_means(visit, folder, "rcap") == falling[::-1] != falling
    visit.page.locator("#group-0 .ranking thead th", has_text="Del").locator("button").click()
    rising = shown_means(visit, folder, "deletion(steps=4)")
    assert rising == sorted(rising)
    assert head.get_attribute("aria-sort") is None
    assert visit.methods(".control-rows") == ["random"]


def test_words_and_a_box_filter_the_rows(visit: Visit) -> None:
    section = visit.page.locator("#group-0")
    section.locator(".filter").fill("GRAD")
    assert visit.methods("tbody") == [m for m in visit.methods("tbody") if "grad" in m]
    assert set(visit.methods("tbody")) == {"gradient", "grad_cam"}
    assert section.locator(".count").inner_text() == "2 of 5 rows"
    section.locator(".filter").fill("")
    assert len(visit.methods("tbody")) == 5
    section.locator(".controls").uncheck()
    assert "random" not in visit.methods("tbody")
    assert not section.locator(".control-rows .heading").is_visible()


def test_a_link_to_a_cell_shows_and_marks_it(browser: Any, folder: Path) -> None:
    rows = table_of(folder)
    cell = rows[(rows["method"] == "random") & (rows["metric"] == "mae")]["cell"].iloc[0]
    narrow = {"viewport": {"width": 360, "height": 640}}
    opened = Visit(browser, folder, f"#cell-{cell}", **narrow)
    target = opened.page.locator(":target")
    assert target.get_attribute("id") == f"cell-{cell}"
    box = target.bounding_box()
    assert 0 <= box["x"] < 360
    assert 0 <= box["y"] < 640
    assert target.evaluate("cell => getComputedStyle(cell).outlineStyle") == "solid"
    opened.page.evaluate("location.hash = ''")
    opened.page.locator("#group-0 .controls").uncheck()
    opened.page.evaluate(f"location.hash = '#cell-{cell}'")
    sync.expect(target).to_be_visible()
    assert opened.complaints == []
    opened.page.close()


def test_the_table_can_be_downloaded(visit: Visit, folder: Path) -> None:
    with visit.page.expect_download() as waiting:
        visit.page.get_by_text("Download the table as CSV").click()
    assert waiting.value.suggested_filename == "page.csv"
    found = pd.read_csv(waiting.value.path(), dtype=str, keep_default_na=False)
    wanted = pd.read_csv(folder / "table.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(found, wanted)


def test_the_scatter_shows_each_image_and_follows_its_choices(visit: Visit) -> None:
    figure = visit.page.locator("#scatter-figure svg")
    assert figure.locator("circle").count() == 10
    tools = visit.page.locator("#scatter-tools")
    tools.locator("[name=up]").select_option(label=SCRIPT)
    assert SCRIPT in str(figure.get_attribute("aria-label"))
    tools.locator("[name=metric]").select_option(label="RCAP ↑ black")
    assert "10 images" in visit.page.locator("#scatter-note").inner_text()
    tools.locator("[name=up]").select_option(label="attention_rollout")
    assert figure.locator("circle").count() == 0


def test_everything_is_reached_by_keyboard(visit: Visit) -> None:
    visit.page.keyboard.press("Tab")
    skip = visit.page.locator(":focus")
    assert skip.inner_text() == "Skip to the tables"
    assert skip.bounding_box()["x"] >= 0
    assert visit.page.evaluate(
        "[...document.querySelectorAll('.wide')].every(e => e.tabIndex === 0 && e.ariaLabel)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_fits_its_window(browser: Any, folder: Path, scheme: str, width: int) -> None:
    settings = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    opened = Visit(browser, folder, **settings)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
    assert opened.complaints == []
    opened.page.close()


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: npm install in tests/browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_nothing(browser: Any, folder: Path, scheme: str, width: int) -> None:
    settings = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    opened = Visit(browser, folder, **settings)
    opened.page.evaluate(AXE.read_text(encoding="utf-8"))
    # what stands within a figure has the figure's name, and takes axe minutes
    found = opened.page.evaluate("axe.run({exclude: ['.figure svg *']})")
    problems = [
        f"{rule['id']}: {rule['help']}: {[node['html'][:200] for node in rule['nodes'][:5]]}"
        for rule in found["violations"]
    ]
    assert problems == []
    opened.page.close()


def test_names_that_want_to_be_markup_do_nothing(
    browser: Any, plugin: Path, tmp_path: Path
) -> None:
    """Classes, keys, labels and errors, wherever a script puts them."""
    from xbench.run import run_suite

    run_suite(spiteful_suite(), data=None, out=tmp_path, quiet=True, page=True)
    (folder,) = (tmp_path / "runs").iterdir()
    opened = Visit(browser, folder)
    page = opened.page
    for head in page.locator("#group-1 .ranking thead button").all():
        head.click()
    page.locator("#group-1 .filter").fill("<script>")
    assert opened.page.locator("#group-1 tr[data-method]:visible").count() == 2
    tools = page.locator("#scatter-tools")
    tools.locator("[name=group]").select_option("1")
    for name in ("metric", "across", "up"):
        for option in range(tools.locator(f"[name={name}] option").count()):
            tools.locator(f"[name={name}]").select_option(str(option))
    tools.locator("[name=across]").select_option(label=SPITE)
    assert SPITE in str(page.locator("#scatter-figure svg").get_attribute("aria-label"))
    key = page.locator("#scatter-figure circle title").first.text_content()
    assert key.startswith(FORMULA + CLOSING)
    with page.expect_download() as waiting:
        page.get_by_text("Download the table as CSV").click()
    rows = pd.read_csv(waiting.value.path(), dtype=str, keep_default_na=False)
    assert not rows["metric"].str.startswith("=").any()
    assert rows["metric"].str.startswith("'=cmd").any()
    assert page.locator("script").count() == 2
    assert page.locator("img:not([src^='data:']), b:has(img), [onerror]").count() == 0
    assert opened.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)
    page.close()
