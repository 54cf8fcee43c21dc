"""Learning rates as functions of the step alone, so that a resumed run needs no memory of them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

Share = Annotated[float, Field(ge=0, le=1)]


class Constant(BaseModel):
    """The same rate throughout."""

    model_config = _STRICT
    name: Literal["constant"] = "constant"

    def factor(self, epoch: float, epochs: int) -> float:
        return 1.0


class Steps(BaseModel):
    """Rate divided at milestones, after a linear warm-up.

    Args:
        milestones: epochs after which the rate is divided.
        divisor: by how much.
        warm_up: epochs of linear growth from 0 to the rate; the first step has a share of it.
    """

    model_config = _STRICT
    name: Literal["steps"]
    milestones: list[Annotated[int, Field(ge=1)]] = [60, 120, 160]
    divisor: Annotated[float, Field(gt=1)] = 5.0
    warm_up: Annotated[float, Field(ge=0)] = 1.0

    def factor(self, epoch: float, epochs: int) -> float:
        if epoch < self.warm_up:
            return epoch / self.warm_up
        return float(self.divisor ** -sum(epoch >= milestone for milestone in self.milestones))


class OneCycle(BaseModel):
    """Half a cosine up, then half a cosine down.

    Args:
        warm_up: share of the training that rises.
        start: rate at the beginning, as a share of the highest.
        end: rate at the end, as a share of the highest.

    Source: Smith and Topin, Super-Convergence, 2019, arXiv:1708.07120, in the cosine form of
    torch.optim.lr_scheduler.OneCycleLR, whose defaults these are; the momentum stays.
    """

    model_config = _STRICT
    name: Literal["one_cycle"]
    warm_up: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start: Share = 1 / 25
    end: Share = 1 / 250_000

    def factor(self, epoch: float, epochs: int) -> float:
        done = epoch / epochs
        if done < self.warm_up:
            return _cosine(self.start, 1.0, done / self.warm_up)
        return _cosine(1.0, self.end, (done - self.warm_up) / (1 - self.warm_up))


Schedule = Annotated[Constant | Steps | OneCycle, Field(discriminator="name")]
"""Each has ``factor(epoch, epochs)``: what multiplies the learning rate after that many epochs, a
step of which is a fraction."""


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2
