"""Scores on disk: part files that are whole or absent.

A group is one (data set, model); each write to it makes one Parquet file of its own. A file gets
its name only after its bytes are on the disk, and nobody opens it for writing again. So no kill,
full disk or second run can tear, mix or lose rows, any number of processes and hosts may write,
and reading needs no lock. Every reading verifies what a file says; a damaged one is set aside,
and its rows count as never computed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import DamagedPart, StoreError, UsageError
from .files import atomic_write, sweep, temporary_file

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
COLUMNS = ("cell", "image", "label", "predicted", "probability", "value", "status")
_TYPES = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.float64(), pa.float64(), pa.string())
_ERROR = "error"  # how a status begins that is not final


@dataclass(frozen=True)
class Form:
    """What the parts of a group hold.

    Args:
        schema: columns and types, no nulls.
        key: the columns that name a row.
        heavy: a column that is read only when it is asked for; the column ``digest`` seals each of
            its values.
    """

    schema: pa.Schema
    key: tuple[str, ...]
    heavy: str = ""

    @property
    def light(self) -> pa.Schema:
        """What is read always."""
        return pa.schema([column for column in self.schema if column.name != self.heavy])


def _schema(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(*column, nullable=False) for column in columns])


SCORES = Form(_schema(*zip(COLUMNS, _TYPES, strict=True)), ("cell", "image"))
KEPT = Form(
    _schema(
        *((name, pa.string()) for name in ("cell", "image", "name", "status", "dtype", "shape")),
        ("digest", pa.string()),
        ("data", pa.binary()),
    ),
    ("cell", "image", "name"),
    heavy="data",
)
"""Curves, maps and pictures: an array for each cell (or another id), image and name."""

_HASH = 16  # hex digits of it that end the name of a part
_ROWS_AT_ONCE = 128
"""Rows of a part with heavy values that are read together."""


class Piece(NamedTuple):
    """One array that is kept of an image; without it, the status says why.

    Args:
        id: of what is kept: the cell's for its curves.
        image: key.
        name: among the arrays of one id, such as "mask" beside "picture".
        status: "ok", or the reason.
        array: of any shape.
        folder: where it goes as a file of its own kind, instead of the store.
    """

    id: str
    image: str
    name: str
    status: str
    array: np.ndarray[Any, Any] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Part:
    """One verified part file.

    Args:
        path: the file.
        facts: what its writer said of it.
        rows: all columns that are not heavy; no nulls, but NaN.
        is_named: whether its name ends in the hash of its bytes, as names do since they can.
    """

    path: Path
    facts: Mapping[str, Any]
    rows: pa.Table
    is_named: bool = False


class Store:
    """A folder of groups, for any number of runs and hosts; the first write creates it."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._groups: dict[Path, Group] = {}  # each remembers what was damaged

    def group(self, dataset: str, model: str) -> Group:
        """The group of these names; each should end in a hash, as in ``"shapes@1a2b3c4d"``.

        Different names give different folders; where a file system ignores case, their hashes do.

        Raises:
            UsageError: if a name is empty or too long for a folder.
        """
        path = self.root / folder_of(dataset) / folder_of(model)
        return self._groups.setdefault(path, Group(path))

    def groups(self) -> list[Group]:
        """All groups that hold parts, sorted by folder."""
        return [Group(path) for path in sorted({p.parent for p in self.root.glob("*/*/*.parquet")})]

    def sweep(self) -> int:
        """Remove the temporary files of dead writers of this host, and count them."""
        return sweep(self.root)


