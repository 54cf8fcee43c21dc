"""Files that are whole or absent, whatever happens to their writer."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from .errors import StoreError

_TEMPORARY = re.compile(r"[0-9a-f]{16}\.([1-9]\d{0,8})\.(\d+)\.([0-9a-f-]*)\.(.*)\.tmp")


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Create or replace a file so that readers, and a power cut, find the old or the new one.

    Raises:
        StoreError: if the disk is full or refuses; the old file is as it was.
    """
    with temporary_file(path, data) as temporary:
        temporary.replace(path)


@contextmanager
def temporary_file(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A file beside ``path`` with the data safely on the disk; gone on leaving, if still there."""
    host, boot, space = _here()
    temporary = path.parent / f"{os.urandom(8).hex()}.{os.getpid()}.{space}.{boot}.{host}.tmp"
    try:
        _make(path.parent)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync(path.parent)
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if os.access(parent, os.R_OK))
        raise StoreError(
            f"{path} cannot be written: {error.strerror}; {shutil.disk_usage(folder).free >> 20:,} "
            f"MiB are free. What was stored before is whole: mend this and run again, which resumes"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _here() -> tuple[str, str, str]:
    """Host, its boot, and the space in which process ids count: a container has its own."""
    boot, space = "", "0"
    with suppress(OSError):  # only Linux says
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").stat().st_ino)
    return quote(socket.gethostname(), safe=""), boot, space


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be another user's
    return True


def writer_of(path: Path) -> Literal["", "dead", "alive", "elsewhere"]:
    """How it stands with the writer of a temporary file; empty if the file is none of ours.

    Of other hosts, and of containers with process ids of their own, nobody here can tell.
    """
    if not (owner := _TEMPORARY.fullmatch(path.name)):
        return ""
    host, boot, space = _here()
    pid, its_space, its_boot, its_host = owner.groups()
    if its_host != host or (its_boot == boot and its_space != space):
        return "elsewhere"
    return "alive" if its_boot == boot and _lives(int(pid)) else "dead"


def sweep(root: Path) -> int:
    """Remove the temporary files of dead writers of this host below a folder, and count them."""
    removed = 0
    for path in root.rglob("*.tmp"):
        if writer_of(path) == "dead":
            with suppress(OSError):  # another sweep was faster, or it is another user's
                path.unlink()
                removed += 1
    return removed
