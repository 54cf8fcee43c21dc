"""Laws of CIFAR-100: the right pixels and keys, and nothing a pickle asks for is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xbench.datasets.cifar import Cifar10, Cifar100
from xbench.errors import UsageError
from xbench.types import Sample

NAMES = [f"class_{label:02d}" for label in range(100)]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)


def table(**changes: Any) -> dict[str, Any]:
    return {
        "filenames": ["a.png", "b.png", "a.png", "c.png", "d.png"],
        "batch_label": "testing batch 1 of 1",
        "fine_labels": [3, 3, 99, 0, 0],
        "coarse_labels": [1, 1, 2, 0, 0],
        "data": PIXELS,
        **changes,
    }


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in table().items() if name != key}


def write(data: Path, content: Any, name: str = "test", protocol: int = 2) -> None:
    folder = data / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    dumped = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (folder / name).write_bytes(dumped)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, table())
    write(tmp_path, {"fine_label_names": NAMES, "coarse_label_names": NAMES[:20]}, "meta")
    return tmp_path


def test_images_labels_and_classes_are_the_files(data: Path) -> None:
    source = Cifar100().open(data)
    assert source.size == (32, 32)
    assert source.classes == tuple(NAMES)
    assert not source.has_masks
    for index, sample in zip([4, 0], source.load([4, 0]), strict=True):
        assert isinstance(sample, Sample)
        expected = torch.from_numpy(PIXELS[index]).reshape(3, 32, 32).float() / 255
        assert torch.equal(sample.image, expected)
        assert sample.label == table()["fine_labels"][index]
        assert sample.mask is None
    assert source.load([]) == []


def test_the_key_is_class_and_file_name(data: Path) -> None:
    source = Cifar100().open(data)
    expected = [f"class_{name}" for name in ("03/a.png", "03/b.png", "99/a.png", "00/c.png")]
    assert list(source.ids[:4]) == expected
    assert source.key(2) == source.ids[2] == "class_99/a.png"


def test_the_revision_follows_the_files_bytes(data: Path) -> None:
    before = Cifar100().open(data).revision
    assert Cifar100().open(data).revision == before
    assert len(before) == 12
    write(data, table(data=255 - PIXELS))
    assert Cifar100().open(data).revision != before


def test_a_file_that_is_not_the_official_one_is_accepted_with_a_notice(data: Path) -> None:
    notice = Cifar100().open(data).notice  # type: ignore[attr-defined]
    assert "is not the official file" in notice
    assert "f0ef6b0ae62326f3e7ffdfab6717acfc" in notice


def test_the_official_file_needs_no_notice(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notice = Cifar100().open(data).notice  # type: ignore[attr-defined]
    md5 = notice.split("its md5 is ")[1][:32]
    monkeypatch.setattr("xbench.datasets.cifar.MD5", {"cifar-100-python/test": md5})
    assert Cifar100().open(data).notice is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", range(5))
def test_every_protocol_that_numpy_writes_by_these_names_is_read(data: Path, protocol: int) -> None:
    write(data, table(), protocol=protocol)
    assert len(Cifar100().open(data).ids) == 5


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_pickles_of_old_and_new_numpy_are_read(data: Path, module: bytes) -> None:
    write(data, pickle.dumps(table(), 2).replace(b"numpy._core.multiarray", module))
    assert len(Cifar100().open(data).ids) == 5


def test_strings_of_python_2_are_read(data: Path) -> None:
    """The official files hold 8-bit strings, as text and as the array's bytes."""
    rows = b"".join(b"U\x05" + name.encode() for name in table()["filenames"])
    labels = b"".join(b"K" + bytes([label]) for label in table()["fine_labels"])
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x05M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + PIXELS.nbytes.to_bytes(4, "little")
        + PIXELS.tobytes()
        + b"tb"
    )
    write(
        data,
        b"\x80\x02}(U\x09filenames]("
        + rows
        + b"eU\x0bfine_labels]("
        + labels
        + b"eU\x04data"
        + array
        + b"u.",
    )
    source = Cifar100().open(data)
    sample = source.load([1])[0]
    assert isinstance(sample, Sample)
    assert torch.equal((sample.image.flatten() * 255).round(), torch.from_numpy(PIXELS[1]).float())


# ---- refused


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", ["test", "meta"])
def test_an_evil_pickle_is_refused_and_does_nothing(data: Path, where: str, protocol: int) -> None:
    canary = data / "canary"
    for evil in (
        Evil(os.system, f"touch {canary}"),
        Evil(eval, f"open({str(canary)!r}, 'w')"),
        Evil(Path.touch, canary),
        Evil(np.save, str(canary), 1),
        Evil(getattr, np.ndarray, "tofile"),
    ):
        write(data, table(extra=evil), where, protocol)
        with pytest.raises(UsageError, match=r"asks for [\w.]+, which is not part of an array"):
            Cifar100().open(data)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["ndarray.tofile", "ndarray.dump", "fromfile", "os.system"])
def test_no_attribute_of_an_allowed_name_is_reached(data: Path, name: str) -> None:
    write(data, b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name.encode() + b"\x93.")
    with pytest.raises(UsageError, match=f"asks for numpy.{name}"):
        Cifar100().open(data)


