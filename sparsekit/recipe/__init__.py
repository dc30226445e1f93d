"""Recipes: YAML files that say what is done to a model. No torch here."""

from __future__ import annotations

from sparsekit.recipe.load import dump_yaml, load_recipe, recipe_from
from sparsekit.recipe.schema import CalibrationSpec, EvaluateSpec, Gates, Recipe, SaveSpec
from sparsekit.recipe.stages import AllocateSpec, PruneStage

__all__ = [
    "AllocateSpec",
    "CalibrationSpec",
    "EvaluateSpec",
    "Gates",
    "PruneStage",
    "Recipe",
    "SaveSpec",
    "dump_yaml",
    "load_recipe",
    "recipe_from",
]
