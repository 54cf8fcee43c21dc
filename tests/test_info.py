"""Laws of what xbench says of itself: every entry is listed, described, and truly so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer

from xbench import info, registry
from xbench.errors import UsageError

Command = Callable[..., Answer]

BUILT_IN = [
    (kind, name)
    for kind in registry.KINDS
    for name, entry in registry.entries(kind).items()
    if entry.origin.startswith("xbench.")
]


@pytest.mark.parametrize("kind", [*registry.KINDS, "suites"])
def test_every_entry_is_listed_with_a_sentence(kind: str, command: Command) -> None:
    text = command("list", kind)
    rows = json.loads(command("list", kind, "--json").out)
    assert text.status == 0
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert len(text.out.splitlines()) == len(rows) > 0
    built_in = {name for of, name in BUILT_IN if of == kind}
    for row in rows:
        assert row["name"] in text.out
        if row["name"] in built_in:
            assert row["summary"].strip(), row["name"]
    assert built_in <= {row["name"] for row in rows}


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_every_built_in_entry_describes_itself(kind: str, name: str) -> None:
    text = info.description(name)
    cls = registry.find(kind, name)
    assert text.startswith(f"{kind[:-1]} {name}\n")
    for field in registry.fields(cls):
        assert f"  {field.name}: " in text
    assert f"Version: {getattr(cls, 'version', 1)}" in text
    assert "Provided by: xbench." in text
    if kind == "metrics":
        assert f"Better: {cls.better}" in text


@pytest.mark.parametrize("name", [name for kind, name in BUILT_IN if kind == "methods"])
def test_every_method_of_a_paper_names_it(name: str) -> None:
    cls = registry.find("methods", name)
    assert getattr(cls, "control", False) or "Source:" in (cls.__doc__ or ""), name


def test_passes_of_an_entry_are_those_of_its_needs_alone() -> None:
    assert "1 forward, 1 backward" in info.description("gradient")
    assert "21 forward, 20 backward" in info.description("smooth_grad")


def test_parameters_are_shown_with_their_types_and_defaults() -> None:
    text = info.description("smooth_grad")
    assert "  samples: " in text
    assert "default 20" in text
    assert "  weights: str, required" in info.description("checkpoint")
    assert "  iou: tuple of float > 0 and <= 1, default (0.5,)" in info.description("max_box_acc")


def test_a_name_that_nobody_has_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"'gradcam'; did you mean 'grad_cam'"):
        info.description("gradcam")


def test_plug_ins_are_listed_with_their_file(plugin: Path, command: Command) -> None:
    out = command("list", "plugins").out
    assert "methods/plug/ramp" in out
    assert str(plugin) in out
    assert str(plugin) in command("info", "plug/ramp").out


def test_the_doctor_names_versions_device_and_disk(command: Command) -> None:
    answer = command("doctor")
    assert "torch 2" in answer.out
    assert "device: " in answer.out
    assert "disk: " in answer.out
    assert (answer.status == 0) == ("no problems found" in answer.out)


def test_the_doctor_finds_a_data_directory_that_is_not_there(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XBENCH_DATA", "/nowhere")
    answer = command("doctor")
    assert "PROBLEM: XBENCH_DATA names '/nowhere', which is no directory" in answer.out
    assert answer.status == 1
