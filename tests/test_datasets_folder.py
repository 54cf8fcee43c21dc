"""Laws of folders of pictures: labels by name, keys by content, one broken file never more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from xbench.datasets.folder import Folder
from xbench.errors import BadImage, UsageError
from xbench.registry import identity, make
from xbench.types import Sample, Source

CLASSES = "index,wnid,name\n2,n03,crane\n0,n01,tench\n1,n02,crane\n3,NA,none\n"


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def mask(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, dtype=bool)
    pixels[5:15, 10:20] = True
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three of four classes in folders, masks for one picture, and a list of all."""
    for seed, name in enumerate(["n03/a.png", "n03/b.JPEG", "n01/deep/c.png", "NA/d.webp"]):
        picture(tmp_path / "photos/val" / name, seed)
    mask(tmp_path / "photos/masks/n03/b.png")
    (tmp_path / "photos/classes.csv").write_text(CLASSES)
    return tmp_path


def opened(data: Path, **options: Any) -> Source:
    settings = {"root": "photos/val", "resize": 16, "crop": 12, **options}
    return Folder(**settings).open(data)


def labels(source: Source) -> dict[str, int]:
    samples = source.load(range(len(source.ids)))
    return {name: sample.label for name, sample in zip(source.ids, samples, strict=True)}  # type: ignore[union-attr]


def one(source: Source, index: int = 0) -> Sample:
    [sample] = source.load([index])
    assert isinstance(sample, Sample), sample
    return sample


# ---- layouts and labels


def test_labels_go_by_the_class_folders_name_among_all_classes(data: Path) -> None:
    source = opened(data, classes="../classes.csv")
    assert labels(source) == {"NA/d.webp": 3, "n01/deep/c.png": 0, "n03/a.png": 2, "n03/b.JPEG": 2}
    assert source.classes == ("tench", "crane", "crane", "none")


def test_without_a_list_labels_are_the_sorted_folders(data: Path) -> None:
    source = opened(data)
    assert labels(source) == {"NA/d.webp": 0, "n01/deep/c.png": 1, "n03/a.png": 2, "n03/b.JPEG": 2}
    assert source.classes == ("NA", "n01", "n03")


def test_without_an_index_column_the_row_is_the_label(data: Path) -> None:
    (data / "photos/classes.csv").write_text("\ufeffwnid\nn03\nNA\nn02\nn01\n", encoding="utf-8")
    source = opened(data, classes="../classes.csv")
    assert source.classes == ("n03", "NA", "n02", "n01")
    assert labels(source)["n01/deep/c.png"] == 3


def test_a_byte_order_mark_is_no_part_of_a_column(data: Path) -> None:
    (data / "photos/classes.csv").write_text("\ufeff" + CLASSES, encoding="utf-8")
    assert opened(data, classes="../classes.csv").classes == ("tench", "crane", "crane", "none")


def test_a_flat_folder_is_unlabelled(data: Path) -> None:
    source = opened(data, root="photos/val/n03")
    assert labels(source) == {"a.png": -1, "b.JPEG": -1}
    assert source.classes == ()


def test_an_absolute_root_needs_no_data_directory(data: Path) -> None:
    assert opened(data, root=str(data / "photos/val/n03")).ids == ("a.png", "b.JPEG")
    assert Folder(root=str(data / "photos/val/n03")).open(None).ids == ("a.png", "b.JPEG")


def test_ids_are_sorted_paths_below_the_root(data: Path) -> None:
    for hidden in (".hidden.png", ".git/x.png", "n03/._a.png", "n03/notes.txt"):
        picture(data / "photos/val" / hidden)
    assert opened(data).ids == ("NA/d.webp", "n01/deep/c.png", "n03/a.png", "n03/b.JPEG")


def test_masks_lie_at_the_same_place_in_their_folder(data: Path) -> None:
    source = opened(data, masks="../masks")
    with_mask, without = one(source, 3), one(source, 2)
    assert source.has_masks
    assert with_mask.mask is not None
    assert set(with_mask.mask.flatten().tolist()) == {0, 1}
    assert without.mask is not None
    assert without.mask.isnan().all()
    assert without.mask.shape == with_mask.mask.shape == source.size == (12, 12)


