"""From a model entry's description to a network that is ready to be explained."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..autograd import prepared
from ..errors import BadWeights, UsageError
from ..layers import last_feature_map
from ..types import Model, Network


@functools.lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(network: Network) -> str:
    """SHA-256 of the weight file, or of the fresh weights where there is no file.

    Raises:
        UsageError: if the file does not exist.
    """
    if network.weights is None:
        return _state_hash(network.build())
    if not network.weights.is_file():
        raise UsageError(
            f"weights {str(network.weights)!r} do not exist; a relative path is looked for in the "
            "data directory (--data DIR or XBENCH_DATA), then in the working directory"
        )
    facts = network.weights.stat()
    return _file_hash(network.weights, facts.st_size, facts.st_mtime_ns)


def _state_hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_layers(
    network: Network, size: tuple[int, int]
) -> tuple[nn.Module, dict[str, str], int]:
    """Architecture without weights, layer roles and number of classes, for images of H x W.

    A dry run tells them; nothing is computed.

    Raises:
        Unsupported: if the network does not return logits.
        Exception: whatever the network raises on such images.
    """
    with torch.device("meta"), torch.no_grad():
        net, example = network.build().eval(), torch.empty(1, len(network.mean), *size)
        with prepared(net):
            classes = net(example).shape[1]
            layers = dict(network.layers)
            if "last_conv" not in layers and (found := last_feature_map(net, example)) is not None:
                layers["last_conv"] = found
    return net, layers, classes


def load_model(
    network: Network,
    name: str,
    layers: Mapping[str, str],
    device: str,
    *,
    planned: str | None = None,
) -> Model:
    """The model with its weights, in evaluation mode, on a device.

    Args:
        network, name, layers, device: what to load, what to call it, its roles, where to.
        planned: the hash that the weights must have, where scores are named by it.

    Raises:
        BadWeights: if the file is damaged, does not fit, holds values that are not finite, or is
            not the planned one.
    """
    net = network.build()
    if planned is not None:
        found = _state_hash(net) if network.weights is None else weights_hash(network)
        if found != planned:
            raise BadWeights(
                f"weights of {name!r} are not those that the run was planned with: "
                + (
                    "each build draws others, so seed them in 'build'"
                    if network.weights is None
                    else f"{str(network.weights)!r} has changed meanwhile; run again"
                )
            )
    if network.weights is not None:
        _fill(net, _read(network.weights), network.weights)
    broken = [key for key, value in net.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise BadWeights(
            f"weights of {name!r} hold NaN or infinity in {len(broken)} tensors, "
            f"first in {broken[0]!r}"
        )
    net = net.eval().requires_grad_(False).to(device)
    return Model(name, net, network.mean, network.std, layers)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix in (".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = dict(state.get("state_dict", state))
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.layout is not torch.strided:
                    raise TypeError(f"{key!r} is no dense tensor")
            return state
        return load_file(path)
    except Exception as error:  # damaged files raise many types
        raise BadWeights(
            f"weights {str(path)!r} cannot be read ({type(error).__name__}: {str(error)[:200]}); "
            "expected safetensors, or a .pt file of tensors alone"
        ) from None


def _fill(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = net.state_dict()
    # counters of BatchNorm play no part in evaluation, and older files lack them
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(found)} {words} (first: {found[0]})"
            for found, words in (
                (missing, "missing"),
                (unknown, "unexpected"),
                (shapes, "of another shape"),
            )
            if found
        ]
        raise BadWeights(f"weights {str(path)!r} do not fit the architecture: " + ", ".join(parts))
    net.load_state_dict(
        {key: value.to(wanted[key].dtype) for key, value in state.items()}, strict=False
    )
