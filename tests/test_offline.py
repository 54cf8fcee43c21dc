"""Laws of keeping the network away, and of where things are looked for instead."""

from __future__ import annotations

import json
import logging
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from conftest import Answer, last_run, suite_file

from xbench import offline
from xbench.errors import Offline

Command = Callable[..., Answer]

CALLER = '''
"""A method that asks somebody else."""

import socket

import xbench


@xbench.method("caller/asks")
class Asks:
    """Asks a host whose name nobody has."""

    def __call__(self, probe):
        socket.getaddrinfo("maps.invalid", 443)
'''


@pytest.fixture(autouse=True)
def allowed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XBENCH_DATA", raising=False)
    yield
    offline.enforce(False)


def test_other_hosts_are_refused_by_name_and_by_address() -> None:
    offline.enforce(True)
    with pytest.raises(Offline, match=r"network access to 'xbench\.invalid' is refused"):
        urllib.request.urlopen("http://xbench.invalid/file")
    for family, place in (
        (socket.AF_INET, ("192.0.2.1", 9)),
        (socket.AF_INET6, ("2001:db8::1", 9)),
    ):
        with socket.socket(family, socket.SOCK_DGRAM) as door:  # which would not answer
            with pytest.raises(Offline, match=rf"'{place[0]}'.*'xbench fetch' brings"):
                door.connect(place)
            with pytest.raises(Offline):
                door.sendto(b"", place)


def test_this_machine_is_no_network() -> None:
    offline.enforce(True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
    one, other = socket.socketpair(socket.AF_UNIX)
    one.close()
    other.close()


def test_the_network_is_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    offline.enforce(True)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.is_offline_mode()
    offline.enforce(False)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"  # as the user had it
    assert not huggingface_hub.is_offline_mode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
        door.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("option", "variable", "key", "wanted"),
    [
        (None, None, None, False),
        (None, None, True, True),
        (None, "0", True, False),
        (None, "1", False, True),
        ("--no-offline", "1", True, False),
        ("--offline", "no", False, True),
    ],
)
def test_an_option_comes_before_the_variable_and_that_before_the_suite(
    option: str | None,
    variable: str | None,
    key: bool | None,
    wanted: bool,
    command: Command,
    plugin: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("XBENCH_OFFLINE", variable)
    suite = suite_file(Path("suite.yaml"), run={} if key is None else {"offline": key})
    answer = command("plan", suite, *([] if option is None else [option]))
    assert answer.status == 0
    assert offline.is_enforced() == wanted


def test_a_variable_that_says_neither_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XBENCH_OFFLINE", "perhaps")
    answer = command("list", "suites")
    assert (answer.status, answer.err) == (2, "error: XBENCH_OFFLINE=perhaps: expected 1 or 0\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_calls_out_of_a_run_is_an_error_of_its_own_cells(
    workers: int, command: Command, plugin: Path, own_names: None
) -> None:
    Path("caller.py").write_text(CALLER)
    suite = suite_file(
        Path("suite.yaml"), methods=["gradient", "caller/asks"], metrics=["mae"],
        run={"workers": workers},
    )  # fmt: skip
    words = ["--plugin", plugin, "--plugin", "caller.py", "--offline", "--no-page"]
    assert command("run", suite, *words).status == 3
    table = json.loads((last_run(Path("results")) / "run.json").read_text())
    assert table["suite"]["run"]["offline"] is True
    (words_,) = {p.read_text().splitlines()[0] for p in last_run(Path("results")).glob("errors/*")}
    assert "error: Offline: network access to 'maps.invalid' is refused" in words_


# --- where data lie -------------------------------------------------------------------------------


def test_what_is_fetched_without_a_place_is_found_without_one(
    command: Command, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("XBENCH_HOME", str(home))
    suite = suite_file(Path("suite.yaml"), datasets=[{"name": "folder", "root": "pictures"}])
    nowhere = command("plan", suite)
    assert nowhere.status == 2
    assert "in the data directory, and none is given" in nowhere.err
    assert not home.exists()
    fetched = command("fetch", suite)
    assert fetched.status == 2
    assert f"looks for the folder {home / 'data/pictures'}" in fetched.err
    assert str(home / "data/pictures") in command("plan", suite).err


def test_fetch_makes_the_directory_that_it_is_told(command: Command, plugin: Path) -> None:
    suite = suite_file(Path("suite.yaml"))
    answer = command("fetch", suite, "--data", "new/place")
    assert answer.out.startswith(f"in {Path('new/place')}:\nplug/noise: 64 images\n")
    Path("file").touch()
    refused = command("fetch", suite, "--data", "file")
    assert refused.status == 2
    assert "data directory 'file' cannot be made" in refused.err


def test_the_log_has_the_level_that_a_variable_says(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **words: given.append(words["level"]))
    monkeypatch.setenv("XBENCH_LOG", "debug")
    assert command("list", "suites").status == 0
    assert given == ["DEBUG"]
    monkeypatch.setenv("XBENCH_LOG", "loud")
    answer = command("list", "suites")
    assert answer.status == 2
    assert "XBENCH_LOG=loud: expected one of debug, info, warning, error" in answer.err
