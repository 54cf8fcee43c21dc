"""Saliency maps as files, for other programs too: safetensors, from image key to map (H, W).

Any number of files in a folder belong together. Those that xbench writes are sealed and say what
made their maps; those of others need only hold the maps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from .errors import StoreError, UsageError
from .files import atomic_write

SCHEMA = 1


def write_maps(
    folder: Path, name: str, maps: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> Path:
    """Store maps (H, W) by image key as one new file of a folder, whole or absent.

    Args:
        folder: where maps of one method, model and data set are.
        name: how the file's name begins; an id of its own follows.
        maps: by image key.
        facts: JSON values kept in the file's metadata; ``made_by`` is the identity of what made
            the maps, ``absent`` has the images without a map and why.

    Raises:
        StoreError: if the disk is full or refuses.
    """
    said = {"schema": SCHEMA, "digest": _digest(maps), **facts}
    path = folder / f"{name}-{os.urandom(8).hex()}.safetensors"
    atomic_write(path, save(dict(maps), {"xbench": json.dumps(said, sort_keys=True)}))
    return path


def _digest(maps: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(maps))).hexdigest()


def _facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What xbench said of a file; nothing, if another program wrote it."""
    return dict(json.loads((metadata or {}).get("xbench", "{}")))


def images_done(folder: Path, made_by: str) -> set[str]:
    """Keys of the images that a folder has a map of, or a reason for none; only headers are read.

    Raises:
        UsageError: if it holds maps that something else made.
        StoreError: if a file is damaged.
    """
    done: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts, keys = _facts(file.metadata()), file.keys()
        except (SafetensorError, ValueError) as error:
            raise _damaged(path, error) from None
        if facts.get("made_by") != made_by:
            raise UsageError(
                f"{folder} holds maps of other weights, images, parameters, target or seed than "
                f"this run's ({path.name}); choose another folder for --save-maps, or remove it"
            )
        done |= {*keys, *facts.get("absent", ())}
    return done


def _damaged(path: Path, why: object) -> StoreError:
    return StoreError(
        f"{path} is damaged ({why}); remove it, and the run that saved its maps saves them again"
    )


@dataclass(frozen=True)
class MapFiles:
    """Verified files of maps.

    Args:
        sha256: of their contents, whatever they are called.
        places: the file of each image's map.
    """

    sha256: str
    places: Mapping[str, Path]

    def load(self, key: str) -> Tensor | None:
        """The map of an image, if there is one."""
        if key not in self.places:
            return None
        with safe_open(self.places[key], framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found


def open_maps(path: Path) -> MapFiles:
    """The maps in a file, or in all ``*.safetensors`` of a folder; each is read and verified once.

    Raises:
        UsageError: if there are none, or several methods' maps.
        StoreError: if a file is damaged.
    """
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    try:
        facts = [(file, file.stat()) for file in files]
    except OSError:
        facts = []
    if not facts:
        raise UsageError(
            f"there are no maps in {str(path)!r}: name a safetensors file, or a folder of them, "
            "relative to the working directory"
        )
    return _opened(path, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in facts))


@functools.lru_cache(maxsize=256)
def _opened(path: Path, files: tuple[tuple[Path, int, int], ...]) -> MapFiles:
    places: dict[str, Path] = {}
    hashes: list[str] = []
    makers: dict[Any, Path] = {}
    for file, _, _ in files:
        content = file.read_bytes()
        try:
            maps = load(content)
            with safe_open(file, framework="pt") as header:
                said = _facts(header.metadata())
        except (SafetensorError, ValueError) as error:
            raise _damaged(file, error) from None
        if said and said.get("digest") != _digest(maps):
            raise _damaged(file, "its seal does not fit")
        makers.setdefault(said.get("made_by"), file)
        twice = [key for key in maps if key in places]
        if len(makers) > 1 or any(not _equal(places[key], key, maps[key]) for key in twice):
            others = sorted({str(one.parent) for one, _, _ in files})
            raise UsageError(
                f"{str(path)!r} holds several maps of one image; name one folder of "
                f"{', '.join(others[:8])}"
            )
        places.update(dict.fromkeys(maps, file))
        hashes.append(hashlib.sha256(content).hexdigest())
    return MapFiles(hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest(), places)


def _equal(path: Path, key: str, one: Tensor) -> bool:
    with safe_open(path, framework="pt") as file:
        other: Tensor = file.get_tensor(key)
    return torch.equal(one.nan_to_num(), other.nan_to_num())
