"""The loop: cross-entropy plus weight times regulariser, SGD, a checkpoint after each epoch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..autograd import frozen_statistics, fused_batch_norm, guided_relu, loss_gradient
from ..errors import Unsupported, UsageError, XbenchError
from ..models.architectures import architecture
from ..noise import stream_keys, uniform
from . import checkpoint
from .augmentation import augmented
from .log import Reporter, Row, write_figure, write_table
from .pictures import Pictures, open_pictures
from .recipe import Recipe
from .step import Step, cosine

EVALUATED = 500
"""Images of a batch on which the accuracy is read."""
ALIGNED = 1000
"""Held-out images on which the cosine of both gradients is read after each epoch."""


@dataclass(frozen=True)
class World:
    """The processes of a training, of which the first writes and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass
class State:
    """What an epoch begins with, and all that a checkpoint holds."""

    net: nn.Module
    optimiser: torch.optim.SGD
    history: list[Row] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"net/{name}": value for name, value in self.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            momentum = self.optimiser.state[parameter].get("momentum_buffer")
            if momentum is not None:
                found[f"momentum/{name}"] = momentum
        return found

    def restore(self, tensors: dict[str, Tensor], history: list[Row]) -> None:
        self.net.load_state_dict(
            {k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")}
        )
        for name, parameter in self.net.named_parameters():
            momentum = tensors.get(f"momentum/{name}")
            if momentum is not None:
                kept = torch.zeros_like(parameter).copy_(momentum)
                self.optimiser.state[parameter]["momentum_buffer"] = kept
        self.history = history


def train(
    recipe: Recipe,
    *,
    out: Path,
    data: Path | None = None,
    device: str = "auto",
    fresh: bool = False,
    quiet: bool = False,
) -> Path:
    """Train what a recipe says, or what is left of it, and return the weights' file.

    ``out`` then holds ``weights.safetensors`` with the recipe and its accuracy as metadata,
    ``log.csv``, ``losses.svg`` and ``checkpoint.safetensors``, from which a training that was
    interrupted goes on as if it had not been: with equal threads and processes, to the same bits.
    Under ``torchrun`` the processes share each batch and agree with one process up to rounding;
    batch normalisation takes the statistics of each process's share, and dropout differs.

    Args:
        recipe: what to do.
        out: folder of its own.
        data: directory of data sets.
        device: "auto" is the GPU if there is one, else the CPU.
        fresh: forget what ``out`` holds.
        quiet: no progress.

    Raises:
        UsageError: if the recipe does not fit the data, the network or what ``out`` holds.
        BadWeights: if the checkpoint is damaged.
        XbenchError: if the loss is no longer finite.
    """
    console = Console(stderr=True)
    cudnn = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    with _world() as world, torch.random.fork_rng(), torch.backends.cudnn.flags(**cudnn):
        place, build = _device(device, world), architecture(recipe.architecture)
        weights, kept = out / "weights.safetensors", out / "checkpoint.safetensors"
        if fresh and world.is_first:
            weights.unlink(missing_ok=True)
            kept.unlink(missing_ok=True)
        if not fresh and weights.exists():
            _, facts = checkpoint.read(weights)
            _same_recipe(recipe, facts, weights)
            if world.is_first and not quiet:
                accuracy = f"{100 * facts['accuracy']:.2f} % of the test images"
                console.print(f"finished before: {weights}, {accuracy} right", soft_wrap=True)
            return weights
        pictures = open_pictures(recipe.train, data, place)
        tested = open_pictures([recipe.test], data, place)
        steps = _steps(recipe, pictures, tested, world)
        torch.manual_seed(recipe.seed)
        state = begin(recipe, build(pictures.classes), place)
        if not fresh and kept.exists():
            tensors, facts = checkpoint.read(kept)
            _same_recipe(recipe, facts, kept)
            state.restore(tensors, facts["history"])
        run = Run(recipe, place, world, pictures, tested, steps, state)
        with Reporter(console, recipe.epochs, steps, quiet=quiet or not world.is_first) as reporter:
            if state.history:
                reporter.say(f"goes on after epoch {len(state.history)} of {recipe.epochs}")
            for epoch in range(len(state.history), recipe.epochs):
                row = run.epoch(epoch, reporter)
                state.history.append(row)
                if world.is_first:
                    facts = {"recipe": recipe.plain(), "history": state.history}
                    checkpoint.write(kept, state.tensors(), facts)
                    write_table(out / "log.csv", state.history)
                    reporter.epoch(row)
        if world.is_first:
            facts = {
                "architecture": recipe.architecture,
                "classes": pictures.classes,
                "mean": recipe.mean,
                "std": recipe.std,
                "seed": recipe.seed,
                "accuracy": state.history[-1]["test_accuracy"],
                "recipe": recipe.plain(),
            }
            write_figure(out / "losses.svg", state.history, recipe.name)
            checkpoint.write(weights, state.net.state_dict(), facts)
    return weights


@dataclass
class Run:
    """A training under way: epochs of steps, and what is measured after each."""

    recipe: Recipe
    device: torch.device
    world: World
    pictures: Pictures
    tested: Pictures
    steps: int
    state: State

    def __post_init__(self) -> None:
        recipe, shape = self.recipe, (1, 3, 1, 1)
        self.mean = torch.tensor(recipe.mean, device=self.device).view(shape)
        self.std = torch.tensor(recipe.std, device=self.device).view(shape)
        self.regulariser = recipe.entry("regularisers", recipe.regulariser)
        self.net = self.state.net
        if self.world.size > 1:
            self.net = DistributedDataParallel(self.state.net)

    def epoch(self, epoch: int, reporter: Reporter) -> Row:
        """One pass over all images, and what it was like."""
        begin = time.perf_counter()
        recipe, size = self.recipe, self.recipe.batch_size
        order = uniform(stream_keys(recipe.seed, [str(epoch)], "order"), self.pictures.count)
        images = order[0].argsort(stable=True).tolist()
        totals = torch.zeros(len(_TOTALS), dtype=torch.float64, device=self.device)
        self.state.net.train()
        for step in range(self.steps):
            batch = images[step * size : (step + 1) * size][self.world.rank :: self.world.size]
            for group in self.state.optimiser.param_groups:
                group["lr"] = recipe.rate(epoch + (step + 0.5) / self.steps)
            key = f"{epoch}/{step}/{self.world.rank}"
            torch.manual_seed(int(stream_keys(recipe.seed, [key], "dropout")))
            totals += self.step(epoch, batch)
            reporter.step(epoch, step)
        if self.world.size > 1:
            distributed.all_reduce(totals)
        row = self._row(epoch, dict(zip(_TOTALS, totals.tolist(), strict=True)))
        if self.world.is_first:
            row |= self.measured()
        return row | {"seconds": time.perf_counter() - begin}

    def step(self, epoch: int, batch: list[int]) -> Tensor:
        """Learn from one batch; the sums of :data:`_TOTALS`."""
        recipe, regulariser = self.recipe, self.regulariser
        images, labels = self.pictures.take(batch)
        inputs = self.normalised(
            augmented(images, recipe.augmentation, recipe.seed, epoch, batch)
        ).requires_grad_(regulariser.weight > 0)
        logits = self.forward(self.net, inputs)
        losses = self.criterion(logits, labels)
        loss = classification = losses.mean()
        added, alignment = None, None
        if regulariser.weight > 0:
            here = Step(
                net=self.state.net,
                forward=lambda inputs: self.forward(self.state.net, inputs),
                inputs=inputs,
                labels=labels,
                logits=logits,
                losses=losses,
                criterion=self.criterion,
                mean=self.mean,
                std=self.std,
            )
            added = regulariser(here)
            loss = classification + regulariser.weight * added
            alignment = here.alignment
        self.state.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.state.optimiser.step()
        return _totals(logits.detach(), labels, classification.detach(), added, alignment)

    def forward(self, net: nn.Module, inputs: Tensor) -> Tensor:
        """(N, K) float32 logits at the recipe's precision."""
        with ExitStack() as stack:
            if self.recipe.precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.regulariser.weight > 0:
                stack.enter_context(fused_batch_norm())
            return net(inputs).float()  # type: ignore[no-any-return]

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) cross-entropy."""
        smoothing = self.recipe.label_smoothing
        return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 or [0, 1] to the network's input."""
        scaled = images / 255 if images.dtype == torch.uint8 else images
        inputs = (scaled - self.mean) / self.std
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return inputs.contiguous(memory_format=layout)

    def measured(self) -> dict[str, Any]:
        """Accuracy on all test images, and the alignment of gradients on the first, in float32."""
        net, right = self.state.net, torch.zeros((), dtype=torch.int64, device=self.device)
        with frozen_statistics(net):
            with torch.inference_mode():
                for start in range(0, self.tested.count, EVALUATED):
                    batch = range(start, min(start + EVALUATED, self.tested.count))
                    images, labels = self.tested.take(batch)
                    right += (net(self.normalised(images)).argmax(1) == labels).sum()
            cosines = self.alignment(min(ALIGNED, self.tested.count))
        found: dict[str, Any] = {"test_accuracy": int(right) / self.tested.count}
        if cosines is not None:
            found["test_zero_gradients"] = float(cosines.isnan().double().mean())
            found["test_cosine"] = _finite(float(cosines.nanmean()))
        return found

    def alignment(self, count: int) -> Tensor | None:
        """(count,) cosines of both gradients of the loss; None where no rule is known."""
        net, found = self.state.net, []
        for start in range(0, count, EVALUATED):
            images, labels = self.tested.take(range(start, min(start + EVALUATED, count)))
            inputs = self.normalised(images).requires_grad_()
            logits = net(inputs)
            losses = self.criterion(logits, labels)
            gradient = loss_gradient(losses, inputs)
            try:
                with guided_relu(logits):
                    found.append(cosine(gradient, loss_gradient(losses, inputs)))
            except Unsupported:
                return None
        return torch.cat(found)

    def _row(self, epoch: int, totals: dict[str, float]) -> dict[str, Any]:
        count = totals["images"]
        classification = totals["classification"] / count
        regularised, aligned = totals["regularised"], totals["aligned"]
        added = totals["added"] / regularised if regularised else None
        loss = classification + self.regulariser.weight * (added or 0.0)
        if _finite(loss) is None:
            raise XbenchError(
                f"the loss is not finite in epoch {epoch + 1}; a lower learning_rate or weight of "
                "the regulariser may help. The checkpoint is that of the epoch before"
            )
        is_known = aligned + totals["zero"] > 0
        return {
            "epoch": epoch + 1,
            "learning_rate": self.recipe.rate(epoch + 0.5),
            "loss": loss,
            "classification_loss": classification,
            "regulariser_loss": added,
            "cosine": totals["cosine"] / aligned if aligned else None,
            "zero_gradients": totals["zero"] / (aligned + totals["zero"]) if is_known else None,
            "train_accuracy": totals["right"] / count,
            "test_accuracy": None,
            "test_cosine": None,
            "test_zero_gradients": None,
        }


