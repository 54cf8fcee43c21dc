"""Laws of suites: everything is resolved, or every problem is said, before anything is loaded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from conftest import small, suite_of

import xbench
from xbench import registry
from xbench.document import Document, parse
from xbench.errors import SuiteError, UsageError
from xbench.suite import FACTS, Suite, builtin_suites, canonical, load_suite, read_suite

pytestmark = pytest.mark.usefixtures("plugin")


@xbench.method("suite-test/lists")
class Lists:
    """Fields of each kind of list."""

    colour: tuple[float, float, float] = (0.0, 0.0, 0.0)
    size: int | tuple[int, int] | None = None
    share: float = 0.5
    version: ClassVar[int] = 1

    def __call__(self, probe: xbench.Probe) -> None:
        raise AssertionError


def labels(suite: Suite, kind: str = "methods") -> list[str]:
    return [choice.label for choice in getattr(suite, kind)]


def refusals(value: Any, settings: Sequence[tuple[str, Any]] = ()) -> tuple[str, ...]:
    given = [(key, setting, f"--set {key}") for key, setting in settings]
    with pytest.raises(SuiteError) as refused:
        load_suite(value if isinstance(value, Document) else Document(value, "s", {}), given)
    return refused.value.problems


def written(text: str) -> Document:
    return parse(text, "suite.yaml")


# --- what a suite becomes -------------------------------------------------------------------------


def test_every_built_in_suite_loads() -> None:
    assert "quick" in builtin_suites()
    for name in builtin_suites():
        assert load_suite(read_suite(name)).name == name


def test_quick_compares_both_embedded_networks_and_needs_no_data() -> None:
    suite = load_suite(read_suite("quick"))
    assert [choice.name for choice in suite.datasets] == ["shapes"]
    assert [choice.name for choice in suite.models] == [
        "shapes/resnet",
        "shapes/resnet_regularised",
    ]


def arms(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": "plug/tiny", "seed": at, "label": str(at), "arm": arm, "pair": pair}
        for at, (arm, pair) in enumerate(pairs)
    ]


def test_arm_and_pair_are_no_part_of_a_network_but_of_the_suite() -> None:
    suite = suite_of(models=arms(("a", 0), ("b", 0)))
    plain = suite_of(models=[{"name": "plug/tiny", "seed": 0, "label": "0"}])
    assert suite.models[0] == plain.models[0]
    assert suite.models[0].identity() == plain.models[0].identity()
    again = load_suite(Document(suite.resolved(), "s", {}))
    assert [choice.replicate for choice in again.models] == [c.replicate for c in suite.models]
    assert suite.models[1].replicate is not None
    assert suite.models[1].replicate.arm == "b"


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([("a", 0), ("a", 1)], "there is no arm but 'a'; an effect is that of one arm against"),
        ([("a", 0), ("b", 0), ("b", 1)], "arm 'b' has pairs 0, 1, but arm 'a' has 0; every pair"),
        ([("a", 0), ("b", 0), ("b", 0)], "arm 'b' has pair 0 more than once"),
        ([("a", -1), ("b", 0)], "pair: input should be greater than or equal to 0, but found -1"),
        ([("", 0), ("b", 0)], "arm is a name of 1 to 40 printable characters, but found ''"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(
    pairs: list[tuple[str, Any]], sentence: str
) -> None:
    (problem,) = refusals(small(models=arms(*pairs)))
    assert sentence in problem
    assert "models" in problem


def test_an_arm_without_a_pair_is_refused() -> None:
    (problem,) = refusals(small(models=[{"name": "plug/tiny", "arm": "a"}]))
    assert "'pair' is missing: 'arm' and 'pair' belong together" in problem


def test_a_name_alone_takes_every_default() -> None:
    suite = suite_of(methods=["var_grad"])
    assert dict(suite.methods[0].params) == {
        "channels": "absolute_sum",
        "noise": 0.15,
        "samples": 20,
        "noise_range": "image",
    }
    assert suite.methods[0].label == "var_grad"


def test_a_list_where_a_field_takes_one_value_is_a_grid() -> None:
    suite = suite_of(methods=[{"name": "smooth_grad", "samples": [2, 3], "noise": [0.1, 0.2]}])
    points = [(dict(c.params)["samples"], dict(c.params)["noise"]) for c in suite.methods]
    assert points == [(2, 0.1), (2, 0.2), (3, 0.1), (3, 0.2)]
    assert len(set(labels(suite))) == 4


def test_a_list_for_a_field_of_lists_is_one_value_and_a_list_of_lists_a_grid() -> None:
    one = suite_of(methods=[{"name": "suite-test/lists", "colour": [0.1, 0.2, 0.3]}])
    assert dict(one.methods[0].params)["colour"] == (0.1, 0.2, 0.3)
    grid = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    two = suite_of(methods=[{"name": "suite-test/lists", "colour": grid}])
    assert [dict(choice.params)["colour"] for choice in two.methods] == [tuple(x) for x in grid]


def test_a_list_is_one_value_where_a_field_takes_a_number_or_a_pair() -> None:
    suite = suite_of(methods=[{"name": "suite-test/lists", "size": [16, 24]}])
    assert [dict(choice.params)["size"] for choice in suite.methods] == [(16, 24)]
    suite = suite_of(methods=[{"name": "suite-test/lists", "size": 16}])
    assert [dict(choice.params)["size"] for choice in suite.methods] == [16]


def test_a_label_is_kept_and_parameters_make_one_otherwise() -> None:
    suite = suite_of(
        methods=[{"name": "gradient", "label": "G"}, {"name": "smooth_grad", "samples": 2}]
    )
    assert labels(suite) == ["G", "smooth_grad(samples=2)"]


def test_labels_must_differ() -> None:
    (twice,) = refusals(small(methods=["gradient", "gradient"]))
    assert "'gradient' is the same as 'gradient'" in twice
    (alias,) = refusals(small(methods=["gradient", {"name": "gradient", "label": "G"}]))
    assert "'G' is the same as 'gradient'" in alias
    (same,) = refusals(small(methods=["gradient", {"name": "random", "label": "gradient"}]))
    assert "'gradient' is the label of two entries" in same
    (grid,) = refusals(small(methods=[{"name": "smooth_grad", "samples": [2, 3], "label": "s"}]))
    assert "label 's' is given to a grid of 2 entries" in grid


@pytest.mark.parametrize("label", ["", "two\nlines", "\x1b[31mred", "a\u202eb", "x" * 200])
def test_a_label_is_one_short_printable_line(label: str) -> None:
    (problem,) = refusals(small(methods=[{"name": "gradient", "label": label}]))
    assert "methods[0].label" in problem


def test_images_of_the_run_are_those_of_every_data_set() -> None:
    suite = suite_of(datasets=[{"name": "plug/noise", "images": 3}], run={"images": 5})
    assert [choice.selection.images for choice in suite.datasets] == [5]


# --- what is refused ------------------------------------------------------------------------------


def test_all_problems_are_said_at_once_each_with_its_line() -> None:
    problems = refusals(
        written(
            "version: 1\n"
            "name: bad\n"
            "datasets: [shapes]\n"
            "models: [shapes/resnte]\n"
            "methods:\n"
            "  - gradcam\n"
            "  - {name: smooth_grad, sample: 3}\n"
            "  - {name: smooth_grad, samples: many, noise: -1.0}\n"
            "metrics:\n"
            "  - name: insertion\n"
            "    baseline: purple\n"
        )
    )
    assert len(problems) == 6
    text = "\n".join(problems)
    assert "suite.yaml:4 (models[0]): unknown model 'shapes/resnte'; did you mean" in text
    assert "suite.yaml:6 (methods[0]): unknown method 'gradcam'; did you mean 'grad_cam'" in text
    assert "suite.yaml:7 (methods[1].sample)" in text
    assert "has no parameter 'sample'; did you mean 'samples'?" in text
    assert "suite.yaml:8 (methods[2].samples)" in text
    assert "suite.yaml:8 (methods[2].noise)" in text
    assert "suite.yaml:11 (metrics[0].baseline)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metod": []}, "unknown key 'metod'; did you mean 'methods'?"),
        ({"run": {"worker": 2}}, "unknown key 'worker'; did you mean 'workers'?"),
        ({"exclude": [{"metrics": "x"}]}, "unknown key 'metrics'; did you mean 'metric'?"),
        ({"version": 2}, "(version)"),
        ({"version": True}, "(version)"),
        ({"name": "a b"}, "(name)"),
        ({"name": "../up"}, "(name)"),
        ({"seed": -1}, "(seed)"),
        ({"seed": "0"}, "(seed)"),
        ({"seed": 1.0}, "(seed)"),
        ({"seed": True}, "(seed)"),
        ({"target": "both"}, "(target)"),
        ({"methods": []}, "(methods)"),
        ({"methods": "gradient"}, "(methods)"),
        ({"methods": {"name": "gradient"}}, "(methods)"),
        ({"methods": [3]}, "write a name, or a mapping with a key 'name'"),
        ({"methods": [{"samples": 3}]}, "write a name, or a mapping with a key 'name'"),
        ({"methods": [None]}, "write a name"),
        ({"methods": [{"name": "gradient", "label": 3}]}, "label must be str"),
        ({"datasets": [{"name": "shapes", "images": 0}]}, "images: input should be"),
        ({"datasets": [{"name": "shapes", "images": True}]}, "images: input should be"),
        ({"datasets": [{"name": "shapes", "images": "8"}]}, "images: input should be"),
        ({"methods": [{"name": "smooth_grad", "samples": 2.0}]}, "samples"),
        ({"methods": [{"name": "smooth_grad", "samples": "2"}]}, "samples"),
        ({"methods": [{"name": "smooth_grad", "samples": True}]}, "samples"),
        ({"methods": [{"name": "smooth_grad", "samples": 0}]}, "samples"),
        ({"methods": [{"name": "smooth_grad", "noise": float("nan")}]}, "noise"),
        ({"methods": [{"name": "smooth_grad", "noise": float("inf")}]}, "noise"),
        ({"methods": [{"name": "smooth_grad", "samples": []}]}, "samples"),
        ({"methods": [{"name": "smooth_grad", "samples": {"a": 1}}]}, "samples"),
        ({"methods": [{"name": "gradient", "version": 3}]}, "has no parameter 'version'"),
        ({"methods": [{"name": "gradient", "kind": "methods"}]}, "has no parameter 'kind'"),
        ({"methods": [{"name": "os.system"}]}, "unknown method"),
        ({"models": [{"name": "checkpoint", "architecture": "w"}]}, "needs a value for 'weights'"),
        ({"run": {"device": "gpu"}}, "(run.device)"),
        ({"run": {"slice": 0}}, "(run.slice)"),
        ({"run": {"batch_size": "large"}}, "(run.batch_size)"),
        ({"run": {"workers": 1.5}}, "(run.workers)"),
    ],
)
def test_a_wrong_value_is_refused_at_its_place(change: dict[str, Any], words: str) -> None:
    problems = refusals(small(**change))
    assert any(words in problem for problem in problems), problems
    assert len(problems) == 1, problems


@pytest.mark.parametrize("value", [None, 3, [], "text", {}])
def test_what_is_no_suite_at_all_is_refused(value: Any) -> None:
    assert refusals(value)


def test_a_missing_key_is_named() -> None:
    value = small()
    del value["metrics"]
    assert refusals(value) == ("s: key 'metrics' is missing",)


def test_a_million_cells_are_too_many() -> None:
    grid = {"name": "smooth_grad", "samples": list(range(1, 1001)), "noise": [0.1, 0.2]}
    metrics = [{"name": "deletion", "steps": list(range(1, 1001))}]
    (problem,) = refusals(small(methods=[grid], metrics=metrics))
    assert "2,000,000 cells" in problem


def test_a_grid_of_a_billion_points_is_refused_at_once() -> None:
    share = [at / 1000 for at in range(1000)]
    grid = {"name": "suite-test/lists", "share": share, "size": [[1, at] for at in range(1000)],
            "colour": [[0.0, 0.0, x] for x in share]}  # fmt: skip
    problems = refusals(small(methods=[grid]))
    assert "1,000,000,000" in problems[0]


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one thing somewhere removed, doubled, replaced or renamed."""
    odd = [None, True, -1, 0, 3.5, float("nan"), "", "x", "gradient", [], {}, [[]], {"name": "x"},
           {"name": ["gradient"]}, {"name": None}, 10**30, "1e-3", b"x", [None],
           "é\x00"]  # fmt: skip
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        changed = dict(value)
        match draw.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice([key + "s", "name", "label", "images", ""])] = changed.pop(key)
            case _:
                changed[key] = mutated(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        changed_list = list(value)
        changed_list[at] = mutated(value[at], draw)
        return changed_list if draw.random() < 0.8 else changed_list * 2
    return copy.deepcopy(draw.choice(odd))


def test_five_hundred_mutated_suites_load_or_are_refused_and_nothing_else() -> None:
    draw = random.Random(0)
    whole = small(
        seed=0,
        target="label",
        exclude=[{"model": "vit*", "method": "grad_cam*"}],
        methods=["gradient", {"name": "smooth_grad", "samples": [2, 3], "noise": 0.1},
                 {"name": "suite-test/lists", "colour": [0.1, 0.2, 0.3], "label": "L"}],
    )  # fmt: skip
    refused = 0
    for _ in range(500):
        value = mutated(whole, draw)
        for _ in range(draw.randrange(3)):
            value = mutated(value, draw)
        try:
            load_suite(Document(value, "s", {}))
        except UsageError:
            refused += 1
    assert 300 < refused < 500


def test_mutated_texts_load_or_are_refused_and_nothing_else() -> None:
    draw = random.Random(1)
    text = yaml.safe_dump(small(methods=["gradient", {"name": "smooth_grad", "samples": [2, 3]}]))
    for _ in range(200):
        changed = list(text)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed))
            changed[at : at + draw.randint(0, 3)] = draw.choice(
                ["", ":", "-", "[", "{", "&a ", "*a", "!!bool ", "\n", "  ", "'", "0", "%", "\t"]
            )
        with suppress(UsageError):
            load_suite(parse("".join(changed), "s"))


