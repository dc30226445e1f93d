"""Running recipes of activation sparsity on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekit import run
from sparsekit.models.source import open_model
from sparsekit.prepared import prepare
from sparsekit.progress import Silent
from sparsekit.recipe.load import load_recipe

SMALL = (
    "calibration.source=builtin",
    "calibration.samples=10",
    "calibration.sequence_length=48",
    "evaluate.samples=2",
    "evaluate.sequence_length=32",
)


def plan(folder: Path, recipe: str, *sets: str) -> Any:
    return prepare(load_recipe(recipe, [*SMALL, *sets]), open_model(str(folder), Silent()))


def thin(folder: Path, out: Path, recipe: str, *sets: str, evaluation: bool = False, **options: Any) -> Any:
    return run.execute(plan(folder, recipe, *sets), out, Silent(), evaluation=evaluation, **options)


def load(folder: Path, *, packed: bool = False) -> Any:
    return open_model(str(folder), Silent()).load(packed=packed)
