"""Downloads of data sets whose hosts and licences allow it: resumed, verified, then unpacked."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError

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
            _receive(download, archive, tell)
        _unpack(archive, data / download.into)
        if not target.exists():
            raise UsageError(f"{archive} does not hold {download.makes!r}")
        made.append(target)
    return made


def _receive(download: Download, archive: Path, tell: Tell) -> None:
    """The archive under its name, once it is complete and verified."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f"{archive.name}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(download.url)  # noqa: S310 - the entries' own constants
    if have:
        request.add_header("Range", f"bytes={have}-")
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
                    tell(download.name, done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # all of it is there already
            raise UsageError(f"{download.url} answers {error.code} {error.reason}") from None
        total = have
    except OSError as error:
        raise UsageError(
            f"{download.url} cannot be downloaded: {error}; the same command goes on from there, "
            f"or put the file at {archive}"
        ) from None
    if total is not None and part.stat().st_size < total:
        raise UsageError(
            f"{download.url} ended after {part.stat().st_size:,} of {total:,} bytes; the same "
            f"command goes on from there"
        )
    with part.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != download.md5:
        part.unlink()
        raise UsageError(
            f"{download.url} is not the published file: its md5 is {md5}, not {download.md5}; it "
            f"was deleted"
        )
    part.rename(archive)


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
