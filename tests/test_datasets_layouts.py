"""Laws of data sets in their own layouts, on tiny replicas: labels, masks, and what is said when a
file is missing or wrong.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from xbench.datasets import imagenet
from xbench.datasets.imagenet import DEVKIT
from xbench.errors import BadImage, UsageError
from xbench.registry import identity, make
from xbench.types import Sample, Source

TENCH, GOLDFISH, CRANE, ALTAR, CHURCH = (
    "n01440764", "n01443537", "n03126707", "n02699494", "n03028079",
)  # fmt: skip
SIZE = (24, 32)  # height, width


def picture(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)
    return path


def png(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def opened(name: str, data: Path | None, **options: Any) -> Source:
    source: Source = make("datasets", name, {"resize": None, "crop": None, **options}).open(data)
    return source


def loaded(source: Source) -> dict[str, Sample]:
    samples = source.load(range(len(source.ids)))
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return dict(zip(source.ids, samples, strict=True))  # type: ignore[arg-type]


def labels(source: Source) -> dict[str, int]:
    found = {name: sample.label for name, sample in loaded(source).items()}
    assert list(found.values()) == list(source.labels)  # type: ignore[attr-defined]
    return found


def mask_of(source: Source, index: int = 0) -> np.ndarray[Any, Any]:
    [sample] = source.load([index])
    assert isinstance(sample, Sample)
    assert sample.mask is not None
    return sample.mask.numpy()


# --- ImageNet -------------------------------------------------------------------------------------


def test_the_shipped_classes_are_timms_and_torchvisions() -> None:
    timm = pytest.importorskip("timm.data")
    numbering = imagenet.classes()
    synsets = timm.ImageNetInfo().label_names()
    assert list(numbering.labels) == synsets == sorted(synsets)
    assert len(set(synsets)) == len(numbering.names) == 1000
    names = [numbering.names[numbering.labels[wnid]] for wnid in (TENCH, GOLDFISH, CRANE, ALTAR)]
    assert names == ["tench", "goldfish", "crane", "altar"]


@pytest.mark.parametrize("inside", ["val", "."])
def test_imagenets_labels_go_by_wordnet_id_however_few_folders_there_are(
    inside: str, tmp_path: Path
) -> None:
    home = tmp_path / "imagenet" / inside
    picture(home / CRANE / "a.JPEG")
    picture(home / GOLDFISH / "b.JPEG")
    source = opened("imagenet", tmp_path)
    assert labels(source) == {f"{GOLDFISH}/b.JPEG": 1, f"{CRANE}/a.JPEG": 517}
    assert source.classes[517] == "crane"
    assert not source.has_masks


def devkit(root: Path, *, packed: bool) -> None:
    """Its ids are in no order of WordNet ids, and inner nodes of the tree follow the leaves."""
    wnids = [ALTAR, TENCH, CRANE, "n00001740"]
    dtype = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    synsets = np.array([(at + 1, wnid, 0) for at, wnid in enumerate(wnids)], dtype=dtype)
    files = {"ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n"}
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    files["meta.mat"] = buffer.getvalue()
    if not packed:
        (root / DEVKIT / "data").mkdir(parents=True)
        for name, content in files.items():
            (root / DEVKIT / "data" / name).write_bytes(content)
        return
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{DEVKIT}/data/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("packed", [False, True])
def test_validation_pictures_in_one_folder_are_labelled_by_the_development_kit(
    packed: bool, tmp_path: Path
) -> None:
    root = tmp_path / "imagenet"
    for number in (1, 2, 3):
        picture(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    devkit(root, packed=packed)
    assert list(labels(opened("imagenet", tmp_path)).values()) == [517, 406, 0]
    picture(root / "val" / "ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(UsageError, match=r"00000004.JPEG is not named .* from 1 to 3"):
        opened("imagenet", tmp_path)


def test_imagenet_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"folder .*imagenet, which is not there.*image-net.org"):
        opened("imagenet", tmp_path)
    with pytest.raises(UsageError, match="none is given; name it with --data DIR"):
        opened("imagenet", None)
    root = tmp_path / "imagenet"
    root.mkdir()
    (root / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(UsageError, match=r"archive ILSVRC2012_img_val.tar, which has to be unpack"):
        opened("imagenet", tmp_path)
    picture(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(UsageError, match=f"put the folder {DEVKIT} or {DEVKIT}.tar.gz into"):
        opened("imagenet", tmp_path)
    (root / f"{DEVKIT}.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=f"{DEVKIT}.tar.gz cannot be read"):
        opened("imagenet", tmp_path)
    picture(root / "val" / "tench" / "a.JPEG")
    with pytest.raises(UsageError, match="labels are unclear"):
        opened("imagenet", tmp_path)
    for flat in (root / "val").glob("*.JPEG"):
        flat.unlink()
    with pytest.raises(UsageError, match=r"class folder .*tench is not listed in"):
        opened("imagenet", tmp_path)


# --- ImageNet-S -----------------------------------------------------------------------------------


@pytest.fixture
def imagenet_s(tmp_path: Path) -> Path:
    """All folders of the variant with 50 classes, the last of which is a church's."""
    wnids = sorted([*list(imagenet.classes().labels)[::30][:33], *imagenet.classes().labels][:49])
    root = tmp_path / "ImageNetS50"
    for wnid in (*wnids, CHURCH):
        (root / "validation" / wnid).mkdir(parents=True, exist_ok=True)
    folders = sorted(path.name for path in (root / "validation").iterdir())
    for wnid in list(imagenet.classes().labels)[200:]:
        if len(folders) == 50:
            break
        (root / "validation" / wnid).mkdir(exist_ok=True)
        folders = sorted(path.name for path in (root / "validation").iterdir())
    number = folders.index(CHURCH) + 1
    picture(root / "validation" / CHURCH / "a.JPEG")
    ids = np.zeros(SIZE, dtype=int)
    ids[4:12, 8:16], ids[12:16, 8:16], ids[20:, :] = number, 1000, number - 1
    segmentation = np.stack([ids % 256, ids // 256, 0 * ids], axis=-1)
    png(root / "validation-segmentation" / CHURCH / "a.png", segmentation)
    return tmp_path


def test_a_segmentations_id_is_red_plus_256_green_and_1000_is_unknown(imagenet_s: Path) -> None:
    source = opened("imagenet_s", imagenet_s, variant=50)
    assert labels(source) == {f"{CHURCH}/a.JPEG": imagenet.classes().labels[CHURCH]}
    expected = np.zeros(SIZE)
    expected[4:12, 8:16], expected[12:16, 8:16] = 1, np.nan
    np.testing.assert_array_equal(mask_of(source), expected)


def test_ids_above_255_use_the_green_channel() -> None:
    from xbench.datasets.imagenet_s import of_class

    ids = np.array([[0, 300, 44], [919, 1000, 300]])
    mask = Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8))
    assert of_class(mask, 300).tolist() == [[0, 1, 0], [0, 2, 1]]
    assert of_class(mask, 919).tolist() == [[0, 0, 0], [1, 2, 0]]


