"""From a recipe's name or file to a validated Recipe: inheritance, overrides, messages with positions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from sparsekit import registry
from sparsekit.errors import RecipeReferenceError, RecipeSchemaError, RecipeSyntaxError
from sparsekit.recipe import catalog, problems
from sparsekit.recipe.joined import near
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.yaml_positions import Data, Mark, Node, check_text, parse, read_file, resolve

MAX_PARENTS = 3
SCHEMA_VERSION = 1
_OWN_KEYS = ("sparsekit", "extends", "name", "description")  # said by each file about itself, never inherited
_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _File:
    """A recipe file: where it is, how messages call it, the folder its parents must be in (None: shipped)."""

    path: Path
    shown: str
    root: Path | None


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    Args:
        name_or_path: Name of a shipped recipe, or path of a YAML file (it has a slash or ends in .yaml).
        overrides: `path.to.key=value` strings, applied after inheritance, later ones last; values are YAML.

    Raises:
        RecipeReferenceError: The recipe, a parent or an override's target does not exist or may not be used.
        RecipeSyntaxError: A file is not the YAML subset.
        RecipeSchemaError: Keys or values are wrong; all of them, one line each.
        PermissionRefused: A file may not be read.
    """
    tree = _chain(_locate(name_or_path))
    for override in overrides:
        tree = _override(tree, override)
    return _validate(tree)


