"""Laws of downloads: verified, resumed, and never half there."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import suite_of

from xbench.datasets.downloads import Download, fetch
from xbench.errors import UsageError
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


CONTENT = archive(("set/a.txt", b"A" * 5000), ("set/deep/b.txt", b"B"))


class _Host(BaseHTTPRequestHandler):
    """Serves one file, by ranges if it is asked to."""

    content: ClassVar[bytes] = CONTENT
    ranges: ClassVar[list[str | None]] = []
    knows_ranges: ClassVar[bool] = True
    cut: ClassVar[int | None] = None

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).ranges.append(wanted)
        if self.path != "/set.tar.gz":
            self.send_error(404)
            return
        start = int(wanted[6:-1]) if wanted and self.knows_ranges else 0
        if wanted and start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : self.cut])

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Says nothing."""


@pytest.fixture
def host() -> Iterator[type[_Host]]:
    class Host(_Host):
        ranges: ClassVar[list[str | None]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    Host.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Host
    server.shutdown()
    thread.join()
    server.server_close()


def wanted(host: type[_Host], content: bytes = CONTENT, name: str = "set.tar.gz") -> Download:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Download(f"{host.address}/{name}", md5, "home", "set")  # type: ignore[attr-defined]


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
    assert found == 6


def test_fetch_says_what_is_there_and_what_has_to_be_requested(
    plugin: Path, tmp_path: Path
) -> None:
    assert fetch_data(suite_of(), tmp_path) == "plug/noise: 64 images\n"
    with pytest.raises(UsageError) as caught:
        fetch_data(suite_of(datasets=["imagenet", "plug/noise"]), tmp_path)
    assert "request it from image-net.org" in str(caught.value)
    assert "plug/noise: 64 images" in str(caught.value)