def test_masks_follow_their_pictures_geometry_by_nearest_pixel(imagenet_s: Path) -> None:
    source = make("datasets", "imagenet_s", {"variant": 50, "preset": "gag-2024"}).open(imagenet_s)
    assert source.size == (256, 256)
    mask = mask_of(source)
    values = set(np.unique(mask[~np.isnan(mask)]).tolist())
    assert values == {0.0, 1.0}
    # 24 x 32 to 256 x 256: every pixel of the object becomes 10 2/3 x 8 of them
    assert np.nanmean(mask == 1) == pytest.approx(8 * 8 / (24 * 32), rel=0.02)
    assert np.isnan(mask).mean() == pytest.approx(4 * 8 / (24 * 32), rel=0.05)


def test_missing_class_folders_would_shift_the_ids_so_they_are_refused(imagenet_s: Path) -> None:
    root = imagenet_s / "ImageNetS50"
    folders = sorted(path.name for path in (root / "validation").iterdir())
    (root / "validation" / folders[0]).rmdir()
    with pytest.raises(UsageError, match="has folders of 49 classes, not the 50 of this variant"):
        opened("imagenet_s", imagenet_s, variant=50)
    (root / "categories.txt").write_text("\n".join(folders))
    listed = opened("imagenet_s", imagenet_s, variant=50, categories="categories.txt")
    assert np.nansum(mask_of(listed)) == 64
    (root / "categories.txt").write_text("\n".join(folders[1:]))
    with pytest.raises(UsageError, match=r"categories.txt lists 49 classes"):
        opened("imagenet_s", imagenet_s, variant=50, categories="categories.txt")
    (root / "categories.txt").write_text("tench")
    with pytest.raises(UsageError, match="lists 'tench', which is not a class of ImageNet"):
        opened("imagenet_s", imagenet_s, variant=50, categories="categories.txt")
    with pytest.raises(UsageError, match=r"ImageNetS919, which is not there.*LUSSeg/ImageNet-S"):
        opened("imagenet_s", imagenet_s)


