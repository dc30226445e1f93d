"""What the schema refuses, said with position, accepted range and likely spelling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from sparsekit import registry
from sparsekit.errors import RecipeSchemaError
from sparsekit.recipe.joined import near
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.stages import PARTS, STAGES, part_model, stage_kind, stage_model
from sparsekit.recipe.yaml_positions import Data, Mark, Node

Path = tuple[str | int, ...]
_OWN_TEXT = frozenset({"recipe", "kind", "unknown_method"})
_TYPES = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    mark: Mark
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"

    @property
    def message(self) -> str:
        """The text with the path in front, unless the position is that path."""
        said = not self.path or self.mark.source == f"--set {self.path}"
        return self.text if said else f"{self.path}: {self.text}"


def raise_all(problems: list[Problem]) -> None:
    """Raise one RecipeSchemaError that names every problem, one line each, in the order of the files."""
    if not problems:
        return
    ordered = sorted(
        dict.fromkeys(problems),
        key=lambda item: (item.mark.source, item.mark.line or 0, item.mark.column or 0),
    )
    if len(ordered) == 1:
        raise RecipeSchemaError(ordered[0].message, where=str(ordered[0].mark))
    raise RecipeSchemaError("\n".join(str(problem) for problem in ordered))


def explain(error: ValidationError, root: Node) -> list[Problem]:
    """Return what is wrong with the recipe under `root`."""
    data = root.data()
    items = [(_real_path(item["loc"], item["type"], data), item) for item in error.errors(include_url=False)]
    unknown = [(path, item) for path, item in items if item["type"] == "extra_forbidden"]
    meant = {(path[:-1], near(str(path[-1]), _keys(path[:-1], data))) for path, _ in unknown}
    problems = []
    for path, item in items:
        if item["type"] == "missing":
            if (path[:-1], path[-1]) not in meant:  # a misspelt key is one mistake, not two
                problems.append(_missing(path, data, root))
        elif item["type"] == "too_short" and _at(path, data):
            pass  # pydantic does not count entries that were refused; they are reported themselves
        elif item["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, data, root))
        else:
            problems.append(_bad_value(path, item, data, root))
    return problems


def mark_at(root: Node, path: Path, *, key: bool = False) -> Mark:
    """Return where a path is written, or its nearest parent; `key` asks for the key instead of the value."""
    node = root
    for step in path:
        child = node.child(step)
        if child is None:
            return node.mark
        node = child
    return (key and node.key) or node.mark


def _missing(path: Path, data: Data, root: Node) -> Problem:
    accepted = accepts(_schema_at(path, data))
    return Problem(
        mark_at(root, path[:-1]),
        dotted(path[:-1]),
        f"missing key {path[-1]!r}" + (f" ({accepted})" if accepted else ""),
    )


def _unknown_key(path: Path, data: Data, root: Node) -> Problem:
    known = _keys(path[:-1], data)
    guess = near(str(path[-1]), known)
    advice = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}"
    return Problem(mark_at(root, path, key=True), dotted(path[:-1]), f"unknown key {path[-1]!r}; {advice}")


def _bad_value(path: Path, item: Any, data: Data, root: Node) -> Problem:
    mark = mark_at(root, path)
    accepted = accepts(schema := _schema_at(path, data))
    if item["type"] == "value_error":
        return Problem(mark, dotted(path), item["msg"].removeprefix("Value error, "))
    if item["type"] in _OWN_TEXT or not accepted:
        return Problem(mark, dotted(path), item["msg"])
    value = _at(path, data)
    guess = near(value, [str(choice) for choice in schema.get("enum", [])]) if isinstance(value, str) else None
    advice = f"; did you mean {guess!r}?" if guess else ""
    return Problem(mark, dotted(path), f"must be {accepted}, got {_shown(value)}{advice}")


def accepts(schema: dict[str, Any]) -> str:
    """Return in words what a JSON Schema accepts; empty if that cannot be said shortly."""
    if "anyOf" in schema:
        parts = [accepts(part) for part in schema["anyOf"]]
        return " or ".join(dict.fromkeys(parts)) if all(parts) else ""
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind in ("number", "integer"):
        return _TYPES[kind] + _range(schema)
    if kind == "string":
        if schema.get("pattern"):
            return str(schema.get("description", f"text that matches {schema['pattern']}"))
        return "text"
    if kind == "array":
        return f"a list{' of at least one entry' if schema.get('minItems') else ''}"
    if kind == "object":
        return "a mapping of keys to values"
    return _TYPES.get(str(kind), "")


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = [
        f"{word} {bound:g}" if bound < 1e15 else ""
        for word, bound in (("of at least", low), ("above", above), ("of at most", high), ("below", below))
        if bound is not None
    ]
    return "".join(f" {word}" if number == 0 else f" and {word}" for number, word in enumerate(filter(None, words)))


def dotted(path: Path) -> str:
    """Return a path as it is written in messages and in --set: `stages.0.sparsity`."""
    return ".".join(str(step) for step in path)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list" if value else "an empty list"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return json.dumps(value)


def _at(path: Path, data: Data) -> Any:
    here: Any = data
    for step in path:
        here = here[step]
    return here


def _real_path(location: tuple[str | int, ...], kind: str, data: Data) -> Path:
    """Cut a pydantic location to the part that exists in the data: unions add steps of their own."""
    here: Any = data
    for position, step in enumerate(location):
        exists = (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        )
        if not exists:
            return location if kind == "missing" and position == len(location) - 1 else location[:position]
        here = here[step]
    return location


def _keys(path: Path, data: Data) -> list[str]:
    keys = list(_schema_at(path, data).get("properties", ()))
    return [*keys, "extends"] if not path else keys


def _schema_at(path: Path, data: Data) -> dict[str, Any]:
    """Return the JSON Schema of what may stand at a path; empty if unknown."""
    root = schema = Recipe.model_json_schema()
    here: Any = data
    for position, step in enumerate(path):
        here = _step(here, step)
        if path[0] == "stages" and position == 1:
            root = schema = _stage_schema(here)
        elif path[0] == "stages" and position == 2 and step in PARTS:
            root = schema = _joined_schema(here, str(step))
        elif isinstance(step, int):
            schema = schema.get("items", {})
        else:
            schema = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or {}
        references = [part for part in schema.get("anyOf", ()) if "$ref" in part] if isinstance(schema, dict) else []
        schema = references[0] if len(references) == 1 else schema  # a section that may be left out
        while isinstance(schema, dict) and "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        if not isinstance(schema, dict):
            return {}
    return schema


def _step(here: Any, step: str | int) -> Any:
    if isinstance(here, dict):
        return here.get(step)
    return here[step] if isinstance(here, list) and isinstance(step, int) and step < len(here) else None


def _stage_schema(here: Any) -> dict[str, Any]:
    kind = stage_kind(here)
    base, room = STAGES[kind]
    method = here.get("method") if isinstance(here, dict) else None
    known = isinstance(method, str) and method in registry.names(room)
    return (stage_model(kind, str(method)) if known else base).model_json_schema()


def _joined_schema(here: Any, room: str) -> dict[str, Any]:
    base: type[BaseModel] = PARTS[room]
    default = base.model_fields["method"].get_default()
    method = here.get("method", default) if isinstance(here, dict) else None
    known = isinstance(method, str) and method in registry.names(room)
    return (part_model(room, str(method)) if known else base).model_json_schema()