WRONG = {
    "empty": (b"", "cannot be read"),
    "cut": (pickle.dumps(table(), 2)[:5000], "cannot be read"),
    "text": (b"not a pickle", "cannot be read"),
    "deep": (b"\x80\x02" + b"(" * 10**6, "cannot be read"),
    "a list": ([1, 2], "holds a list"),
    "no data": (without("data"), "'data'"),
    "data as lists": (table(data=PIXELS.tolist()), "'data'"),
    "data as float": (table(data=PIXELS.astype(float)), "'data'"),
    "data as objects": (table(data=PIXELS.astype(object)), "'data'"),
    "data of 3071": (table(data=PIXELS[:, 1:]), "'data'"),
    "data in four axes": (table(data=PIXELS.reshape(5, 3, 32, 32)), "'data'"),
    "no labels": (without("fine_labels"), "'fine_labels'"),
    "label 100": (table(fine_labels=[0, 1, 2, 3, 100]), "numbers from 0 to 99"),
    "label -1": (table(fine_labels=[0, 1, 2, 3, -1]), "numbers from 0 to 99"),
    "label true": (table(fine_labels=[0, 1, 2, 3, True]), "numbers from 0 to 99"),
    "label text": (table(fine_labels=list("01234")), "numbers from 0 to 99"),
    "few labels": (table(fine_labels=[0, 1, 2, 3]), "as many"),
    "few names": (table(filenames=["a"]), "as many"),
    "names of bytes": (table(filenames=[b"a"] * 5), "as many"),
    "a name twice": (table(filenames=["a.png"] * 5), "twice in one class"),
    "no images": (
        pickle.dumps(table(data=PIXELS[:0], fine_labels=[], filenames=[]), 3),
        "as many",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_a_usage_error(data: Path, kind: str) -> None:
    content, message = WRONG[kind]
    write(data, content)
    with pytest.raises(UsageError, match=message):
        Cifar100().open(data)


@pytest.mark.parametrize("names", [None, NAMES[:99], NAMES[:99] + NAMES[:1], list(range(100))])
def test_wrong_class_names_are_a_usage_error(data: Path, names: Any) -> None:
    write(data, {"fine_label_names": names}, "meta")
    with pytest.raises(UsageError, match="does not hold 100 'fine_label_names'"):
        Cifar100().open(data)


def test_random_damage_is_read_or_a_usage_error(data: Path) -> None:
    original = pickle.dumps(table(), 2)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        content = bytearray(original)
        content[rng.integers(0, 400)] = rng.integers(0, 256)
        write(data, bytes(content))
        try:
            assert len(Cifar100().open(data).ids) == 5
        except UsageError:
            continue


def test_a_missing_file_names_path_and_remedy(data: Path) -> None:
    with pytest.raises(UsageError, match="cifar-100-python/train, which is not there; --data DIR"):
        Cifar100(split="train").open(data)
    with pytest.raises(UsageError, match="name it with --data DIR or XBENCH_DATA"):
        Cifar100().open(None)


def test_a_fifo_is_not_waited_for(data: Path) -> None:
    os.mkfifo(data / "cifar-100-python/train")
    with pytest.raises(UsageError, match="is not there"):
        Cifar100(split="train").open(data)


# ---- real images

DATA = Path(os.environ.get("XBENCH_DATA", "data"))


def cifar10(data: Path) -> Path:
    folder = data / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"kind_{label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    for number, name in enumerate(["test_batch", *(f"data_batch_{at}" for at in range(1, 6))]):
        rows = {
            "filenames": [f"{number}_{at}.png" for at in range(2)],
            "labels": [number, 9],
            "data": PIXELS[[number % 5, 4]],
        }
        (folder / name).write_bytes(pickle.dumps(rows, 2))
    return folder


def test_cifar_10_is_one_test_batch_or_five_training_batches(tmp_path: Path) -> None:
    folder = cifar10(tmp_path)
    test, train = Cifar10().open(tmp_path), Cifar10(split="train").open(tmp_path)
    assert test.ids == ("kind_0/0_0.png", "kind_9/0_1.png")
    assert len(train.ids) == 10
    assert [sample.label for sample in train.load(range(10))] == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]  # type: ignore[union-attr]
    [sample] = train.load([2])
    assert isinstance(sample, Sample)
    assert torch.equal(sample.image, torch.from_numpy(PIXELS[2]).reshape(3, 32, 32) / 255)
    assert train.notice.count("is not the official file") == 5  # type: ignore[attr-defined]
    (folder / "data_batch_3").unlink()
    with pytest.raises(UsageError, match=r"data set 'cifar10' looks for .*data_batch_3, which is"):
        Cifar10(split="train").open(tmp_path)
    assert Cifar10().open(tmp_path).revision == test.revision


def test_labels_are_known_without_loading(data: Path) -> None:
    source = Cifar100().open(data)
    loaded = [sample.label for sample in source.load(range(5)) if isinstance(sample, Sample)]
    assert loaded == list(source.labels)  # type: ignore[attr-defined]


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "cifar-100-python").is_dir(), reason=f"no CIFAR-100 in {DATA}")
def test_the_real_test_split_has_100_images_of_each_class() -> None:
    source = Cifar100().open(DATA)
    assert len(source.ids) == len(set(source.ids)) == 10_000
    names = [key.split("/")[0] for key in source.ids]
    assert {name: names.count(name) for name in source.classes} == dict.fromkeys(
        source.classes, 100
    )
