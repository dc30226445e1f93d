"""A recipe and a model brought together: everything known before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsekit.cost import Cost, estimate
from sparsekit.errors import PlanError
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.source import ModelSource
from sparsekit.pattern import Block
from sparsekit.plan import StagePlan, check_probes, check_tokens, plan_stage
from sparsekit.recipe.nulls import null_recipe
from sparsekit.recipe.schema import Recipe


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first weight is read.

    Attributes:
        recipe, source: What was brought together.
        model: The source, block by block.
        plans: One for each stage.
        cost: What the run needs, nulls apart.
        notes: What the user should know.
        nulls: The same for each null of the recipe that is not the recipe itself.
    """

    recipe: Recipe
    source: ModelSource
    model: LazyModel
    plans: tuple[StagePlan, ...]
    cost: Cost
    notes: tuple[str, ...] = ()
    nulls: Mapping[str, Prepared] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        """Most that lies on the disk at once: a folder for each stage, and those of one null beside them."""
        own = self.cost.disk_bytes * len(self.plans)
        return own + max((null.disk_bytes for null in self.nulls.values()), default=0)

    @property
    def needs_data(self) -> bool:
        """Whether any stage reads calibration text."""
        return any(plan.needs_data for plan in self.plans)


def prepare(recipe: Recipe, source: ModelSource) -> Prepared:
    """Plan a recipe for a model; refuses all that can be refused without reading weights or text."""
    model = source.lazy()
    model.require_tensors()
    plans = tuple(
        plan_stage(model, stage, recipe.calibration.seed, where=f"stages.{position}")
        for position, stage in enumerate(recipe.stages)
    )
    _refuse_broken_blocks(plans)
    spec = recipe.calibration
    length = spec.sequence_length or min(2048, source.max_length)
    if length > source.max_length:
        raise PlanError(
            f"calibration.sequence_length {length} is longer than the model's maximum {source.max_length}",
            hint=f"Set it to {source.max_length} or less.",
        )
    samples = spec.samples if any(plan.needs_data for plan in plans) else 0
    for position, plan in enumerate(plans):
        check_probes(plan, samples, length, where=f"stages.{position}")
    notes = tuple(
        note
        for position, plan in enumerate(plans)
        for note in (*plan.notes, *check_tokens(plan, samples * length, where=f"stages.{position}"))
    )
    found: dict[str, Recipe | None] = {null: null_recipe(recipe, null) for null in recipe.evaluate.nulls}
    notes += tuple(
        f"null {name} is left out: the recipe itself is {name}" for name, null in found.items() if null is None
    )
    nulls = {name: prepare(null, source) for name, null in found.items() if null is not None}
    return Prepared(recipe, source, model, plans, estimate(model, plans, samples, length), notes, nulls)


def _refuse_broken_blocks(plans: Sequence[StagePlan]) -> None:
    """A stage that reorders outputs would tear blocks of several outputs that a stage before it has made.

    Raises:
        PlanError: naming both stages.
    """
    for later, plan in enumerate(plans):
        for earlier, before in enumerate(plans[:later]):
            if plan.pruner.permutes and isinstance(before.pattern, Block) and before.pattern.rows > 1:
                raise PlanError(
                    f"its permutation of channels would break the {before.pattern} blocks of stages.{earlier}",
                    where=f"stages.{later}",
                    hint="Swap the stages, or set permute: false.",
                )


def default_out(recipe: Recipe, source: ModelSource) -> Path:
    """Return `<model name>-<recipe>` in the current folder."""
    return Path.cwd() / f"{source.label}-{recipe.name}"