class Group:
    """The part files of one data set and model.

    Attributes:
        path: the folder.
        damaged: one sentence for each part that was set aside or could not be read.
        duplicates: final rows that only repeated another one, as of the last :meth:`rows`.
        mixed: whether rows of different provenance differed, as of the last :meth:`rows`.
    """

    def __init__(self, path: Path, form: Form = SCORES) -> None:
        self.path = path
        self.form = form
        self.damaged: list[str] = []
        self.duplicates = 0
        self.mixed = False
        # by file name: sound parts never change; None is bad, until the same is written again
        self._known: dict[str, Part | None] = {}

    @cached_property
    def kept(self) -> Group:
        """What is kept beside the scores of this group, in parts of their own."""
        return Group(self.path / "kept", KEPT)

    def manifest(self, wanted: Mapping[str, object]) -> dict[str, Any]:
        """What is pinned for this group: ``wanted`` if nothing is yet, else what came first.

        Of several writers exactly one wins, and all get the winner's, as JSON gives it back.

        Raises:
            StoreError: if the stored one is damaged or newer, or cannot be written.
        """
        if (pinned := self.pinned()) is not None:
            return pinned
        content = json.loads(_canonical({"schema": SCHEMA, "pinned": dict(wanted)}))
        sealed = _canonical(content | {"seal": _sha256(_canonical(content))})
        path = self.path / "manifest.json"
        with temporary_file(path, sealed) as temporary, suppress(FileExistsError):
            path.hardlink_to(temporary)  # unlike a rename, it fails if somebody was first
        return self.pinned() or dict(content["pinned"])

    def pinned(self) -> dict[str, Any] | None:
        """What was pinned for this group, or None while nothing is.

        Raises:
            StoreError: if the manifest is damaged or newer.
        """
        path = self.path / "manifest.json"
        if not os.access(path, os.F_OK):  # exists() raises where a folder is locked
            return None
        try:
            content = json.loads(path.read_bytes())
            if content.pop("seal") != _sha256(_canonical(content)):
                raise ValueError("its seal does not fit")
        except Exception as error:
            raise StoreError(
                f"{path} is damaged ({error}); it pins the conditions of the parts beside it: "
                f"restore it from a copy, or remove it, and the next run pins its own conditions"
            ) from error
        _refuse_newer(path, content)
        return dict(content["pinned"])

    def write(self, name: str, rows: pd.DataFrame | pa.Table, facts: Mapping[str, object]) -> Path:
        """Store rows as one new part; once this returns, they survive a power cut.

        Args:
            name: how the file's name begins, such as a slice's number; the hash of its bytes
                follows, so that equal parts are one file.
            rows: the columns of the form, in any order; NaN for unknown numbers.
            facts: JSON values kept with the rows. Parts of equal ``facts["provenance"]`` promise
                equal rows.

        Raises:
            ValueError, TypeError: if the name, the columns or their values are not as above.
            StoreError: if the disk is full or refuses; nothing is left behind then.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise ValueError(f"part name {name!r} must be of letters, digits, '.', '_' and '-'")
        table = _as_table(rows, self.form.schema)
        light = table.select(self.form.light.names)
        seal = {"schema": SCHEMA, "rows": table.num_rows, "digest": _digest(light), "named": True}
        sealed = _canonical(seal | {"facts": dict(facts)})
        file = pa.BufferOutputStream()
        with pq.ParquetWriter(
            file,
            self.form.schema,
            compression="zstd",
            use_dictionary=[
                column.name
                for column in self.form.schema
                if pa.types.is_string(column.type) and column.name != "digest"
            ],
            write_page_checksum=True,
            write_statistics=False,
            store_schema=False,  # a second copy of names and types is a second place to rot
        ) as writer:
            writer.write_table(table, row_group_size=_ROWS_AT_ONCE if self.form.heavy else None)
            writer.add_key_value_metadata({"xbench": sealed, "xbench-seal": _sha256(sealed)})
        content = memoryview(file.getvalue())
        path = self.path / f"{name}-{hashlib.sha256(content).hexdigest()[:_HASH]}.parquet"
        atomic_write(path, content)
        return path

    def parts(self) -> list[Part]:
        """All sound parts, sorted by file name; each file is read once.

        A damaged file is renamed to ``*.bad`` and reported in :attr:`damaged`.

        Raises:
            StoreError: if a part was written by a newer xbench.
        """
        paths = sorted(self.path.glob("*.parquet"))
        known = self._known
        self._known = {path.name: known.get(path.name) or self._read(path) for path in paths}
        return [part for part in self._known.values() if part is not None]

    def rows(self) -> pd.DataFrame:
        """One row per cell and image, sorted by both, with all columns that are not heavy.

        A final row wins over those whose status starts with "error"; of several errors, the last
        by file name. Equal final rows are one. Where different provenance made them differ, the
        first by file name counts and :attr:`mixed` is set.

        Raises:
            StoreError: if final rows of equal provenance differ, or a part is newer.
        """
        parts = self.parts()
        key, columns = list(self.form.key), self.form.light.names
        found = compared(parts, self.form)
        frame, failed = found.frame, found.failed
        for (cell, image, *_), rows in found.against.groupby([*key, "provenance"]):
            names = " and ".join(parts[part].path.name for part in rows["part"])
            raise StoreError(
                f"{names} in {self.path} claim equal provenance and disagree on cell {cell}, image "
                f"{image!r}:\n{rows[columns[2:]].to_string(index=False)}\nRemove the part that "
                f"you do not trust and run again, which computes its rows anew"
            )
        self.duplicates = found.duplicates
        self.mixed = found.mixed > 0
        preferred = frame.index[~failed].append(frame.index[failed][::-1])
        chosen = frame.loc[preferred].drop_duplicates(key).sort_index()
        rows_of: pd.DataFrame = chosen[columns].reset_index(drop=True)
        return rows_of

    def done(self) -> dict[str, set[str]]:
        """Image keys with a final row, by cell id; errors are not final and are tried again."""
        table = _in_order(self.parts(), self.form)
        final = table.filter(pc.invert(pc.starts_with(table["status"], _ERROR)))
        images = final.group_by("cell").aggregate([("image", "distinct")])
        keys = map(set, images["image_distinct"].to_pylist())
        return dict(zip(images["cell"].to_pylist(), keys, strict=True))

    def arrays(
        self, cells: Collection[str], images: Collection[str]
    ) -> Iterator[tuple[str, str, str, np.ndarray[Any, Any]]]:
        """Cell, image, name and array of what is kept of these; each is verified as it is read.

        The first by file name counts. A part with a damaged array is set aside, and reported in
        :attr:`damaged`; what it held is computed again by the next run that keeps it.
        """
        seen: set[tuple[str, str, str]] = set()
        for part in self.parts():
            wanted = [
                (at, row)
                for at, row in enumerate(part.rows.to_pylist())
                if row["cell"] in cells and row["image"] in images and row["status"] == "ok"
            ]
            try:
                for row, array in read_arrays(part.path, self.form, wanted):
                    key = (row["cell"], row["image"], row["name"])
                    if key not in seen:
                        seen.add(key)
                        yield *key, array
            except Exception as error:  # a flipped bit can raise anything
                self._set_aside(part.path, error)
                self._known[part.path.name] = None

    def _read(self, path: Path) -> Part | None:
        try:
            return read_part(path, self.form)
        except FileNotFoundError:
            return None  # another process has just set it aside, and reports it
        except OSError as error:
            self._say(f"{path} cannot be read ({error.strerror}); left where it is")
            return None
        except DamagedPart as error:
            self._set_aside(path, error)
            return None

    def _set_aside(self, path: Path, error: Exception) -> None:
        with suppress(OSError):  # a store may be read-only
            path.rename(path.with_name(f"{path.name}.bad"))
        self._say(
            f"{path} is damaged ({error}): its rows count as missing; it is set aside as "
            f"{path.name}.bad, if the folder lets it"
        )

    def _say(self, words: str) -> None:
        if words not in self.damaged:  # where it cannot be set aside, it is met again
            self.damaged.append(words)


def folder_of(name: str) -> str:
    """A name as one folder: "/" reads "+", everything unusual is percent-encoded."""
    folder = quote(name, safe="/@", errors="surrogatepass").replace("/", "+")
    if folder.startswith("."):
        folder = "%2E" + folder[1:]
    if not 0 < len(folder) <= 240:
        raise UsageError(f"{name!r} cannot name a folder of the store: give 1 to 240 characters")
    return folder


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(table: pa.Table) -> str:
    """Hash of all values, floats bit by bit; a page's checksum does not say whose page it is."""
    digest = hashlib.sha256()
    for column in table.columns:
        is_text = pa.types.is_string(column.type)
        digest.update(_canonical(column.to_pylist()) if is_text else column.to_numpy().tobytes())
    return digest.hexdigest()