# --- overriding, narrowing, writing ---------------------------------------------------------------


def test_settings_override_the_file_by_dotted_key() -> None:
    document = Document(small(), "s", {})
    settings = [("run.slice", 3), ("seed", 5), ("datasets.0.images", 7), ("methods.0.label", "G")]
    suite = load_suite(document, [(key, value, "--set") for key, value in settings])
    assert (suite.run.slice, suite.seed, suite.datasets[0].selection.images) == (3, 5, 7)
    assert labels(suite)[0] == "G"
    assert document.value == small()


@pytest.mark.parametrize("key", ["name.x", "methods.9.label", "methods.x", "methods.²", "name.a.b"])
def test_a_setting_without_a_place_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="there is no such place"):
        load_suite(Document(small(), "s", {}), [(key, 1, "--set")])


def test_a_misspelt_setting_is_refused_with_a_suggestion() -> None:
    (problem,) = refusals(small(), [("run.slise", 3)])
    assert "unknown key 'slise'; did you mean 'slice'?" in problem


def test_narrowing_keeps_what_a_pattern_matches_by_name_or_label() -> None:
    suite = suite_of(methods=["gradient", "grad_cam", {"name": "random", "label": "noise map"}])
    assert labels(suite.narrowed(methods=["grad*"])) == ["gradient", "grad_cam"]
    assert labels(suite.narrowed(methods=["noise*", "gradient"])) == ["gradient", "noise map"]
    assert labels(suite.narrowed(methods=["random"])) == ["noise map"]
    assert suite.narrowed(methods=[]) == suite


