"""Pictures from disk: read through one door, decoded by PIL alone, brought to one size.

Whatever is wrong with a file, it is a :class:`BadImage` that names the file and the reason. Only
the first frame counts. Grey, palette, CMYK and 16-bit pictures become 8-bit RGB, and alpha is
dropped. EXIF rotation is not applied and colour profiles are ignored.
"""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from ..errors import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 4 * MAX_PIXELS + 2**20  # such a picture uncompressed, and its header

BACKGROUND, OBJECT, UNKNOWN = 0, 1, 2
"""What a mask says of a pixel."""

Pixels = Annotated[int, Field(ge=1)]
Resize = Pixels | tuple[Pixels, Pixels] | None
"""Short side, or exactly (height, width), or the picture's own size."""

Mask = np.ndarray[Any, np.dtype[np.uint8]]
ReadMask = Callable[[Image.Image], Mask]
"""From a decoded PNG to (H, W) of BACKGROUND, OBJECT and UNKNOWN; ValueError if it is no mask."""

_TOO_LARGE = f"it has more than {MAX_PIXELS // 10**6} megapixels"


class Encoded(Protocol):
    """A picture before it is decoded."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """Its bytes, or :class:`BadImage`."""


class File(NamedTuple):
    """A file by its name in a folder; ``root`` is resolved."""

    name: str
    root: Path

    def read(self) -> bytes:
        """The bytes of a regular file that lies inside ``root``.

        Raises:
            BadImage: if it is missing, lies elsewhere (a link, ``..``), is too large or no regular
                file; a FIFO is not opened, since it would wait for ever.
        """
        with _bad_image(self.name):
            path = self.root / self.name
            status = path.stat()
            if not path.resolve().is_relative_to(self.root):
                raise ValueError("it lies outside the data set's folder")
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return path.read_bytes()


@dataclass(frozen=True)
class Transform:
    """Resize, then cut out the centre, with torchvision's rounding of sizes and corners.

    Args:
        resize: an int for the short side; (height, width) for exactly that, whatever the shape
            was; None to keep the size.
        crop: side of the square that is kept; None keeps all.
    """

    resize: int | tuple[int, int] | None
    crop: int | None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of every result; None where it depends on the picture."""
        if self.crop is not None:
            return self.crop, self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def __call__(self, picture: Image.Image, resample: Image.Resampling) -> Image.Image:
        """The transformed picture; bilinear reduction is antialiased.

        Raises:
            ValueError: if the crop does not fit, or a long thin picture would grow too large.
        """
        width, height = picture.size
        if isinstance(self.resize, tuple):
            height, width = self.resize
        elif self.resize is not None:
            short = min(width, height)
            width, height = self.resize * width // short, self.resize * height // short
        if width * height > MAX_PIXELS:
            raise ValueError(f"resized to {width} x {height} {_TOO_LARGE}")
        resized = picture.resize((width, height), resample)
        if self.crop is None:
            return resized
        if self.crop > min(width, height):
            raise ValueError(f"its {width} x {height} pixels are too few for crop: {self.crop}")
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return resized.crop((left, top, left + self.crop, top + self.crop))


def must_fit(resize: int | tuple[int, int] | None, crop: int | None) -> None:
    """Refuses a crop that no resized picture can hold.

    Raises:
        ValueError: naming both.
    """
    if crop is not None and resize is not None:
        short = resize if isinstance(resize, int) else min(resize)
        if crop > short:
            raise ValueError(
                f"crop: {crop} does not fit into resize: {resize}; "
                f"'crop: null' keeps the whole picture"
            )


def load_image(file: Encoded, transform: Transform) -> tuple[Tensor, tuple[int, int]]:
    """The transformed image (3, H, W), float32 in [0, 1], and the picture's own (width, height).

    Raises:
        BadImage: if the file is no picture, damaged, too large, or does not fit the transform.
    """
    data = file.read()
    with _bad_image(file.name):
        picture = _rgb(_decode(data, FORMATS))
        pixels = np.asarray(transform(picture, Image.Resampling.BILINEAR), dtype=np.float32)
        # numpy, since torch would start its own threads in each thread that decodes
        image = np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)
        return torch.from_numpy(image), picture.size


def two_values(mask: Image.Image) -> Mask:
    """A mask of one channel and two values, of which 0 is the background."""
    if mask.mode not in ("1", "L", "P"):
        raise ValueError(f"a mask has one channel of 1 or 8 bits, not {mask.mode}")
    if mask.getcolors(2) is None:
        raise ValueError("it has more than two values")
    pixels: Mask = (np.asarray(mask) != 0).astype(np.uint8)
    return pixels


def load_mask(
    file: Encoded | None, size: tuple[int, int], transform: Transform, read: ReadMask = two_values
) -> Tensor:
    """The object mask (H, W), 1 on the object, 0 elsewhere, NaN where that is unknown; all NaN if
    there is no valid one.

    A valid mask is a PNG that ``read`` accepts, as large as the picture; after the transform, which
    takes the nearest pixel, some of the object and some of the background are left. A mask is never
    repaired.

    Args:
        file: None where an image has no mask.
        size: (width, height) of the picture before the transform.
        transform: the picture's.
        read: what the PNG's values mean.
    """
    try:
        if file is None:
            raise BadImage("there is no mask")
        data = file.read()
        with _bad_image(file.name):
            mask = _decode(data, ("PNG",))
            if mask.size != size:
                raise ValueError(f"the mask has size {mask.size}, its picture {size}")
            pixels = np.asarray(transform(Image.fromarray(read(mask)), Image.Resampling.NEAREST))
            if not {BACKGROUND, OBJECT} <= set(np.unique(pixels).tolist()):
                raise ValueError("after the transform it has no object or no background")
            values = np.array([0, 1, np.nan], dtype=np.float32)
            return torch.from_numpy(values[pixels])
    except BadImage:
        width, height = transform(Image.new("L", size), Image.Resampling.NEAREST).size
        return torch.full((height, width), torch.nan)


def _decode(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The first frame, decoded after its header has been judged."""
    if not data:
        raise ValueError("the file is empty")
    with _silence:
        picture = Image.open(BytesIO(data), formats=formats)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(_TOO_LARGE)
        if picture.format == "PNG":
            picture.verify()  # without the checksums some flipped bits decode to wrong pixels
            picture = Image.open(BytesIO(data), formats=formats)
        picture.load()
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips at 255
        grey = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    picture.info.pop("transparency", None)  # PIL warns when it is lost, and here it always is
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@contextmanager
def _bad_image(name: str) -> Iterator[None]:
    """Turns every exception into a BadImage: PIL raises nearly all there are on damaged files.

    The message holds nothing that differs between equal runs, such as where the data lie.
    """
    try:
        yield
    except UnidentifiedImageError:
        reason = f"it is not a {', '.join(FORMATS)} picture, or its header is damaged"
    except Image.DecompressionBombError:
        reason = _TOO_LARGE
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    else:
        return
    raise BadImage(f"picture {name!r} cannot be used: {reason}")


class _Silence:
    """No warnings of PIL's while any thread decodes; what is wrong becomes an error or is harmless.

    The filters belong to all threads, so threads that overlap in ``catch_warnings`` alone could
    restore them in the wrong order.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._threads = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._threads == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._filters.__exit__(None, None, None)


_silence = _Silence()
