"""Small suites, plug-in files and commands that several tests share."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

import xbench
from xbench import registry
from xbench.document import Document
from xbench.suite import Suite, suite_as_written

PLUGIN = '''
"""A method, a metric, a model and a data set: small, fast and seeded."""

from typing import ClassVar

import torch
from torch import nn

import xbench
from xbench.noise import stream_keys, uniform


def network(classes, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        )


@xbench.model("plug/tiny")
class Tiny:
    """Two convolutions."""

    classes: int = 3
    seed: int = 0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def describe(self, data):
        return xbench.Network(
            build=lambda: network(self.classes, self.seed), weights=None, mean=self.mean,
            std=(0.25,) * 3, layers={},
        )


class Pictures:
    """Ids in one order or another; a picture is a function of its key."""

    classes = ("a", "b", "c")
    revision = "1"
    size = (16, 16)

    def __init__(self, count, shuffle, has_masks):
        names = [f"{at:03d}" for at in range(count)]
        self.numbers = list(range(count))
        # another prefix is another order of selection; keys stay
        self.ids = tuple(f"{shuffle}{name}" for name in names)
        self.has_masks = has_masks

    def key(self, index):
        return f"noise/{index}"

    def load(self, indices):
        found = []
        for index in indices:
            image = uniform(stream_keys(0, [self.key(index)], "picture"), 3 * 256).view(3, 16, 16)
            mask = torch.zeros(16, 16)
            mask[index % 8 : index % 8 + 6, 4:10] = 1
            found.append(xbench.Sample(image, index % 3, mask if self.has_masks else None))
        return found


@xbench.dataset("plug/noise")
class Noise:
    """Uniform noise with a square mask."""

    count: int = 64
    shuffle: str = ""
    masks: bool = True
    version: ClassVar[int] = 1

    def open(self, data):
        return Pictures(self.count, self.shuffle, self.masks)


@xbench.method("plug/ramp")
class Ramp:
    """Brightness times a slope; declares nothing, so its passes are unknown."""

    slope: float = 1.0

    def __call__(self, probe):
        return self.slope * probe.batch.images.mean(1)


@xbench.method("plug/two_gradients")
class TwoGradients:
    """Passes of its own, and declared."""

    needs: ClassVar[tuple] = ()

    def passes(self, model):
        return xbench.Passes(2, 2)

    def __call__(self, probe):
        once = probe.input_gradient(probe.inputs)
        return (once + probe.input_gradient(probe.inputs / 2)).abs().sum(1)


@xbench.metric("plug/brightness")
class Brightness:
    """Mean of the map."""

    better: ClassVar[str] = "higher"
    family: ClassVar[str] = "other"

    def __call__(self, explanation):
        return explanation.saliency.mean((1, 2))
'''

SABOTEURS = '''
"""Entries that fail in every way."""

import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import xbench


def good(probe):
    return probe.batch.images.mean(1)


@xbench.method("sabotage/raise")
class Raise:
    """Raises."""

    def __call__(self, probe):
        raise ValueError("the method's own words")


@xbench.method("sabotage/until")
class Until:
    """Raises as long as a file is there."""

    path: str

    def __call__(self, probe):
        if Path(self.path).exists():
            raise RuntimeError("the file is still there")
        return good(probe)


@xbench.method("sabotage/sys_exit")
class SysExit:
    """Calls sys.exit."""

    def __call__(self, probe):
        sys.exit(0)


@xbench.method("sabotage/os_exit")
class OsExit:
    """Ends its process without a word."""

    code: int = 0

    def __call__(self, probe):
        os._exit(self.code)


@xbench.method("sabotage/segfault")
class Segfault:
    """Dies as a decoder with a bug would."""

    def __call__(self, probe):
        os.kill(os.getpid(), signal.SIGSEGV)


@xbench.method("sabotage/shape")
class Shape:
    """One map for all."""

    def __call__(self, probe):
        return good(probe)[0]


@xbench.method("sabotage/nonfinite")
class Nonfinite:
    """One pixel of one image is not finite."""

    key: str
    value: str = "nan"

    def __call__(self, probe):
        maps = good(probe).clone()
        for at, key in enumerate(probe.batch.keys):
            if key == self.key:
                maps[at, 3, 5] = float(self.value)
        return maps


@xbench.method("sabotage/unsuitable")
class Unsuitable:
    """Cannot work here, and says so."""

    needs: ClassVar[tuple] = ()

    def __call__(self, probe):
        raise xbench.Unsupported("it wants another network")


@xbench.method("sabotage/global_state")
class GlobalState:
    """Changes what others rely on."""

    def __call__(self, probe):
        torch.manual_seed(7)
        maps = good(probe).clone()
        probe.batch.images.mul_(1.0)
        return maps


@xbench.metric("sabotage/metric_raise")
class MetricRaise:
    """Raises."""

    better: ClassVar[str] = "higher"

    def __call__(self, explanation):
        raise ValueError("the metric's own words")


@xbench.metric("sabotage/metric_shape")
class MetricShape:
    """One number for all."""

    better: ClassVar[str] = "higher"

    def __call__(self, explanation):
        return explanation.saliency.mean()


@xbench.metric("sabotage/metric_dies")
class MetricDies:
    """Ends its process."""

    better: ClassVar[str] = "higher"

    def __call__(self, explanation):
        os._exit(5)


class Broken:
    """Four pictures, of which one is none, or of which loading fails altogether."""

    ids = ("a", "b", "c", "d")
    classes = ()
    revision = "1"
    size = (16, 16)
    has_masks = False

    def __init__(self, how):
        self.how = how

    def key(self, index):
        return self.ids[index]

    def load(self, indices):
        if self.how == "raise":
            raise RuntimeError("the disk is gone")
        return [
            xbench.BadImage("it is no picture") if index == 2
            else xbench.Sample(torch.full((3, 16, 16), index / 4), -1)
            for index in indices
        ]


@xbench.dataset("sabotage/pictures")
class BrokenPictures:
    """Pictures that cannot all be read."""

    how: str = "one"

    def open(self, data):
        return Broken(self.how)


class WithNaN(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float("nan")))

    def forward(self, images):
        return images.mean((2, 3)) * self.weight


@xbench.model("sabotage/nan_weights")
class NaNWeights:
    """Weights that training has ruined."""

    def describe(self, data):
        return xbench.Network(WithNaN, None, (0.0,) * 3, (1.0,) * 3, {})


@xbench.model("sabotage/unseeded")
class Unseeded:
    """Other weights at each build."""

    def describe(self, data):
        return xbench.Network(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), None, (0.0,) * 3, (1.0,) * 3,
            {},
        )
'''

SMALL: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "datasets": [{"name": "plug/noise", "images": 10}],
    "models": ["plug/tiny"],
    "methods": ["gradient", "grad_cam", "random"],
    "metrics": ["average_drop", {"name": "deletion", "steps": 4}, "mae"],
    "run": {"batch_size": 4, "slice": 8, "workers": 1, "device": "cpu"},
}


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of ``plug/...``, loaded here too."""
    path = tmp_path_factory.mktemp("plugins") / "plug.py"
    path.write_text(PLUGIN)
    registry.load_plugin(str(path))
    return path