def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"--methods 'gradcam' matches .* did you mean 'grad_cam'"):
        suite_of().narrowed(methods=["gradient", "gradcam"])


def test_a_rule_of_exclude_leaves_out_what_matches_all_its_patterns() -> None:
    suite = suite_of(
        models=["plug/tiny", {"name": "plug/tiny", "seed": 1, "label": "other"}],
        exclude=[{"model": "other", "method": "grad*"}, {"metric": "mae"}],
    )
    (data,), (tiny, other) = suite.datasets, suite.models
    methods = {choice.name: choice for choice in suite.methods}
    metrics = {choice.name: choice for choice in suite.metrics}
    drop, mae = metrics["average_drop"], metrics["mae"]
    assert suite.excludes(data, other, methods["grad_cam"], drop)
    assert not suite.excludes(data, other, methods["random"], drop)
    assert not suite.excludes(data, tiny, methods["grad_cam"], drop)
    assert suite.excludes(data, tiny, methods["random"], mae)


# --- what belongs to a suite ----------------------------------------------------------------------


def loaded(*metrics: Any, **changes: Any) -> Suite:
    return load_suite(Document(small(metrics=list(metrics), **changes), "s", {}))


def test_a_drop_stands_beside_the_gain_under_equal_masks() -> None:
    suite = loaded({"name": "average_drop", "baseline": "blur", "mask": "matched"}, "mae")
    assert labels(suite, "metrics") == [
        "average_drop(baseline=blur, mask=matched)",
        "average_gain(baseline=blur, mask=matched)", "mae", *FACTS,
    ]  # fmt: skip
    drop, gain = suite.metrics[0].make(), suite.metrics[1].make()
    assert drop.needs == gain.needs
    assert suite.metrics[1].beside == suite.metrics[0].label
    assert not any(choice.beside for choice in suite.metrics if choice is not suite.metrics[1])


