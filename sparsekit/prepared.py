"""A recipe and a model brought together: everything known before the first weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparsekit.activation_plan import ActivationPlan, check_text, plan_activations
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.shapes import PLAIN, Shapes
from sparsekit.checkpoint.source import SIDECAR
from sparsekit.cost import Cost, estimate
from sparsekit.errors import PlanError
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.source import ModelSource, open_model
from sparsekit.pattern import Block
from sparsekit.plan import (
    ReshapePlan,
    StagePlan,
    check_probes,
    check_reshape_tokens,
    check_tokens,
    plan_reshapes,
    plan_stage,
)
from sparsekit.progress import Silent
from sparsekit.recipe.nulls import null_recipe
from sparsekit.recipe.schema import Recipe


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first weight is read.

    Attributes:
        recipe, source: What was brought together.
        model: The source, block by block.
        reshapes: One plan for each reshape stage; they come first.
        plans: One for each prune stage, for the model as it was before any reshaping where that is still to come.
        cost: What the run needs, nulls apart.
        notes: What the user should know.
        nulls: The same for each null of the recipe that is not the recipe itself.
        config: Keys of config.json that reshaping has changed.
        shapes: In what the shapes of the model differ from those of its configuration.
        activations: Plan of the stage that calibrates activation sparsity; None without one.
    """

    recipe: Recipe
    source: ModelSource
    model: LazyModel
    plans: tuple[StagePlan, ...]
    cost: Cost
    notes: tuple[str, ...] = ()
    nulls: Mapping[str, Prepared] = field(default_factory=dict)
    reshapes: tuple[ReshapePlan, ...] = ()
    config: Mapping[str, JSON] = field(default_factory=dict)
    shapes: Shapes = PLAIN
    activations: ActivationPlan | None = None

    @property
    def disk_bytes(self) -> int:
        """Most that lies on the disk at once: a folder for each stage, and those of one null beside them."""
        own = self.cost.disk_bytes * len(self.recipe.stages)
        return own + max((null.disk_bytes for null in self.nulls.values()), default=0)

    @property
    def needs_data(self) -> bool:
        """Whether any stage reads calibration text."""
        return self.activations is not None or any(plan.needs_data for plan in _all(self.reshapes, self.plans))


def prepare(recipe: Recipe, source: ModelSource) -> Prepared:
    """Plan a recipe for a model; refuses all that can be refused without reading weights or text."""
    model = source.lazy()
    model.require_tensors()
    seed, first = recipe.calibration.seed, len(recipe.reshapes)
    reshapes = plan_reshapes(model, recipe.reshapes, seed, 0)
    plans = _plan_prunes(model, recipe)
    activations = _plan_activations(model, recipe)
    spec = recipe.calibration
    length = spec.sequence_length or min(2048, source.max_length)
    if length > source.max_length:
        raise PlanError(
            f"calibration.sequence_length {length} is longer than the model's maximum {source.max_length}",
            hint=f"Set it to {source.max_length} or less.",
        )
    samples = spec.samples if activations or any(plan.needs_data for plan in _all(reshapes, plans)) else 0
    for position, probed in enumerate(_all(reshapes, plans)):
        check_probes(probed, samples, length, where=f"stages.{position}")
    for position, reshape in enumerate(reshapes):
        check_reshape_tokens(reshape, samples * length, where=f"stages.{position}")
    if activations is not None:
        check_text(activations, samples, length, where=f"stages.{len(recipe.stages) - 1}")
    notes = tuple(note for reshape in reshapes for note in reshape.notes)
    if (source.folder / SIDECAR).is_file():
        notes += (
            f"the model's own activation sparsity ({SIDECAR}) is left out of what is written: it belongs to the old "
            "weights; the baseline is measured with it",
        )
    notes += tuple(
        note
        for position, plan in enumerate(plans, first)
        for note in (*plan.notes, *check_tokens(plan, samples * length, where=f"stages.{position}"))
    )
    found: dict[str, Recipe | None] = {null: null_recipe(recipe, null) for null in recipe.evaluate.nulls}
    notes += tuple(
        f"null {name} is left out: the recipe itself is {name}" for name, null in found.items() if null is None
    )
    nulls = {name: prepare(null, source) for name, null in found.items() if null is not None}
    cost = estimate(model, plans, samples, length, reshapes, activations)
    return Prepared(
        recipe, source, model, plans, cost, notes, nulls, reshapes, shapes=model.shapes, activations=activations
    )


def reshaped(prepared: Prepared, folder: Path, config: Mapping[str, JSON]) -> Prepared:
    """Return what is left to do once the first reshape stage has written its model to `folder`.

    Args:
        prepared: The plan so far.
        folder: The reshaped model, with its configuration and index.
        config: Keys of config.json that the stage has changed.

    Raises:
        PlanError: A later stage cannot do the model that is left.
    """
    trust = prepared.source.trust_remote_code
    opened = open_model(str(folder), Silent(), trust_remote_code=trust)
    model = opened.lazy()
    model.require_tensors()
    first, seed = 1 + len(prepared.recipe.reshapes) - len(prepared.reshapes), prepared.recipe.calibration.seed
    reshapes = plan_reshapes(model, prepared.recipe.reshapes[first:], seed, first)
    plans = _plan_prunes(model, prepared.recipe)
    activations = _plan_activations(model, prepared.recipe)
    changed = {**prepared.config, **config}
    return replace(
        prepared,
        model=model,
        plans=plans,
        reshapes=reshapes,
        config=changed,
        shapes=model.shapes,
        activations=activations,
    )


def _all(reshapes: Sequence[ReshapePlan], plans: Sequence[StagePlan]) -> list[ReshapePlan | StagePlan]:
    return [*reshapes, *plans]


def _plan_activations(model: LazyModel, recipe: Recipe) -> ActivationPlan | None:
    if recipe.activations is None:
        return None
    where = f"stages.{len(recipe.stages) - 1}"
    return plan_activations(model, recipe.activations, recipe.calibration.seed, where=where)


def _plan_prunes(model: LazyModel, recipe: Recipe) -> tuple[StagePlan, ...]:
    first = len(recipe.reshapes)
    plans = tuple(
        plan_stage(model, stage, recipe.calibration.seed, where=f"stages.{position}")
        for position, stage in enumerate(recipe.prunes, first)
    )
    _refuse_broken_blocks(plans, first)
    return plans


def _refuse_broken_blocks(plans: Sequence[StagePlan], first: int) -> None:
    """A stage that reorders outputs would tear blocks of several outputs that a stage before it has made.

    Raises:
        PlanError: naming both stages.
    """
    for later, plan in enumerate(plans):
        for earlier, before in enumerate(plans[:later]):
            if plan.pruner.permutes and isinstance(before.pattern, Block) and before.pattern.rows > 1:
                raise PlanError(
                    f"its permutation of channels would break the {before.pattern} blocks of stages.{first + earlier}",
                    where=f"stages.{first + later}",
                    hint="Swap the stages, or set permute: false.",
                )


def default_out(recipe: Recipe, source: ModelSource) -> Path:
    """Return `<model name>-<recipe>` in the current folder."""
    return Path.cwd() / f"{source.label}-{recipe.name}"
