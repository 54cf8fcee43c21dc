"""Every error that xbench raises on purpose.

All are XbenchError, whose message is for the user: the command line never shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class XbenchError(Exception):
    """Something the user can mend: the message names the value, the place and the way out."""


class UsageError(XbenchError):
    """Wrong before any work starts: a name, a parameter, a path. Exit status 2."""


class SuiteError(UsageError):
    """All problems of one suite at once.

    Args:
        problems: one sentence each, with its place in the file.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SuiteError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # Exception's own reduce would pass the joined text


class Offline(UsageError):  # noqa: N818
    """Something asked for the network, which the user keeps away."""


class Unsupported(XbenchError):  # noqa: N818
    """An entry declares that it cannot work here; the cell is ``skipped`` with this message."""


class Unpriced(Unsupported):
    """What something costs cannot be told before it runs; a plan counts it as unknown."""


class BadImage(XbenchError):  # noqa: N818
    """One picture cannot be read; its rows are ``failed: decode``."""


class BadWeights(XbenchError):  # noqa: N818
    """Weights are damaged, do not fit the architecture, or are not finite."""


class StoreError(XbenchError):
    """A stored file is damaged, foreign, or contradicts another."""


class DamagedPart(StoreError):  # noqa: N818
    """The bytes of a part are not those that were written."""


def printable(text: str) -> str:
    """Text of files and of errors, without what could steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