@pytest.mark.parametrize("name", ["average_drop", "average_increase"])
def test_every_preset_of_a_drop_or_an_increase_has_a_gain_of_equal_needs(name: str) -> None:
    """Also where logits are read, which have no gain: it reads the probability of the same rows."""
    presets = registry.find("metrics", name).presets
    for preset in presets:
        metric, gain, *facts = loaded({"name": name, "preset": preset}).metrics
        assert gain.name == "average_gain"
        assert metric.make().needs == gain.make().needs
        assert [fact.name for fact in facts] == [*FACTS]


def test_a_gain_of_the_suite_that_reads_the_same_masks_is_gain_enough() -> None:
    gain = {"name": "average_gain", "denominator": "confidence", "label": "AG/p"}
    assert labels(loaded(gain, "average_drop"), "metrics") == ["AG/p", "average_drop", *FACTS]
    other = {"name": "average_gain", "baseline": "blur", "label": "AG blur"}
    assert labels(loaded(other, "average_drop"), "metrics") == [
        "AG blur", "average_drop", "average_gain", *FACTS,
    ]  # fmt: skip


def test_one_gain_serves_all_that_read_its_masks() -> None:
    drops = [{"name": "average_drop", "drop": ["relative", "absolute"]}, "average_increase"]
    names = [choice.name for choice in loaded(*drops).metrics]
    assert names == ["average_drop", "average_gain", "average_drop", "average_increase", *FACTS]