# --- ISIC -----------------------------------------------------------------------------------------


def isic_2019(root: Path, rows: str) -> None:
    header = "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
    root.mkdir(exist_ok=True)
    (root / "ISIC_2019_Training_GroundTruth.csv").write_text(header + rows)


@pytest.fixture
def isic(tmp_path: Path) -> Path:
    root = tmp_path / "isic"
    for year, folder in (
        (2018, "ISIC2018_Task3_Training_Input"), (2019, "ISIC_2019_Training_Input"), (2020, "train")
    ):  # fmt: skip
        picture(root / folder / "ISIC_1.jpg", year)
        picture(root / folder / "ISIC_2.jpg", year + 1)
    isic_2019(root, "ISIC_1,1.0,0,0,0,0,0,0,0,0\nISIC_2,0.0,0,0,0,0,0,0,1.0,0\n")
    table = root / "ISIC2018_Task3_Training_GroundTruth"
    table.mkdir()
    (table / f"{table.name}.csv").write_text(
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_1,0,0,0,1,0,0,0\nISIC_2,0,1,0,0,0,0,0\n"
    )
    (root / "ISIC_2020_Training_GroundTruth.csv").write_text(
        "image_name,patient_id,diagnosis,target\nISIC_1,IP_1,seborrheic keratosis,0\n"
        "ISIC_2,IP_2,melanoma,1\n"
    )
    return tmp_path


@pytest.mark.parametrize(("year", "expected"), [(2018, [0, 7]), (2019, [6, 4]), (2020, [2, 6])])
def test_isics_years_share_nine_classes(year: int, expected: list[int], isic: Path) -> None:
    source = opened("isic", isic, year=year)
    assert list(labels(source).values()) == expected
    assert len(source.classes) == 9
    assert source.classes[6] == "melanoma"


def test_isics_melanoma_is_a_class_against_all_others(isic: Path) -> None:
    source = opened("isic", isic, classes="melanoma")
    assert (list(labels(source).values()), source.classes) == ([0, 1], ("other", "melanoma"))


def test_isics_lesion_masks_are_optional_and_a_missing_one_is_unknown(isic: Path) -> None:
    lesion = np.zeros(SIZE)
    lesion[5:9, 5:9] = 255
    png(isic / "isic/lesions/ISIC_2_segmentation.png", lesion)
    source = opened("isic", isic, masks="lesions")
    assert np.isnan(mask_of(source, 0)).all()
    np.testing.assert_array_equal(mask_of(source, 1), lesion / 255)
    preset = make("datasets", "isic", {"preset": "gag-2024"}).open(isic)
    assert preset.size == (448, 448)
    assert not preset.has_masks


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("ISIC_1,1,0,0,0,0,0,0,1,0\n", "line 2 of .* has 2 diagnoses"),
        ("ISIC_1,0,0,0,0,0,0,0,0,0\n", "line 2 of .* has 0 diagnoses"),
        (",0,0,0,0,0,0,0,0,1\n", "line 2 of .* names no image"),
        ("ISIC_1,0,0\n", "line 2 of .* does not have 10 cells"),
        ("", "has no pictures"),
    ],
)
def test_a_wrong_table_names_the_line(rows: str, message: str, isic: Path) -> None:
    isic_2019(isic / "isic", rows)
    with pytest.raises(UsageError, match=message):
        opened("isic", isic, year=2019)


