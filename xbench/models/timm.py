"""Classifiers of timm, which is an extra, and of the Hugging Face hub, which timm builds too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from ..downloads import Tell, receive
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


def cached(repository: str, file: str, cache: Path | None = None) -> Path | None:
    """A file of a repository in a cache of the Hugging Face hub; nothing is downloaded.

    Args:
        repository, file: on the hub.
        cache: its folder; by default the library's own.
    """
    hub = _library("huggingface_hub")
    found = hub.try_to_load_from_cache(repository, file, cache_dir=cache)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, file: str, cache: Path, tell: Tell) -> Path | None:
    """Downloads a file of a repository into a cache of the hub; None if there is no such file.

    The cache is laid out as the library does it, but what was interrupted goes on.

    Raises:
        UsageError: if the hub does not answer, or does not let the user in.
    """
    hub = _library("huggingface_hub")
    url = hub.hf_hub_url(repository, file)
    try:
        facts = hub.get_hf_file_metadata(url)
    except hub.errors.EntryNotFoundError:
        return None
    except Exception as error:  # of the library and of its transport
        words = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UsageError(f"{url} cannot be downloaded: {words}") from None
    if not facts.etag or not facts.commit_hash:
        raise UsageError(f"{url} does not answer as the Hugging Face hub does")
    home = cache / f"models--{repository.replace('/', '--')}"
    blob = home / "blobs" / facts.etag
    if not blob.is_file():
        # the hub names large files by their SHA-256, others as git does
        kind = {64: "sha256", 40: "git"}.get(len(facts.etag), "")
        # the hub asks who wants it; a host that it points to does not
        is_hub = urlsplit(facts.location).netloc == urlsplit(url).netloc
        headers = hub.utils.build_hf_headers() if is_hub else {}
        receive(
            facts.location, blob, f"{kind}:{facts.etag}" if kind else "", tell,
            name=f"{repository}/{file}", headers=headers,
        )  # fmt: skip
    link: Path = home / "snapshots" / facts.commit_hash / file
    branch = home / "refs" / "main"
    for path in (link, branch):
        path.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    branch.write_text(facts.commit_hash, encoding="utf-8")
    return link


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