def test_a_filter_keeps_the_gain_that_the_suite_has() -> None:
    gain = {"name": "average_gain", "denominator": "confidence", "label": "AG/p"}
    suite = loaded("mae", gain, "average_drop")
    narrow = suite.narrowed(metrics=["average_drop"])
    assert labels(narrow, "metrics") == ["average_drop", "AG/p", *FACTS]
    assert narrow.metrics[1].make() == suite.metrics[1].make()
    assert labels(suite.narrowed(metrics=["mae"]), "metrics") == ["mae", *FACTS]


def test_where_the_gain_is_excluded_so_is_the_drop() -> None:
    suite = loaded(
        "average_drop", "mae", methods=["gradient", "random"],
        exclude=[{"metric": "average_gain", "method": "random"}],
    )  # fmt: skip
    (data,), (model,) = suite.datasets, suite.models
    drop, gain, mae = suite.metrics[:3]
    gradient, random = suite.methods
    assert [suite.excludes(data, model, random, m) for m in (drop, gain, mae)] == [
        True, True, False,
    ]  # fmt: skip
    assert not any(suite.excludes(data, model, gradient, m) for m in (drop, gain, mae))


def test_facts_about_maps_belong_to_every_suite_once() -> None:
    assert labels(loaded("mae"), "metrics") == ["mae", *FACTS]
    own = {"name": "mean_mass", "sign": "positive"}
    assert [choice.name for choice in loaded(own, "mae").metrics] == [
        "mean_mass", "mae", "degenerate_maps", "tied_pixels",
    ]  # fmt: skip


def test_a_label_that_an_added_metric_has_is_refused() -> None:
    with pytest.raises(SuiteError, match=r"'average_gain' is the label of two metrics"):
        loaded("average_drop", {"name": "mae", "label": "average_gain"})


def test_what_was_resolved_is_a_suite_again_through_json_and_yaml() -> None:
    value = small(
        seed=3,
        target="label",
        models=[{"name": "plug/tiny", "mean": [0.1, 0.2, 0.3]}],
        methods=[{"name": "smooth_grad", "samples": [2, 3]}, "grad_cam",
                 {"name": "suite-test/lists", "size": [16, 24]}],
        exclude=[{"model": "vit*"}],
        run={"images": 5},
    )  # fmt: skip
    suite = load_suite(Document(value, "s", {}))
    assert load_suite(Document(suite.resolved(), "s", {})) == suite
    assert load_suite(Document(json.loads(canonical(suite.resolved())), "s", {})) == suite
    as_yaml = yaml.safe_dump(json.loads(canonical(suite.resolved())))
    assert load_suite(parse(as_yaml, "s")) == suite


def test_a_suite_of_nobody_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no suite 'quik'.*did you mean 'quick'"):
        read_suite("quik")
    with pytest.raises(UsageError, match="there is no suite"):
        read_suite("x" * 5000)
    with pytest.raises(UsageError, match="there is no suite"):
        read_suite(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_suite(str(tmp_path / "latin.yaml"))


def test_a_problem_of_two_parameters_together_stands_at_their_entry() -> None:
    methods = [{"name": "smooth_grad", "percentile": 50.0}]
    with pytest.raises(SuiteError, match=r"\(methods\[0\]\): method 'smooth_grad': percentile"):
        suite_of(methods=methods)
