"""Looking after a store: what stands there, whether it is sound, what serves nothing, merging.

A look at a store changes nothing, needs no lock and may run beside any number of writers: parts are
whole or absent, so what appears or goes meanwhile was simply not there.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from .errors import DamagedPart, StoreError, UsageError, printable
from .files import atomic_write, writer_of
from .registry import suggestion
from .store import (
    KEPT,
    SCORES,
    Form,
    Group,
    Part,
    compared,
    folder_of,
    is_well_named,
    read_arrays,
    read_part,
)

Kind = Literal[
    "damaged", "altered", "unreadable", "newer", "foreign", "contradiction", "manifest",
    "left over", "set aside", "unknown",
]  # fmt: skip
HARMLESS: tuple[Kind, ...] = ("left over", "set aside", "unknown")
"""Kinds of findings that no table can notice."""

LONG_WRITTEN = 24 * 3600.0
"""Age in seconds from which a temporary file of another host counts as left over: writing one takes
seconds, and no two hosts' clocks are a day apart."""

_OURS = re.compile(r"-[0-9a-f]{16}\.parquet(\.bad)?$")
"""Names that a store gives; another file among its parts is somebody's."""

ANEW = (
    "restore it from a copy, or let 'xbench store gc --damaged' remove it, and the next run "
    "computes its rows anew"
)
ELSEWHERE = "move it elsewhere, or remove it"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a store.

    Args:
        kind: of what is wrong.
        path: the file.
        what: is wrong with it.
        way_out: what to do.
    """

    kind: Kind
    path: Path
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}; {self.way_out}"


@dataclass(frozen=True)
class Sound:
    """A part that was read and is what its writer wrote.

    Args:
        part: itself.
        size: bytes.
        sha256: of the file; empty where only scores and facts were read.
    """

    part: Part
    size: int
    sha256: str = ""


@dataclass
class Audit:
    """What a look at a store has found.

    Attributes:
        root: of the store.
        findings: what is wrong.
        parts: sound ones in the order of their names, by folder.
        pinned: conditions of each group that has a manifest, by folder.
        duplicates: final rows that only repeat another one: harmless.
        mixed: final rows that differ from another one which was made under other conditions.
        untold: parts of earlier versions, which do not say what their cells are.
        writing: temporary files of writers that are alive, or may be.
    """

    root: Path
    findings: list[Finding] = field(default_factory=list)
    parts: dict[Path, list[Sound]] = field(default_factory=dict)
    pinned: dict[Path, dict[str, Any]] = field(default_factory=dict)
    duplicates: int = 0
    mixed: int = 0
    untold: int = 0
    writing: int = 0

    @property
    def groups(self) -> list[Path]:
        """Folders of groups, relative to the root, sorted."""
        found = {path.relative_to(self.root).parts[:2] for path in (*self.parts, *self.pinned)}
        return sorted(Path(*names) for names in found)

    def of(self, group: Path, form: Form) -> list[Sound]:
        """Parts of a group, of one form."""
        folder = self.root / group
        return self.parts.get(folder / "kept" if form is KEPT else folder, [])

    def form(self, folder: Path) -> Form:
        """Of the parts in a folder."""
        return KEPT if len(folder.relative_to(self.root).parts) == 3 else SCORES

    def counts(self) -> dict[str, int]:
        """In numbers."""
        every = [(form, one) for g in self.groups for form in (SCORES, KEPT)
                 for one in self.of(g, form)]  # fmt: skip
        return {
            "groups": len(self.groups),
            "parts": len(every),
            "rows": sum(one.part.rows.num_rows for form, one in every if form is SCORES),
            "arrays": sum(one.part.rows.num_rows for form, one in every if form is KEPT),
            "bytes": sum(one.size for _, one in every),
            "duplicates": self.duplicates,
            "mixed": self.mixed,
            "untold": self.untold,
            "writing": self.writing,
        }


# --- where ----------------------------------------------------------------------------------------


def find_store(path: Path) -> Path:
    """The store of a folder of results, or the folder itself if it is one.

    Raises:
        UsageError: if there is none.
    """
    if (path / "store").is_dir():
        return path / "store"
    if _is_store(path):
        return path
    if path.is_dir():
        raise UsageError(
            f"{str(path)!r} holds no store: neither a folder 'store' nor parts of scores; give the "
            f"folder that 'xbench run -o' was given"
        )
    wrong = "is a file" if path.exists() else "does not exist"
    others: list[str] = []
    with suppress(OSError):
        others = [o.name for o in path.absolute().parent.iterdir() if (o / "store").is_dir()]
    hint = suggestion(path.name, others) if others else ""
    raise UsageError(f"{str(path)!r} {wrong}; no store to look at{hint}")


def _is_store(path: Path) -> bool:
    """Whether a folder holds groups."""
    return any(any(path.glob(f"*@*/*@*/{name}")) for name in ("manifest.json", "*.parquet"))


# --- looking --------------------------------------------------------------------------------------


def audit(root: Path, *, deep: bool = True) -> Audit:
    """Reads a store without changing it.

    Args:
        root: of the store.
        deep: read every byte; else what is kept beside the scores counts as sound unread.
    """
    found = Audit(root)
    for kind, path in _files(root, found.findings):
        if kind == "part":
            _look_at_part(found, path, deep=deep)
        elif kind == "manifest":
            _look_at_manifest(found, path)
        elif kind == "temporary":
            _look_at_temporary(found, path)
        elif kind == "bad":
            found.findings.append(
                Finding(
                    "set aside", path, "was found damaged and set aside",
                    "the next run computes its rows anew; 'xbench store gc --damaged' removes it",
                )
            )  # fmt: skip
        else:
            found.findings.append(Finding("unknown", path, "is no file of a store", ELSEWHERE))
    for folder, parts in found.parts.items():
        _look_at_conditions(found, folder, parts)
        _look_at_rows(found, folder, [one.part for one in parts])
    return found


def _files(root: Path, findings: list[Finding]) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, sorted, with what its place and name say that it is."""

    def locked(error: OSError) -> None:
        path = Path(str(error.filename))
        if not isinstance(error, FileNotFoundError):  # else it has gone meanwhile
            findings.append(_unreadable(path, error))

    for name, folders, files in os.walk(root, onerror=locked, followlinks=True):
        folder = Path(name)
        depth = len(folder.relative_to(root).parts)
        folders.sort()
        if depth >= 2:
            known = ["kept"] if depth == 2 else []
            yield from (("unknown", folder / one) for one in folders if one not in known)
            folders[:] = [one for one in folders if one in known]
        for one in sorted(files):
            path = folder / one
            if one.endswith(".tmp") and writer_of(path):
                yield "temporary", path
            elif depth in (2, 3) and one.endswith(".parquet"):
                yield "part", path
            elif depth in (2, 3) and _OURS.search(one):
                yield "bad", path
            elif depth == 2 and one == "manifest.json":
                yield "manifest", path
            else:
                yield "unknown", path


