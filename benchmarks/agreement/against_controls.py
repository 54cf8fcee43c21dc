"""Control and transformed maps beside their definitions, pixel by pixel."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from comparison import Comparison, explained
from scipy import ndimage
from torch import Tensor

from xbench.testing import SIDE, toy_batch

BATCH = toy_batch(4)
PIXELS = SIDE * SIDE
DEFINITION = "definition, pixel by pixel"


def stream(purpose: str) -> list[list[float]]:
    """Each image's uniform numbers, by SplitMix64 in Python's integers."""

    def mixed(state: int) -> float:
        z = state & (1 << 64) - 1
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        return ((z ^ z >> 31) >> 40) * 2.0**-24

    starts = []
    for key in BATCH.keys:
        digest = hashlib.blake2b(f"0\0{key}\0{purpose}\0{0}".encode(), digest_size=8).digest()
        starts.append(int.from_bytes(digest, "little"))
    return [
        [mixed(start + 0x9E3779B97F4A7C15 * step) for step in range(1, PIXELS + 1)]
        for start in starts
    ]


def random() -> Tensor:
    return torch.tensor(stream("random map"), dtype=torch.float64).view(4, SIDE, SIDE)


def centre() -> Tensor:
    def bell(at: int) -> float:
        return math.exp(-((4 * at / (SIDE - 1) - 2) ** 2) / 2)

    one = [[bell(row) * bell(column) for column in range(SIDE)] for row in range(SIDE)]
    return torch.tensor(one, dtype=torch.float64).expand(4, SIDE, SIDE)


def sobel() -> Tensor:
    grey = BATCH.images.mean(1).numpy()
    edges = [[ndimage.sobel(one, axis, mode="nearest") for one in grey] for axis in (0, 1)]
    return torch.from_numpy(np.hypot(*edges))


def fake_cam() -> Tensor:
    ones = torch.ones(4, SIDE, SIDE)
    ones[:, 0, 0] = 0
    return ones


def inverted() -> Tensor:
    return torch.stack([one.max() - one for one in explained("grad_cam")])


def reversed_map(l: float, m: float) -> Tensor:  # noqa: E741
    """Section 4 of the specification, by Python's sort and a loop over pairs."""
    made = []
    kept, moved = math.floor(PIXELS * l), math.floor(PIXELS * m)
    draws = zip(stream("reversed ties"), stream("reversed pairs"), strict=True)
    for one, (ties, pairs) in zip(explained("gradient").flatten(1).tolist(), draws, strict=True):
        shuffled = sorted(range(PIXELS), key=ties.__getitem__)
        ascending = sorted(shuffled, key=one.__getitem__)
        low = ascending[:moved]
        high = ascending[PIXELS - 1 - kept - moved : PIXELS - 1 - kept]
        order = sorted(range(moved), key=pairs.__getitem__)
        for below, partner in zip(low, order, strict=True):
            above = high[partner]
            one[below], one[above] = one[above], one[below]
        made.append(one)
    return torch.tensor(made, dtype=torch.float64).view(4, SIDE, SIDE)


def _against(name: str, definition: Any, reference: str = DEFINITION, **params: Any) -> Comparison:
    return Comparison(
        name, reference, lambda: (explained(name, params), definition()), params=params
    )


COMPARISONS = (
    _against("random", random, "SplitMix64 in Python's integers"),
    _against("centre", centre),
    _against("sobel", sobel, "scipy.ndimage.sobel"),
    _against("constant", lambda: torch.ones(4, SIDE, SIDE)),
    _against("fake_cam", fake_cam),
    _against("identity", lambda: BATCH.images.sum(1) / 3),
    _against("oracle", lambda: BATCH.masks),
    _against("inverted", inverted),
    _against("reversed", lambda: reversed_map(0.07, 0.1), of="gradient"),
    _against("reversed", lambda: reversed_map(0.02, 0.3), of="gradient", l=0.02, m=0.3),
)
