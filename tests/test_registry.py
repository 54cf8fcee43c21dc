"""Laws of names and parameters: what a user mistypes is named, what plug-ins break stays theirs."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

import xbench
from xbench import info, registry
from xbench.errors import UsageError

pytestmark = pytest.mark.usefixtures("own_names")

METHOD = '''
import xbench

@xbench.method("{name}")
class Mine:
    """A plug-in."""

    strength: float = 1.0

    def __call__(self, probe):
        return self.strength * probe.inputs[:, 0]
'''

Install = Callable[..., None]


def run_python(script: str) -> None:
    environment = dict(os.environ, PYTHONPATH=str(Path(xbench.__file__).parents[1]))
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.fixture(autouse=True)
def forgotten_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("xbench_plugin_", "installed_")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends that a distribution is installed: modules by name, entry points by kind."""
    points: list[EntryPoint] = []

    def installed(modules: dict[str, str], **kinds: dict[str, str]) -> None:
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        for kind, named in kinds.items():
            points.extend(EntryPoint(n, value, f"xbench.{kind}") for n, value in named.items())
        monkeypatch.setattr(registry, "_scanned", set())

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [p for p in points if p.group == group]
    )
    return installed


# --- names ----------------------------------------------------------------------------------------


def test_a_wrong_name_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'smoothgrad'; did you mean 'smooth_grad"):
        registry.find("methods", "smoothgrad")


def test_a_name_like_no_other_points_to_the_list() -> None:
    with pytest.raises(UsageError, match=r"unknown metric 'zzz'.*'xbench list metrics' shows all"):
        registry.find("metrics", "zzz")


@pytest.mark.parametrize("name", ["", "a b", "/a", "a/", "a//b", "../a", "-a", "ä", "a\n", ".a"])
def test_names_are_segments_of_plain_characters(name: str) -> None:
    with pytest.raises(UsageError, match="slash-separated segments of letters"):
        registry.method(name)(type("Mine", (), {}))


@pytest.mark.parametrize("name", ["a", "library/Class", "cifar100/resnet18", "a.b-c_d/0"])
def test_a_name_may_have_segments(name: str) -> None:
    made = registry.method(name)(type("Mine", (), {"__doc__": "A method."}))
    assert registry.find("methods", name) is made


def test_entries_are_sorted_by_name() -> None:
    for kind in registry.KINDS:
        assert list(registry.entries(kind)) == sorted(registry.entries(kind))


def test_a_pattern_matches_as_in_a_shell() -> None:
    names = ["smooth_grad", "smooth_grad_squared", "grad_cam", "captum/DeepLift"]
    assert registry.matching(names, ["smooth*"]) == {"smooth_grad", "smooth_grad_squared"}
    assert registry.matching(names, ["*Lift", "grad_cam"]) == {"captum/DeepLift", "grad_cam"}


# --- parameters -----------------------------------------------------------------------------------


def test_an_unknown_parameter_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"'smooth_grad' has no parameter 'sample'.*'samples'\?"):
        registry.make("methods", "smooth_grad", {"sample": 3})


def test_a_parameter_of_an_entry_without_any_says_so() -> None:
    with pytest.raises(UsageError, match=r"method 'random' has no parameter 'x'; it has none"):
        registry.make("methods", "random", {"x": 1})


@pytest.mark.parametrize("value", [True, "20", 20.0, None, [20]])
def test_a_value_of_the_wrong_type_is_refused_not_converted(value: object) -> None:
    with pytest.raises(UsageError, match=r"'smooth_grad': samples = .*valid integer"):
        registry.make("methods", "smooth_grad", {"samples": value})


@pytest.mark.parametrize("value", [0, -1])
def test_a_value_out_of_range_names_the_value_and_the_bound(value: int) -> None:
    with pytest.raises(UsageError, match=rf"samples = {value}: input should be greater than or"):
        registry.make("methods", "smooth_grad", {"samples": value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"noise = (nan|inf): .*finite"):
        registry.make("methods", "smooth_grad", {"noise": value})


def test_an_unknown_choice_names_the_known_ones() -> None:
    with pytest.raises(
        UsageError,
        match=r"baseline = 'grey': .*'black', 'mean', 'white', 'blur', .* or 'blur_latec'",
    ):
        registry.make("metrics", "insertion", {"baseline": "grey"})


def test_a_missing_value_is_named() -> None:
    with pytest.raises(UsageError, match=r"model 'checkpoint' needs a value for 'weights'"):
        registry.make("models", "checkpoint", {"architecture": "resnet20"})


def test_all_problems_of_one_entry_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"samples = 0: .*; method 'smooth_grad' has no .*'x'"):
        registry.make("methods", "smooth_grad", {"samples": 0, "x": 1})


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"method 'smooth_grad' has no parameter 1"):
        registry.make("methods", "smooth_grad", {1: 2})  # type: ignore[dict-item]


