"""Laws of the command line: one clear message, the right exit status, and no torch for help."""

from __future__ import annotations

import csv
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer, environment, finish, last_run, start, suite_file

from xbench.cli import VARIABLES, cli
from xbench.suite import FACTS, builtin_suites

Command = Callable[..., Answer]
METRICS = 3 + 1 + len(FACTS)
"""Of the suite: those that it names, the gain beside the drop, facts about maps."""


@pytest.fixture
def suite(plugin: Path, tmp_path: Path) -> Path:
    return suite_file(tmp_path / "small.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and no variables of the user's."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def problem(answer: Answer) -> str:
    """The message of an error: on standard error alone, without a traceback."""
    assert "Traceback" not in answer.err
    assert answer.out == ""
    return answer.err


# --- help -----------------------------------------------------------------------------------------


def test_help_answers_in_half_a_second_of_computing(tmp_path: Path) -> None:
    def computed() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def seconds() -> float:
        before = computed()
        subprocess.run(
            [sys.executable, "-m", "xbench.cli", "--help"],
            env=environment(), cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        return computed() - before

    assert min(seconds() for _ in range(5)) < 0.5


def test_help_and_the_package_import_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys, xbench, xbench.cli\n"
        "sys.argv = ['xbench', 'run', '--help']\n"
        "try:\n    xbench.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'pandas', 'matplotlib', 'pydantic', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Plan SUITE" in done.stdout


def test_every_command_explains_itself(command: Command) -> None:
    assert set(cli.commands) >= {"run", "plan", "table", "list", "info", "doctor"}
    for name in cli.commands:
        for flag in ("-h", "--help"):
            answer = command(name, flag)
            assert answer.status == 0
            assert answer.out.startswith("Usage: ")


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run", "--wrokers", "2"], "No such option"),
        (["run", "--images", "0"], "--images"),
        (["run", "--images", "many"], "--images"),
        (["run", "--target", "both"], "--target"),
        (["run", "quik"], "there is no suite 'quik'"),
        (["run", "--methods", "gradcam"], "did you mean 'grad_cam'"),
        (["run", "--add-method", "gradcam"], "unknown method 'gradcam'; did you mean 'grad_cam'"),
        (["run", "--set", "slice"], "write KEY=VALUE"),
        (["run", "--set", "run.slise=3"], "did you mean 'slice'"),
        (["run", "--set", "run.slice=[1"], "not valid YAML"),
        (["run", "--device", "gpu"], "--device: "),
        (["run", "--workers", "two"], "--workers: "),
        (["run", "--workers", "-1"], "--workers: "),
        (["run", "--batch-size", "0"], "--batch-size: "),
        (["run", "--data", "nowhere"], "data directory 'nowhere' does not exist"),
        (["run", "--plugin", "nothing.py"], "plug-in file 'nothing.py' does not exist"),
        (["run", "--plugin", "no.such.module"], "plug-in 'no.such.module' fails to import"),
        (["run", "--model", "shapes/resnet"], "--model belongs to --images-dir"),
        (["run", "--images-dir", "."], "--images-dir DIR takes --model NAME"),
        (["run", "--images-dir", "nowhere", "--model", "shapes/resnet"], "nowhere"),
        (["plan", "--set", "datasets.0.images=20000"], "has 10000 images, but 20000"),
        (["plan", "--set", "methods.0={name: grad_cam, layer: nine}"], "has no layer 'nine'"),
        (["table", "--format", "xml"], "--format"),
        (["list", "everything"], "everything"),
        (["info", "gradcam"], "nothing is registered as 'gradcam'; did you mean 'grad_cam'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_message_and_status_2(
    words: list[str], message: str, command: Command
) -> None:
    answer = command(*words)
    assert message in problem(answer)
    assert answer.status == 2
    assert not Path("results").exists()


def test_all_problems_of_a_suite_are_said_at_once_with_their_lines(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(
        "version: 1\nname: bad\ndatasets: [shapes]\nmodels: [shapes/resnte]\n"
        "methods: [gradient, {name: smooth_grad, sample: 3}]\nmetrics: [mea]\nrum: {}\n"
    )
    answer = command("run", "bad.yaml")
    lines = problem(answer).splitlines()
    assert answer.status == 2
    assert [line.split(" ")[:2] for line in lines] == [
        ["error:", "bad.yaml:7"], ["error:", "bad.yaml:4"], ["error:", "bad.yaml:5"],
        ["error:", "bad.yaml:6"],
    ]  # fmt: skip


def test_a_defect_is_one_sentence_and_its_traceback_only_when_asked_for(
    command: Command, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("xbench.run.run_suite", defect)
    answer = command("run", suite)
    assert answer.status == 1
    assert "unexpected ZeroDivisionError: a defect" in problem(answer)
    monkeypatch.setenv("XBENCH_DEBUG", "1")
    assert "Traceback" in command("run", suite).err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def broken(:\n", "fails to import: SyntaxError"),
        ("raise RuntimeError('its own words')\n", "RuntimeError: its own words"),
        ("import nonsense_that_is_not_there\n", "No module named 'nonsense_that_is_not_there'"),
        ("import sys\nsys.exit(0)\n", "fails to import: SystemExit"),
        (
            "import xbench\n@xbench.method('gradient')\nclass G:\n    '''x'''\n"
            "    def __call__(self, probe): ...\n",
            "method 'gradient' is provided twice, by xbench.methods.gradients and by",
        ),
        (
            "import xbench\n@xbench.method('a b')\nclass G:\n    '''x'''\n",
            "registers method 'a b'; names are",
        ),
    ],
)
def test_a_plug_in_file_that_is_broken_is_one_message_and_status_2(
    content: str, message: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    for _ in range(2):  # half a module must not pass for a whole one
        answer = command("run", "--plugin", path)
        assert message in problem(answer)
        assert answer.status == 2


# --- variables ------------------------------------------------------------------------------------


def test_an_unknown_variable_warns_and_a_known_one_does_not(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XBENCH_DATTA", "x")
    monkeypatch.setenv("XBENCH_DEBUG", "")
    answer = command("list", "suites")
    words = "warning: unknown environment variable XBENCH_DATTA; did you mean XBENCH_DATA?\n"
    assert answer.err == words
    assert answer.status == 0


def test_a_data_directory_that_is_not_there_is_refused_wherever_it_is_named(
    command: Command, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XBENCH_DATA", "nowhere")
    answer = command("run", suite)
    assert answer.status == 2
    assert "data directory 'nowhere' does not exist (--data or XBENCH_DATA)" in problem(answer)


def test_plug_ins_may_be_named_by_a_variable(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named.py").write_text(
        "import xbench\n@xbench.method('cli-test/named')\nclass Named:\n    '''By a variable.'''\n"
        "    def __call__(self, probe): ...\n"
    )
    monkeypatch.setenv("XBENCH_PLUGINS", str(tmp_path / "named.py"))
    assert "cli-test/named" in command("list", "methods").out
    monkeypatch.setenv("XBENCH_PLUGINS", f"{tmp_path / 'named.py'},nothing.py")
    answer = command("list", "methods")
    assert answer.status == 2
    assert "plug-in file 'nothing.py' does not exist" in problem(answer)


# --- run, plan, table -----------------------------------------------------------------------------


def test_a_run_prints_its_leaderboard_and_ends_with_0(command: Command, suite: Path) -> None:
    answer = command("run", suite, "-o", "out")
    assert answer.status == 0
    assert "grad_cam" in answer.out
    assert "forwards and" in answer.err
    assert command("run", suite, "-o", "out", "-q").err == ""


def test_a_run_as_json_is_the_table(command: Command, suite: Path) -> None:
    rows = json.loads(command("run", suite, "--json").out)
    assert len(rows) == 3 * METRICS
    assert {row["status"] for row in rows} == {"ok"}


def test_the_plan_says_what_the_run_then_does(command: Command, suite: Path) -> None:
    before = command("plan", suite).out
    assert not list(Path().glob("results/store/*"))
    assert "scores: 210 planned, 0 stored, 210 missing" in before
    assert "units of work: 2, of up to 8 images; forward shape 4 rows" in before
    command("run", suite)
    run = json.loads((last_run(Path("results")) / "run.json").read_text())
    passes = run["passes"]
    assert f"passes to run: {passes['forward']:,} forward + {passes['backward']:,}" in before
    per_image = f"{passes['forward'] // 10:,} forward + {passes['backward'] // 10:,} backward"
    (line,) = [line for line in before.splitlines() if "all together, per image" in line]
    assert line.endswith(per_image)
    after = command("plan", suite).out
    assert "scores: 210 planned, 210 stored, 0 missing" in after
    assert "passes to run: 0 forward + 0 backward" in after


def test_the_plan_of_the_rest_says_what_the_resumed_run_does(command: Command, suite: Path) -> None:
    command("run", suite, "--images", 3, "--methods", "gra*")
    said = command("plan", suite, "--batch-size", 32).out
    assert "forward shape 4 rows" in said
    command("run", suite)
    passes = json.loads((last_run(Path("results")) / "run.json").read_text())["passes"]
    assert f"passes to run: {passes['forward']:,} forward + {passes['backward']:,}" in said


def test_tables_come_from_what_is_stored_in_every_format(command: Command, suite: Path) -> None:
    nothing = command("table", suite)
    assert nothing.status == 5
    assert "nothing of suite 'small' is stored" in nothing.err
    ran = command("run", suite)
    assert command("table", suite).out == ran.out
    assert json.loads(command("table", suite, "--format", "json").out)[0]["dataset"] == "plug/noise"
    rows = list(csv.DictReader(io.StringIO(command("table", suite, "--format", "csv").out)))
    assert len(rows) == 3 * METRICS
    assert command("table", suite, "--format", "md").out.startswith("**plug/noise x plug/tiny")


def test_options_narrow_a_suite_and_add_to_it(command: Command, suite: Path) -> None:
    words = ["--methods", "grad*", "--methods", "sobel", "--metrics", "mae",
             "--add-method", "sobel", "--images", 3, "--seed", 4, "--target", "label",
             "--batch-size", 2, "--workers", 1, "--device", "cpu",
             "--set", "run.slice=2", "--set", "methods.1.label=CAM"]  # fmt: skip
    command("run", suite, *words)
    run = json.loads((last_run(Path("results")) / "run.json").read_text())["suite"]
    assert [entry["label"] for entry in run["methods"]] == ["gradient", "CAM", "sobel"]
    assert [entry["name"] for entry in run["metrics"]] == ["mae", *FACTS]
    assert (run["seed"], run["target"]) == (4, "label")
    assert run["run"] == {
        "images": 3, "device": "cpu", "batch_size": 2, "workers": 1, "slice": 2,
        "keep": [], "examples": 4, "save_maps": None, "offline": False,
    }  # fmt: skip


def test_fresh_sets_the_store_aside(command: Command, suite: Path) -> None:
    first = command("run", suite)
    fresh = command("run", suite, "--fresh")
    assert "what was stored is now in" in fresh.err
    assert "all stored" not in fresh.err
    assert fresh.out == first.out


def test_pictures_need_no_suite(command: Command, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for at in range(3):
        image = Image.effect_noise((70, 80), 40 + 20 * at).convert("RGB")
        image.save(tmp_path / "pictures" / f"{at}.png")
    words = ["--methods", "gradient", "--metrics", "average_drop", "--metrics", "mae",
             "--set", "datasets.0.resize=64", "--set", "datasets.0.crop=64"]  # fmt: skip
    answer = command("run", "--images-dir", "pictures", "--model", "shapes/resnet", *words)
    assert answer.status == 0, answer.err
    assert "pictures x shapes/resnet, 3 images, target predicted" in answer.out.replace("\n", " ")
    run = last_run(Path("results"))
    assert "skipped" in (run / "table.csv").read_text()


# --- what is installed ----------------------------------------------------------------------------

ACME = '''
from pathlib import Path

Path(__file__).with_name("imported").touch()

import xbench


@xbench.method("acme/mean")
class Mean:
    """Brightness."""

    def __call__(self, probe):
        return probe.batch.images.mean(1)


@xbench.metric("acme/largest")
class Largest:
    """The map's largest value."""

    better = "higher"

    def __call__(self, explanation):
        return explanation.saliency.amax((1, 2))
'''

POINTS = """
[xbench.methods]
acme/mean = acme_package:Mean
acme/broken = acme_broken:Nothing

[xbench.metrics]
acme/largest = acme_package:Largest
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages: one plug-in that works, one that does not."""
    site = tmp_path / "site"
    (site / "acme-1.0.dist-info").mkdir(parents=True)
    (site / "acme-1.0.dist-info" / "METADATA").write_text("Name: acme\nVersion: 1.0\n")
    (site / "acme-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    (site / "acme_package.py").write_text(ACME)
    (site / "acme_broken.py").write_text("raise ImportError('it lacks\\na library')\n")
    return site


def test_installed_plug_ins_run_in_workers_and_broken_ones_harm_nobody(
    site: Path, plugin: Path, tmp_path: Path
) -> None:
    """Listed, not imported until a suite names it; the broken one is a line of doctor."""
    canary = site / "imported"
    names = suite_file(tmp_path / "names.yaml", methods=["gradient", "acme/mean"],
                       metrics=["acme/largest", "mae"], run={"workers": 2})  # fmt: skip
    others = suite_file(tmp_path / "others.yaml")
    bad = suite_file(tmp_path / "bad.yaml", methods=["acme/broken", "gradient"])

    def call(*words: object) -> Answer:
        return finish(start(*words, folder=tmp_path, PYTHONPATH=str(site)))

    plain = call("plan", others, "--plugin", plugin)
    assert plain.status == 0, plain.err
    assert not canary.exists()

    refused = call("run", bad, "--plugin", plugin)
    assert refused.status == 2
    assert "bad.yaml" in refused.err
    assert (
        "plug-in acme (acme_broken:Nothing) provides method 'acme/broken' but fails to import"
        in (refused.err)
    )
    assert "Traceback" not in refused.err

    doctor = call("doctor")
    lines = [line for line in doctor.out.splitlines() if "acme_broken" in line]
    assert lines == ["PROBLEM: plug-in acme (acme_broken:Nothing): ImportError: it lacks a library"]
    assert doctor.status == 1
    listed = call("list", "plugins")
    assert "methods/acme/mean" in listed.out
    assert "broken: ImportError: it lacks a library" in listed.out

    canary.unlink()
    ran = call("run", names, "--plugin", plugin)
    assert ran.status == 0, ran.err
    assert canary.exists()
    assert "acme/mean" in ran.out


def test_every_built_in_suite_is_planned_or_says_what_it_lacks(command: Command) -> None:
    for name in builtin_suites():
        answer = command("plan", name)
        assert answer.status in (0, 2), name
        assert "Traceback" not in answer.err
        assert answer.status == 0 or answer.err.startswith("error: "), name
    assert command("plan", "quick").status == 0
