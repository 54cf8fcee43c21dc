"""The time of a table's statistics: seconds of one thread, at the size of a large run."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from measure import Clock

from xbench import statistics
from xbench.document import parse
from xbench.plan import Plan, make_plan
from xbench.statistics import Floats
from xbench.store import Store
from xbench.suite import load_suite
from xbench.tables import collect

IMAGES = 10_000
METHODS, METRICS = 20, 10

SUITE = f"""
version: 1
name: timed
datasets: [{{name: shapes, images: {IMAGES}}}]
models: [shapes/resnet]
methods: [gradient, smooth_grad, var_grad, grad_cam, grad_cam_plus_plus, layer_cam, hires_cam,
  random]
metrics: [average_drop, average_gain, average_increase, insertion, deletion, rcap, mae]
"""
"""With the three facts about maps, 80 cells."""


def scores() -> Floats:
    """Images by methods by metrics: images of unequal difficulty, methods of unequal merit."""
    stream = np.random.default_rng(0)
    difficulty = stream.normal(size=(IMAGES, 1, METRICS))
    merit = 0.05 * stream.normal(size=(1, METHODS, METRICS))
    return difficulty + merit + stream.normal(size=(IMAGES, METHODS, METRICS))


def filled(plan: Plan, store: Store) -> None:
    """Stores a score of every cell and image, in parts as a run leaves them."""
    (group,) = plan.groups
    keys = [key for _, key in group.images]
    cells = [cell.id for cell in group.cells]
    stream = np.random.default_rng(0)
    for start in range(0, len(keys), plan.suite.run.slice):
        own = keys[start : start + plan.suite.run.slice]
        rows = {
            "cell": np.repeat(cells, len(own)),
            "image": own * len(cells),
            "label": 0,
            "predicted": 0,
            "probability": 0.5,
            "value": stream.normal(size=len(own) * len(cells)),
            "status": "ok",
        }
        facts = {"provenance": {"versions": {}}}
        store.group(*group.folder).write(str(start), pd.DataFrame(rows), facts)


def work(folder: Path) -> Iterator[tuple[str, Callable[[], object], float | None]]:
    """What is timed: words, call, limit in seconds."""
    values, keys = scores(), [f"image/{at}" for at in range(IMAGES)]
    better = ["higher", "lower"] * (METRICS // 2)
    flat = values.reshape(IMAGES, -1)
    cells = f"{METHODS} methods x {METRICS} metrics"
    yield (
        f"BCa intervals, {statistics.DRAWS:,} draws of {flat.shape[1]} cells",
        lambda: statistics.bca_intervals(flat, keys),
        10.0,
    )
    yield (
        f"mean ranks of {cells} with intervals and pairs that are separable",
        lambda: statistics.ranking(values, better, keys),
        None,
    )
    yield f"tests of all pairs, {cells}", lambda: statistics.pair_tests(values, keys), None
    yield (
        f"Friedman and Nemenyi, {cells}",
        lambda: [statistics.friedman(values[:, :, at], word) for at, word in enumerate(better)],
        None,
    )
    yield (
        f"agreement of {METRICS} metrics about {METHODS} methods with intervals",
        lambda: statistics.agreement_of_metrics(values, better, keys),
        None,
    )
    plan, store = make_plan(load_suite(parse(SUITE, "timed")), None), Store(folder)
    filled(plan, store)
    yield (
        f"a table of {len(plan.cells)} cells from the store, with intervals and warnings",
        lambda: collect(plan, Store(folder)),
        None,
    )


def page(repeats: int) -> Iterator[str]:
    """The lines of the page, each as soon as it is known."""
    clock = Clock("cpu")
    yield "# The time of statistics\n"
    yield (
        f"Made by `python benchmarks/speed --kinds statistics`, numpy {np.__version__}, "
        f"{platform.machine()}, one thread: seconds of CPU, the median of {repeats}, "
        f"of {IMAGES:,} images.\n"
    )
    yield "| work | seconds | limit |\n| --- | --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        for words, call, limit in work(Path(folder)):
            found = []
            for _ in range(repeats):
                began = clock()
                call()
                found.append(clock() - began)
            yield f"| {words} | {median(found):.1f} | {'' if limit is None else f'{limit:g}'} |"
