"""The stages of a recipe, one after the other, and the folders beside OUT that a run works in.

    OUT.stage-N          stage N, if it is not the last
    OUT.levels           what searches measured of each linear, unless the user names a folder
    OUT.null-NAME        the same recipe as a null, and beside it its own stages

None of them is ever committed. A run that was killed finds its shards in them again; `drop_scratch` removes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import fs, ranks
from sparsekit.activation_plan import held_out
from sparsekit.allocation import Workspace
from sparsekit.assemble import is_packed, shard_name, shard_names, write_model_files
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.recovery import Place
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.contracts import LinearInfo
from sparsekit.data import TextSpec, load_blocks
from sparsekit.data.packing import TokenBlocks
from sparsekit.describe import tools
from sparsekit.errors import CalibrationError, SparsekitError
from sparsekit.models.gate_files import GateFile, weight_sizes, write_gates
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.shapes import parameters
from sparsekit.pack import Encoding, Layout
from sparsekit.plan import ReshapePlan, StagePlan
from sparsekit.prepared import Prepared, reshaped
from sparsekit.progress import Reporter, Silent
from sparsekit.prune import Form, StageResult, checkpoint_tensors, prune_stage
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.stages import Stage
from sparsekit.reshaping import ReshapeResult, reshape_stage
from sparsekit.thinning import Thinned, thin

if TYPE_CHECKING:
    from torch import Tensor

_STAGE = re.compile(r"stage-\d+")
OTHER = "stdlib"
"""Text of another kind that activation sparsity is measured on: source code."""


@dataclass(frozen=True)
class Ran:
    """What the stages of a recipe have done.

    Attributes:
        prepared: The plans as they were in the end, for the model that reshaping has left.
        reshapes: What each reshape stage did.
        results: What each prune stage did.
        thinned: What the activation stage did; None without one.
    """

    prepared: Prepared
    reshapes: tuple[ReshapeResult, ...]
    results: tuple[StageResult, ...]
    thinned: Thinned | None = None


def run_stages(
    prepared: Prepared,
    blocks: TokenBlocks | None,
    staged: StagedCheckpoint,
    reporter: Reporter,
    *,
    resume: bool,
    database: Path | None = None,
) -> Ran:
    """Run the stages in order, each on what the one before made; the last writes a whole model into `staged`.

    Args:
        prepared: The plan.
        blocks: Calibration text; None when no stage reads any.
        staged: Where the model goes; the other stages work in folders beside it.
        reporter: Told about every block.
        resume: Go on with stages that an interrupted run left.
        database: Where searches keep what they measure; None: beside OUT.
    """
    writing = len(prepared.recipe.reshapes) + len(prepared.recipe.prunes)
    run = _Run(blocks, staged, reporter, resume, database, writing)
    reshapes: list[ReshapeResult] = []
    while prepared.reshapes:
        plan = prepared.reshapes[0]
        with run.folder(len(reshapes)) as work:
            workspace = run.workspace(len(reshapes), prepared, plan.stage, ())
            result = reshape_stage(prepared.model, plan, run.samples(plan), work, shard_name, reporter, workspace)
            config = {**prepared.config, **result.config}
            after = replace(prepared, config=config, shapes=result.shapes)
            ranks.share(partial(write_model_files, after, work, len(result.blocks)))
        prepared = reshaped(prepared, work.folder, result.config)
        _require_planned(plan, prepared.model)
        reshapes.append(replace(result, parameters=(plan.before, parameters(prepared.model.module))))
    names = shard_names(prepared)
    results = []
    for position, pruned in enumerate(prepared.plans, len(reshapes)):
        last = position == run.writing - 1
        form = _form(prepared.recipe) if last and is_packed(prepared) else None
        workspace = run.workspace(position, prepared, pruned.stage, pruned.free)
        with run.folder(position) as work:
            results.append(
                prune_stage(prepared.model, pruned, run.samples(pruned), work, names, reporter, form, workspace)
            )
    if not writing:
        ranks.share(lambda: _copy_blocks(prepared.model, names, staged))
    if prepared.plans or not writing:
        ranks.share(lambda: write_model_files(prepared, staged, prepared.model.blocks))
    return Ran(prepared, tuple(reshapes), tuple(results), _thin(prepared, blocks, staged, reporter))


def _copy_blocks(model: LazyModel, names: Sequence[str], staged: StagedCheckpoint) -> None:
    """Write the shards of all blocks as they are."""
    for index in range(model.blocks):
        if staged.finished(f"block-{index}") is None:
            staged.write_shard(f"block-{index}", names[index], checkpoint_tensors(model, index, {}), {})


def _thin(
    prepared: Prepared, blocks: TokenBlocks | None, staged: StagedCheckpoint, reporter: Reporter
) -> Thinned | None:
    """Calibrate activation sparsity of what is written, and write it beside the weights."""
    plan = prepared.activations
    if plan is None:
        return None
    assert blocks is not None  # noqa: S101  (such a plan needs data)
    others = ranks.share(lambda: _other_text(prepared, blocks, reporter))
    thinned = thin(prepared.model, plan, blocks.ids, others, reporter)
    shares = {name: round(stat.share, 6) for name, stat in thinned.held_out.dropped.items()}
    content = GateFile(thinned.gates, plan.stage.dense_tokens, plan.stage.prefill, weight_sizes(staged.folder), shares)
    ranks.share(lambda: write_gates(staged, content))
    return thinned


def _other_text(prepared: Prepared, blocks: TokenBlocks, reporter: Reporter) -> dict[str, Tensor]:
    """Return ids of source code, text of another kind than any prose: do thresholds carry over?"""
    samples, length = blocks.ids.shape
    spec = TextSpec(source=OTHER, samples=held_out(samples), sequence_length=length)
    source = prepared.source
    try:
        code = load_blocks(
            spec, source.tokenizer, model_max_length=source.max_length, part="held_out", reporter=Silent()
        )
    except CalibrationError as error:  # a Python without its sources
        reporter.note(f"activation sparsity is not measured on source code: {error.message}")
        return {}
    return {OTHER: code.ids}


def _require_planned(plan: ReshapePlan, model: LazyModel) -> None:
    """Require that a reshape stage left as many parameters as it announced."""
    after = parameters(model.module)
    if plan.after is not None and plan.after != after:
        raise SparsekitError(f"{after} parameters are left, {plan.after} were planned", where=plan.stage.method)


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share; `writing` is the number of those that write weights."""

    blocks: TokenBlocks | None
    staged: StagedCheckpoint
    reporter: Reporter
    resume: bool
    database: Path | None
    writing: int

    def samples(self, plan: StagePlan | ReshapePlan) -> Tensor | None:
        """Return the calibration ids, None for a stage that reads none."""
        return self.blocks.ids if self.blocks is not None and plan.needs_data else None

    def workspace(self, position: int, prepared: Prepared, stage: Stage, linears: Sequence[LinearInfo]) -> Workspace:
        """Return where the stage's searches keep files, and what those belong to."""
        kept = (self.database or levels_folder(self.staged.out)) / f"stage-{position}"
        return Workspace(kept, _identity(prepared, self.blocks, position, stage, linears))

    @contextmanager
    def folder(self, position: int) -> Iterator[StagedCheckpoint]:
        """Open where a stage writes: the checkpoint itself for the last one, else a folder beside it."""
        if position == self.writing - 1:
            yield self.staged
            return
        folder = self.staged.out.with_name(f"{self.staged.out.name}.stage-{position}")
        identity: dict[str, JSON] = {"run": self.staged.run_id, "stage": position}
        begin = partial(StagedCheckpoint.open, folder, identity, overwrite=True, resume=self.resume)
        with ranks.share(begin) as work:
            yield work