_TOTALS = (
    "images", "right", "classification", "regularised", "added", "aligned", "cosine", "zero",
)  # fmt: skip


def _totals(
    logits: Tensor,
    labels: Tensor,
    classification: Tensor,
    added: Tensor | None,
    alignment: Tensor | None,
) -> Tensor:
    count = labels.new_tensor(len(labels), dtype=torch.float64)
    nothing = torch.zeros_like(count)
    aligned = nothing if alignment is None else (~alignment.isnan()).sum()
    return torch.stack(
        [
            count,
            (logits.argmax(1) == labels).sum(),
            classification * count,
            nothing if added is None else count,
            nothing if added is None else added.detach() * count,
            aligned,
            nothing if alignment is None else alignment.nansum(),
            nothing if alignment is None else count - aligned,
        ]
    )


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None


def begin(recipe: Recipe, net: nn.Module, device: torch.device) -> State:
    """A network with fresh weights, drawn on the CPU, so that they are equal everywhere."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=layout)
    optimiser = torch.optim.SGD(
        net.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    return State(net, optimiser)


def _steps(recipe: Recipe, pictures: Pictures, tested: Pictures, world: World) -> int:
    """Steps of an epoch, once everything fits together."""
    if recipe.batch_size % world.size:
        raise UsageError(
            f"batch_size {recipe.batch_size} cannot be shared by {world.size} processes evenly"
        )
    if pictures.count < recipe.batch_size:
        raise UsageError(
            f"batch_size {recipe.batch_size} is more than the {pictures.count} training images"
        )
    if pictures.classes != tested.classes:
        raise UsageError(
            f"train has {pictures.classes} classes, test {tested.classes}; they must agree"
        )
    return pictures.count // recipe.batch_size


def _same_recipe(recipe: Recipe, facts: dict[str, Any], path: Path) -> None:
    differences = recipe.differences(facts.get("recipe", {}))
    if differences:
        raise UsageError(
            f"{path} comes from another recipe: {'; '.join(differences)}. Choose another --out, or "
            "train anew with --fresh"
        )


def _device(name: str, world: World) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world.size > 1:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: there is no GPU that torch can use; --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; write auto, cpu, cuda or cuda:N") from None


@contextmanager
def _world() -> Iterator[World]:
    """The processes that ``torchrun`` started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