def test_a_whole_number_stands_for_the_same_float() -> None:
    whole = registry.make("methods", "smooth_grad", {"noise": 1})
    assert registry.identity(whole) == registry.identity(
        registry.make("methods", "smooth_grad", {"noise": 1.0})
    )
    assert repr(registry.parameters(whole)["noise"]) == "1.0"


def test_an_entry_is_frozen() -> None:
    entry = registry.make("methods", "smooth_grad")
    with pytest.raises(AttributeError, match="samples"):
        entry.samples = 3


def test_a_default_out_of_its_own_range_is_refused() -> None:
    @registry.method("off")
    class Off:
        """Its author erred."""

        samples: Annotated[int, Field(ge=1)] = 0

    with pytest.raises(UsageError, match="samples = 0"):
        registry.make("methods", "off")


def test_lists_become_tuples_so_that_entries_can_be_hashed() -> None:
    colour = registry.make(
        "models", "checkpoint", {"architecture": "resnet20", "weights": "w", "mean": [0, 0, 0.5]}
    )
    assert colour.mean == (0, 0, 0.5)
    assert isinstance(hash(colour), int)


# --- labels and identities ------------------------------------------------------------------------


def test_a_label_shows_the_parameters_that_are_not_defaults() -> None:
    def label(**params: object) -> str:
        return registry.label(registry.make("methods", "smooth_grad", params))

    assert label() == label(samples=20) == "smooth_grad"
    assert label(samples=5) == "smooth_grad(samples=5)"
    assert label(samples=5, noise=0.1) == "smooth_grad(noise=0.1, samples=5)"


def test_a_label_hides_defaults_however_they_are_declared() -> None:
    @registry.method("ways")
    class Ways:
        """Three ways to give a field its default."""

        plain: int = 1
        field: int = Field(2, ge=1)
        factory: tuple[int, ...] = Field(default_factory=lambda: (3,))

    assert registry.label(registry.make("methods", "ways")) == "ways"
    assert registry.label(registry.make("methods", "ways", {"field": 3})) == "ways(field=3)"


def test_an_identity_holds_name_version_and_every_resolved_parameter() -> None:
    assert registry.identity(registry.make("methods", "var_grad", {"samples": 5})) == {
        "name": "var_grad",
        "version": 1,
        "params": {
            "channels": "absolute_sum",
            "noise": 0.15,
            "samples": 5,
            "noise_range": "image",
        },
    }


def test_an_identity_holds_the_version_that_a_class_declares() -> None:
    @registry.metric("versioned")
    class Versioned:
        """Changed its numbers twice."""

        version: ClassVar[int] = 3

    made = registry.make("metrics", "versioned")
    assert registry.identity(made) == {"name": "versioned", "version": 3, "params": {}}


def test_parameters_make_an_equal_entry_again() -> None:
    made = registry.make("methods", "guided_absolute_grad", {"percentile": 50})
    again = registry.make("methods", made.name, registry.parameters(made))
    assert again == made
    assert hash(again) == hash(made)


# --- plug-ins from a file -------------------------------------------------------------------------


