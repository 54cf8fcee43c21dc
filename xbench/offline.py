"""Keeping the network away: ``--offline`` says no, whoever asks."""

from __future__ import annotations

import os
import sys
from typing import Any

from .errors import Offline

_HUB = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""With these, the Hugging Face libraries look into their caches alone and do not ask first."""

_state = {"enforced": False, "hooked": False}
_before: dict[str, str | None] = {}  # what the variables were


def is_enforced() -> bool:
    """Whether this process refuses network access."""
    return _state["enforced"]


def enforce(wanted: bool) -> None:
    """From now on, refuses network access in this process, or allows it again.

    Addresses of this machine stay allowed. Python code alone is watched, which is what suites
    import; a library that brings its own sockets in another language is not.
    """
    if wanted == _state["enforced"]:
        return
    _state["enforced"] = wanted
    for name in _HUB:
        if wanted:
            _before[name] = os.environ.get(name)
            os.environ[name] = "1"
        elif (old := _before[name]) is None:
            del os.environ[name]
        else:
            os.environ[name] = old
    if hub := sys.modules.get("huggingface_hub.constants"):  # it has read its variables before
        hub.HF_HUB_OFFLINE = wanted  # type: ignore[attr-defined]
    if wanted and not _state["hooked"]:
        sys.addaudithook(_refuse)
        _state["hooked"] = True


_EVENTS = ("socket.getaddrinfo", "socket.connect", "socket.sendto")


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _state["enforced"] or event not in _EVENTS:
        return
    place = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = place[0] if isinstance(place, tuple) else place
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    # a path is a socket of this machine
    is_here = event != "socket.getaddrinfo" and not isinstance(place, tuple)
    if is_here or host in (None, "", "localhost", "::1") or host.startswith("127."):
        return
    raise Offline(
        f"network access to {host!r} is refused, since this command is offline (--offline, "
        "XBENCH_OFFLINE or the suite's run.offline); 'xbench fetch' brings data and weights before"
    )