def _unreadable(path: Path, error: OSError) -> Finding:
    return Finding(
        "unreadable", path, f"cannot be read ({error.strerror})", "give yourself the right to"
    )


def _look_at_part(found: Audit, path: Path, *, deep: bool) -> None:
    """Takes a part in, or says what is wrong with its bytes."""
    form = found.form(path.parent)
    try:
        size, sha256 = path.stat().st_size, ""
        if deep:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        part = read_part(path, form)
    except FileNotFoundError:
        return  # it has gone meanwhile
    except OSError as error:
        found.findings.append(_unreadable(path, error))
        return
    except DamagedPart as error:
        found.findings.append(_damage(path, error))
        return
    except StoreError as error:
        what, _, way_out = str(error).removeprefix(f"{path} ").rpartition("; ")
        found.findings.append(Finding("newer", path, what, way_out))
        return
    if deep and form.heavy:
        try:
            for _ in read_arrays(path, form, list(enumerate(part.rows.to_pylist()))):
                pass
        except Exception as error:  # a flipped bit can raise anything
            found.findings.append(_damage(path, error))
            return
    if deep and part.is_named and not is_well_named(path, sha256):
        found.findings.append(
            Finding(
                "altered", path,
                "has bytes that do not fit its name, though its rows are those that were written: "
                "a bit that nobody reads has changed, or somebody has renamed it",
                "restore it from a copy, or remove it and run again",
            )
        )  # fmt: skip
        return
    found.parts.setdefault(path.parent, []).append(Sound(part, size, sha256))


