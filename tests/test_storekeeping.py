"""Laws of looking after a store: nothing wrong stays unseen, and nothing that counts is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Answer, Outcome, environment, last_run, small, suite_of

import xbench.files
from xbench import storekeeping
from xbench.errors import StoreError, UsageError
from xbench.run import run_suite
from xbench.store import Group, Piece, Store, kept_table
from xbench.storekeeping import Audit, audit, find_store, merge, redundant, remove, waste

Run = Callable[..., Outcome]
Command = Callable[..., Answer]

CELL = "0123456789abcdef"
HERE = {"provenance": {"torch": "2.14.1"}}
ELSEWHERE = {"provenance": {"torch": "2.13.0"}}


def frame(images: str = "abc", value: float = 0.5, status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "cell": CELL,
            "image": list(images),
            "label": 0,
            "predicted": 1,
            "probability": 0.5,
            "value": value,
            "status": status,
        }
    )


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Store(tmp_path / "store").group("shapes@1a2b3c4d", "resnet@9f8e7d6c")


def look(group: Group) -> Audit:
    return audit(group.path.parents[1])


def kinds(found: Audit) -> list[str]:
    return [finding.kind for finding in found.findings]


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def results(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of SMALL leaves, with curves and maps; not to be changed."""
    out = tmp_path_factory.mktemp("results")
    suite = suite_of(run={**small()["run"], "keep": ["curves", "maps"]})
    run_suite(suite, data=None, out=out, quiet=True, form="csv")
    return out