def test_a_plug_in_file_adds_its_entries(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(METHOD.format(name="mine"))
    registry.load_plugin(str(file))
    assert registry.make("methods", "mine", {"strength": 2.0}).strength == 2.0
    assert registry.entries("methods")["mine"].origin == str(file)


def test_a_plug_in_file_may_be_loaded_twice(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(METHOD.format(name="mine"))
    registry.load_plugin(str(file))
    first = registry.find("methods", "mine")
    registry.load_plugin(str(file))
    assert registry.find("methods", "mine") is first


def test_a_plug_in_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"plug-in file '.*gone\.py' does not exist"):
        registry.load_plugin(str(tmp_path / "gone.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import there_is_no_such_module", "ModuleNotFoundError: No module named"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_broken_plug_in_file_is_an_error_that_names_the_cause(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    for _ in range(2):  # a half-made module must not pass for a loaded one the second time
        with pytest.raises(UsageError, match=rf"broken\.py' fails to import: {message}"):
            registry.load_plugin(str(file))


def test_a_plug_in_file_cannot_take_a_built_in_name(tmp_path: Path) -> None:
    file = tmp_path / "thief.py"
    file.write_text(METHOD.format(name="gradient"))
    built_in = registry.find("methods", "gradient")
    message = r"method 'gradient' is provided twice, by xbench\.methods\.gradients and by .*thief"
    with pytest.raises(UsageError, match=message):
        registry.load_plugin(str(file))
    assert registry.find("methods", "gradient") is built_in


def test_a_class_typed_at_a_prompt_can_be_registered_and_typed_again() -> None:
    script = METHOD.format(name="mine") * 2 + (
        "from xbench import registry\n"
        "assert registry.make('methods', 'mine').name == 'mine'\n"
        "assert registry.entries('methods')['mine'].origin == '__main__'\n"
    )
    run_python(script)


def test_two_files_with_one_name_are_both_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(METHOD.format(name="mine"))
    registry.load_plugin(str(tmp_path / "one.py"))
    with pytest.raises(UsageError, match=r"'mine' is provided twice, by .*one\.py and by .*two"):
        registry.load_plugin(str(tmp_path / "two.py"))


def test_one_file_cannot_use_a_name_for_two_classes(tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(METHOD.format(name="mine") + METHOD.format(name="mine").replace("Mine", "Two"))
    with pytest.raises(UsageError, match=r"method 'mine' is provided twice, by .*twice\.py"):
        registry.load_plugin(str(file))


def test_a_module_on_the_path_is_a_plug_in_too(install: Install) -> None:
    install({"installed_module": METHOD.format(name="mine")})
    registry.load_plugin("installed_module")
    assert "mine" in registry.entries("methods")


# --- installed plug-ins ---------------------------------------------------------------------------


def test_an_installed_plug_in_is_listed_without_being_imported(install: Install) -> None:
    install({"installed_mine": METHOD.format(name="mine")}, methods={"mine": "installed_mine:Mine"})
    assert "mine" in registry.entries("methods")
    assert "installed_mine" not in sys.modules


def test_an_installed_plug_in_is_imported_when_it_is_named(install: Install) -> None:
    install({"installed_mine": METHOD.format(name="mine")}, methods={"mine": "installed_mine:Mine"})
    made = registry.make("methods", "mine", {"strength": 2.0})
    assert made.strength == 2.0
    assert made.name == "mine"
    assert registry.find("methods", "mine") is type(made)
    assert registry.broken_plugins() == {}


def test_one_installed_module_may_provide_several_entries(install: Install) -> None:
    text = METHOD.format(name="mine") + METHOD.format(name="yours").replace("Mine", "Yours")
    named = {"mine": "installed_two:Mine", "yours": "installed_two:Yours"}
    install({"installed_two": text}, methods=named)
    for name in named:
        assert registry.make("methods", name).name == name
    assert registry.broken_plugins() == {}


def test_an_installed_module_may_be_named_as_a_plug_in_too(install: Install) -> None:
    install({"installed_mine": METHOD.format(name="mine")}, methods={"mine": "installed_mine:Mine"})
    registry.load_plugin("installed_mine")
    assert registry.make("methods", "mine").name == "mine"


def test_a_broken_installed_plug_in_is_an_error_only_when_it_is_named(install: Install) -> None:
    install({"installed_broken": "1 / 0"}, methods={"mine": "installed_broken:Mine"})
    assert "mine" in registry.entries("methods")
    assert registry.make("methods", "gradient").name == "gradient"
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"installed_broken:Mine.* 'mine' but fails to import: ZeroDivision"
        ):
            registry.make("methods", "mine")
    assert "mine" in registry.entries("methods")


def test_broken_plugins_are_listed_with_their_errors(install: Install) -> None:
    install(
        {"installed_broken": "1 / 0", "installed_mine": METHOD.format(name="good")},
        methods={"bad": "installed_broken:Mine", "good": "installed_mine:Mine"},
    )
    (error,) = registry.broken_plugins().values()
    assert error == "ZeroDivisionError: division by zero"


def test_an_installed_plug_in_without_decorator_is_refused_with_the_reason(
    install: Install,
) -> None:
    install({"installed_bare": "class Mine: pass"}, methods={"mine": "installed_bare:Mine"})
    with pytest.raises(UsageError, match=r"installed_bare:Mine.*@xbench\.method"):
        registry.make("methods", "mine")


def test_an_installed_plug_in_that_takes_a_built_in_name_breaks_that_name_alone(
    install: Install,
) -> None:
    install(
        {"installed_thief": METHOD.format(name="gradient")},
        methods={"gradient": "installed_thief:Mine"},
    )
    message = r"'gradient' is provided twice, by xbench\.methods\.gradients and by installed_thief"
    with pytest.raises(UsageError, match=message):
        registry.make("methods", "gradient")
    assert registry.make("methods", "grad_cam").name == "grad_cam"
    assert (
        "provided twice" in registry.broken_plugins()["installed_thief:Mine (installed_thief:Mine)"]
    )


def test_an_installed_plug_in_imported_by_hand_is_the_same_entry(install: Install) -> None:
    install({"installed_mine": METHOD.format(name="mine")}, methods={"mine": "installed_mine:Mine"})
    module = importlib.import_module("installed_mine")
    assert registry.find("methods", "mine") is module.Mine
    assert registry.broken_plugins() == {}


def test_two_distributions_with_one_name_are_both_named_and_neither_is_used(
    install: Install,
) -> None:
    text = METHOD.format(name="mine")
    install({"installed_one": text, "installed_two": text}, methods={"mine": "installed_one:Mine"})
    install({}, methods={"mine": "installed_two:Mine"})
    with pytest.raises(UsageError, match=r"provided twice, by installed_one.* and by installed_tw"):
        registry.make("methods", "mine")


def test_naming_entries_imports_no_torch_before_it_is_needed() -> None:
    run_python("import sys, xbench, xbench.registry; assert 'torch' not in sys.modules")


# --- presets and nested entries -------------------------------------------------------------------


@pytest.fixture
def with_presets(own_names: None) -> type:
    @registry.method("preset-test")
    class WithPresets:
        """A method with presets."""

        strength: float = 1.0
        steps: int = 3
        mode: Literal["plain", "odd"] = "plain"
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "paper-2024": {"strength": 2.0, "mode": "odd"},
            "one": {"steps": 5},
        }

    return WithPresets


def test_a_preset_stands_for_its_parameters_beneath_those_given(with_presets: type) -> None:
    found = registry.make("methods", "preset-test", {"preset": "paper-2024", "strength": 4.0})
    assert found == with_presets(strength=4.0, mode="odd")
    assert registry.identity(found)["params"] == {"strength": 4.0, "steps": 3, "mode": "odd"}


def test_a_label_names_the_preset_where_that_is_shorter(with_presets: type) -> None:
    assert (
        registry.label(with_presets(strength=2.0, mode="odd")) == "preset-test(preset=paper-2024)"
    )
    label = registry.label(with_presets(strength=2.0, steps=4, mode="odd"))
    assert label == "preset-test(preset=paper-2024, steps=4)"
    assert registry.label(with_presets(mode="odd")) == "preset-test(mode=odd)"
    assert registry.label(with_presets(steps=5)) == "preset-test(preset=one)"


@pytest.mark.parametrize(
    ("name", "preset", "words"),
    [
        ("preset-test", "paper-2042", "has no preset 'paper-2042'; did you mean 'paper-2024'"),
        ("sobel", "paper-2024", "has no preset 'paper-2024'; it has none"),
    ],
)
def test_an_unknown_preset_is_an_error(
    with_presets: type, name: str, preset: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        registry.make("methods", name, {"preset": preset})


def test_a_nested_entry_is_checked_kept_whole_and_part_of_the_identity() -> None:
    plain = registry.make("methods", "inverted", {"of": "smooth_grad"})
    given = {"of": {"name": "smooth_grad", "samples": 3}}
    changed = registry.make("methods", "inverted", given)
    assert registry.identity(plain) != registry.identity(changed)
    nested = registry.identity(changed)["params"]["of"]
    assert nested == registry.identity(registry.make("methods", "smooth_grad", {"samples": 3}))
    again = registry.make("methods", "inverted", {"of": changed.of.plain()})
    assert again == changed == pickle.loads(pickle.dumps(changed))
    for wrong, words in (
        ({"of": {"name": "smooth_grad", "sample": 3}}, "did you mean 'samples'"),
        ({"of": "smoth_grad"}, "did you mean 'smooth_grad'"),
        ({"of": 3}, "write the name of a method"),
        ({"of": {"samples": 3}}, "a mapping with a key 'name'"),
    ):
        with pytest.raises(UsageError, match=words):
            registry.make("methods", "inverted", wrong)


# --- classes that are made on first use -----------------------------------------------------------


def test_a_provided_class_is_made_when_it_is_named_and_not_when_it_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry._entries, "methods", dict(registry.entries("methods")))
    made = []

    def load() -> type:
        made.append(1)
        return registry.declared("there/Late", type("Late", (), {"__annotations__": {"size": int}}))

    registry.provide("methods", "there/Late", load, origin="there", summary="Late of there.")
    assert "there/Late         " in info.listing("methods")
    assert registry.broken_plugins() == {}
    assert not made
    assert registry.make("methods", "there/Late", {"size": 3}).size == 3
    with pytest.raises(UsageError, match="method 'there/Late' has no parameter 'sise'"):
        registry.make("methods", "there/Late", {"sise": 3})


def test_a_refused_name_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_refused", {})
    registry.refuse("methods", "there/Never", "explains nothing")
    with pytest.raises(UsageError, match="method 'there/Never' is not offered: it explains not"):
        registry.find("methods", "there/Never")
    assert registry.refusal("metrics", "there/Never") is None