def _damage(path: Path, error: Exception) -> Finding:
    if not _OURS.search(path.name):
        return Finding("unknown", path, "is no part of a store, whatever its name says", ELSEWHERE)
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 4))
        if file.read() != b"PAR1":
            words = f"is truncated: it ends after {size:,} bytes without the end of such a file"
            return Finding("damaged", path, words, ANEW)
    return Finding("damaged", path, f"is damaged ({' '.join(str(error).split())})", ANEW)


def _look_at_manifest(found: Audit, path: Path) -> None:
    try:
        pinned = Group(path.parent).pinned()
    except StoreError as error:
        what, _, way_out = str(error).removeprefix(f"{path} ").rpartition("; ")
        found.findings.append(Finding("manifest", path, what, way_out))
        return
    if pinned is not None:
        found.pinned[path.parent] = pinned


def _look_at_temporary(found: Audit, path: Path) -> None:
    if _is_left_over(path):
        found.findings.append(
            Finding(
                "left over", path, "was begun by a writer that is dead",
                "it does no harm; 'xbench store gc' removes it",
            )
        )  # fmt: skip
    else:
        found.writing += 1


def _is_left_over(path: Path) -> bool:
    writer = writer_of(path)
    if writer != "elsewhere":
        return writer == "dead"
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > LONG_WRITTEN
    return False


def _look_at_conditions(found: Audit, folder: Path, parts: Sequence[Sound]) -> None:
    """Whether parts belong where they lie, and have only cells that they name."""
    group = folder.parent if found.form(folder) is KEPT else folder
    pinned = found.pinned.get(group, {})
    for part in (one.part for one in parts):
        names = part.facts.get("group")
        if names is None:
            found.untold += 1
        elif (here := (group.parent.name, group.name)) != tuple(map(folder_of, names)):
            home = found.root.joinpath(*map(folder_of, names))
            found.findings.append(
                Finding(
                    "foreign", part.path,
                    f"holds scores of {' x '.join(names)}, not of {' x '.join(here)}",
                    f"move it to {home}{'/kept' if folder != group else ''}",
                )
            )  # fmt: skip
        if names is not None:
            strange = set(part.rows["cell"].unique().to_pylist()) - set(cells_of(part))
            if strange:
                found.findings.append(
                    Finding(
                        "foreign", part.path,
                        f"has rows of cells that it does not name: {', '.join(sorted(strange))}",
                        "remove it and run again, which computes its rows anew",
                    )
                )  # fmt: skip
        made = part.facts.get("provenance") or {}
        other = {key: made[key] for key in pinned if key in made and made[key] != pinned[key]}
        if other:
            words = ", ".join(f"{key} {value}, not {pinned[key]}" for key, value in other.items())
            found.findings.append(
                Finding(
                    "foreign", part.path,
                    f"was made under other conditions than the manifest of its group pins: {words}",
                    "remove it and run again, which computes its rows anew",
                )
            )  # fmt: skip


def cells_of(part: Part) -> dict[str, tuple[str, str]]:
    """Method and metric of each cell that a part names."""
    told = part.facts.get("cells", {})
    return {cell: (method, metric) for method in told for metric, cell in told[method].items()}


def _look_at_rows(found: Audit, folder: Path, parts: Sequence[Part]) -> None:
    """How rows of several parts stand to one another."""
    form = found.form(folder)
    told = compared(parts, form)
    found.duplicates += told.duplicates
    found.mixed += told.mixed
    found.findings += _contradictions(told.against, parts, form)


