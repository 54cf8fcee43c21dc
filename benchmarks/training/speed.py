"""Time and memory of a regularised step beside the plain one of the same recipe.

    python benchmarks/training/speed.py cifar100-resnet20-short --variant cosine

Each row is a process of its own, on random pictures: CPU seconds (on a GPU, seconds) of the median
step, how many plain steps that is, and the peak memory. Five passes instead of two would be 2.5.
``generic`` is the regularised step with torch's own double backward of batch normalisation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from xbench.models.architectures import architecture
from xbench.training import loop
from xbench.training.pictures import Held
from xbench.training.recipe import load_recipe, read_recipe

CLASSES = 100
WARM_UP = 2


@contextmanager
def nothing() -> Iterator[None]:
    yield


def measured(name: str, variant: str, which: str, steps: int, side: int, threads: int) -> Any:
    """Seconds of a step, and the peak memory in MiB."""
    torch.set_num_threads(threads)
    recipe = load_recipe(read_recipe(name))
    if which != "plain":
        recipe = recipe.variant(variant)
    if which == "generic":
        loop.fused_batch_norm = nothing
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    size = (4 * recipe.batch_size, 3, side, side)
    images = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % CLASSES
    pictures = Held(images.to(device), labels.to(device), CLASSES)
    torch.manual_seed(0)
    net = architecture(recipe.architecture)(CLASSES)
    state = loop.begin(recipe, net, device)
    run = loop.Run(recipe, device, loop.World(), pictures, pictures, 4, state)
    net.train()
    times = []
    for step in range(WARM_UP + steps):
        batch = [(step * recipe.batch_size + i) % len(images) for i in range(recipe.batch_size)]
        begin = clock(device)
        run.step(0, batch)
        times.append(clock(device) - begin)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return statistics.median(times[WARM_UP:]), peak


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a regularised step.")
    parser.add_argument("recipe", help="built-in name or path")
    parser.add_argument("--variant", default="cosine")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--side", type=int, default=32, help="of the random pictures")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{'step':12} {'seconds':>8} {'plain = 1':>9} {'peak MiB':>9}")
    plain = None
    for which in ("plain", args.variant, "generic"):
        # a fresh process each, since the peak of a process never falls
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            task = (args.recipe, args.variant, which, args.steps, args.side, args.threads)
            seconds, peak = pool.apply(measured, task)
        plain = plain or seconds
        print(f"{which:12} {seconds:8.3f} {seconds / plain:9.2f} {peak:9.0f}", flush=True)


if __name__ == "__main__":
    main()
