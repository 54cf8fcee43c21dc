"""Which pictures a folder holds, with their labels and masks; none of them is opened here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import UsageError
from .pictures import Encoded, File, ReadMask, two_values

UNLABELLED = -1
# GIF and TIFF are refused on loading, so that they are counted and not overlooked
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Picture(NamedTuple):
    """Where an image and its mask lie, its label, and what the mask's values mean."""

    image: Encoded
    mask: Encoded | None
    label: int
    read_mask: ReadMask = two_values


class Numbering(NamedTuple):
    """Label by class folder, class names by label, and the CSV file that says so."""

    labels: Mapping[str, int]
    names: tuple[str, ...]
    file: Path


def existing_root(name: str, root: str, data: Path | None, hint: str = "") -> Path:
    """The resolved folder of a data set.

    Args:
        name: of the data set, for messages.
        root: relative to ``data``, or absolute.
        data: the data directory.
        hint: what to put there, and where it comes from.
    """
    hint = f". {hint}" if hint else ""
    if data is None and not Path(root).is_absolute():
        raise UsageError(
            f"data set {name!r} looks for {root!r} in the data directory, and none is given; "
            f"name it with --data DIR or XBENCH_DATA{hint}"
        )
    path = (data or Path()) / root
    if not path.is_dir():
        raise UsageError(
            f"data set {name!r} looks for the folder {path}, which is not there; "
            f"--data DIR or XBENCH_DATA names the directory that holds {root!r}{hint}"
        )
    return path.resolve()


def in_folders(
    root: Path, masks: Path | None, numbering: Numbering | None
) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures of class folders, or of a flat one, and the class folders in sorted order."""
    if masks is not None and not masks.is_dir():
        raise UsageError(f"the folder of masks {masks} is not there; 'masks' is relative to {root}")
    folders, images = walk(root, masks)
    flat = [image for image in images if "/" not in image]
    if folders and flat:
        raise UsageError(
            f"{root} holds pictures ({flat[0]!r}) beside folders ({folders[0]!r}), so labels are "
            f"unclear; move one of them away, or list the pictures with 'index'"
        )
    labels = {folder: label for label, folder in enumerate(folders)}
    if numbering is not None:
        labels = {**numbering.labels}
        for folder in folders:
            if folder not in labels:
                raise UsageError(f"class folder {root / folder} is not listed in {numbering.file}")
    pictures = []
    for image in images:
        mask = None
        if masks is not None:
            mask = File(PurePosixPath(image).with_suffix(".png").as_posix(), masks)
        label = UNLABELLED if flat else labels[image.split("/")[0]]
        pictures.append(Picture(File(image, root), mask, label))
    return pictures, tuple(folders)


def walk(root: Path, masks: Path | None = None) -> tuple[list[str], list[str]]:
    """Names of the folders in ``root``, sorted, and of all pictures below it, relative to it."""
    top: list[str] = []
    images: list[str] = []

    def refuse(error: OSError) -> None:
        raise UsageError(f"the folder {error.filename} cannot be listed: {error.strerror}")

    for here, folders, files in os.walk(root, onerror=refuse):
        folder = Path(here)
        inside = folder.relative_to(root)
        visible = [name for name in (*folders, *files) if not name.startswith(".")]
        found = [name for name in visible if name.lower().endswith(SUFFIXES)]
        images += [(inside / name).as_posix() for name in found]
        folders[:] = sorted(set(folders) & set(visible) - set(found))  # os.walk goes on with these
        if masks is not None:
            folders[:] = [name for name in folders if (folder / name).resolve() != masks]
        for name in folders:
            if (folder / name).is_symlink():
                raise UsageError(
                    f"{folder / name} is a link to a folder, which xbench does not follow; "
                    f"put the folder itself there"
                )
        if folder == root:
            top = list(folders)
    for image in images:
        if not image.isprintable() and re.search("[\ud800-\udfff]", image):
            raise UsageError(f"the file name {image!r} in {root} is not UTF-8; rename the file")
    return top, images


def in_index(
    root: Path, file: Path, label_column: str | None, numbering: Numbering | None
) -> list[Picture]:
    """The pictures that a CSV file lists."""
    columns = ("image",) if label_column is None else ("image", label_column)
    pictures: dict[str, Picture] = {}
    for line, cells in read_csv(file, columns):
        if not cells["image"]:
            raise UsageError(f"line {line} of {file} names no image")
        image = PurePosixPath(cells["image"]).as_posix()
        if image in pictures:
            raise UsageError(f"line {line} of {file} names {image!r} a second time")
        mask = File(cells["mask"], root) if cells.get("mask") else None
        text = "" if label_column is None else cells[label_column]
        pictures[image] = Picture(File(image, root), mask, _label(text, line, file, numbering))
    return list(pictures.values())


def _label(text: str, line: int, file: Path, numbering: Numbering | None) -> int:
    if not text:
        return UNLABELLED
    if numbering is not None and text in numbering.labels:
        return numbering.labels[text]
    if re.fullmatch("[0-9]{1,9}", text) and (numbering is None or int(text) < len(numbering.names)):
        return int(text)
    known = "a whole number; 'classes' can number class names"
    if numbering is not None:
        known = f"one of the {len(numbering.names)} classes of {numbering.file}"
    raise UsageError(f"line {line} of {file} has the label {text!r}, which is not {known}")


def read_classes(file: Path) -> Numbering:
    """All classes of a data set, by the file that numbers them."""
    rows = [cells for _, cells in read_csv(file, ())]
    folder = next((name for name in (rows[0] if rows else {}) if name != "index"), None)
    if folder is None:
        raise UsageError(f"{file} has no class, or no column that names the class folders")
    labels: dict[str, int] = {}
    names: dict[int, str] = {}
    for place, cells in enumerate(rows):
        number = cells.get("index", str(place))
        label = int(number) if re.fullmatch("[0-9]{1,9}", number) else len(rows)
        if label >= len(rows) or label in names:
            raise UsageError(
                f"column 'index' of {file} does not hold 0 to {len(rows) - 1} once each"
            )
        if cells[folder] in labels:
            raise UsageError(f"column {folder!r} of {file} holds {cells[folder]!r} twice")
        labels[cells[folder]] = label
        names[label] = cells.get("name", cells[folder])
    return Numbering(labels, tuple(names[label] for label in range(len(rows))), file)


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; text stays text, so that a class may be called NA."""
    if not file.is_file():
        raise UsageError(f"the CSV file {file} is not there")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader: csv.DictReader[Any] = csv.DictReader(text, strict=True)
            rows = [(reader.line_num, cells) for cells in reader]
            header = list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"the CSV file {file} cannot be read: {error}") from None
    for column in columns:
        if column not in header:
            raise UsageError(f"{file} has no column {column!r}; it has {', '.join(header)}")
    for line, cells in rows:
        if None in cells or None in cells.values():
            raise UsageError(f"line {line} of {file} does not have {len(header)} cells")
    return rows


def read_table(file: Path, columns: int) -> list[tuple[int, list[str]]]:
    """Line number and words of each line of a text file; ``#`` begins a comment.

    Raises:
        UsageError: if the file is missing, or a line does not have as many words.
    """
    if not file.is_file():
        raise UsageError(f"the list {file} is not there; it belongs to the data set's own files")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"the list {file} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != columns:
            raise UsageError(f"line {number} of {file} does not have {columns} words: {line!r}")
        found.append((number, words))
    return found
