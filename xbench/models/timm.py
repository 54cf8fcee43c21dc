"""Classifiers of timm, which is an extra, and of the Hugging Face hub, which timm builds too."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UsageError
from ..registry import suggestion


def _library(name: str = "timm") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"networks of timm and of the Hugging Face hub need timm ({error}); "
            "pip install 'xbench[timm]' brings it"
        ) from None


def names() -> list[str]:
    """All that timm can build, each with the tags of its weights; empty without timm."""
    if importlib.util.find_spec("timm") is None:
        return []
    timm = _library()
    return [*timm.list_models(), *timm.list_pretrained()]


def facts(name: str) -> Mapping[str, Any]:
    """What timm says of the weights of a network, such as ``resnet50`` or ``resnet50.a1_in1k``.

    Raises:
        UsageError: if timm is missing, has no such network, or no such weights of it.
    """
    timm = _library()
    if name not in (known := names()):
        raise UsageError(f"timm has no classifier {name!r}{suggestion(name, known)}")
    found: Mapping[str, Any] = timm.get_pretrained_cfg(name).to_dict()
    return found


def build(name: str, classes: int | None = None) -> nn.Module:
    """The network with fresh weights; without ``classes``, as many as its weights tell apart."""
    net: nn.Module = _library().create_model(name, pretrained=False, num_classes=classes)
    return net


def weight_files(facts: Mapping[str, Any]) -> Sequence[str]:
    """Names that the weights of a repository of the hub have, the first one first."""
    named = facts.get("hf_hub_filename")
    return (named,) if named else ("model.safetensors", "pytorch_model.bin")


def cached(repository: str, file: str) -> Path | None:
    """A file of a repository in the cache of the Hugging Face hub; nothing is downloaded."""
    hub = _library("huggingface_hub")
    found = hub.try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def hub_facts(config: Path) -> Mapping[str, Any]:
    """Of a repository's ``config.json``: as :func:`facts`, and ``architecture``, ``arguments``.

    Raises:
        UsageError: if it describes no network of timm.
    """
    try:
        text = json.loads(config.read_text(encoding="utf-8"))
        weights = text.get("pretrained_cfg", text)
        classes = text["num_classes"] if "num_classes" in text else weights["num_classes"]
        told = {key: weights[key] for key in ("input_size", "mean", "std")}
        arguments = {**text.get("model_args", {}), "num_classes": classes}
        architecture = text["architecture"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{config} does not describe an image classifier of timm "
            f"({type(error).__name__}: {error}); networks of other libraries are plug-ins: a class "
            "with the decorator @xbench.model"
        ) from None
    file = weights.get("hf_hub_filename")
    return {
        **told,
        "num_classes": classes,
        "hf_hub_filename": file,
        "architecture": architecture,
        "arguments": arguments,
    }


def build_from(facts: Mapping[str, Any]) -> nn.Module:
    """The network of :func:`hub_facts` with fresh weights."""
    timm = _library()
    net: nn.Module = timm.create_model(
        facts["architecture"], pretrained=False, **facts["arguments"]
    )
    return net
