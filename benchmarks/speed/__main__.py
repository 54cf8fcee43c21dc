"""Every metric beside as many plain forwards of the bare network: ``python benchmarks/speed``.

Writes ``results/speed/metrics.md``. The unit is one plain forward of an image: fp32, eager,
inference mode, in batches of the fastest size, of the network as it is built, in the same process
immediately before and after the work. A ratio is the time of an item, from given maps to scores on
the host, over that of as many plain forwards as were counted while it ran; of methods, from images
to maps, backward passes count as those of the whole network. Medians of the repetitions, with their
least and largest: other work on the machine moves single ones. One thread.

The kind ``statistics`` writes ``results/speed/statistics.md``: see ``summaries.py``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import summaries
import torch
from measure import Bare, Clock, Timing, Work, timed
from torch.nn import functional
from workloads import WORKLOADS, Workload

from xbench import engines, registry
from xbench.autograd import prepared
from xbench.document import parse
from xbench.plan import batch_needs, make_plan
from xbench.probe import Explanation, Probe
from xbench.runner import run_unit
from xbench.scoring import evaluated
from xbench.store import Store
from xbench.suite import load_suite
from xbench.types import Passes


@dataclass(frozen=True)
class Item:
    """Entries that are timed together, as one run computes them.

    Args:
        words: in the table.
        names: of metrics or methods.
        limit: what the ratio is to stay within; None where nothing is asked.
        kind: "metrics" or "methods".
        head_only: the backward passes end at the last layer, and count nothing.
        only: the workloads that it is timed on; all by default.
    """

    words: str
    names: tuple[str, ...]
    limit: float | None
    kind: str = "metrics"
    head_only: bool = False
    only: tuple[str, ...] = tuple(WORKLOADS)


ITEMS = (
    Item("AD, AG, AI", ("average_drop", "average_gain", "average_increase"), 1.15),
    Item("insertion", ("insertion",), 1.15),
    Item("deletion", ("deletion",), 1.15),
    Item("RCAP", ("rcap",), 1.15),
    Item(
        "all of these",
        ("average_drop", "average_gain", "average_increase", "insertion", "deletion", "rcap"),
        1.15,
    ),
    Item("ROAD", ("road",), None),
    Item(
        "five gradient CAMs",
        ("grad_cam", "grad_cam_plus_plus", "xgrad_cam", "hires_cam", "layer_cam"),
        1.10,
        "methods",
        head_only=True,
    ),
    Item(
        "SmoothGrad, VarGrad, AbsoluteGrad, Guided AbsoluteGrad",
        ("smooth_grad", "var_grad", "absolute_grad", "guided_absolute_grad"),
        1.10,
        "methods",
    ),
    Item("Score-CAM", ("score_cam",), 1.10, "methods", only=("W0",)),
)

GRID = """
version: 1
name: grid
datasets: [{name: shapes, images: %d}]
models: [shapes/resnet]
methods: [grad_cam, grad_cam_plus_plus, xgrad_cam, hires_cam, layer_cam, smooth_grad,
  guided_absolute_grad]
metrics: [average_drop, average_gain, average_increase, insertion, deletion, rcap]
"""


@contextmanager
def working(item: Item, load: Workload, device: str) -> Iterator[tuple[Work, Bare]]:
    """Does an item's work on a batch, and the bare network beside it."""
    entries = [registry.make(item.kind, name) for name in item.names]
    batch = load.batch(load.images, device)
    net = load.network().to(device)
    model = load.model(copy.deepcopy(net))
    smooth = functional.avg_pool2d(batch.images.mean(1, keepdim=True), 8)
    maps = functional.interpolate(smooth, batch.images.shape[-2:], mode="bilinear")[:, 0]
    asked = (entries, []) if item.kind == "methods" else ([], [entries])
    with prepared(model.net) as meter:

        def work() -> Passes:
            probe = Probe(model, batch, needs=batch_needs(*asked), meter=meter)
            if item.kind == "methods":
                for method in entries:
                    probe.explain(method).finite.tolist()
            else:
                explanation = Explanation(probe, maps)
                for metric in entries:
                    evaluated(metric, explanation)
            return probe.spent

        yield (
            Work(work, len(batch.keys), model.net),
            Bare(net, model.normalise(batch.images), Clock(device)),
        )


