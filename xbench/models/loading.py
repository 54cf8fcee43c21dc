"""From a model entry's description to a network that is ready to be explained."""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import warnings
from collections import OrderedDict
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
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
        UsageError: if the file does not exist, or is not the one that its source tells of.
    """
    if network.weights is None:
        return _state_hash(network.build())
    if not network.weights.is_file():
        place = (
            "a relative path is looked for in the data directory (--data DIR or XBENCH_DATA), then "
            "in the working directory"
        )
        raise UsageError(f"weights {str(network.weights)!r} do not exist; {network.fetch or place}")
    facts = network.weights.stat()
    found = _file_hash(network.weights, facts.st_size, facts.st_mtime_ns)
    if not found.startswith(network.sha256):
        raise UsageError(
            f"weights {str(network.weights)!r} are damaged or others than they are called: their "
            f"SHA-256 begins with {found[:8]}, expected {network.sha256[:8]}; delete the file, and "
            f"{network.fetch}"
        )
    return found


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
                f"each build of {name!r} draws other weights than the run was planned with: seed "
                "them in 'build'"
                if network.weights is None
                else f"weights {str(network.weights)!r} have changed since the run was planned; "
                "run again"
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


# --- files ----------------------------------------------------------------------------------------


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty for other files and for damaged ones."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # loading the file says what is wrong with it
        return {}


_NESTS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which checkpoints keep their weights, beside an optimiser's state and the like."""


def damage(path: Path) -> str:
    """Why a safetensors file cannot be opened; empty where it can be, or is of another kind."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
    except Exception as error:  # damaged files raise many types
        return f"it is damaged ({type(error).__name__}: {error})"
    return ""


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old kinds of pickles
            state = torch.load(path, map_location="cpu", weights_only=True)
        while isinstance(state, dict) and (
            nest := next((key for key in _NESTS if isinstance(state.get(key), dict)), None)
        ):
            state = state[nest]
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not tensors by name")
        for key, value in state.items():
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is no name")
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                raise TypeError(
                    f"{key!r} is no dense tensor; tensors lie at the top or under one of "
                    f"{', '.join(_NESTS)}"
                )
        found: Mapping[str, Tensor] = state
        return found
    except Exception as error:  # damaged files raise many types
        words = f"{type(error).__name__}: {str(error)[:200]}"
        if type(error).__name__ == "UnpicklingError":
            refused = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it holds {refused[1][:100]}" if refused else "it is damaged or holds objects"
            words = (
                f"{what}, and an object can run code when it is read. Where you trust the file, "
                f"keep its tensors alone: {_conversion(path)}"
            )
        elif not isinstance(error, TypeError):
            words = f"it is damaged, or no file of weights: {words}"
        raise BadWeights(
            f"weights {str(path)!r} cannot be read ({words}); "
            "expected safetensors, or a .pt file of tensors alone"
        ) from None


def _conversion(path: Path) -> str:
    """A command that turns a pickle into tensors, which runs what code it holds."""
    script = (
        "import sys, torch; x = torch.load(sys.argv[1], 'cpu', weights_only=0); "
        f"x = next((x[k] for k in {_NESTS} if isinstance(x, dict) and k in x), x); "
        "x = x if isinstance(x, dict) else x.state_dict(); torch.save(x, sys.argv[2])"
    )
    return shlex.join(["python", "-c", script, str(path), str(path.with_suffix(".tensors.pt"))])


# --- names of weights -----------------------------------------------------------------------------


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
_PREFIXES = ("model.", "net.", "state_dict.")
_OLD_DENSENET = re.compile(r"(?<=\.)(norm|conv)\.([12])\.(?=weight|bias|running_|num_batches)")
_SPARE = re.compile(r"(AuxLogits|aux1|aux2)\.|n_averaged$|(.*\.)?num_batches_tracked$")
"""Auxiliary heads and counters, which play no part in evaluation."""


def _plain_name(key: str, wanted: Container[str]) -> str:
    """A weight's name as the architecture has it, without what wrappers put before it."""
    if key in wanted:
        return key
    key = _WRAPPERS.sub("", key)
    for prefix in _PREFIXES:
        if key not in wanted:
            key = key.removeprefix(prefix)
    if key not in wanted:
        old = _OLD_DENSENET.sub(r"\1\2.", key)
        key = old if old in wanted else key
    return key


def _fill(net: nn.Module, found: Mapping[str, Tensor], path: Path) -> None:
    wanted = net.state_dict()
    state: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in found.items():
        name = _plain_name(key, wanted)
        if name in state:
            raise BadWeights(f"weights {str(path)!r} hold {name!r} twice, also as {key!r}")
        if name in wanted or not _SPARE.match(name):
            state[name] = value
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    missing, unknown = [k for k in wanted if k not in state], [k for k in state if k not in wanted]
    if not shapes:
        # versions, by which a network's own code brings weights of older ones up to date
        versions = getattr(found, "_metadata", None)
        if versions is None and not unknown:  # names are those of today, hence versions too
            versions = wanted._metadata  # type: ignore[attr-defined]
        if versions is not None:
            state._metadata = versions  # type: ignore[attr-defined]
        try:
            left = net.load_state_dict(state, strict=False)
        except Exception as error:  # of the network's own code
            raise BadWeights(
                f"weights {str(path)!r} do not fit the architecture: {str(error)[:200]}"
            ) from None
        missing, unknown = left.missing_keys, left.unexpected_keys
    missing = [key for key in missing if not _SPARE.match(key)]
    if missing or unknown or shapes:
        parts = [
            f"{len(keys)} {words}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for keys, words in (
                (missing, "missing"),
                (unknown, "unexpected"),
                (shapes, "of another shape"),
            )
            if keys
        ]
        hint = "" if missing or unknown else _class_hint(state, wanted)
        if any(key.startswith("momentum/") for key in unknown):
            hint = ". It is the state of a training, whose network is in weights.safetensors beside"
        raise BadWeights(
            f"weights {str(path)!r} do not fit the architecture: {'; '.join(parts)}{hint}"
        )


def _class_hint(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """A sentence where nothing but the number of outputs of one layer differs."""
    keys = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    pairs = [(state[key].shape, wanted[key].shape) for key in keys]
    is_head = all(theirs[1:] == ours[1:] for theirs, ours in pairs)
    if not is_head or len({key.rpartition(".")[0] for key in keys}) > 1:
        return ""
    theirs, ours = pairs[0]
    return (
        f". Only the last layer differs: the file tells {theirs[0]} classes apart, the "
        f"architecture {ours[0]}; give classes: {theirs[0]}"
    )