def test_isic_names_an_unknown_diagnosis_and_what_is_absent(isic: Path) -> None:
    table = isic / "isic/ISIC_2020_Training_GroundTruth.csv"
    table.write_text("image_name,diagnosis\nISIC_1,freckle\n")
    with pytest.raises(UsageError, match=r"line 2 of .* has the diagnosis 'freckle'"):
        opened("isic", isic)
    table.unlink()
    with pytest.raises(UsageError, match=r"2020_Training_GroundTruth.csv is not there"):
        opened("isic", isic)
    with pytest.raises(UsageError, match=r"folder .*isic/here, which is not there; 'images'"):
        opened("isic", isic, images="here")
    with pytest.raises(UsageError, match=r"challenge.isic-archive.com"):
        opened("isic", isic / "isic")


# --- Places365 ------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Path:
    root = tmp_path / "places365"
    for number in (1, 2):
        picture(root / "val_256" / f"Places365_val_{number:08d}.jpg", number, (256, 256))
    (root / "categories_places365.txt").write_text("/a/airfield 0\n/a/alley/dark 1\n")
    (root / "places365_val.txt").write_text(
        "Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n"
    )
    return tmp_path


def test_places_labels_stand_in_its_list(places: Path) -> None:
    source = opened("places365", places)
    assert list(labels(source).values()) == [1, 0]
    assert source.classes == ("airfield", "alley/dark")


def test_the_centre_of_a_small_place_is_cut_out_as_it_is(places: Path) -> None:
    preset = make("datasets", "places365", {"preset": "gag-2024"}).open(places)
    whole = loaded(opened("places365", places))
    for name, sample in loaded(preset).items():
        assert torch.equal(sample.image, whole[name].image[:, 16:240, 16:240])


def test_places_names_the_wrong_line_or_the_missing_file(places: Path) -> None:
    root = places / "places365"
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg 2\n")
    with pytest.raises(UsageError, match=r"line 1 of .*val.txt has the label '2', .* 0 to 1"):
        opened("places365", places)
    (root / "places365_val.txt").write_text("Places365_val_00000001.jpg\n")
    with pytest.raises(UsageError, match=r"line 1 of .*val.txt does not have 2 words"):
        opened("places365", places)
    (root / "places365_val.txt").unlink()
    with pytest.raises(UsageError, match=r"the list .*places365_val.txt is not there"):
        opened("places365", places)
    with pytest.raises(UsageError, match=r"pictures in .*val_large, which is not there"):
        opened("places365", places, small=False)
    (root / "categories_places365.txt").write_text("/a/airfield 1\n")
    with pytest.raises(UsageError, match="does not number its classes from 0 in order"):
        opened("places365", places)
    with pytest.raises(UsageError, match="'xbench fetch' can download it"):
        opened("places365", root)


# --- Oxford-IIIT Pet ------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "great_pyrenees_2"):
        picture(root / "images" / f"{name}.jpg")
        trimap = np.full(SIZE, 2)
        trimap[4:12, 4:12], trimap[6:10, 6:10] = 3, 1
        png(root / "annotations/trimaps" / f"{name}.png", trimap)
    (root / "annotations/test.txt").write_text(
        "# Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\ngreat_pyrenees_2 16 2 10\n"
    )
    return tmp_path


def test_a_trimaps_border_is_unknown(pets: Path) -> None:
    source = opened("oxford_pet", pets)
    assert labels(source) == {"Abyssinian_1.jpg": 0, "great_pyrenees_2.jpg": 15}
    assert (source.classes[0], source.classes[15]) == ("Abyssinian", "great_pyrenees")
    assert len(source.classes) == 37
    expected = np.zeros(SIZE)
    expected[4:12, 4:12], expected[6:10, 6:10] = np.nan, 1
    np.testing.assert_array_equal(mask_of(source), expected)


