"""Downloads of what hosts and licences allow: resumed, verified, and archives unpacked."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .errors import UsageError

log = logging.getLogger(__name__)

FOLDER = "downloads"
"""Of the data directory, where archives are kept; they may be deleted once they are unpacked."""

CHUNK = 2**20

Tell = Callable[[str, int, int | None], object]
"""Told what is downloaded: name, bytes so far, bytes in all, if known."""


class Download(NamedTuple):
    """A tar archive.

    Args:
        url: where it is.
        md5: that it must have, as its authors or torchvision publish it.
        into: folder to unpack it in, relative to the data directory.
        makes: what is there once it is unpacked, relative to ``into``.
    """

    url: str
    md5: str
    into: str
    makes: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(downloads: Iterable[Download], data: Path, tell: Tell) -> list[Path]:
    """Downloads and unpacks what is not there yet; what was unpacked.

    What was interrupted goes on where it ended. A folder appears only when it is complete.

    Raises:
        UsageError: if a host does not answer, or an archive is not the published one.
    """
    made = []
    for download in downloads:
        target = data / download.into / download.makes
        if target.exists():
            continue
        archive = data / FOLDER / download.name
        if not archive.exists():
            receive(download.url, archive, f"md5:{download.md5}", tell)
        _unpack(archive, data / download.into)
        if not target.exists():
            raise UsageError(f"{archive} does not hold {download.makes!r}")
        made.append(target)
    return made


def receive(
    url: str,
    place: Path,
    checksum: str,
    tell: Tell,
    *,
    name: str = "",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Downloads one file, which gets its name once it is complete and verified.

    What was interrupted goes on where it ended.

    Args:
        url: where it is.
        place: where it goes.
        checksum: ``md5:``, ``sha256:`` or ``git:`` (how git names a file's content), and how the
            digest begins; empty if its host does not say.
        tell: told how far it is.
        name: to call it; the last part of ``url`` by default.
        headers: of the request.

    Raises:
        UsageError: if the host does not answer, or the file is not the published one.
    """
    name = name or url.rpartition("/")[2]
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    have = part.stat().st_size if part.exists() else 0
    said = {"User-Agent": "xbench", **(headers or {})}
    request = urllib.request.Request(url, headers=said)  # noqa: S310 - the entries' own addresses
    if have:
        request.add_header("Range", f"bytes={have}-")
    log.debug("GET %s from byte %d", url, have)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            goes_on = answer.status == 206
            length = answer.headers.get("Content-Length")
            done = have if goes_on else 0
            total = done + int(length) if length else None
            with part.open("ab" if goes_on else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    tell(name, done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # all of it is there already
            raise UsageError(f"{url} answers {error.code} {error.reason}") from None
        total = have
    except OSError as error:
        raise UsageError(
            f"{url} cannot be downloaded: {error}; the same command goes on from there, "
            f"or put the file at {place}"
        ) from None
    if total is not None and part.stat().st_size < total:
        raise UsageError(
            f"{url} ended after {part.stat().st_size:,} of {total:,} bytes; the same "
            f"command goes on from there"
        )
    algorithm, _, expected = checksum.partition(":")
    found = _digest(part, algorithm) if checksum else ""
    if not found.startswith(expected):
        part.unlink()
        raise UsageError(
            f"{url} is not the published file: its {algorithm} is {found}, not {expected}; it "
            f"was deleted"
        )
    part.rename(place)


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(archive: Path, into: Path) -> None:
    """Beside its place, then moved there; nothing is written outside and no link is followed."""
    into.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(f"{archive.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(beside, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"{archive} cannot be unpacked: {error}") from None
    for entry in beside.iterdir():
        if not (into / entry.name).exists():
            entry.rename(into / entry.name)
    shutil.rmtree(beside)
