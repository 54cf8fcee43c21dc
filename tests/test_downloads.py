"""Laws of downloads: verified, resumed, and never half there."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from conftest import Answer, suite_file, suite_of
from torchvision import models

from xbench import registry
from xbench.downloads import Download, fetch, receive
from xbench.errors import UsageError
from xbench.models import torchvision
from xbench.models.loading import load_model, weights_hash
from xbench.registry import entries
from xbench.run import fetch_data


def archive(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def git_hash(content: bytes) -> str:
    """As ``git hash-object`` says it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


CONTENT = archive(("set/a.txt", b"A" * 5000), ("set/deep/b.txt", b"B"))


class _Host(BaseHTTPRequestHandler):
    """Serves one file by ranges, if it is asked to, and others as a hub does."""

    address: ClassVar[str] = ""
    content: ClassVar[bytes] = CONTENT
    hub: ClassVar[dict[str, bytes]] = {}
    ranges: ClassVar[list[str | None]] = []
    knows_ranges: ClassVar[bool] = True
    cut: ClassVar[int | None] = None

    def do_HEAD(self) -> None:
        repository, _, file = self.path.partition("/resolve/main/")
        content = self.hub.get(file)
        if content is None or repository != "/somebody/net":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if content is None else "RepoNotFound")
            self.end_headers()
            return
        is_large = file.endswith(".safetensors")
        self.send_response(302 if is_large else 200)
        self.send_header("X-Repo-Commit", "0123")
        if is_large:
            self.send_header("X-Linked-Etag", hashlib.sha256(content).hexdigest())
            self.send_header("X-Linked-Size", str(len(content)))
            elsewhere = self.address.replace("127.0.0.1", "localhost")
            self.send_header("Location", f"{elsewhere}/signed/{file}")
        else:
            self.send_header("ETag", f'"{git_hash(content)}"')
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).ranges.append(wanted)
        content = self.hub.get(self.path.rpartition("/")[2])
        if self.path == "/set.tar.gz":
            content = self.content
        if content is None:
            self.send_error(404)
            return
        start = int(wanted[6:-1]) if wanted and self.knows_ranges else 0
        if wanted and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.cut])

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Says nothing."""


@pytest.fixture
def host() -> Iterator[type[_Host]]:
    class Host(_Host):
        hub: ClassVar[dict[str, bytes]] = {}
        ranges: ClassVar[list[str | None]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    Host.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Host
    server.shutdown()
    thread.join()
    server.server_close()


def wanted(host: type[_Host], content: bytes = CONTENT, name: str = "set.tar.gz") -> Download:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Download(f"{host.address}/{name}", md5, "home", "set")


def silent(name: str, done: int, total: int | None) -> None:
    """Nobody listens."""


def test_an_archive_is_downloaded_verified_and_unpacked_once(
    host: type[_Host], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int | None]] = []
    made = fetch([wanted(host)], tmp_path, lambda *said: told.append(said))
    assert made == [tmp_path / "home/set"]
    assert (tmp_path / "home/set/deep/b.txt").read_bytes() == b"B"
    assert told[-1] == ("set.tar.gz", len(CONTENT), len(CONTENT))
    assert fetch([wanted(host)], tmp_path, silent) == []
    assert host.ranges == [None]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["set.tar.gz"]


def test_an_interrupted_download_goes_on_where_it_ended(host: type[_Host], tmp_path: Path) -> None:
    host.cut = 60
    with pytest.raises(UsageError, match="the same command goes on"):
        fetch([wanted(host)], tmp_path, silent)
    assert not (tmp_path / "home").exists()
    host.cut = None
    assert fetch([wanted(host)], tmp_path, silent)
    assert host.ranges == [None, "bytes=60-"]


def test_a_host_without_ranges_begins_anew(host: type[_Host], tmp_path: Path) -> None:
    host.knows_ranges = False
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.tar.gz.part").write_bytes(b"something else")
    assert fetch([wanted(host)], tmp_path, silent)


def test_a_part_that_is_complete_is_verified_as_it_is(host: type[_Host], tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.tar.gz.part").write_bytes(CONTENT)
    assert fetch([wanted(host)], tmp_path, silent)


def test_another_file_than_the_published_one_is_refused(host: type[_Host], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the published file: its md5 is"):
        fetch([wanted(host, b"other")], tmp_path, silent)
    assert list((tmp_path / "downloads").iterdir()) == []
    assert not (tmp_path / "home").exists()


def test_nothing_is_unpacked_outside_its_folder(host: type[_Host], tmp_path: Path) -> None:
    host.content = archive(("set/a.txt", b"A"), ("../../outside.txt", b"B"))
    with pytest.raises(UsageError, match="cannot be unpacked"):
        fetch([wanted(host, host.content)], tmp_path, silent)
    assert not list(tmp_path.rglob("outside.txt"))
    assert not (tmp_path / "home/set").exists()


def test_a_host_that_does_not_answer_is_named(host: type[_Host], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent.tar answers 404"):
        fetch([wanted(host, name="absent.tar")], tmp_path, silent)
    nobody = Download("http://127.0.0.1:9/set.tar.gz", "0" * 32, "home", "set")
    with pytest.raises(
        UsageError, match=r"cannot be downloaded: .*or put the file at .*set.tar.gz"
    ):
        fetch([nobody], tmp_path, silent)


def test_every_download_of_a_data_set_has_a_checksum_and_a_place() -> None:
    found = 0
    for entry in entries("datasets").values():
        cls = entry.load()
        if hasattr(cls, "downloads"):
            for download in cls().downloads():
                found += 1
                assert download.url.startswith(("https://", "http://data.csail.mit.edu/"))
                assert len(bytes.fromhex(download.md5)) == 16
                assert not Path(download.into).is_absolute()
    assert found == 8


def test_a_folder_of_another_name_than_its_archive_is_nothing_to_download() -> None:
    def into(root: str) -> list[str]:
        entry = registry.make("datasets", "cub200", {"root": root})
        return [download.into for download in entry.downloads()]

    assert into("birds/CUB_200_2011") == ["birds", "birds"]
    assert into("birds") == []


def test_fetch_says_what_is_there_and_what_has_to_be_requested(
    plugin: Path, tmp_path: Path
) -> None:
    words = f"in {tmp_path}:\nplug/noise: 64 images\nplug/tiny: fresh weights\n"
    assert fetch_data(suite_of(), tmp_path) == words
    with pytest.raises(UsageError) as caught:
        fetch_data(suite_of(datasets=["imagenet", "plug/noise"]), tmp_path)
    assert "request it from image-net.org" in str(caught.value)
    assert "plug/noise: 64 images" in str(caught.value)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "git"])
def test_a_file_is_verified_as_its_host_names_it(
    algorithm: str, host: type[_Host], tmp_path: Path
) -> None:
    url, place = f"{host.address}/set.tar.gz", tmp_path / "deep/file"
    digests = {
        "md5": hashlib.md5(CONTENT).hexdigest(),
        "sha256": hashlib.sha256(CONTENT).hexdigest()[:8],
        "git": git_hash(CONTENT),
    }
    receive(url, place, f"{algorithm}:{digests[algorithm]}", silent)
    assert place.read_bytes() == CONTENT
    with pytest.raises(UsageError, match=f"its {algorithm} is .*, not 0123; it was deleted"):
        receive(url, tmp_path / "other", f"{algorithm}:0123", silent)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty ones in place of the libraries' own; an empty data directory."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_weights_of_torchvision_are_fetched_verified_and_resumed(
    host: type[_Host], caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    theirs = models.squeezenet1_1(num_classes=1000)
    torch.save(theirs.state_dict(), buffer)
    content = buffer.getvalue()
    sha = hashlib.sha256(content).hexdigest()
    file = f"squeezenet1_1-{sha[:8]}.pth"
    host.hub[file] = content
    cls = registry.find("models", "torchvision/squeezenet1_1")
    real = torchvision.weights("squeezenet1_1")["DEFAULT"]
    member = SimpleNamespace(
        url=f"{host.address}/{file}", transforms=real.transforms, meta=real.meta
    )
    monkeypatch.setattr(cls, "members", {"DEFAULT": member})
    host.cut = 1000
    with pytest.raises(UsageError, match="the same command goes on"):
        cls().fetch(caches, silent)
    host.cut = None
    told: list[tuple[str, int, int | None]] = []
    for _ in range(2):  # the second time, it is there
        cls().fetch(caches, lambda *said: told.append(said))
    assert host.ranges == [None, "bytes=1000-"]
    assert told[-1] == (file, len(content), len(content))
    network = cls().describe(caches)
    assert network.weights == caches / "weights" / file
    assert weights_hash(network) == sha
    assert fetch_data(suite_of(datasets=["shapes"], models=["torchvision/squeezenet1_1"]), caches)
    network.weights.write_bytes(content[:-1])
    with pytest.raises(
        UsageError, match=r"are damaged .*delete the file, and 'xbench fetch' brings"
    ):
        weights_hash(network)


@pytest.fixture
def hub(host: type[_Host], monkeypatch: pytest.MonkeyPatch) -> type[_Host]:
    """The host in place of the Hugging Face hub, with one repository."""
    address = functools.partial(huggingface_hub.hf_hub_url, endpoint=host.address)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", address)
    net = timm.create_model("test_resnet", num_classes=7).eval()
    facts = {"input_size": [3, 96, 96], "mean": [0.1] * 3, "std": [0.4] * 3}
    config = {"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": facts}
    host.hub["config.json"] = json.dumps(config).encode()
    host.hub["model.safetensors"] = safetensors.torch.save(net.state_dict())
    return host


def test_a_repository_of_the_hub_is_fetched_verified_and_resumed(
    hub: type[_Host], caches: Path
) -> None:
    entry = registry.make("models", "hf/somebody/net")
    hub.cut = 1000
    with pytest.raises(UsageError, match="the same command goes on"):
        entry.fetch(caches, silent)
    hub.cut = None
    told: list[tuple[str, int, int | None]] = []
    for _ in range(2):  # the second time, it is there
        entry.fetch(caches, lambda *said: told.append(said))
    content = hub.hub["model.safetensors"]
    assert hub.ranges == [None, None, "bytes=1000-"]
    assert told[-1] == ("somebody/net/model.safetensors", len(content), len(content))
    network = entry.describe(caches)
    assert network.sha256 == weights_hash(network) == hashlib.sha256(content).hexdigest()
    assert (network.mean, network.size) == ((0.1,) * 3, (96, 96))
    assert load_model(network, "net", {}, "cpu").net(torch.rand(1, 3, 96, 96)).shape == (1, 7)
    library = huggingface_hub.hf_hub_download(
        "somebody/net", "model.safetensors", cache_dir=caches / "weights", local_files_only=True
    )
    assert Path(library) == network.weights


def test_another_file_than_the_hub_names_is_refused(hub: type[_Host], caches: Path) -> None:
    honest = hub.do_HEAD

    def lies(self: _Host) -> None:
        honest(self)
        if self.path.endswith(".safetensors"):
            self.hub["model.safetensors"] = b"something else"

    hub.do_HEAD = lies  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="is not the published file: its sha256 is"):
        registry.make("models", "hf/somebody/net").fetch(caches, silent)
    assert not list(caches.rglob("*.safetensors"))


def test_what_the_hub_does_not_have_is_told(hub: type[_Host], caches: Path) -> None:
    with pytest.raises(UsageError, match=r"somebody/else/resolve/main/config\.json cannot be"):
        registry.make("models", "hf/somebody/else").fetch(caches, silent)
    del hub.hub["model.safetensors"]
    with pytest.raises(UsageError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        registry.make("models", "hf/somebody/net").fetch(caches, silent)


def test_fetched_weights_run_offline(
    hub: type[_Host], caches: Path, command: Callable[..., Answer], plugin: Path
) -> None:
    """From nothing to scores, as a user does it."""
    model = {"name": "hf/somebody/net", "label": "net"}
    suite = suite_file(caches.parent / "suite.yaml", models=[model], methods=["gradient"])
    words = (suite, "--data", caches, "-o", caches.parent / "out")
    before = command("run", *words, "--offline")
    assert before.status == 2
    assert "'hf/somebody/net'" in before.err
    assert "'xbench fetch' or 'hf download somebody/net config.json" in before.err
    refused = command("fetch", *words, "--offline")
    assert refused.status == 2
    assert "fetch is for the network" in refused.err
    fetched = command("fetch", *words)
    assert fetched.status == 0, fetched.err
    sha = hashlib.sha256(hub.hub["model.safetensors"]).hexdigest()
    assert f"model.safetensors, SHA-256 {sha[:16]}" in fetched.out
    hub.hub.clear()
    assert command("run", *words, "--offline", "-q").status == 0