def test_a_folder_of_masks_inside_the_root_is_no_class(data: Path) -> None:
    shutil.move(data / "photos/masks", data / "photos/val/masks")
    assert opened(data, masks="masks").classes == ("NA", "n01", "n03")


def test_without_masks_a_sample_has_none(data: Path) -> None:
    source = opened(data)
    assert not source.has_masks
    assert one(source).mask is None


# ---- a list of pictures


def indexed(data: Path, text: str, **options: Any) -> Source:
    (data / "photos/index.csv").write_text(text)
    return opened(data, root="photos", index="index.csv", **options)


def test_an_index_gives_images_labels_and_masks(data: Path) -> None:
    text = "id,image,mask,label\n1,val/n03/b.JPEG,masks/n03/b.png,7\n2,val/n03/a.png,,\n"
    source = indexed(data, text)
    assert source.ids == ("val/n03/a.png", "val/n03/b.JPEG")
    assert labels(source) == {"val/n03/a.png": -1, "val/n03/b.JPEG": 7}
    known, unknown = one(source, 1).mask, one(source, 0).mask
    assert known is not None
    assert known.sum() > 0
    assert unknown is not None
    assert unknown.isnan().all()


def test_an_index_may_name_classes(data: Path) -> None:
    text = "image,kind\nval/n03/a.png,n03\nval/NA/d.webp,NA\nval/n01/deep/c.png,1\n"
    source = indexed(data, text, label_column="kind", classes="classes.csv")
    assert labels(source) == {"val/NA/d.webp": 3, "val/n01/deep/c.png": 1, "val/n03/a.png": 2}


def test_an_index_without_labels_is_unlabelled(data: Path) -> None:
    assert labels(indexed(data, "image\nval/n03/a.png\n", label_column=None)) == {
        "val/n03/a.png": -1
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,label\nx.png,1\n", "no column 'image'; it has picture, label"),
        ("image,class\nx.png,1\n", "no column 'label'"),
        ("", "no column 'image'"),
        ("image,label\n", "has no pictures"),
        ("image,label\nx.png\n", "line 2 of .* does not have 2 cells"),
        ("image,label\nx.png,1,2\n", "line 2 of .* does not have 2 cells"),
        ("image,label\nx.png,1\n./x.png,1\n", "line 3 of .* names 'x.png' a second time"),
        ("image,label\n,1\n", "line 2 of .* names no image"),
        ("image,label\nx.png,dog\n", "label 'dog', which is not a whole number"),
        ("image,label\nx.png,1.0\n", "label '1.0'"),
        ("image,label\nx.png,-1\n", "label '-1'"),
        ("image,label\nx.png," + "9" * 5000 + "\n", "which is not a whole number"),
        ('image,label\n"x.png,1\n', "cannot be read"),
    ],
)
def test_a_wrong_index_is_a_usage_error(data: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        indexed(data, text)


def test_an_index_that_is_not_utf_8_is_a_usage_error(data: Path) -> None:
    (data / "photos/index.csv").write_bytes(b"image,label\n\xff.png,1\n")
    with pytest.raises(UsageError, match="cannot be read"):
        opened(data, root="photos", index="index.csv")


def test_a_label_outside_the_classes_is_a_usage_error(data: Path) -> None:
    with pytest.raises(UsageError, match="label '4', which is not one of the 4 classes"):
        indexed(data, "image,label\nx.png,4\n", classes="classes.csv")


def test_listed_pictures_that_are_missing_or_outside_fail_alone(data: Path) -> None:
    picture(data / "secret.png")
    source = indexed(data, "image,label\n../secret.png,1\nval/n03/a.png,1\nval/none.png,1\n")
    kinds = [type(sample) for sample in source.load([0, 1, 2])]
    assert kinds == [BadImage, Sample, BadImage]
    assert source.key(0) == "../secret.png@unreadable"


def test_a_listed_mask_outside_the_root_is_unknown(data: Path) -> None:
    mask(data / "secret.png")
    source = indexed(data, "image,mask,label\nval/n03/a.png,../secret.png,1\n")
    found = one(source).mask
    assert found is not None
    assert found.isnan().all()


# ---- errors before any work


def test_a_missing_folder_names_path_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}/photos/val, which is not there; --data DIR"):
        opened(tmp_path)
    with pytest.raises(UsageError, match="name it with --data DIR or XBENCH_DATA"):
        Folder(root="photos").open(None)


