"""The nulls of a recipe: the same recipe without what should make it good."""

from __future__ import annotations

import json
from typing import Any

from sparsekit.recipe.schema import Null, PruneStage, Recipe

NULLS: dict[str, str] = {
    "uniform": "the same recipe with one sparsity for every matrix",
    "random": "the same recipe with random masks",
}
"""What each null is, in words."""


def null_recipe(recipe: Recipe, null: Null) -> Recipe | None:
    """Return the recipe that a gain is seen against; None where its stages are the recipe's own.

    `uniform`: every target of a stage at the stage's sparsity, with neither allocator nor overrides. `random`: masks
    of the pruner `random`; allocation, refiner and update stay.
    """
    raw = recipe.resolved()
    stages = [(_uniform if null == "uniform" else _random)(stage) for stage in raw["stages"]]
    if stages == raw["stages"]:
        return None
    evaluation = {**raw["evaluate"], "nulls": []}
    return Recipe.model_validate_json(json.dumps({**raw, "stages": stages, "evaluate": evaluation}))


def _uniform(stage: dict[str, Any]) -> dict[str, Any]:
    return {**stage, "allocate": {"method": "uniform"}, "overrides": {}}


def _random(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["method"] == "random":
        return stage
    return {key: value for key, value in stage.items() if key in PruneStage.model_fields} | {"method": "random"}
