"""Laws of maps on disk: whole or refused, and never another run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xbench.errors import StoreError, UsageError
from xbench.mapfiles import images_done, open_maps, write_maps

MAPS = {f"image/{at} ü": torch.rand(3, 5, dtype=torch.float64) for at in range(4)}


def test_maps_come_back_bit_for_bit_with_any_key(tmp_path: Path) -> None:
    write_maps(tmp_path, "0000000", MAPS, {"made_by": "a"})
    found = open_maps(tmp_path)
    for key, expected in MAPS.items():
        seen = found.load(key)
        assert seen is not None
        assert seen.dtype == torch.float64
        assert torch.equal(seen, expected)
    assert found.load("nobody") is None


def test_images_are_done_with_a_map_or_a_reason_for_none(tmp_path: Path) -> None:
    assert images_done(tmp_path / "nowhere", "a") == set()
    write_maps(tmp_path, "0", MAPS, {"made_by": "a", "absent": {"x": "failed: decode"}})
    write_maps(tmp_path, "1", {}, {"made_by": "a", "absent": {"y": "failed: decode"}})
    assert images_done(tmp_path, "a") == {*MAPS, "x", "y"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    write_maps(tmp_path, "0", MAPS, {"made_by": "a"})
    with pytest.raises(UsageError, match="choose another folder for --save-maps"):
        images_done(tmp_path, "b")
    save_file(MAPS, tmp_path / "theirs.safetensors")
    with pytest.raises(UsageError, match=r"choose another folder .*|theirs"):
        images_done(tmp_path, "a")


def test_the_hash_is_of_the_content_and_not_of_names(tmp_path: Path) -> None:
    save_file(MAPS, tmp_path / "a.safetensors")
    hashes = {open_maps(tmp_path / "a.safetensors").sha256, open_maps(tmp_path).sha256}
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "sub" / "b.safetensors")
    hashes.add(open_maps(tmp_path).sha256)
    assert len(hashes) == 1
    key = next(iter(MAPS))
    save_file({**MAPS, key: MAPS[key] + 1e-12}, tmp_path / "sub" / "b.safetensors")
    assert open_maps(tmp_path).sha256 not in hashes


@pytest.mark.parametrize("place", range(0, 700, 23))
def test_a_flipped_bit_of_a_sealed_file_is_never_silent(place: int, tmp_path: Path) -> None:
    """Only in what the seal does not cover, such as its own words, may the maps stay the same."""
    path = write_maps(tmp_path, "0", MAPS, {"made_by": "a"})
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    words, found = "", None
    try:
        found = open_maps(tmp_path)
    except StoreError as error:
        words = str(error)
    if found is None:
        assert f"{path} is damaged" in words
        assert "remove it" in words
    else:
        assert all(torch.equal(found.load(key), MAPS[key]) for key in MAPS)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write_maps(tmp_path, "0", MAPS, {"made_by": "a"})
    path.write_bytes(path.read_bytes()[:-1])
    for reads in (lambda: open_maps(tmp_path), lambda: images_done(tmp_path, "a")):
        with pytest.raises(StoreError, match="is damaged"):
            reads()


def test_two_maps_of_one_image_are_refused_unless_they_are_one(tmp_path: Path) -> None:
    save_file(MAPS, tmp_path / "a.safetensors")
    key = next(iter(MAPS))
    save_file({key: MAPS[key]}, tmp_path / "b.safetensors")
    assert open_maps(tmp_path).load(key) is not None
    save_file({key: MAPS[key] * 2}, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="several maps of one image"):
        open_maps(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "a.safetensors").unlink()
    for method in ("grad_cam", "gradient"):
        write_maps(tmp_path / method, "0", {method: MAPS[key]}, {"made_by": method})
    with pytest.raises(UsageError, match=r"name one folder of .*grad_cam, .*gradient"):
        open_maps(tmp_path)
