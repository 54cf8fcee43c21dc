"""Laws of reading YAML: every value has its place, and no text can harm."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import pytest

from xbench.document import MAX_ALIASES, MAX_BYTES, MAX_DEPTH, parse
from xbench.errors import SuiteError


def refusal(text: str) -> str:
    """The one sentence that a text is refused with."""
    with pytest.raises(SuiteError) as refused:
        parse(text, "suite.yaml")
    (sentence,) = refused.value.problems
    assert sentence.startswith("suite.yaml")
    assert "\n" not in sentence
    return sentence


def test_values_are_plain_and_have_their_lines() -> None:
    document = parse("name: a\nmethods:\n  - gradient\n  - {name: x, samples: 3}\n", "s.yaml")
    assert document.value == {"name": "a", "methods": ["gradient", {"name": "x", "samples": 3}]}
    assert document.place(("methods", 1, "samples")) == "s.yaml:4 (methods[1].samples)"
    assert document.place(("methods", 0)) == "s.yaml:3 (methods[0])"
    assert document.place(()) == "s.yaml:1"


def test_a_place_that_is_not_there_has_the_line_of_what_surrounds_it() -> None:
    document = parse("run:\n  slice: 3\n", "s.yaml")
    assert document.place(("run", "workers")) == "s.yaml:1 (run.workers)"


def test_an_empty_text_is_nothing() -> None:
    assert parse("", "s").value is None
    assert parse("# a comment\n", "s").value is None


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {a: 1, a: 2}\n"])
def test_a_key_that_occurs_twice_is_refused_with_its_place(text: str) -> None:
    assert "key 'a' occurs twice" in refusal(text)


def test_a_syntax_error_names_its_line() -> None:
    assert refusal("a: 1\nb: [1, 2\nc: 3\n").startswith("suite.yaml:3: not valid YAML")


def test_keys_are_words() -> None:
    for text in ("1: a\n? [a, b]\n: c\n", "<<: {a: 1}\n", "? {a: b}\n: c\n"):
        assert "keys must be plain words" in refusal(text)


def test_a_text_beyond_the_size_limit_is_refused_at_once() -> None:
    began = time.monotonic()
    assert "larger than 1 MiB" in refusal("#" * (MAX_BYTES + 1))
    assert time.monotonic() - began < 1


def test_depth_is_limited_before_anything_is_built() -> None:
    deep = MAX_DEPTH - 1
    assert parse("a: " + "[" * deep + "]" * deep, "s").value is not None
    assert "levels" in refusal("a: " + "[" * 50_000)
    assert "levels" in refusal("\n".join(" " * at + "a:" for at in range(100)))


def test_aliases_are_limited() -> None:
    assert "aliases" in refusal("a: &x 1\nb: [" + "*x, " * (MAX_ALIASES + 1) + "]\n")


def test_a_billion_laughs_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 11)]
    began = time.monotonic()
    assert "too many values" in refusal("\n".join(lines))
    assert time.monotonic() - began < 3


def test_an_alias_of_itself_is_refused() -> None:
    assert "too many values" in refusal("a: &x [*x]\n")
    assert "too many values" in refusal("a: &x {b: *x}\n")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['echo']",
        "!!python/name:os.system",
        "!unknown 3",
        "!!int abc",
        "!!bool maybe",
        "!!float x",
        "!!timestamp never",
        "2020-13-45",
        "9" * 5000,
        "!!binary '*'",
        "!!set 3",
        "!!omap 3",
        "\x00",
        "*nobody",
        '"\\xZZ"',
        "%",
        "@a",
        "{",
        "- : :\n -",
        "\ud800",
    ],
)
def test_what_no_suite_holds_is_refused_in_one_sentence(value: str) -> None:
    refusal(f"a: {value}\n")


def test_any_text_parses_or_is_refused() -> None:
    draw = random.Random(0)
    alphabet = "ab:- \n\t{}[]!&*|>'\"%@#?,\\0\x07é"
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randint(1, 40)))
        with suppress(SuiteError):
            parse(text, "s")


def test_the_slowest_text_within_the_limits_is_answered_soon() -> None:
    began = time.monotonic()
    with pytest.raises(SuiteError, match="too many values"):
        parse("- a\n" * (MAX_BYTES // 4), "s")
    assert time.monotonic() - began < 10