def test_pets_name_the_wrong_line(pets: Path) -> None:
    file = pets / "oxford-iiit-pet/annotations/test.txt"
    file.write_text("Abyssinian_1 38 1 1\n")
    with pytest.raises(UsageError, match=r"line 1 of .* has the class '38', which is not 1 to 37"):
        opened("oxford_pet", pets)
    file.write_text("Abyssinian_1 1 1 1\nbeagle_1 1 2 2\n")
    with pytest.raises(UsageError, match=r"line 2 of .* gives class 1 to 'beagle', an earlier one"):
        opened("oxford_pet", pets)
    with pytest.raises(UsageError, match=r"trainval.txt is not there"):
        opened("oxford_pet", pets, split="trainval")
    with pytest.raises(UsageError, match="'xbench fetch' can download it"):
        opened("oxford_pet", pets / "oxford-iiit-pet")


# --- CUB-200-2011 ---------------------------------------------------------------------------------


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    names = ("001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg")
    for name in names:
        picture(root / "images" / name)
    lists = {
        "images.txt": f"1 {names[0]}\n2 {names[1]}\n",
        "classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n",
        "image_class_labels.txt": "1 1\n2 2\n",
        "train_test_split.txt": "1 1\n2 0\n",
    }
    for name, text in lists.items():
        (root / name).write_text(text)
    return tmp_path


def test_birds_come_by_split_and_labels_count_from_0(birds: Path) -> None:
    test, train = opened("cub200", birds), opened("cub200", birds, split="train")
    assert labels(test) == {"002.Laysan_Albatross/b.jpg": 1}
    assert labels(train) == {"001.Black_footed_Albatross/a.jpg": 0}
    assert test.classes == ("Black footed Albatross", "Laysan Albatross")
    assert not test.has_masks


@pytest.mark.parametrize("home", ["CUB_200_2011/segmentations", "segmentations"])
def test_a_birds_mask_is_where_most_annotators_marked_it(home: str, birds: Path) -> None:
    votes = np.zeros(SIZE)
    votes[2:8, 2:8], votes[3:7, 3:7] = 102, 153
    png(birds / home / "002.Laysan_Albatross/b.png", votes)
    np.testing.assert_array_equal(mask_of(opened("cub200", birds)), votes == 153)