def test_a_class_folder_that_is_not_listed_is_a_usage_error(data: Path) -> None:
    picture(data / "photos/val/n99/x.png")
    with pytest.raises(UsageError, match=r"n99 is not listed in .*classes\.csv"):
        opened(data, classes="../classes.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,wnid\n0,n01\n2,n02\n", "does not hold 0 to 1 once each"),
        ("index,wnid\n0,n01\n0,n02\n", "does not hold 0 to 1 once each"),
        ("index,wnid\nx,n01\n", "does not hold 0 to 0 once each"),
        ("index,wnid\n0,n01\n1,n01\n", "holds 'n01' twice"),
        ("index\n0\n", "no column that names the class folders"),
        ("wnid\n", "has no class"),
    ],
)
def test_a_wrong_list_of_classes_is_a_usage_error(data: Path, text: str, message: str) -> None:
    (data / "photos/classes.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        opened(data, classes="../classes.csv")


@pytest.mark.parametrize("option", ["classes", "index", "masks"])
def test_a_missing_file_or_folder_is_a_usage_error(data: Path, option: str) -> None:
    with pytest.raises(UsageError, match="nowhere is not there"):
        opened(data, **{option: "nowhere"})


def test_pictures_beside_class_folders_are_a_usage_error(data: Path) -> None:
    picture(data / "photos/val/stray.png")
    with pytest.raises(UsageError, match=r"'stray\.png'.* labels are unclear"):
        opened(data)


def test_a_link_to_a_folder_is_a_usage_error(data: Path) -> None:
    (data / "photos/val/n04").symlink_to(data / "photos/val/n03")
    with pytest.raises(UsageError, match="n04 is a link to a folder"):
        opened(data)


def test_a_folder_that_cannot_be_listed_is_a_usage_error(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def forbidden(path: Any) -> Any:
        if Path(path).name == "n03":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UsageError, match="n03 cannot be listed: Permission denied"):
        opened(data)


def test_an_empty_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match="has no pictures"):
        opened(tmp_path, root="photos")


def test_a_file_name_that_is_not_utf_8_is_a_usage_error(data: Path) -> None:
    try:
        picture(data / "photos/val/n03" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UsageError, match="is not UTF-8; rename the file"):
        opened(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 100}, "'crop: null' keeps the whole picture"),
        ({"resize": (300, 200)}, "'crop: null' keeps the whole picture"),
        ({"resize": 0}, "resize"),
        ({"resize": True}, "resize"),
        ({"resize": "256"}, "resize"),
        ({"resize": [1, 2, 3]}, "resize"),
        ({"crop": -1}, "crop"),
        ({"index": "i.csv", "masks": "m"}, "cannot be combined"),
        ({"mask": "m"}, "no parameter 'mask'; did you mean 'masks'"),
    ],
)
def test_wrong_parameters_are_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make("datasets", "folder", {"root": "photos", **options})


def test_a_list_from_yaml_is_height_and_width(data: Path) -> None:
    entry = make("datasets", "folder", {"root": "photos/val", "resize": [9, 14], "crop": None})
    assert entry.open(data).size == (9, 14)
    assert one(entry.open(data)).image.shape == (3, 9, 14)


# ---- broken files among good ones


def test_broken_files_fail_alone_and_the_others_are_untouched(data: Path) -> None:
    folder = data / "photos/val/n03"
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "empty.png").touch()
    (folder / "film.gif").write_bytes(b"GIF89a")
    (folder / "page.tiff").write_bytes(b"II*\0")
    picture(folder / "folder.jpg/inside.png")
    (folder / "out.png").symlink_to(picture(data / "secret.png"))
    os.mkfifo(folder / "pipe.png")
    source = opened(data)
    bad = {
        name
        for name, sample in zip(source.ids, source.load(range(len(source.ids))), strict=True)
        if isinstance(sample, BadImage)
    }
    names = "cut.jpg", "empty.png", "film.gif", "folder.jpg", "out.png", "page.tiff", "pipe.png"
    assert bad == {f"n03/{name}" for name in names}
    assert len(source.ids) == 4 + len(names)


