"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xbench import registry


@pytest.fixture
def own_names() -> Iterator[None]:
    """Names that a test registers, or plug-ins that it breaks, are forgotten when it ends."""
    kept = {kind: registry.entries(kind) for kind in registry.KINDS}
    broken = dict(registry._broken)
    yield
    for kind, entries in kept.items():
        registry._entries[kind].clear()
        registry._entries[kind].update(entries)
    registry._broken.clear()
    registry._broken.update(broken)