def _as_table(rows: pd.DataFrame | pa.Table, schema: pa.Schema) -> pa.Table:
    given = list(rows.column_names if isinstance(rows, pa.Table) else rows.columns)
    if sorted(given) != sorted(schema.names):
        raise ValueError(f"a part has the columns {', '.join(schema.names)}, not {given}")
    if isinstance(rows, pa.Table) and rows.schema == schema:
        return rows
    columns = [pa.array(rows[field.name].to_numpy(), field.type) for field in schema]
    if any(column.null_count for column in columns):
        raise ValueError("a part has no nulls; an unknown number is NaN")
    return pa.table(columns, schema=schema)


def kept_table(pieces: Iterable[Piece]) -> pa.Table:
    """Arrays as the rows of a part of :data:`KEPT`, and the reasons where there is none."""
    rows: dict[str, list[Any]] = {name: [] for name in KEPT.schema.names}
    for piece in pieces:
        array = np.empty(0) if piece.array is None else np.ascontiguousarray(piece.array)
        data = array.tobytes()
        values = (piece.id, piece.image, piece.name, piece.status, array.dtype.str,
                  json.dumps(array.shape), _sha256(data), data)  # fmt: skip
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    return pa.table(rows, schema=KEPT.schema)


def read_arrays(
    path: Path, form: Form, wanted: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[dict[str, Any], np.ndarray[Any, Any]]]:
    """Rows, by their numbers in a part, with their arrays; a few are in memory at once.

    Raises:
        Exception: of any kind, if the part is damaged.
    """
    if not wanted:
        return
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group, chosen in itertools.groupby(wanted, lambda one: one[0] // _ROWS_AT_ONCE):
            values = file.read_row_group(group, columns=[form.heavy], use_threads=False)[form.heavy]
            for at, row in chosen:
                data = values[at % _ROWS_AT_ONCE].as_py()
                if _sha256(data) != row["digest"]:
                    raise ValueError("an array is not the one that was sealed")
                shape = json.loads(row["shape"])
                yield row, np.frombuffer(data, np.dtype(row["dtype"])).reshape(shape)


def read_part(path: Path, form: Form) -> Part:
    """The part in a file, verified but for its heavy column.

    Raises:
        DamagedPart: if its bytes are not those that were written.
        StoreError: if it was written by a newer xbench.
        OSError: if the file cannot be opened.
    """
    content = pa.OSFile(str(path)) if form.heavy else pa.BufferReader(path.read_bytes())
    try:
        with content:
            return _verified(path, content, form)
    except StoreError:
        raise
    except Exception as error:  # a flipped bit can raise anything
        raise DamagedPart(str(error)) from error


def is_well_named(path: Path, sha256: str) -> bool:
    """Whether a file's name ends in the hash of its bytes."""
    return path.stem.endswith(f"-{sha256[:_HASH]}")


def _verified(path: Path, content: Any, form: Form) -> Part:
    """The part in this file; any error but StoreError means that it is damaged."""
    file = pq.ParquetFile(content, page_checksum_verification=True)
    metadata = file.metadata.metadata or {}
    sealed = metadata.get(b"xbench", b"")
    if metadata.get(b"xbench-seal", b"") != _sha256(sealed).encode():
        raise ValueError("its seal does not fit")
    seal = json.loads(sealed)
    _refuse_newer(path, seal)
    if file.schema_arrow.remove_metadata() != form.schema:
        raise ValueError("its columns are not those of such a part")
    rows = file.read(columns=form.light.names, use_threads=False).replace_schema_metadata()
    found = (rows.schema, rows.num_rows, _digest(rows))
    if found != (form.light, seal["rows"], seal["digest"]):
        raise ValueError("its rows are not those that were sealed")
    return Part(path, seal["facts"], rows, seal.get("named", False))


def _refuse_newer(path: Path, sealed: Mapping[str, Any]) -> None:
    """A higher number under a sound seal is no damage: every schema is sealed alike."""
    if sealed["schema"] > SCHEMA:
        raise StoreError(
            f"{path} was written by a newer xbench (schema {sealed['schema']}, this one reads up "
            f"to {SCHEMA}); update xbench, or use another folder"
        )


class Compared(NamedTuple):
    """Rows of several parts beside one another.

    Args:
        frame: all rows by key and part, with the numbers of part and provenance as columns.
        failed: which of them are not final.
        against: final rows of equal provenance that differ.
        duplicates: final rows that only repeat another one.
        mixed: final rows that differ from another one of another provenance.
    """

    frame: pd.DataFrame
    failed: pd.Series[bool]
    against: pd.DataFrame
    duplicates: int
    mixed: int


def compared(parts: Sequence[Part], form: Form) -> Compared:
    """How the rows of these parts, in this order, stand to one another."""
    key, columns = list(form.key), form.light.names
    frame: pd.DataFrame = _in_order(parts, form).to_pandas()
    failed = frame["status"].str.startswith(_ERROR)
    again = frame[~failed & frame.duplicated(key, keep=False)]
    said = again.drop_duplicates([*columns, "provenance"])
    distinct = said.drop_duplicates(columns)
    return Compared(
        frame,
        failed,
        said[said.duplicated([*key, "provenance"], keep=False)],
        len(again) - len(distinct),
        int(distinct.duplicated(key).sum()),
    )


def _in_order(parts: Sequence[Part], form: Form) -> pa.Table:
    """Rows by cell, image and part, with the numbers of part and provenance as columns."""
    seen: dict[bytes, int] = {}
    made = [seen.setdefault(_canonical(p.facts.get("provenance")), len(seen)) for p in parts]
    table = pa.concat_tables([form.light.empty_table(), *(part.rows for part in parts)])
    for name, numbers in (("part", range(len(parts))), ("provenance", made)):
        column = np.repeat(np.asarray(numbers, np.int64), [part.rows.num_rows for part in parts])
        table = table.append_column(name, pa.array(column))
    keys = [(name, "ascending") for name in form.key]
    return table.take(pc.sort_indices(table, sort_keys=keys))  # a stable sort
