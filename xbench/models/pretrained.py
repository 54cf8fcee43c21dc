"""Networks of libraries, with weights of theirs: ``torchvision/``, ``timm/`` and ``hf/<name>``.

The library says what a network's weights want: mean and standard deviation, the size of images and
the number of classes. A run downloads nothing: weights are taken from the data directory, where
``fetch`` puts them, or from the library's cache.
"""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from .. import registry
from ..downloads import Tell, receive
from ..errors import UsageError
from ..registry import suggestion
from ..types import Network
from . import timm, torchvision

WEIGHTS = "weights"
"""Folder of the data directory, for files of torchvision and a cache of the Hugging Face hub."""

_Seed = Annotated[int, Field(ge=0)]


class _Pretrained:
    """What networks of all libraries share."""

    version: ClassVar[int] = 1
    places: ClassVar[tuple[str, ...]] = ("weights", "seed")  # the hash of weights stands for them
    name: ClassVar[str]
    weights: str
    seed: int

    def __reduce__(self) -> Any:
        # the class is made on first use, so pickle cannot find it by its name
        return registry.make, ("models", self.name, registry.parameters(self))

    def seeded(self, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """The same fresh weights at every build; the global stream is left as it was."""

        def drawn() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return build()

        return drawn


def _class(
    base: type[_Pretrained], name: str, weights: Sequence[str], words: str, **more: Any
) -> type:
    """The registered class of a network.

    Args:
        name: registered name.
        weights: what may be chosen, the default first.
        words: the docstring, without its arguments.
        more: class attributes.
    """
    arguments = (
        "Args:\n"
        f"    weights: {weights[0]!r} is the library's default; 'none' draws fresh ones, to try.\n"
        "    seed: of fresh weights.\n\n"
        "Raises:\n    UsageError: if the weights are not on this machine."
    )
    namespace = {
        "__module__": __name__,
        "__doc__": f"{words}\n\n{arguments}",
        "__annotations__": {"weights": Literal[tuple(weights)], "seed": _Seed},
        "weights": weights[0],
        "seed": 0,
        **more,
    }
    return registry.declared(name, type(re.sub(r"\W", "_", name), (base,), namespace))


# --- torchvision ----------------------------------------------------------------------------------


class _Torchvision(_Pretrained):
    """A network of torchvision."""

    key: ClassVar[str]
    members: ClassVar[Mapping[str, Any]]

    def describe(self, data: Path | None) -> Network:
        member = self.members.get(self.weights, self.members["DEFAULT"])
        preset = member.transforms()
        build = functools.partial(torchvision.build_for, self.key, member)
        side = preset.crop_size[0]
        network = functools.partial(
            Network, mean=tuple(preset.mean), std=tuple(preset.std), size=(side, side)
        )
        if self.weights == "none":
            return network(build=self.seeded(build), weights=None)
        file = Path(member.url).name
        here = [] if data is None else [data / file, data / WEIGHTS / file]
        home = Path(torch.hub.get_dir()) / "checkpoints" / file
        return network(
            build=build,
            weights=next((path for path in here if path.is_file()), home),
            sha256=torchvision.checksum(file),
            fetch=(
                "'xbench fetch' brings them into the data directory, and 'curl --fail --location "
                f"--create-dirs --output {shlex.quote(str(home))} {member.url}' there; with "
                "'weights: none' the network is tried with fresh ones"
            ),
        )

    def fetch(self, data: Path, tell: Tell) -> None:
        """Downloads the weights into ``data``, unless they are there or in torch's own cache."""
        found = self.describe(data).weights
        if found is not None and not found.is_file():
            url = self.members[self.weights].url
            file = Path(url).name
            receive(url, data / WEIGHTS / file, f"sha256:{torchvision.checksum(file)}", tell)


def _torchvision_class(key: str) -> type:
    names = torchvision.names()
    if key not in names:
        raise UsageError(f"torchvision has no classifier {key!r}{suggestion(key, names)}")
    return _made_torchvision_class(key)


@functools.cache
def _made_torchvision_class(key: str) -> type:
    members = torchvision.weights(key)
    default = members["DEFAULT"]
    preset = default.transforms()
    side = preset.crop_size[0]
    lines = [
        f"{key} of torchvision, with the weights that torchvision names.",
        "",
        f"{default.meta['num_params'] / 1e6:.1f} M parameters, "
        f"{len(default.meta['categories']):,} classes. The default weights want images of "
        f"{side} x {side}",
        f"cut out of a short side of {preset.resize_size[0]} ({preset.interpolation.value}), "
        f"mean {tuple(preset.mean)}, std {tuple(preset.std)}.",
        "",
        "Weights:",
    ]
    for name, member in members.items():
        if name != "DEFAULT":
            first = "(default) " if member is default else ""
            accuracy = next(iter(member.meta["_metrics"].values())).get("acc@1")
            lines.append(f"    {name}: {first}published accuracy {accuracy} %, {member.url}")
    more = {"key": key, "members": members}
    return _class(_Torchvision, f"torchvision/{key}", [*members, "none"], "\n".join(lines), **more)


# --- timm and the Hugging Face hub ----------------------------------------------------------------


class _Hub(_Pretrained):
    """A network that timm builds, with weights from the Hugging Face hub."""

    key: ClassVar[str]

    def network(
        self,
        facts: Mapping[str, Any],
        build: Callable[[], nn.Module],
        repository: str,
        data: Path | None,
        files: Sequence[str] = (),
    ) -> Network:
        if not facts["num_classes"]:
            raise UsageError(f"model {self.name!r} has no classes: its weights give features alone")
        network = functools.partial(
            Network,
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            size=tuple(facts["input_size"][1:]),
        )
        if self.weights == "none":
            return network(build=self.seeded(build), weights=None)
        weights = timm.weight_files(facts)
        found = next((p for file in weights if (p := _cached(repository, file, data))), None)
        # the cache names what it holds by its hash, of which a link may tell another one
        blob = found.readlink().name if found is not None and found.is_symlink() else ""
        return network(
            build=build,
            weights=found or Path(repository) / weights[0],
            sha256=blob if re.fullmatch("[0-9a-f]{64}", blob) else "",
            fetch=_fetch(repository, *files, weights[0]),
        )


class _Timm(_Hub):
    """A network of timm."""

    facts: ClassVar[Mapping[str, Any]]

    def describe(self, data: Path | None) -> Network:
        repository = self.facts.get("hf_hub_id", "")
        if not repository and self.weights != "none":
            raise UsageError(
                f"model {self.name!r}: timm has no weights of it on the Hugging Face hub; "
                "'weights: none' tries the network without, and the model 'checkpoint' with "
                f"architecture: {self.name} takes a file of your own"
            )
        build = functools.partial(timm.build, self.key)
        return self.network(self.facts, build, repository, data)

    def fetch(self, data: Path, tell: Tell) -> None:
        """Downloads the weights into ``data``, unless they are there or in the hub's own cache."""
        found = self.describe(data).weights
        if found is not None and not found.is_file():
            _bring(self.facts["hf_hub_id"], timm.weight_files(self.facts), data, tell)


class _HuggingFace(_Hub):
    """A repository of the hub."""

    def describe(self, data: Path | None) -> Network:
        config = _cached(self.key, "config.json", data)
        if config is None:
            raise UsageError(
                f"model {self.name!r}: its config.json is not in the Hugging Face hub's cache; "
                + _fetch(self.key, "config.json", "model.safetensors")
            )
        facts = timm.hub_facts(config)
        build = functools.partial(timm.build_from, facts)
        return self.network(facts, build, self.key, data, ("config.json",))

    def fetch(self, data: Path, tell: Tell) -> None:
        """Downloads what the repository says and its weights, as far as they are not there."""
        config = _cached(self.key, "config.json", data)
        if config is None:
            config = _bring(self.key, ("config.json",), data, tell)
        found = self.describe(data).weights
        if found is not None and not found.is_file():
            _bring(self.key, timm.weight_files(timm.hub_facts(config)), data, tell)


def _cached(repository: str, file: str, data: Path | None) -> Path | None:
    """A file of the hub, in the data directory or in the hub's own cache."""
    inside = None if data is None else timm.cached(repository, file, data / WEIGHTS)
    return inside or timm.cached(repository, file)


def _bring(repository: str, files: Sequence[str], data: Path, tell: Tell) -> Path:
    """The first of these files that the repository has."""
    for file in files:
        if (found := timm.fetch(repository, file, data / WEIGHTS, tell)) is not None:
            return found
    raise UsageError(f"repository {repository} of the Hugging Face hub has no {' or '.join(files)}")


def _fetch(repository: str, *files: str) -> str:
    return (
        f"'xbench fetch' or 'hf download {repository} {' '.join(files)}' brings it; with "
        "'weights: none' the network is tried with fresh ones"
    )


@functools.cache
def _timm_class(key: str) -> type:
    facts = timm.facts(key)
    height, width = facts["input_size"][1:]
    short = math.floor(min(height, width) / (facts.get("crop_pct", 1)))
    words = (
        f"{key} of timm, with the weights that timm names.\n\n"
        f"{facts['num_classes']:,} classes. The weights want images of {height} x {width} cut out "
        f"of a short side of {short}\n({facts['interpolation']}), mean {tuple(facts['mean'])}, std "
        f"{tuple(facts['std'])}.\nTheir licence: {facts.get('license', 'not stated')}. They lie on "
        f"the Hugging Face hub in {facts.get('hf_hub_id', 'no repository')}."
    )
    more = {"key": key, "facts": facts}
    return _class(_Timm, f"timm/{key}", ("DEFAULT", "none"), words, **more)


@functools.cache
def _hub_class(key: str) -> type:
    if key.count("/") != 1:
        raise UsageError(
            f"model {'hf/' + key!r}: a repository of the Hugging Face hub is OWNER/NAME, such as "
            "hf/timm/resnet50.a1_in1k"
        )
    words = (
        f"The image classifier of the Hugging Face hub's repository {key}, built by timm.\n\n"
        "Its config.json says which network it is, and what its images look like."
    )
    return _class(_HuggingFace, f"hf/{key}", ("DEFAULT", "none"), words, key=key)


# --- the families ---------------------------------------------------------------------------------


for _prefix, _load, _names, _summary in (
    (
        "torchvision/",
        _torchvision_class,
        torchvision.names,
        "Any classifier of torchvision, such as torchvision/resnet50, with torchvision's weights.",
    ),
    (
        "timm/",
        _timm_class,
        timm.names,
        "Any classifier of timm, such as timm/deit_tiny_patch16_224.fb_in1k, with timm's weights.",
    ),
    (
        "hf/",
        _hub_class,
        list,
        "A classifier for timm from the Hugging Face hub, such as hf/timm/resnet50.a1_in1k.",
    ),
):
    registry.provide_family(
        registry.Family("models", _prefix, __name__, _load, _names, summary=_summary)
    )
