"""Laws of the store: parts are whole or absent, never silently wrong, and no rows get lost."""

import errno
import hashlib
import json
import os
import random
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import xbench.files
import xbench.store
from xbench.errors import StoreError, UsageError
from xbench.store import COLUMNS, Group, Store, atomic_write

CELL = "0123456789abcdef"
NAN = float("nan")
HERE = {"provenance": {"torch": "2.14.1"}}
ELSEWHERE = {"provenance": {"torch": "2.13.0"}}


def frame(images: int = 3, value: float = 0.5, status: str = "ok", first: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "cell": CELL,
            "image": [f"image-{first + i}" for i in range(images)],
            "label": np.arange(images),
            "predicted": np.arange(images) + 1,
            "probability": np.linspace(0.1, 0.9, images),
            "value": value,
            "status": status,
        }
    )


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Store(tmp_path / "store").group("shapes@1a2b3c4d", "resnet@9f8e7d6c")


def again(group: Group) -> Group:
    """The same folder as another process sees it: nothing cached."""
    return Group(group.path)


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    environment = dict(os.environ, PYTHONPATH=str(Path(xbench.store.__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


WRITER = """
import sys
from pathlib import Path
import pyarrow as pa
from xbench.store import Store
assert "torch" not in sys.modules
root, who, parts, rows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store(Path(root))
group = store.group("shapes@1", "resnet@2")

def table(number):
    return pa.table({
        "cell": ["0123456789abcdef"] * rows,
        "image": [f"{who}-{number}-{i}" for i in range(rows)],
        "label": [0] * rows, "predicted": [1] * rows,
        "probability": [i / rows for i in range(rows)], "value": [float(number)] * rows,
        "status": ["ok"] * rows,
    })

store.group("warm@1", who).write("0", table(0), {})  # the first write imports more
print("ready", flush=True)
sys.stdin.readline()
for number in range(parts):
    print(group.write(f"{number:07d}", table(number), {}).name, flush=True)
"""


def test_rows_come_back_bit_for_bit_and_sorted_by_cell_and_image(group: Group) -> None:
    odd = np.array([NAN, -0.0, np.inf, 5e-324, 1 / 3])
    given = frame(5).assign(value=odd, image=list("edcba"), status="failed: “nonfinite”")
    group.write("0000000", given[list(COLUMNS[::-1])], HERE)
    found = again(group).rows()
    assert tuple(found.columns) == COLUMNS
    assert found["value"].to_numpy().tobytes() == odd[::-1].tobytes()
    expected = given.sort_values("image", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_exact=True)


def test_a_frame_and_a_table_give_the_same_part(group: Group) -> None:
    group.write("a", frame(), HERE)
    group.write("b", pa.Table.from_pandas(frame(), preserve_index=False), HERE)
    one, other = group.parts()
    assert one.rows.equals(other.rows)
    assert one.facts == other.facts == HERE


def test_equal_parts_are_one_file_named_by_its_bytes(group: Group) -> None:
    one = group.write("a", frame(), HERE)
    assert group.write("a", frame(), HERE) == one
    assert group.write("a", frame(value=0.6), HERE) != one
    assert one.stem == f"a-{hashlib.sha256(one.read_bytes()).hexdigest()[:16]}"
    assert all(part.is_named for part in group.parts())


def test_nothing_is_created_before_something_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    group = store.group("shapes@1", "resnet@2")
    assert (group.parts(), group.done(), len(group.rows())) == ([], {}, 0)
    assert tuple(group.rows().columns) == COLUMNS
    assert (store.groups(), store.sweep()) == ([], 0)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_no_rows_is_a_part(group: Group) -> None:
    group.write("0000000", frame().iloc[:0], HERE)
    assert len(again(group).parts()) == 1
    assert len(group.rows()) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (frame().drop(columns="value"), "has the columns cell, image"),
        (frame().assign(extra=1), "has the columns cell, image"),
        (frame().assign(label=[0.5, 1, 2]), "truncated"),
        (frame().assign(status=pd.Series([None, "ok", "ok"], dtype=object)), "no nulls"),
        (frame().assign(value=pd.Series([None, 1, 2], dtype=object)), "no nulls"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(
    group: Group, wrong: pd.DataFrame, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group.write("0000000", wrong, HERE)
    assert not group.path.exists()


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a\0", "a b"])
def test_part_names_are_of_checked_characters(group: Group, name: str) -> None:
    with pytest.raises(ValueError, match="must be of letters"):
        group.write(name, frame(), HERE)


# whole or absent


def test_a_killed_writer_leaves_whole_parts_or_none(tmp_path: Path) -> None:
    draw = random.Random(0)
    store = Store(tmp_path)
    promised: set[str] = set()
    for batch in range(5):
        writers = [start(WRITER, tmp_path, f"writer{batch}{i}", 10**6, 2000) for i in range(5)]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
            time.sleep(draw.uniform(0, 0.05))
        for writer in writers:
            time.sleep(draw.uniform(0, 0.02))
            writer.kill()
            said, _ = writer.communicate()
            promised.update(said.split("\n")[:-1])
    store.sweep()
    group = store.group("shapes@1", "resnet@2")
    stored = {part.path.name for part in group.parts()}
    assert group.damaged == []
    assert promised <= stored
    assert len(stored - promised) <= 25  # named, and killed before it could say so
    assert {path.name for path in group.path.iterdir()} == stored
    assert len(group.rows()) == 2000 * len(stored)


def test_temporary_files_of_dead_writers_go_and_all_others_stay(group: Group) -> None:
    group.write("0000000", frame(), HERE)
    host, boot, space = xbench.files._here()
    dead = start("")
    dead.communicate()

    def left_by(pid: int, space: str, boot: str, host: str) -> Path:
        path = group.path / f"{os.urandom(8).hex()}.{pid}.{space}.{boot}.{host}.tmp"
        path.write_bytes(b"PAR1")
        return path

    gone = [left_by(dead.pid, space, boot, host), left_by(os.getpid(), space, "0-0", host)]
    kept = [
        left_by(os.getpid(), space, boot, host),
        left_by(1, space, boot, host),  # lives, and is another user's unless we are root
        left_by(dead.pid, "1", boot, host),  # another container counts its own ids
        left_by(dead.pid, space, boot, "elsewhere.example.org"),
        group.path / "somebody's.tmp",
    ]
    kept[-1].touch()
    store = Store(group.path.parents[1])
    assert store.sweep() == 2
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    assert store.sweep() == 0
    assert len(again(group).parts()) == 1


def test_a_writer_s_temporary_file_says_that_it_lives(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    store = Store(group.path.parents[1])
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(store.sweep()))
    group.write("0000000", frame(), HERE)
    assert set(seen) == {0}
    assert len(group.parts()) == 1


def test_bytes_are_on_the_disk_before_their_name_and_the_name_after(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.write("0000000", frame(), HERE)
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        steps.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    group.write("0000001", frame(first=3), HERE)
    assert steps == ["file", "name", "folder"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("place", "step"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_a_full_disk_costs_neither_old_files_nor_leaves_a_stump(
    group: Group, monkeypatch: pytest.MonkeyPatch, place: Any, step: str
) -> None:
    group.write("0000000", frame(), HERE)
    table = group.path / "table.csv"
    atomic_write(table, b"old")
    before = {path: path.read_bytes() for path in group.path.iterdir()}
    attempts: list[Callable[[], object]] = [
        lambda: group.write("0000001", frame(first=3), HERE),
        lambda: atomic_write(table, b"new"),
    ]
    if step != "replace":
        attempts.append(lambda: group.manifest({"shape": [32]}))
    with monkeypatch.context() as patch:
        patch.setattr(place, step, full)
        for attempt in attempts:
            with pytest.raises(
                StoreError, match=r"No space left on device; [\d,]+ MiB are free.*resumes"
            ):
                attempt()
    assert {path: path.read_bytes() for path in group.path.iterdir()} == before
    group.write("0000001", frame(first=3), HERE)
    atomic_write(table, b"new")
    assert table.read_bytes() == b"new"
    assert len(again(group).rows()) == 6


def test_a_write_cut_short_by_the_system_leaves_no_stump(group: Group) -> None:
    group.write("0000000", frame(), HERE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            group.write("0000001", frame(5000, first=3), HERE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(group.path.iterdir())) == 1
    assert len(again(group).rows()) == 3


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "store").group("a@1", "b@2").write("0", frame(), {})


# many writers


def test_four_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path, who, 25, 20) for who in "abcd"]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    said = [writer.communicate("go\n")[0].split() for writer in writers]
    group = Store(tmp_path).group("shapes@1", "resnet@2")
    assert {part.path.name for part in group.parts()} == {name for names in said for name in names}
    expected = {f"{who}-{n}-{i}" for who in "abcd" for n in range(25) for i in range(20)}
    assert group.done() == {CELL: expected}
    assert (len(group.rows()), group.duplicates, group.damaged) == (len(expected), 0, [])


RACER = """
import json, sys
from pathlib import Path
from xbench.store import Store
for line in sys.stdin:
    group = Store(Path(sys.argv[1])).group("shapes@1", f"resnet@{int(line)}")
    print(json.dumps(group.manifest({"winner": sys.argv[2]})), flush=True)
"""


def test_of_four_racing_manifests_one_wins_and_all_read_it(tmp_path: Path) -> None:
    racers = [start(RACER, tmp_path, who) for who in "abcd"]
    winners = []
    for number in range(20):
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{number}\n")
            racer.stdin.flush()
        said = {racer.stdout.readline() for racer in racers if racer.stdout is not None}
        assert len(said) == 1
        winners.append(json.loads(said.pop())["winner"])
        folder = Store(tmp_path).group("shapes@1", f"resnet@{number}").path
        assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    for racer in racers:
        racer.communicate()
    assert set(winners) <= set("abcd")


# the manifest


def test_a_manifest_is_pinned_by_whoever_comes_first(group: Group) -> None:
    wanted = {"shape": (32, 3), "threads": 2, "by size": {10: "a", 9: "b"}}
    pinned = {"shape": [32, 3], "threads": 2, "by size": {"10": "a", "9": "b"}}
    assert group.manifest(wanted) == pinned
    assert again(group).manifest({"shape": [1]}) == pinned


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("32", "33"),
        lambda text: text[:-9],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("pinned", "pinnet"),
    ],
)
def test_a_damaged_manifest_is_an_error_with_the_way_out(
    group: Group, damage: Callable[[str], str]
) -> None:
    group.manifest({"shape": [32]})
    path = group.path / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=r"manifest.json is damaged .*restore it .*or remove it"):
        group.manifest({"shape": [32]})
    path.unlink()
    assert group.manifest({"shape": [16]}) == {"shape": [16]}


# damage


def test_a_flipped_bit_is_never_silently_wrong(group: Group) -> None:
    draw = random.Random(0)
    path = group.write("0000000", frame(60), HERE | {"cells": {CELL: {"method": "grad_cam"}}})
    content = path.read_bytes()
    (whole,) = group.parts()
    harmless = 0
    for _ in range(200):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        reader = again(group)
        if found := reader.parts():
            harmless += 1
            assert found[0].rows.equals(whole.rows)
            assert found[0].facts == whole.facts
            assert reader.damaged == []
        else:
            (message,) = reader.damaged
            assert f"{path} is damaged" in message
            path.with_name(f"{path.name}.bad").unlink()
    assert harmless < 100


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_part_is_set_aside_and_its_rows_are_computed_again(
    group: Group, share: float
) -> None:
    group.write("0000000", frame(), HERE)
    bad = group.write("0000001", frame(first=3), HERE)
    content = bad.read_bytes()
    bad.write_bytes(content[: int(share * len(content))])
    reader = again(group)
    assert reader.done() == {CELL: {"image-0", "image-1", "image-2"}}
    assert len(reader.damaged) == 1
    assert bad.with_name(f"{bad.name}.bad").exists()
    reader.write("0000001", frame(first=3), HERE)
    assert len(reader.rows()) == 6
    assert again(group).damaged == []


def test_a_value_altered_under_an_honest_checksum_is_found(group: Group) -> None:
    path = group.write("0000000", frame(), HERE)
    file = pq.ParquetFile(path)
    metadata = {k: v for k, v in file.metadata.metadata.items() if k.startswith(b"xbench")}
    table = file.read()
    better = table.set_column(5, table.schema.field(5), pa.array([0.5, 0.5, 0.6]))
    with pq.ParquetWriter(path, better.schema, store_schema=False) as writer:
        writer.write_table(better)
        writer.add_key_value_metadata(metadata)
    assert group.parts() == []
    assert "not those that were sealed" in group.damaged[0]


def test_a_foreign_parquet_file_is_set_aside(group: Group) -> None:
    group.write("0000000", frame(), HERE)
    frame().to_parquet(group.path / "mine.parquet")
    assert len(group.parts()) == 1
    assert "seal does not fit" in group.damaged[0]


def test_a_part_that_cannot_be_read_stays_where_it_is(group: Group) -> None:
    group.write("0000000", frame(), HERE)
    folder = group.path / "0000001.parquet"
    folder.mkdir()
    assert len(group.parts()) == 1
    assert "cannot be read" in group.damaged[0]
    assert folder.is_dir()


def test_a_part_of_a_newer_schema_is_refused_and_left_alone(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(xbench.store, "SCHEMA", 2)
        path = group.write("0000000", frame(), HERE)
        group.manifest({})
    for read in (group.parts, group.rows, group.done, lambda: group.manifest({})):
        with pytest.raises(StoreError, match=r"written by a newer xbench \(schema 2"):
            read()
    assert path.exists()


# rows that say the same, and rows that do not


def test_what_is_done_excludes_errors_alone(group: Group) -> None:
    group.write("0", frame(status="ok"), HERE)
    group.write("1", frame(value=NAN, status="failed: decode", first=3), HERE)
    group.write("2", frame(value=NAN, status="error: killed (signal 9)", first=6), HERE)
    assert group.done() == {CELL: {f"image-{i}" for i in range(6)}}


@pytest.mark.parametrize("names", ["01", "10"])
def test_a_final_row_wins_over_an_error_in_any_order(group: Group, names: str) -> None:
    group.write(names[0], frame(value=NAN, status="error: out of memory"), HERE)
    group.write(names[1], frame(value=0.5), HERE)
    rows = group.rows()
    assert (rows["status"] == "ok").all()
    assert (rows["value"] == 0.5).all()
    assert (len(rows), group.duplicates, group.mixed) == (3, 0, False)


def test_of_several_errors_the_last_by_file_name_stays(group: Group) -> None:
    for name, status in (("1", "error: one"), ("2", "error: two"), ("0", "error: zero")):
        group.write(name, frame(value=NAN, status=status), HERE)
    rows = group.rows()
    assert list(rows["status"]) == ["error: two"] * 3
    assert (group.done(), group.duplicates) == ({}, 0)


@pytest.mark.parametrize("value", [0.5, NAN])
def test_equal_final_rows_are_one_and_are_counted(group: Group, value: float) -> None:
    group.write("0", frame(value=value), HERE)
    once = again(group).rows()
    for facts in (HERE, ELSEWHERE):
        group.write("1", frame(value=value), facts)
    pd.testing.assert_frame_equal(group.rows(), once)
    assert (group.duplicates, group.mixed) == (6, False)
    group.rows()
    assert group.duplicates == 6


@pytest.mark.parametrize(
    "other", [{"value": 0.6}, {"value": NAN}, {"status": "failed: mask"}, {"predicted": 7}]
)
def test_unequal_final_rows_of_one_provenance_are_an_error_naming_both(
    group: Group, other: dict[str, Any]
) -> None:
    group.write("2", frame(value=0.7), ELSEWHERE)
    one = group.write("0", frame(), HERE)
    two = group.write("1", frame().assign(**other), HERE)
    with pytest.raises(StoreError, match=f"{one.name} and {two.name} .*equal provenance"):
        group.rows()
    two.unlink()
    assert len(group.rows()) == 3


def test_of_unequal_rows_of_different_provenance_the_first_by_name_counts(group: Group) -> None:
    group.write("1", frame(value=0.6), ELSEWHERE)
    group.write("0", frame(value=0.5), HERE)
    assert (group.rows()["value"] == 0.5).all()
    assert (group.mixed, group.duplicates) == (True, 0)


def test_a_reader_sees_what_was_written_after_its_first_look(group: Group) -> None:
    group.write("0", frame(), HERE)
    assert len(group.rows()) == 3
    again(group).write("1", frame(first=3), HERE)
    assert len(group.rows()) == 6


def test_a_part_is_read_from_the_disk_once(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.write("0", frame(), HERE)
    group.done()
    monkeypatch.setattr(Path, "read_bytes", full)
    assert len(group.rows()) == 3
    assert group.damaged == []


# names


ODD_NAMES = [
    *("a", "A", "a/b", "a+b", "a%2Bb", "a b", "a\\b", "a:b", "NA", "con", "-rf", "~", "@"),
    *(".", "..", "...", ".hidden", "../a", "../../a", "/", "/etc/passwd", "//", "a/", "a/../b"),
    *("a\0b", "a\nb", "ä", "a\u0308", "模型", "\ud800", "*", "[a]", "%", "%2E", "%2E."),
]


def test_odd_names_stay_inside_the_store_and_never_meet(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    paths = {store.group(a, b).path for a in ODD_NAMES for b in ODD_NAMES}
    assert len(paths) == len(ODD_NAMES) ** 2
    for path in paths:
        assert path.resolve().parents[1] == store.root.resolve()
    for name in ODD_NAMES:
        store.group(name, name).write("0", frame(1).assign(image=ascii(name)), {})
    assert len(store.groups()) == len(ODD_NAMES)
    for name in ODD_NAMES:
        assert store.group(name, name).rows()["image"].item() == ascii(name)


def test_usual_names_stay_readable(tmp_path: Path) -> None:
    path = Store(tmp_path).group("shapes@1a2b3c4d", "cifar100/resnet18@9f8e").path
    assert path == tmp_path / "shapes@1a2b3c4d" / "cifar100+resnet18@9f8e"


@pytest.mark.parametrize("name", ["", "x" * 241])
def test_a_name_that_makes_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 240 characters"):
        Store(tmp_path).group("shapes@1", name)