def items(
    load: str, kinds: Sequence[str], device: str, repeats: int
) -> Iterator[tuple[Item, Timing]]:
    for item in ITEMS:
        if load in item.only and item.kind in kinds:
            with working(item, WORKLOADS[load], device) as (work, bare):
                is_whole = item.kind == "methods" and not item.head_only
                yield item, timed(work, bare, repeats, has_backward=is_whole)


def grid(images: int, repeats: int) -> Timing:
    """Seven methods and six metrics through the runner: images read, parts written."""
    suite = load_suite(parse(GRID % images, "grid"))
    load = WORKLOADS["W0"]
    net = load.network()
    bare = Bare(net, load.model(net).normalise(load.batch(64, "cpu").images), Clock("cpu"))

    def work() -> Passes:
        with tempfile.TemporaryDirectory() as folder:
            plan, store = make_plan(suite, None), Store(Path(folder))
            plan.pin(store)
            reports = [run_unit(job) for job, _ in plan.jobs(store)]
        forward, backward = (
            sum(getattr(report.passes, way) for report in reports)
            for way in ("forward", "backward")
        )
        return Passes(forward // images, backward // images)

    return timed(Work(work, images), bare, repeats, has_backward=True)


def _row(words: str, timing: Timing, limit: float | None) -> str:
    cells = (
        words,
        f"{timing.passes.forward} + {timing.passes.backward}",
        f"{median(timing.equivalents):.1f}",
        f"{timing.ratio:.2f}",
        f"{min(timing.ratios):.2f} to {max(timing.ratios):.2f}",
        "" if timing.outside is None else f"{100 * timing.outside:.1f} %",
        "" if limit is None else f"{limit:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


EXPLAINED = """\
Passes are forward + backward per image, as counted. A forward-equivalent is the time of one plain
fp32 forward of an image, in batches of the fastest size; the ratio is an item's time over that of
as many plain passes, median of {}. It is below 1 where the memory layout that images are passed in
is faster than the plain one. Outside the network are ranks, masks, blending and scores."""

HEADER = """\
| item | passes | forward-equivalents | ratio | spread | outside the network | limit |
| --- | --- | --- | --- | --- | --- | --- |"""


def page(
    loads: Sequence[str], kinds: Sequence[str], device: str, repeats: int, images: int
) -> Iterator[str]:
    """The lines of the page, each as soon as it is known."""
    machine = torch.cuda.get_device_name() if "cuda" in device else platform.machine()
    yield "# The time of metrics and methods beside plain forwards\n"
    yield f"Made by `python benchmarks/speed`, torch {torch.__version__}, {machine}, one thread."
    yield EXPLAINED.format(repeats)
    for name in loads:
        yield f"\n## {name}: {WORKLOADS[name].words}\n"
        yield HEADER
        for item, timing in items(name, kinds, device, repeats):
            yield _row(item.words, timing, item.limit)
    if device == "cpu" and "W0" in loads:
        yield f"\n## A whole grid: {images} images of shapes, 7 methods x 6 metrics\n"
        yield "Through the runner, planning, images read and parts written.\n"
        yield HEADER
        yield _row("grid", grid(images, repeats), 1.10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--quick", action="store_true", help="without W2, three repetitions")
    parser.add_argument("--loads", nargs="+", choices=WORKLOADS, help="all by default")
    kinds = ("metrics", "methods", "statistics")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="all by default")
    parser.add_argument("--repeats", type=int, help="of each item; 7 by default")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.device == "cpu":
        engines.keep_freed_memory()  # as a run does; the plain forwards gain from it too
    loads = given.loads or [name for name in WORKLOADS if name != "W2" or not given.quick]
    repeats = given.repeats or (3 if given.quick else 7)
    if set(given.kinds) - {"statistics"}:
        _write(given.out / "metrics.md", page(loads, given.kinds, given.device, repeats, 64))
    if "statistics" in given.kinds:
        _write(given.out / "statistics.md", summaries.page(1 if given.quick else min(repeats, 3)))


def _write(path: Path, lines: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            print(line, flush=True)
            print(line, file=file, flush=True)


if __name__ == "__main__":
    main()