def test_loading_keeps_the_order_and_depends_on_nothing_else(data: Path) -> None:
    source = opened(data)
    order = [3, 0, 2, 0, 1] * 4
    for index, sample in zip(order, source.load(order), strict=True):
        assert isinstance(sample, Sample)
        assert torch.equal(sample.image, one(source, index).image)
    assert source.load([]) == []


def test_without_one_size_pictures_must_equal_the_first_readable(data: Path) -> None:
    (data / "photos/val/NA/d.webp").write_bytes(b"")
    picture(data / "photos/val/n03/a.png", size=(21, 30))
    source = opened(data, resize=None, crop=None)
    broken, first, other, equal = source.load(range(4))
    assert source.size == (20, 30)
    assert isinstance(broken, BadImage)
    assert isinstance(first, Sample)
    assert isinstance(equal, Sample)
    with pytest.raises(BadImage, match=r"has \(height, width\) \(21, 30\), but .* \(20, 30\)"):
        raise other  # type: ignore[misc]


# ---- keys


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source.ids))]


def test_keys_do_not_depend_on_where_the_data_lie(data: Path, tmp_path: Path) -> None:
    before = keys(opened(data, masks="../masks"))
    shutil.copytree(data / "photos", tmp_path / "elsewhere/photos")
    assert keys(opened(tmp_path / "elsewhere", masks="../masks")) == before
    assert identity(Folder(root="photos/val"))["params"]["root"] == "photos/val"
    assert before[0].startswith("NA/d.webp@")
    assert len(before[0]) == len("NA/d.webp@") + 12


@pytest.mark.parametrize("change", ["image", "mask", "label"])
def test_a_key_changes_with_image_mask_and_label_and_no_other_does(data: Path, change: str) -> None:
    options: dict[str, Any] = {"masks": "../masks", "classes": "../classes.csv"}
    before = keys(opened(data, **options))
    if change == "image":
        picture(data / "photos/val/n03/b.JPEG", seed=99)
        changed = [False, False, False, True]
    elif change == "mask":
        (data / "photos/masks/n03/b.png").unlink()
        changed = [False, False, False, True]
    else:
        swapped = CLASSES.replace("2,n03", "1,n03").replace("1,n02", "2,n02")
        (data / "photos/classes.csv").write_text(swapped)
        changed = [False, False, True, True]
    after = keys(opened(data, **options))
    assert [old != new for old, new in zip(before, after, strict=True)] == changed


def test_a_key_is_read_once(data: Path) -> None:
    source = opened(data)
    before = source.key(2)
    picture(data / "photos/val/n03/a.png", seed=99)
    assert source.key(2) == before


def test_a_damaged_picture_still_has_a_key_of_its_content(data: Path) -> None:
    (data / "photos/val/n03/a.png").write_bytes(b"damaged")
    os.mkfifo(data / "photos/val/n03/z.png")
    source = opened(data)
    assert "unreadable" not in source.key(2)
    assert source.key(4) == "n03/z.png@unreadable"


# ---- real photographs

DATA = Path(os.environ.get("XBENCH_DATA", "data"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "imagenet").is_dir(), reason=f"no imagenet in {DATA}")
def test_real_imagenet_folders_are_numbered_among_all_classes() -> None:
    source = Folder(root="imagenet/val", classes="../classes.csv").open(DATA)
    assert len(source.ids) == 800
    assert len(source.classes) == 1000
    assert source.classes[0] == "tench"
    samples = source.load(range(0, 800, 50))
    assert all(isinstance(sample, Sample) for sample in samples)
    found = [sample.label for sample in samples if isinstance(sample, Sample)]
    assert found == sorted(found)  # wnids are numbered in sorted order
    assert found[-1] > 900


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "objects").is_dir(), reason=f"no objects in {DATA}")
def test_all_real_objects_have_a_mask_within_the_crop() -> None:
    source = Folder(root="objects", index="index.csv", label_column="imagenet_target").open(DATA)
    samples = source.load(range(len(source.ids)))
    assert len(samples) == 195
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.mask is not None
        assert 0 < sample.mask.mean() < 1
        assert sample.image.shape == (3, 224, 224)