def recipe_from(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as data; `source` names it in messages. Raises as `load_recipe`."""
    return _validate(_to_node(json.loads(json.dumps(data)), Mark(source)))


def merge(parent: Node, child: Node) -> Node:
    """Return `child` completed by `parent`: mappings merge deep, anything else of the child replaces."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return replace(child, value=merged)


def dump_yaml(resolved: Mapping[str, Any]) -> str:
    """Return resolved recipe data as YAML that loads back to the same data."""
    return yaml.dump(dict(resolved), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a YAML 1.2 reader would take for a number; PyYAML itself looks after YAML 1.1."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        ambiguous = resolve(text) != text
    except ValueError:
        ambiguous = True
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if ambiguous else None)


_Dumper.add_representer(str, _represent_text)


# --- finding files -----------------------------------------------------------------------------------------
def _locate(name_or_path: str) -> _File:
    if _is_shipped_name(name_or_path):
        return _shipped(name_or_path)
    path = Path(name_or_path)
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeReferenceError(f"not a usable path: {error}", where=name_or_path) from error
    return _File(path, name_or_path, None if catalog.trees().shown(resolved) else resolved.parent)


def _is_shipped_name(text: str) -> bool:
    return bool(_SHIPPED_NAME.fullmatch(text)) and not text.endswith((".yaml", ".yml"))


def _shipped(name: str, where: Mark | None = None) -> _File:
    files = catalog.shipped_files()
    if name in files:
        return _File(files[name], f"recipes/{name}.yaml", None)
    hint = f"For the file in this folder write ./{name}" if Path(name).is_file() else None
    if Path(f"{name}.yaml").is_file():
        hint = f"For the file in this folder write {name}.yaml"
    message = registry.unknown("recipe", name, files)
    raise RecipeReferenceError(message, where=str(where) if where else None, hint=hint)


def _parent(extends: Node, child: _File) -> _File:
    text = extends.value
    if not isinstance(text, str) or not text:
        raise RecipeSchemaError("extends: must be the name or path of one parent recipe", where=str(extends.mark))
    if _is_shipped_name(text):
        return _shipped(text, extends.mark)
    trees = catalog.trees()
    target = _absent_is_fine(child.path.parent / text)
    if (shown := trees.shown(target)) and target.is_file():
        return _File(target, shown, None)
    if child.root is not None and target.is_relative_to(child.root) and target.is_file():
        return _File(target, str(Path(child.shown).parent / text), child.root)
    if child.root is not None and text.startswith("configs/"):
        packaged = _absent_is_fine(trees.configs.parent / text)
        if (shown := trees.shown(packaged)) and packaged.is_file():
            return _File(packaged, shown, None)
    inside = bool(shown) if child.root is None else target.is_relative_to(child.root)
    if PurePosixPath(text).is_absolute() or not inside:
        allowed = "the shipped recipes and configs" if child.root is None else "the folder of the recipe"
        raise RecipeReferenceError(
            f"extends: {text!r} leaves {allowed}",
            where=str(extends.mark),
            hint="Extend a file beside or below the recipe, or a shipped recipe or configs/ file by name.",
        )
    raise RecipeReferenceError(f"extends: there is no file {text!r}" + _near_config(text), where=str(extends.mark))


def _absent_is_fine(path: Path) -> Path:
    return path.resolve(strict=False)


def _near_config(text: str) -> str:
    configs = catalog.trees().configs
    files = sorted(path.relative_to(configs) for path in configs.rglob("*.yaml"))
    names = [f"configs/{path.as_posix()}" for path in files if path.parent.name != "tasks"]  # those are lm-eval's
    known = [name for name in names if PurePosixPath(name).name == PurePosixPath(text).name]
    guess = known[0] if known else near(text.lstrip("./"), names)
    return f"; did you mean {guess!r}?" if guess else f"; shipped configs: {', '.join(names)}"


# --- inheritance and overrides -----------------------------------------------------------------------------
def _chain(file: _File) -> Node:
    """Read a recipe and its parents, and merge them."""
    tree = _read(file)
    seen = {file.path.resolve()}
    child, extends = file, tree.child("extends")
    while extends is not None:
        parent = _parent(extends, child)
        if parent.path.resolve() in seen:
            raise RecipeReferenceError(f"extends: {parent.shown} extends itself", where=str(extends.mark))
        if len(seen) > MAX_PARENTS:
            raise RecipeReferenceError(f"extends: more than {MAX_PARENTS} parents in a row", where=str(extends.mark))
        seen.add(parent.path.resolve())
        inherited = _read(parent)
        child, extends = parent, inherited.child("extends")
        tree = merge(_without(inherited, _OWN_KEYS), tree)
    return _without(tree, ("extends",))


def _read(file: _File) -> Node:
    node = read_file(file.path, file.shown)
    version = node.child("sparsekit")
    if version is None:
        raise RecipeSchemaError(
            f"missing key 'sparsekit' ({SCHEMA_VERSION})" + _misspelt_version(node), where=str(node.mark)
        )
    if version.value is not True and version.value == SCHEMA_VERSION and isinstance(version.value, int):
        return node
    newer = isinstance(version.value, int) and version.value > SCHEMA_VERSION
    raise RecipeSchemaError(
        f"sparsekit: must be {SCHEMA_VERSION}, the version of the recipe schema, got {version.value!r}",
        where=str(version.mark),
        hint="Upgrade sparsekit to read this recipe." if newer else None,
    )


def _misspelt_version(node: Node) -> str:
    keys = node.value if isinstance(node.value, dict) else {}
    guess = near("sparsekit", [key for key in keys if key not in Recipe.model_fields])
    return f"; line {keys[guess].mark.line} says {guess!r}" if guess else ""


def _without(node: Node, keys: Sequence[str]) -> Node:
    value = node.value if isinstance(node.value, dict) else {}
    return replace(node, value={key: child for key, child in value.items() if key not in keys})


def _override(tree: Node, override: str) -> Node:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise RecipeReferenceError(
            f"--set needs KEY=VALUE, got {override!r}", hint="For example: --set stages.0.sparsity=0.6"
        )
    mark = Mark(f"--set {path}")
    if path.split(".")[0] in ("extends", "sparsekit"):
        raise RecipeReferenceError(f"{path} cannot be overridden", where=str(mark), hint="Write a recipe file.")
    return _put(tree, path.split("."), [], _override_value(text.strip(), mark), mark)


def _override_value(text: str, mark: Mark) -> Node:
    """Read a value: YAML if it begins like a list, mapping or quoted text, else plain: *.txt is a glob."""
    try:
        if text.startswith(("[", "{", '"', "'")):
            value = parse(f"value: {text}".encode("utf-8", "surrogatepass"), str(mark)).child("value")
            return _to_node(value.data() if value else None, mark)
        check_text(text)
        return Node(resolve(text), mark)
    except (ValueError, RecipeSyntaxError) as error:
        problem = error.message if isinstance(error, RecipeSyntaxError) else str(error)
        raise RecipeSyntaxError(f"{text!r}: {problem}", where=str(mark)) from error


def _put(node: Node, steps: list[str], done: list[str], new: Node, mark: Mark) -> Node:
    if not steps:
        return replace(new, key=mark)
    step, rest = steps[0], steps[1:]
    here = ".".join(done)
    if isinstance(node.value, list):
        if not (step.isascii() and step.isdigit() and int(step[:9]) < len(node.value)):
            count = len(node.value)
            numbers = "it is empty" if not count else f"use 0{f' to {count - 1}' if count > 1 else ''}"
            raise RecipeReferenceError(f"{here} has no entry {step!r}; {numbers}", where=str(mark))
        items = list(node.value)
        items[int(step)] = _put(items[int(step)], rest, [*done, step], new, mark)
        return replace(node, value=items)
    if not isinstance(node.value, dict):
        raise RecipeReferenceError(f"{here} is {node.value!r}, which has no key {step!r}", where=str(mark))
    empty = Node({} if rest else None, mark, mark)
    child = _put(node.value.get(step, empty), rest, [*done, step], new, mark)
    return replace(node, value={**node.value, step: child})


def _to_node(data: Data, mark: Mark) -> Node:
    if isinstance(data, dict):
        return Node({key: replace(_to_node(value, mark), key=mark) for key, value in data.items()}, mark)
    if isinstance(data, list):
        return Node([_to_node(value, mark) for value in data], mark)
    return Node(data, mark)


# --- validation --------------------------------------------------------------------------------------------
def _validate(tree: Node) -> Recipe:
    try:
        return Recipe.model_validate_json(json.dumps(tree.data()))
    except ValidationError as error:
        problems.raise_all(problems.explain(error, tree))
        raise  # unreachable: a ValidationError has at least one problem