def _contradictions(against: Any, parts: Sequence[Part], form: Form) -> list[Finding]:
    """One finding for each set of parts that say different things of the same rows."""
    by_parts: dict[tuple[int, ...], list[Any]] = {}
    for _, rows in against.groupby([*form.key, "provenance"]):
        by_parts.setdefault(tuple(dict.fromkeys(rows["part"])), []).append(rows)
    findings = []
    for numbers, places in by_parts.items():
        first = places[0].iloc[0]
        last = parts[numbers[-1]]
        names = cells_of(last).get(first["cell"])
        cell = f"cell {first['cell']}" + (f" ({', '.join(filter(None, names))})" if names else "")
        of = "value" if form is SCORES else "digest"
        said = " against ".join(str(value) for value in places[0][of])
        beside = " and ".join(str(parts[number].path) for number in numbers[:-1]) or "itself"
        findings.append(
            Finding(
                "contradiction", last.path,
                f"and {beside} claim equal provenance and disagree on {len(places):,} "
                f"{'row' if len(places) == 1 else 'rows'}, such as {cell}, image "
                f"{first['image']!r}: {said}",
                "remove the part that you do not trust and run again, which computes its rows anew",
            )
        )  # fmt: skip
    return findings


# --- what serves nothing --------------------------------------------------------------------------


@dataclass(frozen=True)
class Waste:
    """A file that serves nothing.

    Args:
        path: the file.
        size: bytes.
        why: it serves nothing.
    """

    path: Path
    size: int
    why: str


def waste(found: Audit, *, damaged: bool = False) -> list[Waste]:
    """What may go without any table noticing.

    Args:
        found: a deep look at the store.
        damaged: also parts that were set aside, and those that no run can read.
    """
    files: list[Waste] = []
    reasons: dict[Kind, str] = {"left over": "a writer that is dead began it"}
    if damaged:
        reasons |= {"set aside": "damaged and set aside", "damaged": "damaged: no run can read it"}
    for finding in found.findings:
        if finding.kind in reasons:
            with suppress(FileNotFoundError):
                size = finding.path.stat().st_size
                files.append(Waste(finding.path, size, reasons[finding.kind]))
    for folder, parts in found.parts.items():
        files += [
            Waste(parts[at].part.path, parts[at].size, "other parts hold all its rows")
            for at in sorted(redundant([one.part for one in parts], found.form(folder)))
        ]
    return files


def redundant(parts: Sequence[Part], form: Form) -> set[int]:
    """Numbers of the parts without which all others still say the same.

    A final row may go if a part before has an equal one of equal provenance, which is the one that
    counts; an error, if there is a final row in its place.
    """
    frame, failed, *_ = compared(parts, form)
    key = list(form.key)
    again = frame.duplicated([*form.light.names, "provenance"])  # the first is of the first part
    final = pd.MultiIndex.from_frame(frame.loc[~failed, key])
    is_final = pd.MultiIndex.from_frame(frame.loc[failed, key]).isin(final)
    needed = {*frame.loc[~failed & ~again, "part"], *frame.loc[failed, "part"][~is_final]}
    spare = set(range(len(parts))) - needed
    sure: dict[str, float] = {}
    for at in sorted(needed):
        sure.update(parts[at].facts.get("confidence", {}))
    return {
        at
        for at in spare
        if all(sure.get(k) == v for k, v in parts[at].facts.get("confidence", {}).items())
    }


def remove(files: Iterable[Waste]) -> None:
    """Removes files; one that has gone meanwhile is gone.

    Raises:
        StoreError: if the system refuses.
    """
    for file in files:
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"{file.path} cannot be removed: {error.strerror}; give yourself the right to, and "
                f"run this again"
            ) from error


