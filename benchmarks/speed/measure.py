"""One piece of work beside plain forwards of the bare network, in the same process and minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xbench.types import Passes

ENOUGH, MOST = 1.0, 50
"""Seconds and batches of plain passes on either side of the work, whichever is reached first."""


class Clock:
    """Seconds of this process's CPU, which other processes do not take part in; wall time on a GPU.

    With one thread both are the time of the work alone.
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")

    def __call__(self) -> float:
        if not self.is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Bare:
    """The network as its authors' code calls it: fp32, eager, inputs as they are, in batches.

    Args:
        net: in evaluation mode; another copy than the one that is measured, which has hooks.
        inputs: (N, 3, H, W).
        clock: tells seconds.

    Attributes:
        size: of the batches, the fastest of those tried.
    """

    def __init__(self, net: nn.Module, inputs: Tensor, clock: Clock) -> None:
        self.net, self.inputs, self.clock = net, inputs, clock
        tried = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= len(inputs)]
        self.size = 1
        self.size = min(tried, key=lambda size: min(self._once(size) for _ in range(3)))

    def _once(self, size: int) -> float:
        """Seconds of a forward of one image, in a batch of this size."""
        began = self.clock()
        with torch.inference_mode():
            self.net(self.inputs[:size])
        return (self.clock() - began) / size

    def forward(self) -> float:
        """Seconds per image."""
        return self._mean(lambda: self._once(self.size))

    def both(self) -> float:
        """Seconds per image, forward and backward towards the inputs."""
        inputs = self.inputs[: self.size].clone().requires_grad_()

        def once() -> float:
            began = self.clock()
            torch.autograd.grad(self.net(inputs).amax(1).sum(), inputs)
            return (self.clock() - began) / self.size

        return self._mean(once)

    def _mean(self, once: Callable[[], float]) -> float:
        found: list[float] = []
        while len(found) < MOST and sum(found) * self.size < ENOUGH:
            found.append(once())
        return sum(found) / len(found)


class Inside:
    """Seconds that a network spends in its own forward, as a context."""

    def __init__(self, net: nn.Module | None, clock: Clock) -> None:
        self.net, self.clock, self.seconds, self.began = net, clock, 0.0, 0.0
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Inside:
        if self.net is not None:
            self.handles.append(self.net.register_forward_pre_hook(self._enter, prepend=True))
            self.handles.append(self.net.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        self.began = self.clock()

    def _leave(self, *_: object) -> None:
        self.seconds += self.clock() - self.began


@dataclass(frozen=True)
class Timing:
    """What a piece of work took.

    Args:
        passes: that were counted at the network, per image.
        equivalents: seconds per image over those of one plain forward, of each repetition.
        ratios: seconds over those of as many plain passes, of each repetition.
        outside: share of the seconds spent outside of the network's forwards, the median; None if
            there are backward passes, or the network is not at hand.
    """

    passes: Passes
    equivalents: list[float]
    ratios: list[float]
    outside: float | None

    @property
    def ratio(self) -> float:
        return median(self.ratios)


@dataclass(frozen=True)
class Work:
    """Something to time.

    Args:
        once: does it, and gives the passes per image that it spent.
        images: that it is about.
        net: the network that it calls, if that can be told.
    """

    once: Callable[[], Passes]
    images: int
    net: nn.Module | None = None


def timed(work: Work, bare: Bare, repeats: int, *, has_backward: bool = False) -> Timing:
    """Some work, repeated, each time between plain passes whose mean is the unit.

    Args:
        work: what is timed.
        bare: the unit.
        repeats: an odd number.
        has_backward: whether its backward passes count, as those of the whole network.
    """
    if repeats > 1:
        work.once()  # untimed, so that all is warm

    def plain() -> tuple[float, float]:
        forward = bare.forward()
        return forward, bare.both() - forward if has_backward else 0.0

    equivalents, ratios, outside = [], [], []
    for _ in range(repeats):
        before = plain()
        with Inside(work.net, bare.clock) as inside:
            began = bare.clock()
            passes = work.once()
            seconds = bare.clock() - began
        forward, more = ((one + other) / 2 for one, other in zip(before, plain(), strict=True))
        equivalents.append(seconds / work.images / forward)
        ratios.append(
            seconds
            / work.images
            / (passes.forward * forward + has_backward * passes.backward * more)
        )
        outside.append(1 - inside.seconds / seconds)
    share = None if work.net is None or passes.backward else median(outside)
    return Timing(passes, equivalents, ratios, share)