@pytest.fixture
def out(results: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(results, tmp_path / "results")
    return tmp_path / "results"


def parts_of(out: Path) -> list[Path]:
    return sorted((out / "store").glob("*/*/*.parquet"))


# --- verify ---------------------------------------------------------------------------------------


def test_what_a_run_wrote_is_sound_and_a_look_changes_nothing(out: Path) -> None:
    before = snapshot(out)
    found = audit(find_store(out))
    assert found.findings == []
    counts = found.counts()
    assert (counts["groups"], counts["parts"], counts["rows"]) == (1, 4, 10 * 3 * 3)
    assert counts["arrays"] > 0
    assert (found.duplicates, found.mixed, found.untold, found.writing) == (0, 0, 0, 0)
    assert snapshot(out) == before


@pytest.mark.parametrize("which", ["*/*/*.parquet", "*/*/kept/*.parquet", "*/*/manifest.json"])
def test_every_flipped_bit_is_found(which: str, out: Path) -> None:
    draw = random.Random(0)
    path = sorted((out / "store").glob(which))[0]
    for other in (out / "store").rglob("*.parquet"):
        if other != path:
            other.unlink()
    content = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        found = audit(out / "store")
        assert [finding.path for finding in found.findings] == [path]
    path.write_bytes(content)
    assert audit(out / "store").findings == []


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("which", ["*/*/*.parquet", "*/*/kept/*.parquet"])
def test_a_truncated_part_is_found_and_left_where_it_is(
    share: float, which: str, out: Path
) -> None:
    path = sorted((out / "store").glob(which))[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    (finding,) = audit(out / "store").findings
    assert (finding.kind, finding.path) == ("damaged", path)
    assert "is truncated" in finding.what
    assert "computes its rows anew" in finding.way_out
    assert [file.path for file in waste(audit(out / "store"), damaged=True)] == [path]
    assert path.exists()


def test_a_part_in_another_group_s_folder_is_found(out: Path) -> None:
    part = parts_of(out)[0]
    other = part.parents[1] / "plug+tiny@00000000" / part.name
    other.parent.mkdir()
    shutil.copy(part, other)
    (finding,) = audit(out / "store").findings
    assert (finding.kind, finding.path) == ("foreign", other)
    assert "holds scores of plug/noise@" in finding.what
    assert finding.way_out == f"move it to {part.parent}"


def test_a_part_of_another_kind_is_found(out: Path) -> None:
    part = parts_of(out)[0]
    shutil.move(part, part.parent / "kept")
    (finding,) = audit(out / "store").findings
    assert finding.path == part.parent / "kept" / part.name
    assert "columns are not those" in finding.what


def test_a_renamed_part_is_found(out: Path) -> None:
    part = parts_of(out)[0]
    renamed = part.rename(part.with_name("0000000-0123456789abcdef.parquet"))
    (finding,) = audit(out / "store").findings
    assert (finding.kind, finding.path) == ("altered", renamed)
    assert "somebody has renamed it" in finding.what


def test_rows_of_a_cell_that_a_part_does_not_name_are_found(group: Group) -> None:
    facts = {**HERE, "group": ["shapes@1a2b3c4d", "resnet@9f8e7d6c"]}
    group.write("0", frame("ab"), {**facts, "cells": {"gradient": {"mae": CELL}}})
    path = group.write("1", frame("c"), {**facts, "cells": {"gradient": {"mae": "f" * 16}}})
    (finding,) = look(group).findings
    assert (finding.kind, finding.path) == ("foreign", path)
    assert CELL in finding.what


def test_a_part_made_under_other_conditions_than_are_pinned_is_found(group: Group) -> None:
    group.manifest({"rows": 32, "threads": 1})
    group.write("0", frame("a"), {"provenance": {"rows": 32, "threads": 1}})
    path = group.write("1", frame("b"), {"provenance": {"rows": 7, "threads": 1}})
    (finding,) = look(group).findings
    assert (finding.kind, finding.path) == ("foreign", path)
    assert "rows 7, not 32" in finding.what


def test_files_that_are_no_store_s_are_found_and_stay(group: Group) -> None:
    group.write("0", frame(), HERE)
    root = group.path.parents[1]
    strange = [
        root / "readme.txt", root / "shapes@1a2b3c4d" / "notes.tmp", group.path / "table.csv",
        group.path / "mine.parquet", group.path / "older.parquet.bad",
    ]  # fmt: skip
    for path in strange:
        path.write_text("mine")
    (group.path / "more").mkdir()
    (group.path / "more" / "0.parquet").write_text("not looked at")
    found = look(group)
    assert {finding.path for finding in found.findings} == {*strange, group.path / "more"}
    assert waste(found, damaged=True) == []


def test_a_damaged_manifest_is_found(group: Group) -> None:
    group.manifest({"rows": 32})
    path = group.path / "manifest.json"
    path.write_text(path.read_text().replace("32", "33"))
    (finding,) = look(group).findings
    assert (finding.kind, finding.path) == ("manifest", path)
    assert finding.what == "is damaged (its seal does not fit)"
    assert "restore it from a copy, or remove it" in finding.way_out


def test_what_a_newer_version_wrote_is_said_and_kept(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(xbench.store, "SCHEMA", 2)
        group.write("0", frame(), HERE)
        group.manifest({})
    found = look(group)
    assert sorted(kinds(found)) == ["manifest", "newer"]
    assert all("update xbench" in finding.way_out for finding in found.findings)
    assert waste(found, damaged=True) == []


def test_equal_duplicates_are_counted_and_harmless(group: Group) -> None:
    group.write("0", frame("abc"), HERE)
    group.write("1", frame("bcd"), HERE)
    group.write("2", frame("d"), ELSEWHERE)
    found = look(group)
    assert (found.findings, found.duplicates, found.mixed) == ([], 3, 0)
    assert "3 rows only repeat another, which is harmless" in storekeeping.show_findings(found)
    assert found.untold == 3


def test_unequal_duplicates_of_equal_provenance_are_found_with_their_place(group: Group) -> None:
    facts = {**HERE, "group": ["shapes@1a2b3c4d", "resnet@9f8e7d6c"]}
    facts["cells"] = {"gradient": {"mae": CELL}}
    one = group.write("0", frame("abc", 0.5), facts)
    two = group.write("1", frame("bcd", 0.625), facts)
    (finding,) = look(group).findings
    assert (finding.kind, finding.path) == ("contradiction", two)
    assert str(one) in finding.what
    assert f"disagree on 2 rows, such as cell {CELL} (gradient, mae), image 'b'" in finding.what
    assert "0.5 against 0.625" in finding.what


def test_unequal_duplicates_of_different_provenance_are_counted(group: Group) -> None:
    group.write("0", frame("abc", 0.5), HERE)
    group.write("1", frame("bc", 0.6), ELSEWHERE)
    found = look(group)
    assert (found.findings, found.duplicates, found.mixed) == ([], 0, 2)


def test_arrays_that_disagree_are_found_too(group: Group) -> None:
    for number in (0, 1):
        piece = Piece(CELL, "a", "", "ok", np.array([number]))
        group.kept.write(str(number), kept_table([piece]), HERE)
    (finding,) = look(group).findings
    assert finding.kind == "contradiction"


# --- writers that live, and that do not -----------------------------------------------------------


def left_by(group: Group, *, pid: int | None = None, host: str | None = None) -> Path:
    own, boot, space = xbench.files._here()
    name = f"{os.urandom(8).hex()}.{pid or os.getpid()}.{space}.{boot}.{host or own}.tmp"
    path = group.path / name
    path.write_bytes(b"PAR1")
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_of_dead_writers_are_found_and_removed_and_others_stay(group: Group) -> None:
    group.write("0", frame(), HERE)
    gone = [left_by(group, pid=dead_pid()), left_by(group, host="other.example.org")]
    kept = [left_by(group), left_by(group, host="other.example.org")]
    long_ago = time.time() - 2 * storekeeping.LONG_WRITTEN
    os.utime(gone[1], (long_ago, long_ago))
    found = look(group)
    assert kinds(found) == ["left over", "left over"]
    assert found.writing == 2
    files = waste(found)
    assert {file.path for file in files} == set(gone)
    remove(files)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)


def test_a_store_that_is_being_written_to_is_sound_and_its_writer_is_left_alone(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.write("0", frame(), HERE)
    seen: list[Audit] = []

    def meanwhile(descriptor: int) -> None:
        seen.append(look(group))
        remove(waste(seen[-1], damaged=True))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", meanwhile)
        group.write("1", frame("d"), HERE)
    assert [one.writing for one in seen] == [1, 0]  # its bytes, and then its name
    assert all(one.findings == [] for one in seen)
    assert len(Group(group.path).rows()) == 4


def test_a_part_that_goes_while_it_is_looked_for_was_not_there(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.write("0", frame(), HERE)
    path = group.write("1", frame("d"), HERE)
    listed = storekeeping._files

    def then_gone(*arguments: Any) -> Any:
        for kind, one in list(listed(*arguments)):
            path.unlink(missing_ok=True)
            yield kind, one

    monkeypatch.setattr(storekeeping, "_files", then_gone)
    found = look(group)
    assert (found.findings, found.counts()["parts"]) == ([], 1)


# --- gc -------------------------------------------------------------------------------------------


def test_damaged_parts_go_only_when_asked_for(out: Path) -> None:
    one, two = parts_of(out)
    aside = one.rename(one.with_name(f"{one.name}.bad"))
    two.write_bytes(two.read_bytes()[:-100])
    found = audit(out / "store")
    assert sorted(kinds(found)) == ["damaged", "set aside"]
    assert waste(found) == []
    assert {file.path for file in waste(found, damaged=True)} == {aside, two}


def test_a_readable_part_stays_even_if_a_bit_has_changed(out: Path) -> None:
    part = parts_of(out)[0]
    part.rename(part.with_name("0000000-0123456789abcdef.parquet"))
    assert waste(audit(out / "store"), damaged=True) == []


def said(parts: list[Any], path: Path) -> tuple[Any, ...]:
    """What a reader makes of parts: rows, whether mixed or contradictory, and confidences."""
    group = Group(path)
    confidence: dict[str, float] = {}
    for part in group.parts():
        confidence.update(part.facts.get("confidence", {}))
    try:
        return group.rows().to_json(), group.mixed, confidence
    except StoreError:
        return "contradiction", None, confidence


def test_what_is_redundant_can_go_without_any_reader_noticing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # many small files
    draw = random.Random(0)
    freed = contradictory = 0
    for number in range(25):
        group = Store(tmp_path / str(number)).group("a@1", "b@2")
        for name in range(draw.randint(2, 5)):
            rows = []
            for image in draw.sample("abc", draw.randint(1, 3)):
                value = draw.choice([0.5, 0.5, 0.5, 0.6])
                status = draw.choice(["ok", "ok", "ok", "error: one", "error: two"])
                rows.append(frame(image, value if status == "ok" else float("nan"), status))
            facts: dict[str, Any] = dict(draw.choice([HERE, HERE, ELSEWHERE]))
            if draw.random() < 0.3:
                facts["confidence"] = {draw.choice("abc"): draw.choice([0.8, 0.9])}
            group.write(f"{draw.randint(0, 9)}{name}", pd.concat(rows), facts)
        parts = group.parts()
        before = said(parts, group.path)
        files = waste(look(group))
        remove(files)
        assert said(parts, group.path) == before
        freed += len(files)
        contradictory += before[0] == "contradiction"
        assert waste(look(group)) == []
    assert freed > 3
    assert 0 < contradictory < 20


def test_an_error_goes_once_the_score_is_there(group: Group) -> None:
    group.write("0", frame("ab", 0.5), HERE)
    one = group.write("1", frame("ab", float("nan"), "error: killed"), ELSEWHERE)
    group.write("2", frame("bc", float("nan"), "error: killed"), HERE)
    assert [file.path for file in waste(look(group))] == [one]


def test_equal_arrays_are_kept_once(group: Group) -> None:
    pieces = [Piece(CELL, image, "", "ok", np.arange(3)) for image in "ab"]
    group.kept.write("0", kept_table(pieces), HERE)
    again = group.kept.write("1", kept_table(pieces[1:]), HERE)
    found = look(group)
    assert [file.path for file in waste(found)] == [again]
    assert redundant([], storekeeping.KEPT) == set()


# --- merge ----------------------------------------------------------------------------------------


METHODS = ["gradient", "grad_cam", "random"]


def only(images: range) -> dict[str, Any]:
    return {"datasets": [{"name": "plug/noise", "only": list(images)}]}


@pytest.mark.parametrize(
    "halves",
    [
        ({"methods": METHODS[:1]}, {"methods": METHODS[1:]}),
        (only(range(5)), only(range(5, 10))),
        (only(range(7)), only(range(3, 10))),
    ],
    ids=["methods", "images", "images that overlap"],
)
@pytest.mark.parametrize("order", [1, -1])
def test_two_halves_make_the_whole_byte_for_byte(
    halves: tuple[dict[str, Any], dict[str, Any]], order: int, run: Run, tmp_path: Path
) -> None:
    whole = run(out=tmp_path / "whole", **only(range(10)))
    for number, half in enumerate(halves):
        run(out=tmp_path / f"half{number}", **{**only(range(10)), **half})
    sources = [tmp_path / "half0", tmp_path / "half1"][::order]
    done = merge(sources, tmp_path / "both")
    assert audit(done.root).findings == []
    both = run(out=tmp_path / "both", **only(range(10)))
    assert both.run["units"] == []
    assert "all stored, nothing to do" in both.err
    for name in ("table.csv", "table.parquet", "per_image.parquet", "provenance.json"):
        assert (both.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_merging_again_changes_nothing(out: Path, tmp_path: Path) -> None:
    first = merge([out], tmp_path / "into")
    before = snapshot(tmp_path / "into")
    assert first.copied
    assert (first.skipped, first.mixed) == (0, 0)
    again = merge([out, out / "store"], tmp_path / "into")
    assert (again.copied, again.skipped) == ((), 2 * len(first.copied))
    assert snapshot(tmp_path / "into") == before
    store = {path.relative_to(out): data for path, data in snapshot(out / "store").items()}
    assert {path.relative_to(tmp_path / "into"): data for path, data in before.items()} == store


def test_a_merge_that_was_interrupted_goes_on(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def interrupted(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        xbench.files.atomic_write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(storekeeping, "atomic_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge([out], tmp_path / "into")
    assert audit(tmp_path / "into" / "store").findings == []
    done = merge([out], tmp_path / "into")
    assert (len(done.copied), done.skipped) == (2, 2)


def test_a_sound_copy_mends_a_damaged_part(out: Path, tmp_path: Path) -> None:
    merge([out], tmp_path / "into")
    before = snapshot(tmp_path / "into")
    part = parts_of(tmp_path / "into")[0]
    part.write_bytes(part.read_bytes()[:-50])
    assert merge([out], tmp_path / "into").copied == (part,)
    assert snapshot(tmp_path / "into") == before


def store_of(path: Path, *rows: pd.DataFrame, **pinned: int) -> Group:
    group = Store(path / "store").group("shapes@1a2b3c4d", "resnet@9f8e7d6c")
    if pinned:
        group.manifest(pinned)
    for number, one in enumerate(rows):
        group.write(str(number), one, HERE)
    return group


def refused(words: str, sources: list[Path], into: Path) -> None:
    before = snapshot(into) if into.exists() else {}
    with pytest.raises(StoreError, match=words):
        merge(sources, into)
    assert (snapshot(into) if into.exists() else {}) == before


def test_a_damaged_source_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path / "a", frame("a"))
    path = next(store_of(tmp_path / "b", frame("b"), frame("c")).path.glob("1-*"))
    path.write_bytes(path.read_bytes()[:-1])
    refused(f"(?s){path} is truncated.*nothing was merged", [tmp_path / "a", tmp_path / "b"],
            tmp_path / "into")  # fmt: skip


def test_what_a_dead_writer_left_in_a_source_stays_there(tmp_path: Path) -> None:
    left_by(store_of(tmp_path / "a", frame("a")), pid=dead_pid())
    assert len(merge([tmp_path / "a"], tmp_path / "into").copied) == 1
    assert len(snapshot(tmp_path / "into")) == 1


@pytest.mark.parametrize("is_target", [True, False])
def test_unequal_rows_of_equal_provenance_are_refused_with_their_place(
    is_target: bool, tmp_path: Path
) -> None:
    store_of(tmp_path / "a", frame("ab", 0.5))
    store_of(tmp_path / "b", frame("bc", 0.6))
    into = tmp_path / ("a" if is_target else "into")
    refused(
        "claim equal provenance and disagree on 1 row, such as cell 0123456789abcdef, image 'b': "
        "0.5 against 0.6",
        [tmp_path / "b"] if is_target else [tmp_path / "a", tmp_path / "b"],
        into,
    )


def test_unequal_rows_of_other_versions_are_brought_and_said(tmp_path: Path) -> None:
    store_of(tmp_path / "a", frame("ab", 0.5))
    group = store_of(tmp_path / "b")
    group.write("0", frame("bc", 0.6), ELSEWHERE)
    done = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "into")
    assert (len(done.copied), done.mixed) == (2, 1)
    assert "1 row differ" in storekeeping.show_merged(done)


@pytest.mark.parametrize("is_target", [True, False])
def test_groups_of_other_conditions_are_refused(is_target: bool, tmp_path: Path) -> None:
    store_of(tmp_path / "a", frame("a"), rows=32)
    store_of(tmp_path / "b", frame("b"), rows=7)
    refused(
        "pins rows 32, .*pins rows 7: their numbers differ by rounding",
        [tmp_path / "b"] if is_target else [tmp_path / "a", tmp_path / "b"],
        tmp_path / ("a" if is_target else "into"),
    )


def test_a_store_is_not_merged_into_itself(out: Path) -> None:
    with pytest.raises(UsageError, match="is the store to merge into"):
        merge([out], out / "store")


# --- commands -------------------------------------------------------------------------------------


def test_ls_says_what_stands_there(command: Command, out: Path) -> None:
    facts = json.loads(command("store", "ls", out, "--json").out)
    (group,) = facts["groups"]
    assert group["dataset"].startswith("plug/noise@")
    assert group["model"].startswith("plug/tiny@")
    assert (group["images"], group["parts"]) == (10, 4)
    assert group["pinned"] == {"rows": 4, "threads": 1}
    assert group["versions"]["torch"] == [xbench.runner.versions()["torch"]]
    assert group["kept"].keys() == {"curves", "maps", "pictures"}
    table = pd.read_csv(last_run(out) / "table.csv", dtype=str)
    stored = {(cell["cell"], cell["method"], cell["metric"]) for cell in group["cells"]}
    assert stored == set(zip(table["cell"], table["method"], table["metric"], strict=True))
    assert {(cell["images"], cell["errors"]) for cell in group["cells"]} == {(10, 0)}
    assert group["bytes"] == sum(p.stat().st_size for p in (out / "store").rglob("*.parquet"))
    text = command("store", "ls", out).out
    assert "10 images, 9 cells, 90 rows, 4 parts" in text
    assert "average_drop, " in text
    listed = command("store", "ls", out / "store", "--cells").out
    assert all(cell["cell"] in listed for cell in group["cells"])


def test_ls_puts_methods_together_that_are_alike_and_counts_errors(
    command: Command, group: Group
) -> None:
    cells = {name: {"mae": name * 16} for name in "abc"}
    facts = {**HERE, "group": ["shapes@1a2b3c4d", "resnet@9f8e7d6c"], "cells": cells}
    rows = [frame("xyz").assign(cell="a" * 16), frame("xyz").assign(cell="b" * 16)]
    failed = frame("yz", float("nan"), "error: killed").assign(cell="c" * 16)
    group.write("0", pd.concat([*rows, frame("x").assign(cell="c" * 16), failed]), facts)
    group.write("1", failed, ELSEWHERE | facts)
    listed = command("store", "ls", group.path.parents[1]).out
    assert "  3 images of 2 cells\n    methods: a, b\n    metrics: mae\n" in listed
    assert "  1 image of 1 cell, and 2 errors\n    methods: c\n" in listed


def test_verify_answers_0_for_a_sound_store_and_1_for_another(command: Command, out: Path) -> None:
    sound = command("store", "verify", out)
    assert sound.status == 0
    assert "no problem in 1 group, 4 parts, 90 rows" in sound.out
    part = parts_of(out)[0]
    part.write_bytes(part.read_bytes()[:-1])
    found = command("store", "verify", out)
    assert found.status == 1
    assert found.out.startswith(f"{part} is truncated")
    assert "1 problem in 1 group, 3 parts" in found.out
    as_json = command("store", "verify", out, "--json")
    assert as_json.status == 1
    assert [f["path"] for f in json.loads(as_json.out)["findings"]] == [str(part)]
    assert "1 problem; 'xbench store verify' says which" in command("store", "ls", out).out


def test_gc_says_what_goes_and_a_dry_run_removes_nothing(command: Command, group: Group) -> None:
    root = group.path.parents[1]
    group.write("0", frame(), HERE)
    again = group.write("1", frame(), HERE)
    before = snapshot(root)
    words = f"{again} ({again.stat().st_size / 1024:.1f} KiB): other parts hold all its rows"
    dry = command("store", "gc", root, "--dry-run").out
    assert dry.startswith(f"would remove {words}")
    assert snapshot(root) == before
    as_json = json.loads(command("store", "gc", root, "-n", "--json").out)
    assert (as_json["removed"], len(as_json["files"])) == (False, 1)
    assert command("store", "gc", root).out.startswith(f"removed {words}")
    assert not again.exists()
    assert command("store", "gc", root).out == "nothing to remove\n"


def test_merge_says_what_it_did(command: Command, out: Path, tmp_path: Path) -> None:
    answer = command("store", "merge", out, "--into", tmp_path / "into")
    assert answer.status == 0
    assert f"{tmp_path / 'into' / 'store'}: 4 parts copied" in answer.out
    again = command("store", "merge", out, "--into", tmp_path / "into", "--json")
    assert json.loads(again.out)["skipped"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "resluts"], "'resluts' does not exist; no store to look at; did you mean 'results"),
        (["verify", "empty"], "'empty' holds no store"),
        (["gc", "results/file"], "'results/file' is a file; no store"),
        (["merge", "empty", "--into", "new"], "'empty' holds no store"),
        (["merge", "results"], "--into"),
        (["merge", "--into", "new"], "SOURCE..."),
        (["merge", "results", "--into", "results/file"], "is a file; name a folder"),
        (["verfiy"], "No such command 'verfiy'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_message_and_status_2(
    words: list[str], message: str, command: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "results" / "store").mkdir(parents=True)
    (tmp_path / "results" / "file").touch()
    before = snapshot(tmp_path)
    answer = command("store", *words)
    assert message in answer.err
    assert (answer.status, answer.out) == (2, "")
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_store_of_nothing_is_sound(command: Command, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert "0 groups, 0 parts, 0 rows" in command("store", "ls", tmp_path).out
    assert command("store", "verify", tmp_path).status == 0
    assert command("store", "gc", tmp_path).out == "nothing to remove\n"


def test_what_files_say_cannot_steer_a_terminal(command: Command, group: Group) -> None:
    evil = "\x1b[31mred\x07\n[bold]"
    facts = {"provenance": {"versions": {evil: evil}}, "cells": {evil: {evil: CELL}}}
    group.write("0", frame(), {**facts, "group": [evil, evil]})
    (group.path / f"{evil.replace('/', '')}.txt").touch()
    for words in (["ls"], ["ls", "--cells"], ["verify"]):
        printed = command("store", *words, group.path.parents[1]).out
        assert "red" in printed
        assert not set(printed) & {"\x1b", "\x07"}


def test_the_commands_import_no_torch(out: Path, tmp_path: Path) -> None:
    script = (
        "import sys, xbench.cli\n"
        "for words in (['ls', OUT], ['verify', OUT], ['gc', OUT], ['merge', OUT, '--into', NEW]):\n"
        "    sys.argv = ['xbench', 'store', *words]\n"
        "    try:\n        xbench.cli.main()\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    ).replace("OUT", repr(str(out))).replace("NEW", repr(str(tmp_path / "new")))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