def test_lists_of_birds_must_agree(birds: Path) -> None:
    root = birds / "CUB_200_2011"
    (root / "image_class_labels.txt").write_text("1 1\n2 3\n")
    with pytest.raises(UsageError, match=r"picture 2 in .* has the class '3', which"):
        opened("cub200", birds)
    (root / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(UsageError, match="do not have the same pictures"):
        opened("cub200", birds)
    with pytest.raises(UsageError, match=r"data.caltech.edu"):
        opened("cub200", root)


def test_where_a_data_set_lies_is_no_part_of_what_scores_are_known_by(birds: Path) -> None:
    (birds / "CUB_200_2011").rename(birds / "moved")
    moved = make("datasets", "cub200", {"root": "moved"})
    assert identity(moved) == identity(make("datasets", "cub200"))
    assert moved.open(birds).key(0).startswith("002.Laysan_Albatross/b.jpg@")


# --- one broken picture never more ----------------------------------------------------------------


@pytest.mark.parametrize("damage", ["broken", "absent"])
def test_a_damaged_picture_is_a_failure_of_its_own(damage: str, pets: Path) -> None:
    file = pets / "oxford-iiit-pet/images/Abyssinian_1.jpg"
    file.unlink()
    if damage == "broken":
        file.write_bytes(b"\xff\xd8\xff no picture")
    source = opened("oxford_pet", pets)
    failed, other = source.load([0, 1])
    assert isinstance(failed, BadImage)
    assert "Abyssinian_1.jpg" in str(failed)
    assert isinstance(other, Sample)


def _wrong_size(values: Any) -> Any:
    return values[:-1]


def _stray_value(values: Any) -> Any:
    values[0, 0] = 4
    return values


def _all_border(values: Any) -> Any:
    values[values == 1] = 3
    return values


@pytest.mark.parametrize("change", [_wrong_size, _stray_value, _all_border, None])
def test_a_mask_that_is_missing_or_wrong_is_unknown_everywhere(change: Any, pets: Path) -> None:
    file = pets / "oxford-iiit-pet/annotations/trimaps/Abyssinian_1.png"
    values = np.array(Image.open(file))
    file.unlink()
    if change is not None:
        png(file, change(values))
    source = opened("oxford_pet", pets)
    assert np.isnan(mask_of(source, 0)).all()
    assert not np.isnan(mask_of(source, 1)).all()


# --- Hugging Face ---------------------------------------------------------------------------------


class _Table:
    """What xbench asks of a table of the library."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None) -> None:
        self.rows = rows
        self.features = {
            "image": types.SimpleNamespace(), "label": types.SimpleNamespace(names=names)
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]

    def cast_column(self, column: str, feature: Any) -> _Table:
        assert (column, feature) == ("image", "encoded")
        return self


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    content = picture(tmp_path / "a.jpg").read_bytes()
    rows = [
        {"image": {"bytes": content, "path": None}, "label": 1},
        {"image": {"bytes": None, "path": str(tmp_path / "a.jpg")}, "label": 0},
        {"image": None, "label": 0},
    ]
    asked: dict[str, Any] = {"table": _Table(rows, ["cat", "dog"])}

    def load_dataset(path: str, config: str | None, **options: Any) -> _Table:
        asked.update(path=path, config=config, **options)
        if path == "absent":
            raise FileNotFoundError("no such data set")
        table: _Table = asked["table"]
        return table

    def encoded(decode: bool) -> str:
        return "decoded" if decode else "encoded"

    library = types.SimpleNamespace(load_dataset=load_dataset, Image=encoded)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def test_a_name_after_the_slash_is_the_path_on_the_hub(hub: dict[str, Any]) -> None:
    source = opened("huggingface/org/animals", None, split="validation")
    assert (hub["path"], hub["split"], hub["revision"]) == ("org/animals", "validation", None)
    assert source.classes == ("cat", "dog")
    first, second, broken = source.load([0, 1, 2])
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert torch.equal(first.image, second.image)
    assert (first.label, second.label) == (1, 0)
    assert isinstance(broken, BadImage)
    assert source.key(0).startswith("000000000@")
    assert (
        identity(make("datasets", "huggingface/org/animals"))["name"] == "huggingface/org/animals"
    )


def test_the_hub_says_what_is_missing(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'huggingface/absent' cannot be loaded: FileNotFound"):
        opened("huggingface/absent", None)
    with pytest.raises(UsageError, match="has no column 'picture'; it has image, label"):
        opened("huggingface/animals", None, image_column="picture")
    hub["table"].rows[1]["label"] = "cat"
    with pytest.raises(UsageError, match=r"row 1 of .* has the label 'cat' in 'label'"):
        opened("huggingface/animals", None)
    assert opened("huggingface/animals", None, label_column=None).classes == ()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the library 'datasets' \(pip install datasets\)"):
        opened("huggingface/animals", None)


# --- real photographs -----------------------------------------------------------------------------

DATA = Path(os.environ.get("XBENCH_DATA", "data"))


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "imagenet").is_dir(), reason=f"no imagenet in {DATA}")
def test_real_photographs_have_the_labels_of_a_list_of_all_classes() -> None:
    by_list = make("datasets", "folder", {"root": "imagenet/val", "classes": "../classes.csv"})
    one, two = make("datasets", "imagenet").open(DATA), by_list.open(DATA)
    assert one.ids == two.ids
    assert one.labels == two.labels
    assert len(set(one.labels)) == 800
    assert one.classes == two.classes
