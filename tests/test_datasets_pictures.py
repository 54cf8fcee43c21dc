"""A corpus of odd and broken files: each gives the right pixels or a BadImage, and nothing else."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import transforms

from xbench.datasets.pictures import FORMATS, MAX_BYTES, File, Transform, load_image, load_mask
from xbench.errors import BadImage

AS_IS = Transform(None, None)
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
SMOOTH = np.linspace(0, 255, 24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "pictures"
    folder.mkdir()
    return folder


def encoded(picture: Image.Image | np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def put(root: Path, content: bytes, name: str = "x") -> File:
    (root / name).write_bytes(content)
    return File(name, root)


def pixels(root: Path, content: bytes) -> np.ndarray[Any, Any]:
    """(H, W, 3) bytes of a picture with this content."""
    image, _ = load_image(put(root, content), AS_IS)
    assert image.dtype == torch.float32
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    data: bytes = bytes(1000),
    extra: bytes = b"",
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header),
        extra,
        chunk(b"IDAT", zlib.compress(data)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_claiming(width: int, height: int) -> bytes:
    content = bytearray(encoded(SMOOTH, "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_claiming(width: int, height: int) -> bytes:
    frame = encoded(SMOOTH, "WEBP", lossless=True)[12:]
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(NOISE), Image.fromarray(SMOOTH)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


# ---- right pixels


@pytest.mark.parametrize("options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_their_pixels(
    root: Path, options: tuple[str, dict[str, Any]]
) -> None:
    kind, settings = options
    assert (pixels(root, encoded(NOISE, kind, **settings)) == NOISE).all()


def test_jpeg_gives_pils_pixels(root: Path) -> None:
    content = encoded(NOISE, "JPEG")
    assert (pixels(root, content) == np.asarray(Image.open(BytesIO(content)))).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb_and_alpha_is_dropped(root: Path, mode: str) -> None:
    picture = Image.fromarray(SMOOTH).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(NOISE[..., 0]))
    content = encoded(picture, "JPEG" if mode == "CMYK" else "PNG", quality=100)
    found = pixels(root, content).astype(int)
    expected = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= (8 if mode == "CMYK" else 0)


def test_palette_with_transparent_entries_becomes_rgb_without_a_warning(root: Path) -> None:
    picture = Image.fromarray(SMOOTH).quantize(16)
    content = encoded(picture, "PNG", transparency=bytes(range(16)))
    assert (pixels(root, content) == np.asarray(picture.convert("RGB"))).all()


def test_16_bit_grey_is_scaled_and_not_clipped(root: Path) -> None:
    grey = np.array([[0, 128, 257, 32768, 163 * 257, 65535]], dtype=np.uint16)
    rows = b"\0" + grey.astype(">u2").tobytes()
    found = pixels(root, png(6, 1, depth=16, colour=0, data=rows))
    assert found[0, :, 0].tolist() == [0, 0, 1, 128, 163, 255]
    assert (found[..., :1] == found).all()


def test_16_bit_colour_is_scaled(root: Path) -> None:
    rows = b"\0" + np.array([0, 163 * 257, 65535], dtype=">u2").tobytes()
    assert pixels(root, png(1, 1, depth=16, colour=2, data=rows)).tolist() == [[[0, 163, 255]]]


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_animations_show_their_first_frame(root: Path, kind: str, options: dict[str, Any]) -> None:
    assert (pixels(root, animated(kind, **options)) == NOISE).all()


def test_exif_rotation_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(root, encoded(SMOOTH, "JPEG", exif=exif)).shape == (24, 32, 3)


def test_damaged_exif_is_harmless_and_silent(root: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    content = encoded(SMOOTH, "JPEG", exif=exif.tobytes()[:-8])
    assert pixels(root, content).shape == (24, 32, 3)


def test_the_name_does_not_decide_the_format(root: Path) -> None:
    image, _ = load_image(put(root, encoded(NOISE, "PNG"), "x.jpg"), AS_IS)
    assert image.shape == (3, 24, 32)


# ---- refused

JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG")
BROKEN = {
    "zero bytes": b"",
    "one byte": b"\xff",
    "text": b"a picture is worth a thousand words\n" * 20,
    "html": b"<!doctype html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "gif": encoded(Image.fromarray(NOISE).quantize(), "GIF"),
    "tiff": encoded(NOISE, "TIFF"),
    "ppm": encoded(NOISE, "PPM"),
    "ico": encoded(NOISE, "ICO"),
    **{f"jpeg cut at {share} %": JPEG[: len(JPEG) * share // 100] for share in (1, 10, 50, 90, 99)},
    "jpeg without its end mark": JPEG[:-2],
    **{f"png cut at {share} %": PNG[: len(PNG) * share // 100] for share in (1, 10, 50, 90, 99)},
    "png without its end": PNG[:-12],
    "png without data": PNG[:33] + chunk(b"IEND", b""),
    "png with too little data": png(50, 50),
    "png of size zero": png(0, 0),
    "png with colour type 7": png(9, 9, colour=7),
    "png with a huge text": png(9, 9, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27)))),
    "webp cut in half": encoded(NOISE, "WEBP")[:200],
    "bmp cut in half": encoded(NOISE, "BMP")[:900],
    "bmp header alone": encoded(NOISE, "BMP")[:54],
    "png bomb": png(60000, 60000),
    "png that PIL only warns of": png(10000, 10000),
    "png that PIL opens in silence": png(8001, 8000),
    "jpeg bomb": jpeg_claiming(65500, 65500),
    "jpeg that PIL only warns of": jpeg_claiming(12000, 12000),
    "webp bomb": webp_claiming(16000, 16000),
    "long thin picture": png(60000, 1, data=bytes(180001)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_a_bad_image_that_names_it(root: Path, kind: str) -> None:
    with pytest.raises(BadImage, match=r"^picture 'x' cannot be used: [^\n]+$") as caught:
        load_image(put(root, BROKEN[kind]), Transform(1100, None))
    assert "0x" not in str(caught.value)  # an address would differ between equal runs


@pytest.mark.parametrize("kind", [name for name in BROKEN if "bomb" in name or "PIL" in name])
def test_bombs_are_refused_for_their_size(root: Path, kind: str) -> None:
    with pytest.raises(BadImage, match="more than 64 megapixels"):
        load_image(put(root, BROKEN[kind]), AS_IS)


def test_an_empty_file_is_called_empty(root: Path) -> None:
    with pytest.raises(BadImage, match="the file is empty"):
        load_image(put(root, b""), AS_IS)


def test_a_text_named_as_a_picture_is_told_the_formats(root: Path) -> None:
    with pytest.raises(BadImage, match=f"it is not a {', '.join(FORMATS)} picture"):
        load_image(put(root, BROKEN["text"], "x.jpg"), AS_IS)


def test_a_flipped_bit_in_a_png_never_gives_wrong_pixels(root: Path) -> None:
    outcomes = {"refused": 0, "same": 0}
    for bit in range(0, len(PNG) * 8, 11):
        content = bytearray(PNG)
        content[bit // 8] ^= 1 << bit % 8
        try:
            assert (pixels(root, bytes(content)) == NOISE).all()
            outcomes["same"] += 1
        except BadImage:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0.9 * sum(outcomes.values())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "PNG"])
def test_random_damage_never_raises_anything_else(root: Path, kind: str) -> None:
    original = encoded(SMOOTH, kind)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        content = bytearray(original)
        for place in rng.integers(0, len(content), rng.integers(1, 20)):
            content[place] = rng.integers(0, 256)
        try:
            image, _ = load_image(put(root, bytes(content)), AS_IS)
        except BadImage:
            continue
        assert image.isfinite().all()


def link(root: Path, target: Path | str) -> None:
    (root / "x").symlink_to(target)


def sparse(root: Path) -> None:
    with (root / "x").open("wb") as file:
        file.truncate(MAX_BYTES + 1)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda root: None, "No such file"),
    "a folder": (lambda root: (root / "x").mkdir(), "not a regular file"),
    "a FIFO": (lambda root: os.mkfifo(root / "x"), "not a regular file"),
    "a link to a device": (lambda root: link(root, "/dev/zero"), "outside"),
    "a link out of the root": (lambda root: link(root, root.parent / "secret.png"), "outside"),
    "a dangling link": (lambda root: link(root, root / "nothing"), "No such file"),
    "a link to itself": (lambda root: link(root, root / "x"), "symbolic links"),
    "a huge file": (sparse, "bytes"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_only_regular_files_inside_the_root_are_read(root: Path, kind: str) -> None:
    (root.parent / "secret.png").write_bytes(PNG)
    make, reason = PLACES[kind]
    make(root)
    with pytest.raises(BadImage, match=reason):
        load_image(File("x", root), AS_IS)


@pytest.mark.parametrize("name", ["../secret.png", "{parent}/secret.png", "a\0b", "a" * 5000])
def test_a_name_cannot_lead_out_of_the_root(root: Path, name: str) -> None:
    (root.parent / "secret.png").write_bytes(PNG)
    with pytest.raises(BadImage):
        load_image(File(name.format(parent=root.parent), root), AS_IS)


def test_a_link_inside_the_root_is_followed(root: Path) -> None:
    put(root, PNG, "original.png")
    link(root, root / "original.png")
    assert load_image(File("x", root), AS_IS)[0].shape == (3, 24, 32)


def test_nothing_of_pil_or_of_the_warnings_is_left_changed(root: Path) -> None:
    files = [put(root, content, f"{i}") for i, content in enumerate(BROKEN.values())]
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES

    def attempt(file: File) -> None:
        with pytest.raises(BadImage):
            load_image(file, Transform(1100, None))

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(attempt, files * 3))
    assert not caught
    after = list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    assert before == after
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# ---- the transform


@pytest.mark.parametrize("size", [(24, 32), (32, 24), (61, 17), (16, 16), (500, 375)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(16, 16), (16, 11), (20, 15), (16, None), ((9, 14), 8)]
)
def test_the_transform_equals_torchvisions(
    root: Path, size: tuple[int, int], resize: int | tuple[int, int], crop: int | None
) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8))
    steps = [transforms.Resize(resize)] + ([transforms.CenterCrop(crop)] if crop else [])
    expected = transforms.Compose([*steps, transforms.ToTensor()])(picture)
    found, original = load_image(put(root, encoded(picture, "PNG")), Transform(resize, crop))
    assert torch.equal(found, expected)
    assert original == size[::-1]


def test_a_pair_squashes_to_exactly_that_height_and_width(root: Path) -> None:
    image, _ = load_image(put(root, PNG), Transform((10, 7), None))
    assert image.shape == (3, 10, 7)
    assert Transform((10, 7), None).size == (10, 7)


def test_a_crop_larger_than_the_picture_is_refused(root: Path) -> None:
    with pytest.raises(BadImage, match="32 x 24 pixels are too few for crop: 25"):
        load_image(put(root, PNG), Transform(None, 25))


# ---- masks

OBJECT = np.zeros((24, 32), dtype=np.uint8)
OBJECT[6:18, 8:20] = 1
CENTRE = Transform(None, 16)


@pytest.mark.parametrize("value", [1, 7, 255])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_a_mask_is_one_where_it_is_not_zero(root: Path, mode: str, value: int) -> None:
    picture = Image.fromarray(OBJECT * value)
    if mode == "1":
        picture = Image.fromarray(OBJECT.astype(bool))
    elif mode == "P":
        picture.putpalette(RNG.integers(0, 256, 768).tolist())
    mask = load_mask(put(root, encoded(picture, "PNG")), (32, 24), AS_IS)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, torch.from_numpy(OBJECT).float())


@pytest.mark.parametrize(
    "transform", [Transform(48, 40), Transform(9, 9), Transform((50, 5), None)]
)
def test_a_mask_keeps_two_values_and_the_images_geometry(root: Path, transform: Transform) -> None:
    mask = load_mask(put(root, encoded(OBJECT * 255, "PNG"), "m"), (32, 24), transform)
    picture = put(root, encoded(np.stack([OBJECT * 255] * 3, -1), "PNG"), "p")
    image, _ = load_image(picture, transform)
    assert set(mask.flatten().tolist()) == {0, 1}
    assert mask.shape == image.shape[1:]
    unsure = (image[0] > 0) & (image[0] < 1)
    assert torch.equal(mask[~unsure], image[0][~unsure])


def test_a_mask_takes_the_nearest_pixel(root: Path) -> None:
    noise = NOISE[:, :24, 0] % 2
    mask = load_mask(put(root, encoded(noise, "PNG")), (24, 24), Transform(8, None))
    nearest = [int((place + 0.5) * 24 / 8) for place in range(8)]
    assert torch.equal(mask, torch.from_numpy(noise[nearest][:, nearest]).float())


def with_values(*values: int) -> np.ndarray[Any, Any]:
    mask = OBJECT.copy()
    mask[0, : len(values)] = values
    return mask


CORNER = np.zeros_like(OBJECT)
CORNER[0, 0] = 1
MALFORMED = {
    "empty": encoded(OBJECT * 0, "PNG"),
    "full": encoded(OBJECT * 0 + 1, "PNG"),
    "full of two values": encoded(OBJECT + 1, "PNG"),
    "three values": encoded(with_values(2), "PNG"),
    "ignored pixels": encoded(with_values(255), "PNG"),
    "grey": encoded(SMOOTH[..., 0], "PNG"),
    "empty after the crop": encoded(CORNER, "PNG"),
    "full after the crop": encoded(1 - CORNER, "PNG"),
    "another size": encoded(OBJECT[:, :31], "PNG"),
    "turned": encoded(OBJECT.T, "PNG"),
    "colour": encoded(np.stack([OBJECT] * 3, -1), "PNG"),
    "alpha": encoded(Image.fromarray(OBJECT).convert("LA"), "PNG"),
    "16 bits": encoded(OBJECT.astype(np.uint16), "PNG"),
    "jpeg": encoded(OBJECT * 255, "JPEG"),
    "bmp": encoded(OBJECT, "BMP"),
    "cut": encoded(OBJECT, "PNG")[:60],
    "zero bytes": b"",
    "text": b"mask",
    "bomb": png(60000, 60000),
}


def test_the_malformed_masks_are_one_step_from_a_valid_one(root: Path) -> None:
    mask = load_mask(put(root, encoded(OBJECT, "PNG")), (32, 24), CENTRE)
    assert mask.mean() == 144 / 256


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_mask_is_unknown_everywhere(root: Path, kind: str) -> None:
    mask = load_mask(put(root, MALFORMED[kind]), (32, 24), CENTRE)
    assert mask.shape == (16, 16)
    assert mask.isnan().all()


@pytest.mark.parametrize("file", [None, File("missing.png", Path("/nowhere"))])
def test_a_missing_mask_is_unknown_everywhere(file: File | None) -> None:
    mask = load_mask(file, (32, 24), Transform(12, None))
    assert mask.shape == (12, 16)
    assert mask.isnan().all()