@pytest.fixture(scope="session")
def saboteurs(plugin: Path) -> Path:
    """The file of ``sabotage/...``, loaded here too."""
    path = plugin.with_name("saboteurs.py")
    path.write_text(SABOTEURS)
    registry.load_plugin(str(path))
    return path


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def run(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text()))

    @property
    def csv(self) -> bytes:
        return (self.folder / "table.csv").read_bytes()

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(
            self.folder / "table.csv",
            keep_default_na=False,
            dtype={"cell": str, "reason": str},
            na_values={key: [""] for key in ("mean", "std", "ci_low", "ci_high")},
        )

    @property
    def scores(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "per_image.parquet")

    @property
    def errors(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("errors/*")))

    def values(self) -> dict[tuple[str, str, str], float]:
        """Score by method, metric and image."""
        rows = self.scores
        keys = zip(rows["method"], rows["metric"], rows["image"], strict=True)
        return dict(zip(keys, rows["value"].tolist(), strict=True))


def last_run(out: Path) -> Path:
    """The run that ended last: two within a second have names in no order."""
    return max((out / "runs").iterdir(), key=lambda path: (path / "run.json").stat().st_mtime_ns)


def suite_file(path: Path, **changes: Any) -> Path:
    """A YAML file of SMALL with these keys replaced."""
    path.write_text(yaml.safe_dump(small(**changes)))
    return path


def small(**changes: Any) -> dict[str, Any]:
    """SMALL with these keys replaced; those of ``run`` one by one."""
    value = copy.deepcopy(SMALL)
    value["run"].update(changes.pop("run", {}))
    return value | changes


def suite_of(**changes: Any) -> Suite:
    """SMALL with these keys replaced, and no metric besides."""
    return suite_as_written(Document(small(**changes), "test", {}))


@pytest.fixture
def run(plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs SMALL with changes, in this process unless workers are asked for."""
    from xbench.run import run_suite

    def run_here(
        *,
        out: Path = tmp_path / "out",
        data: Path | None = None,
        plugins: Sequence[Path] = (),
        suite: Suite | None = None,
        fail_fast: bool = False,
        **changes: Any,
    ) -> Outcome:
        capsys.readouterr()
        status = run_suite(
            suite or suite_of(**changes),
            data=data,
            out=out,
            plugins=[str(path) for path in (plugin, *plugins)],
            fail_fast=fail_fast,
        )
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err, last_run(out))

    return run_here


@dataclass(frozen=True)
class Answer:
    """Of a command."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this user has fetched takes no part."""
    monkeypatch.setenv("XBENCH_HOME", "/nonexistent")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line in this process, with its exit status."""
    from xbench.cli import main

    def call(*words: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["xbench", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    return call


def environment(**more: str) -> dict[str, str]:
    """For processes in any folder: this xbench first on the path."""
    home = str(Path(xbench.__file__).parents[1])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("XBENCH_")}
    path = os.pathsep.join(filter(None, (more.pop("PYTHONPATH", ""), home)))
    return {**inherited, "PYTHONPATH": path, "COLUMNS": "200", **more}


def start(*words: object, folder: Path, **more: str) -> subprocess.Popen[str]:
    """``xbench WORDS`` as a process in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "xbench.cli", *map(str, words)],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> Answer:
    """The process' answer; a process that hangs is killed with its group."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hangs after {seconds} s:\n{out}\n{err}") from None
    return Answer(process.returncode, out, err)


def members(group: int) -> list[int]:
    """Processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As a run pins it: with more, a matrix product may be cut where an image's row begins.

    Small networks are faster with one, too.
    """
    torch.set_num_threads(1)


@pytest.fixture
def own_names() -> Iterator[None]:
    """Names that a test registers, or plug-ins that it breaks, are forgotten when it ends."""
    kept = {kind: registry.entries(kind) for kind in registry.KINDS}
    broken = dict(registry._broken)
    yield
    for kind, entries in kept.items():
        registry._entries[kind].clear()
        registry._entries[kind].update(entries)
    registry._broken.clear()
    registry._broken.update(broken)
