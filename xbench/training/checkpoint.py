"""A training's state and its weights as safetensors: no pickle, whole or absent, sealed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import BadWeights
from ..files import atomic_write

_SEAL = "sha256"


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors, and facts as JSON in the file's metadata, with a hash of both."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in facts.items()}
    metadata[_SEAL] = _hash(whole, metadata)
    atomic_write(path, save(whole, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write` wrote.

    Raises:
        BadWeights: if the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BadWeights(_sentence(path, str(error))) from None
    seal = metadata.pop(_SEAL, None)
    if seal != _hash(tensors, metadata):
        raise BadWeights(_sentence(path, "its content does not match its hash"))
    return tensors, {name: json.loads(value) for name, value in metadata.items()}


def _sentence(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged or no file of 'xbench train' ({reason}); remove it, or train anew "
        "with --fresh"
    )


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
