"""Train the embedded network of the ``shapes`` data set.

    python benchmarks/training/shapes.py --out xbench/weights/shapes_resnet.safetensors

No picture is seen twice: each step draws new ones of split ``train``. The accuracy is read on
pictures of split ``test`` from another seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from xbench.datasets.shapes import generate
from xbench.models.resnet import shapes_resnet

MEAN = STD = (0.5, 0.5, 0.5)
BATCH = 128
RATE = 0.01
WEIGHT_DECAY = 0.01
TESTED = 10_000


def normalised(images: Tensor) -> Tensor:
    return (images - MEAN[0]) / STD[0]


def batches(seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh images and labels; the next batch is drawn while the network learns from this one."""

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        return generate(seed, "train", range(step * BATCH, (step + 1) * BATCH))

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, 0)
        for step in range(steps):
            images, labels, _ = coming.result()
            if step + 1 < steps:
                coming = pool.submit(draw, step + 1)
            yield images, labels


@torch.inference_mode()
def accuracy(net: nn.Module, seed: int, count: int) -> float:
    """Share of held-out images whose largest logit is the label's."""
    net.eval()
    right = 0
    for start in range(0, count, 500):
        images, labels, _ = generate(seed, "test", range(start, min(start + 500, count)))
        right += int((net(normalised(images)).argmax(1) == labels).sum())
    net.train()
    return right / count


def train(seed: int, steps: int) -> nn.Module:
    """AdamW under a one-cycle schedule with cross-entropy."""
    torch.manual_seed(seed)
    net = shapes_resnet().train()
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    begin = time.perf_counter()
    losses = []
    for step, (images, labels) in enumerate(batches(seed, steps), start=1):
        loss = functional.cross_entropy(net(normalised(images)), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            mean_loss = sum(losses) / len(losses)
            held_out = accuracy(net, seed + 1, 1000)
            seconds = time.perf_counter() - begin
            print(f"{step:6d} {mean_loss:.4f} {held_out:.4f} {seconds:6.0f} s", flush=True)
            losses.clear()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the network of the shapes data set.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args()
    print("  step loss   accuracy")
    net = train(args.seed, args.steps)
    reached = accuracy(net, args.seed + 1, TESTED)
    print(f"accuracy {reached:.4f} on {TESTED} test images of seed {args.seed + 1}")
    command = (
        f"python benchmarks/training/shapes.py --out {args.out.as_posix()} "
        f"--seed {args.seed} --steps {args.steps}"
    )
    facts = {"accuracy": reached, "command": command, "mean": MEAN, "std": STD}
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    save_file(net.state_dict(), args.out, metadata=metadata)


if __name__ == "__main__":
    main()
