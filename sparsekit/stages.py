"""The stages of a recipe, one after the other, and the folders beside OUT that a run works in.

    OUT.stage-N          stage N, if it is not the last
    OUT.levels           what searches measured of each linear, unless the user names a folder
    OUT.null-NAME        the same recipe as a null, and beside it its own stages

None of them is ever committed. A run that was killed finds its shards in them again; `drop_scratch` removes them.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsekit import fs
from sparsekit.allocation import Workspace
from sparsekit.assemble import is_packed, shard_names, write_model_files
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.recovery import Place
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.data.packing import TokenBlocks
from sparsekit.describe import tools
from sparsekit.pack import Encoding, Layout
from sparsekit.plan import StagePlan
from sparsekit.prepared import Prepared
from sparsekit.progress import Reporter
from sparsekit.prune import Form, StageResult, prune_stage
from sparsekit.recipe.schema import Recipe

_STAGE = re.compile(r"stage-\d+")


def run_stages(
    prepared: Prepared,
    blocks: TokenBlocks | None,
    staged: StagedCheckpoint,
    reporter: Reporter,
    *,
    resume: bool,
    database: Path | None = None,
) -> list[StageResult]:
    """Run the stages in order, each on the shards of the one before; the last writes a whole model into `staged`.

    Args:
        prepared: The plan.
        blocks: Calibration text; None when no stage reads any.
        staged: Where the model goes; the other stages work in folders beside it.
        reporter: Told about every block.
        resume: Go on with stages that an interrupted run left.
        database: Where searches keep what they measure; None: beside OUT.
    """
    names = shard_names(prepared)
    results = []
    for position, plan in enumerate(prepared.plans):
        kept = (database or levels_folder(staged.out)) / f"stage-{position}"
        workspace = Workspace(kept, _identity(prepared, blocks, plan))
        samples = blocks.ids if blocks is not None and plan.needs_data else None
        if position == len(prepared.plans) - 1:
            form = _form(prepared.recipe) if is_packed(prepared) else None
            results.append(prune_stage(prepared.model, plan, samples, staged, names, reporter, form, workspace))
        else:
            folder = staged.out.with_name(f"{staged.out.name}.stage-{position}")
            identity: dict[str, JSON] = {"run": staged.run_id, "stage": position}
            with StagedCheckpoint.open(folder, identity, overwrite=True, resume=resume) as work:
                results.append(prune_stage(prepared.model, plan, samples, work, names, reporter, None, workspace))
    write_model_files(prepared, staged)
    return results


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


def _identity(prepared: Prepared, blocks: TokenBlocks | None, plan: StagePlan) -> dict[str, JSON]:
    """Return what the files of an allocator depend on: all but its own options and what comes after it."""
    versions = tools()
    del versions["python"]  # does not change a result
    stage = plan.stage.model_dump(mode="json", exclude={"allocate", "refine", "update", "propagate", "min_coverage"})
    linears: dict[str, JSON] = {linear.name: [linear.out_features, linear.in_features] for linear in plan.free}
    return {
        "model": prepared.source.identity(),
        "calibration": blocks.fingerprint if blocks else None,
        "stage": stage,
        "linears": linears,
        "versions": versions,
    }


def _form(recipe: Recipe) -> Form:
    layout, encoding = recipe.save.format, recipe.save.values
    return Form(None if layout == "auto" else Layout(layout), None if encoding == "auto" else Encoding(encoding))