# --- bringing stores together ---------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What a merge has done.

    Args:
        root: of the store that it went to.
        copied: new files there.
        size: their bytes.
        skipped: parts whose rows were there already.
        mixed: final rows that now differ from another one, made under other conditions.
    """

    root: Path
    copied: tuple[Path, ...]
    size: int
    skipped: int
    mixed: int


def merge(sources: Sequence[Path], into: Path) -> Merged:
    """Copies what other stores hold into one, after everything was found sound and compatible.

    What is interrupted goes on when it is run again: each part is whole or absent.

    Args:
        sources: stores, or folders that hold one.
        into: a store, or a folder that holds one or will.

    Raises:
        UsageError: if a source is no store, or the target itself.
        StoreError: if a store is damaged, two contradict each other, or the disk refuses. Nothing
            was copied then, but for a disk that refuses.
    """
    roots = [find_store(source) for source in sources]
    if into.exists() and not into.is_dir():
        raise UsageError(f"--into {str(into)!r} is a file; name a folder of results")
    target = into if _is_store(into) else into / "store"
    for source, root in zip(sources, roots, strict=True):
        if target.exists() and root.samefile(target):
            raise UsageError(f"{str(source)!r} is the store to merge into; name only the others")
    given = [audit(root) for root in roots]
    there = audit(target)
    problems = [
        finding
        for one in (*given, there)
        for finding in one.findings
        if finding.kind not in HARMLESS
        # what is damaged in the target counts as missing there, and may be what is brought
        and not (one is there and finding.kind in ("damaged", "altered"))
    ]
    if problems:
        raise StoreError("\n".join([*map(printable, map(str, problems)), "nothing was merged"]))
    _refuse_other_conditions(there, given)
    todo: list[tuple[Path, Sound]] = []
    skipped = mixed = 0
    for group in sorted({group for one in given for group in one.groups}):
        for form in (SCORES, KEPT):
            new, again, differ = _new_parts(group, form, there, given)
            todo += new
            skipped += again
            mixed += differ
    for one in given:
        for folder, pinned in one.pinned.items():
            home = Group(target / folder.relative_to(one.root))
            if (known := home.manifest(pinned)) != pinned:  # somebody has just pinned others
                raise StoreError(_other(home.path, folder, known, pinned))
    for path, sound in todo:
        content = sound.part.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sound.sha256:
            raise StoreError(f"{sound.part.path} has changed meanwhile; run this again")
        atomic_write(path, content)
    size = sum(sound.size for _, sound in todo)
    return Merged(target, tuple(path for path, _ in todo), size, skipped, mixed)


def _refuse_other_conditions(there: Audit, given: Sequence[Audit]) -> None:
    """Groups of equal names must pin equal conditions, or their numbers differ by rounding."""
    first: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for one in (there, *given):
        for folder, pinned in one.pinned.items():
            place, known = first.setdefault(folder.relative_to(one.root), (folder, pinned))
            if known != pinned:
                raise StoreError(_other(place, folder, known, pinned))


def _other(place: Path, folder: Path, known: Mapping[str, Any], pinned: Mapping[str, Any]) -> str:
    return (
        f"{place / 'manifest.json'} pins {conditions_in_words(known)}, "
        f"{folder / 'manifest.json'} pins {conditions_in_words(pinned)}: their numbers differ by "
        f"rounding. Run one of them again with the other's conditions in a new folder "
        f"(--batch-size); nothing was merged"
    )


def conditions_in_words(pinned: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(pinned.items()))


def _new_parts(
    group: Path, form: Form, there: Audit, given: Sequence[Audit]
) -> tuple[list[tuple[Path, Sound]], int, int]:
    """Parts to copy and where to, how many bring nothing new, and how many rows now differ."""
    own = there.of(group, form)
    brought = [one for source in given for one in source.of(group, form)]
    parts = [one.part for one in (*own, *brought)]
    told = compared(parts, form)
    if findings := _contradictions(told.against, parts, form):
        raise StoreError("\n".join([*map(printable, map(str, findings)), "nothing was merged"]))
    spare = redundant(parts, form)
    home = there.root / group
    folder = home / "kept" if form is KEPT else home
    names = {one.part.path.name: one.sha256 for one in own}
    new: list[tuple[Path, Sound]] = []
    for at, one in enumerate(brought, start=len(own)):
        name = one.part.path.name
        if at in spare or names.get(name) == one.sha256:
            continue
        if name in names:
            raise StoreError(
                f"{one.part.path} and a different part would share the name {folder / name}; "
                f"rename it, and merge again"
            )
        names[name] = one.sha256
        new.append((folder / name, one))
    return new, len(brought) - len(new), told.mixed