def null_folder(out: Path, name: str) -> Path:
    """Return where the null `name` of the run that writes `out` is pruned."""
    return out.with_name(f"{out.name}.null-{name}")


def levels_folder(out: Path) -> Path:
    """Return where the searches of the run that writes `out` keep what they measure."""
    return out.with_name(f"{out.name}.levels")


def drop_scratch(out: Path) -> None:
    """Remove what runs that wrote `out`, or were killed while they did, have left in the folders beside it.

    Raises:
        Locked: A live process is working there.
        ResourceError: The disk refuses.
    """
    found = Place.of(out).find(r"(OUT\.(?:null-[a-z]+|stage-\d+)(?:\.stage-\d+)?)\.partial-[0-9a-f]{16}(?:\.journal)?")
    for name in sorted(set(found)):
        StagedCheckpoint.open(out.with_name(name), {}, overwrite=True, resume=False).discard()
    levels = levels_folder(out)
    if levels.is_dir() and all(_STAGE.fullmatch(entry.name) for entry in levels.iterdir()):
        fs.remove_tree(levels)


def _identity(
    prepared: Prepared, blocks: TokenBlocks | None, position: int, stage: Stage, linears: Sequence[LinearInfo]
) -> dict[str, JSON]:
    """Return what the files of a search depend on: all but an allocator's own options and what comes after it."""
    versions = tools()
    del versions["python"]  # does not change a result
    apart = {"allocate", "refine", "update", "propagate", "min_coverage"}
    before: list[JSON] = [earlier.model_dump(mode="json") for earlier in prepared.recipe.stages[:position]]
    return {
        "model": prepared.source.identity(),
        "calibration": blocks.fingerprint if blocks else None,
        "stage": stage.model_dump(mode="json", exclude=apart),
        "linears": {linear.name: [linear.out_features, linear.in_features] for linear in linears},
        "versions": versions,
        **({"before": before} if before else {}),
    }


def _form(recipe: Recipe) -> Form:
    layout, encoding = recipe.save.format, recipe.save.values
    return Form(None if layout == "auto" else Layout(layout), None if encoding == "auto" else Encoding(encoding))
