"""YAML as data, with a line and column for every key and value.

Recipes are written in a subset of YAML: mappings with text keys, lists, and plain values. Refused, each with
its position: tags, anchors and aliases, duplicate keys, several documents, NaN and infinity, text that is not
UTF-8, files over 256 KiB and nesting deeper than 16. Plain values follow YAML 1.2, so `2:4`, `no` and `1e-3`
are text, text and a number (YAML 1.1 reads 124, false and a text).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from sparsekit.errors import PermissionRefused, RecipeReferenceError, RecipeSyntaxError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

Scalar = str | int | float | bool | None
Data = Scalar | list["Data"] | dict[str, "Data"]


@dataclass(frozen=True)
class Mark:
    """Where something is written: a file position, or the override it came from."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Node:
    """A value and where it is written; `keys` holds the positions of a mapping's keys."""

    value: Scalar | list[Node] | dict[str, Node]
    mark: Mark
    key: Mark | None = None

    def data(self) -> Data:
        """Return the plain value without positions."""
        if isinstance(self.value, dict):
            return {key: node.data() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.data() for node in self.value]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """Return the node under a key or index, None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(step))
        if isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            return self.value[step]
        return None


def read_file(path: Path, shown: str | None = None) -> Node:
    """Read a YAML file.

    Args:
        path: The file.
        shown: Name of the file in messages; default: the path as given.

    Returns:
        The root node.

    Raises:
        RecipeReferenceError: No such file, or not a file.
        RecipeSyntaxError: Not the YAML subset.
        PermissionRefused: The file may not be read.
    """
    shown = shown or str(path)
    try:
        if path.exists() and not path.is_file():
            raise RecipeReferenceError("is not a regular file", where=shown, hint="Name a recipe or a YAML file.")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except PermissionError as error:
        raise PermissionRefused("may not be read", where=shown, hint="Check its permissions.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeReferenceError(
            f"cannot be read: {reason}",
            where=shown,
            hint="See `sparsekit recipes list` for those that are shipped.",
        ) from error
    return parse(content, shown)


def parse(content: bytes, source: str) -> Node:
    """Read YAML bytes; `source` names them in messages.

    Raises:
        RecipeSyntaxError: Not the YAML subset; the message starts with `source:line:column`.
    """
    if len(content) > MAX_BYTES:
        raise RecipeSyntaxError(f"more than {MAX_BYTES // 1024} KiB; a recipe is a short text", where=source)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise RecipeSyntaxError(
            f"byte 0x{content[error.start]:02x} is not UTF-8",
            where=str(Mark(source, line, column)),
            hint="Save the file as UTF-8.",
        ) from error
    return _compose(text, source)


def resolve(text: str) -> Scalar:
    """Return the value of a plain (unquoted) scalar by the YAML 1.2 core rules.

    Raises:
        ValueError: NaN, infinity, or a number no computer holds.
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _INTEGER.fullmatch(text):
        if len(text) > 19:
            raise ValueError(f"the number {text[:12]}... is too large")
        return int(text)
    if _FLOAT.fullmatch(text):
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return number
    return text


def check_text(text: str) -> None:
    """Raise ValueError if a text holds a character that no name or path needs."""
    if found := _UNPRINTABLE.search(text):
        raise ValueError(f"character {found[0]!a} is not allowed")


def _compose(text: str, source: str) -> Node:
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        return _document(_Events(events, source))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise RecipeSyntaxError(
            f"character {chr(error.character)!a} is not allowed", where=str(Mark(source, line, column))
        ) from error
    except yaml.MarkedYAMLError as error:
        raise _scan_error(error, source) from error


def _scan_error(error: yaml.MarkedYAMLError, source: str) -> RecipeSyntaxError:
    mark = error.problem_mark or error.context_mark
    where = str(Mark(source, mark.line + 1, mark.column + 1)) if mark else source
    problem = " ".join(str(error.problem or error.context).split())
    hint = None
    if "'\\t'" in problem:
        hint = "Indent with spaces, not tabs."
    elif error.context and ("alias" in error.context or "anchor" in error.context):
        problem, hint = "anchors and aliases are not allowed", "Put text that begins with * or & in quotes."
    elif "mapping values are not allowed" in problem:
        problem, hint = "unexpected ':'", "Check the indentation, or put text that contains ': ' in quotes."
    return RecipeSyntaxError(problem, where=where, hint=hint)


class _Events:
    """PyYAML's event stream, with the features recipes do not have refused on the way."""

    def __init__(self, events: Iterator[Event], source: str) -> None:
        self._events = events
        self._source = source

    def mark(self, event: Event) -> Mark:
        start = event.start_mark
        assert start is not None  # noqa: S101  (PyYAML gives every event a position)
        return Mark(self._source, start.line + 1, start.column + 1)

    def fail(self, event: Event, problem: str, hint: str | None = None) -> RecipeSyntaxError:
        return RecipeSyntaxError(problem, where=str(self.mark(event)), hint=hint)

    def next(self) -> Event:
        event = next(self._events)
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
            raise self.fail(event, "anchors and aliases are not allowed", "Put text that begins with * or & in quotes.")
        if tag := getattr(event, "tag", None):
            raise self.fail(
                event,
                f"tag {tag!r} is not allowed: recipes are data",
                "Put text that begins with ! in quotes.",
            )
        return event


def _document(events: _Events) -> Node:
    event = events.next()
    while isinstance(event, StreamStartEvent):
        event = events.next()
    if isinstance(event, StreamEndEvent):
        raise events.fail(event, "the file is empty", "Begin with: sparsekit: 1")
    if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
        raise events.fail(event, "YAML directives are not allowed", "Remove the line that begins with %.")
    node = _node(events, events.next(), 0)
    events.next()  # end of the document
    if not isinstance(extra := events.next(), StreamEndEvent):
        raise events.fail(extra, "a second document begins here; a recipe is one", "Remove it and the --- line.")
    if not isinstance(node.value, dict):
        raise RecipeSyntaxError("a recipe is a mapping of keys to values", where=str(node.mark))
    return node


def _node(events: _Events, event: Event, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise events.fail(event, f"nested deeper than {MAX_DEPTH} levels")
    mark = events.mark(event)
    if isinstance(event, MappingStartEvent):
        return Node(_mapping(events, depth), mark)
    if isinstance(event, SequenceStartEvent):
        items: list[Node] = []
        while not isinstance(item := events.next(), SequenceEndEvent):
            items.append(_node(events, item, depth + 1))
        return Node(items, mark)
    return Node(_scalar(events, event), mark)


def _mapping(events: _Events, depth: int) -> dict[str, Node]:
    found: dict[str, Node] = {}
    while not isinstance(event := events.next(), MappingEndEvent):
        if not isinstance(event, ScalarEvent) or not isinstance(key := _scalar(events, event), str):
            raise events.fail(event, "a key must be text", "Put it in quotes.")
        mark = events.mark(event)
        if key in found:
            first = found[key].key
            raise events.fail(event, f"key {key!r} appears twice; first on line {first.line if first else '?'}")
        found[key] = replace(_node(events, events.next(), depth + 1), key=mark)
    return found


def _scalar(events: _Events, event: Event) -> Scalar:
    assert isinstance(event, ScalarEvent)  # noqa: S101  (the only node left after aliases are refused)
    text: str = event.value
    try:
        check_text(text)
        return resolve(text) if event.style is None else text
    except ValueError as error:
        raise events.fail(event, str(error)) from error
