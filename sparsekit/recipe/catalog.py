"""Where the shipped recipes and configs are, what they are called, and their schema for editors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsekit import registry
from sparsekit.errors import RecipeReferenceError, RecipeSchemaError
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.stages import PARTS, STAGES, part_model, stage_model
from sparsekit.recipe.yaml_positions import read_file


@dataclass(frozen=True)
class RecipeInfo:
    """A shipped recipe."""

    name: str
    description: str
    path: Path


@dataclass(frozen=True)
class Trees:
    """The folders of shipped files."""

    recipes: Path
    configs: Path

    def shown(self, path: Path) -> str | None:
        """Return a path as messages show it (`recipes/wanda-50.yaml`); None if it is outside the trees."""
        for root in (self.recipes, self.configs):
            if path.is_relative_to(root):
                return f"{root.name}/{path.relative_to(root).as_posix()}"
        return None


@cache
def trees() -> Trees:
    """Return the shipped folders: of the installed package, else of the checkout it runs from.

    Raises:
        RecipeReferenceError: The installation lacks them.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_shipped", package.parent):
        if (root / "recipes").is_dir() and (root / "configs").is_dir():
            return Trees(root / "recipes", root / "configs")
    raise RecipeReferenceError(
        "the shipped recipes are missing from this installation",
        hint="Install sparsekit again: pip install sparsekit",
    )


def shipped_files() -> dict[str, Path]:
    """Return the shipped recipes by name, sorted; files are not read."""
    return {path.stem: path for path in sorted(trees().recipes.glob("*.yaml"))}


def shipped() -> list[RecipeInfo]:
    """Return the shipped recipes, sorted by name.

    Raises:
        RecipeSchemaError: One of them has no description.
    """
    found = []
    for name, path in shipped_files().items():
        shown = f"recipes/{path.name}"
        description = read_file(path, shown).child("description")
        if description is None or not isinstance(description.value, str):
            raise RecipeSchemaError("missing key 'description'", where=shown)
        found.append(RecipeInfo(name, description.value, path))
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipe files, for editors, with the options of every registered method."""
    schema = Recipe.model_json_schema(mode="validation")
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    parts = {room: _part_schema(definitions, room) for room in PARTS}
    stages = [
        _reference(definitions, stage_model(kind, name), name, **(parts if kind == "prune" else {}))
        for kind, (_, room) in STAGES.items()
        for name in registry.names(room)
    ]
    properties = schema["properties"]
    properties["stages"]["items"] = {"anyOf": stages}
    properties["extends"] = {
        "type": "string",
        "description": "a recipe or config whose keys this one completes and overrides",
    }
    schema["required"] = ["sparsekit", "name", "description"]
    schema["anyOf"] = [{"required": ["stages"]}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sparsekit recipe"}


def _part_schema(definitions: dict[str, Any], room: str) -> dict[str, Any]:
    """Return the schema of a stage's key that names a method: its name alone, or a mapping with options."""
    names = registry.names(room)
    mappings = [_reference(definitions, part_model(room, name), name) for name in names]
    absent = [] if room == "allocate" else [{"type": "null"}]
    return {"anyOf": [{"enum": list(names)}, *mappings, *absent], "description": registry.ROOMS[room][0]}


def _reference(definitions: dict[str, Any], model: Any, method: str, **replaced: Any) -> dict[str, str]:
    """Add the schema of a stage or allocation, its method fixed, to `definitions`; return a reference."""
    own = model.model_json_schema(mode="validation", ref_template="#/$defs/{model}")
    definitions.update(own.pop("$defs", {}))
    own["properties"].update(replaced, method={"const": method})
    if "pattern" in own["properties"]:  # an N:M pattern implies the sparsity
        own["required"] = [key for key in own["required"] if key != "sparsity"]
    definitions[model.__name__] = own
    return {"$ref": f"#/$defs/{model.__name__}"}
