"""The nulls of a recipe: the same recipe without what should make it good."""

from __future__ import annotations

import json
from typing import Any

from sparsekit import registry
from sparsekit.recipe.schema import Null, Recipe
from sparsekit.recipe.stages import ActivationStage, PruneStage, ReshapeStage, Stage

NULLS: dict[str, str] = {
    "uniform": "the same recipe with one sparsity for every matrix",
    "random": "the same recipe with random masks",
}
"""What each null is, in words."""


def null_recipe(recipe: Recipe, null: Null) -> Recipe | None:
    """Return the recipe that a gain is seen against; None where its stages are the recipe's own.

    `uniform`: every target of a stage at the stage's sparsity, with neither allocator nor overrides. `random`: masks
    of the pruner `random`; allocation, refiner and update stay. A reshaper knows its own nulls.
    """
    raw = recipe.resolved()
    stages = [
        _null_stage(stage, raw_stage, null) for stage, raw_stage in zip(recipe.stages, raw["stages"], strict=True)
    ]
    if stages == raw["stages"]:
        return None
    evaluation = {**raw["evaluate"], "nulls": []}
    return Recipe.model_validate_json(json.dumps({**raw, "stages": stages, "evaluate": evaluation}))


def _null_stage(stage: Stage, raw: dict[str, Any], null: Null) -> dict[str, Any]:
    if isinstance(stage, ActivationStage):
        return {**raw, "allocate": "uniform"} if null == "uniform" else raw
    if isinstance(stage, ReshapeStage):
        options = registry.load("reshape", stage.method)(stage.method_options(), 0).null(
            null
        )  # no null depends on a seed
        return raw if options is None else {**raw, **options.model_dump(mode="json")}
    return (_uniform if null == "uniform" else _random)(raw)


def _uniform(stage: dict[str, Any]) -> dict[str, Any]:
    return {**stage, "allocate": {"method": "uniform"}, "overrides": {}}


def _random(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["method"] == "random":
        return stage
    return {key: value for key, value in stage.items() if key in PruneStage.model_fields} | {"method": "random"}
