"""Random numbers that belong to an image, not to a batch.

``torch.Generator().manual_seed`` keeps only the low 32 bits of a seed on the CPU, its streams
differ between devices, and one draw for a batch depends on the image's place in it. Here every
number is a function of (seed, image key, purpose, draw, position): a 64-bit key from BLAKE2b counts
through SplitMix64 (Steele, Lea, Flood 2014), in plain integer operations that give the same bits on
every device. Normals follow by Box-Muller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

VERSION = "splitmix64-bm-1"
"""Part of every cell's identity: a change here changes numbers."""

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch stores."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: Tensor, places: int) -> Tensor:
    return (value >> places) & ((1 << (64 - places)) - 1)  # torch's shift is arithmetic


def stream_keys(
    seed: int, keys: Sequence[str], purpose: str, draw: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """One 64-bit stream per image, shape (N,) int64."""
    digests = (
        hashlib.blake2b(f"{seed}\0{key}\0{purpose}\0{draw}".encode(), digest_size=8).digest()
        for key in keys
    )
    words = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(words, dtype=torch.int64, device=device)


def bits(streams: Tensor, count: int) -> Tensor:
    """The first ``count`` SplitMix64 outputs of each stream, shape (N, count) int64."""
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=streams.device)
    z = streams[:, None] + steps * _signed(_GAMMA)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def uniform(streams: Tensor, count: int) -> Tensor:
    """(N, count) float32 in [0, 1): 24-bit integers times 2**-24, hence equal on all devices."""
    return _shift_right(bits(streams, count), 40).to(torch.float32) * 2.0**-24


def normal(streams: Tensor, count: int) -> Tensor:
    """(N, count) float32 standard normals by Box-Muller, two from each pair of uniforms."""
    half = (count + 1) // 2
    words = _shift_right(bits(streams, 2 * half), 40)
    # 1 - u lies in (0, 1], so that the logarithm is finite
    radius = torch.sqrt(
        -2.0 * torch.log(((1 << 24) - words[:, :half]).to(torch.float32) * 2.0**-24)
    )
    angle = words[:, half:].to(torch.float32) * (2.0 * math.pi * 2.0**-24)
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)[:, :count]


@contextmanager
def seeded(stream: int, device: torch.device) -> Iterator[None]:
    """The global generators of torch and numpy begin at a stream here, and go on as before after.

    For libraries that draw from them. They keep no more than 32 bits of the stream, and what they
    draw depends on the device and the version.
    """
    gpus = [device] if device.type == "cuda" else []
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(gpus):
        seed = stream & 0xFFFFFFFF
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
