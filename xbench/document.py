"""A YAML document with the place of every value, read without running anything.

Suites may come from strangers. Size, depth and aliases are limited before anything is built,
duplicate keys are refused (PyYAML keeps the last in silence), and every parser error becomes one
sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import SuiteError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_NODES = 100_000

_TAGS: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.ScalarNode: ("null", "bool", "int", "float", "timestamp", "str"),
    yaml.SequenceNode: ("seq",),
    yaml.MappingNode: ("map",),
}

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed document.

    Args:
        value: plain dicts, lists and scalars.
        source: file name, for messages.
        lines: line number, from 1, by path of keys and positions.
        given: what set a value from outside, such as "--batch-size", by path.
    """

    value: Any
    source: str
    lines: dict[Path, int]
    given: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """``suite.yaml:12 (methods[2].samples)``, of the nearest part that has a line."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.given:
                return self.given[path[:length]]
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        words = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        line = f":{self.lines[known]}" if known in self.lines else ""
        return f"{self.source}{line}" + (f" ({words.lstrip('.')})" if words else "")


def parse(text: str, source: str) -> Document:
    """The document in a text.

    Raises:
        SuiteError: if it is not YAML, too large, too deep, or has a key twice.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise SuiteError([f"{source} is larger than {MAX_BYTES >> 20} MiB, the limit for a suite"])
    try:
        _limit(text, source)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            document = Document(None, source, {})
            value = _Builder(loader, document).build(root, ()) if root is not None else None
            return Document(value, source, document.lines)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SuiteError([f"{source}{line}: not valid YAML: {reason}"]) from None
    except SuiteError:
        raise
    except Exception as error:  # such as an integer of 5,000 digits, or !!bool on another word
        raise SuiteError([f"{source}: a value cannot be read: {error}"]) from None


def _limit(text: str, source: str) -> None:
    depth = aliases = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > 2 * MAX_NODES:
            raise SuiteError([f"{source}: it holds too many values"])
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > MAX_DEPTH or aliases > MAX_ALIASES:
            raise SuiteError(
                [
                    f"{source}: more than {MAX_DEPTH} levels or {MAX_ALIASES} aliases; "
                    "a suite needs neither"
                ]
            )


class _Builder:
    def __init__(self, loader: yaml.SafeLoader, document: Document) -> None:
        self.loader, self.document, self.nodes = loader, document, 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise SuiteError([f"{self.document.source}: its aliases expand to too many values"])
        self.document.lines[path] = node.start_mark.line + 1
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS[type(node)]:
            raise SuiteError([f"{self.document.place(path)}: a suite has no tag {node.tag!r}"])
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, at)) for at, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return self.loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key == "<<":
                raise SuiteError([f"{self.document.place(path)}: keys must be plain words"])
            if key in found:
                self.document.lines[(*path, key)] = key_node.start_mark.line + 1
                raise SuiteError([f"{self.document.place((*path, key))}: key {key!r} occurs twice"])
            found[key] = self.build(value_node, (*path, key))
            self.document.lines[(*path, key)] = key_node.start_mark.line + 1
        return found
