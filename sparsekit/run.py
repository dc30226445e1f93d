"""Executing a resolved recipe: plan, prune stage by stage, evaluate, report, commit.

Of several ranks all prune together; the first reads the text, writes, measures and reports.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparsekit import fs, ranks
from sparsekit.assemble import is_packed
from sparsekit.calibration import calibration_blocks
from sparsekit.checkpoint.source import SIDECAR
from sparsekit.checkpoint.staging import StagedCheckpoint, differences, is_finished, recover
from sparsekit.data.packing import TokenBlocks
from sparsekit.describe import (
    base,
    describe_blocks,
    describe_model,
    describe_reshape,
    describe_stage,
    peak_memory_bytes,
    tools,
    weights_bytes,
)
from sparsekit.describe_activations import describe_thinned
from sparsekit.errors import OutputExists, RunError, UsageError
from sparsekit.evaluate.evaluation import EvaluationReport
from sparsekit.evaluate.gates import GatesSpec, check
from sparsekit.models.source import ModelSource
from sparsekit.plan import BASE_MEMORY_BYTES, require_memory
from sparsekit.prepared import Prepared
from sparsekit.progress import Reporter
from sparsekit.quality import check_evaluation, measure, with_nulls
from sparsekit.recipe.schema import Recipe
from sparsekit.report.pages import pages
from sparsekit.report.summary import summarise
from sparsekit.stages import Ran, drop_scratch, run_stages


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        out: The committed checkpoint.
        report: Content of report.json.
        evaluation: What was measured, None when nothing was.
        missed_gates: Quality gates that were not met, in words.
        already_finished: The checkpoint was there, made by exactly this run; nothing was done.
    """

    out: Path
    report: dict[str, Any]
    evaluation: EvaluationReport | None = None
    missed_gates: tuple[str, ...] = ()
    already_finished: bool = False


def execute(
    prepared: Prepared,
    out: Path,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    resume: bool = True,
    evaluation: bool = True,
    database: Path | None = None,
    command: Sequence[str] = (),
) -> Outcome:
    """Run a prepared recipe and commit the checkpoint to `out`.

    Args:
        prepared: The plan.
        out: Output folder.
        reporter: Told about every step.
        overwrite: Replace a non-empty `out`.
        resume: Go on with an interrupted run of the same recipe, model, data and versions; False discards it.
        evaluation: Measure the pruned model against the dense one as the recipe says.
        database: Where searches keep what they measure, for other searches; None keeps it until the run has finished.
        command: What the user typed, for the model card.

    Raises:
        SparsekitError: with what is wrong; `out` is then as it was.
    """
    start = time.perf_counter()
    if not evaluation:
        _refuse_unmeasured(prepared.recipe)
    with ranks.together():
        _refuse_source(prepared.source, out)
        _require_memory(prepared, evaluation=evaluation)
    if extra := prepared.model.extra:
        reporter.note(f"{len(extra)} tensors have no place in the model and are copied unchanged, first {extra[0]}")
    for note in prepared.notes:
        reporter.note(note)
    for folder in (out.parent, *([database] if database else [])):
        ranks.require_shared(folder)
    blocks = ranks.share(lambda: _read_text(prepared, out, reporter, evaluation=evaluation))
    identity = _identity(prepared, blocks)
    _refuse_different_ranks(identity)
    if finished := ranks.share(lambda: _finished(out, identity)):
        return finished
    with ranks.share(partial(StagedCheckpoint.open, out, identity, overwrite=overwrite, resume=resume)) as staged:
        ran = run_stages(prepared, blocks, staged, reporter, resume=resume, database=database)
        scores = ranks.share(lambda: measure(prepared, staged, reporter)) if evaluation else None
        if scores:
            scores = with_nulls(scores, prepared, blocks, staged, reporter, resume=resume)
        report = {
            "schema": 1,
            "run_id": staged.run_id,
            "command": list(command),
            "model": describe_model(prepared),
            "recipe": prepared.recipe.resolved(),
            "calibration": describe_blocks(blocks),
            "reshapes": [
                describe_reshape(stage, result)
                for stage, result in zip(prepared.recipe.reshapes, ran.reshapes, strict=True)
            ],
            "stages": [
                describe_stage(plan, result) for plan, result in zip(ran.prepared.plans, ran.results, strict=True)
            ],
            "activations": _activations(ran),
            "evaluation": scores.to_json() if scores else None,
            "missed_gates": check(GatesSpec(**prepared.recipe.gates.model_dump()), scores) if scores else [],
            "seconds": round(time.perf_counter() - start, 2),
            "ranks": ranks.here().size,
            "tools": tools(),
        }
        return ranks.share(lambda: _commit(ran, staged, report, scores))


def _read_text(prepared: Prepared, out: Path, reporter: Reporter, *, evaluation: bool) -> TokenBlocks | None:
    """Return the calibration text, None where no stage reads any; refuse what could not be written or measured."""
    fs.require_space(out, prepared.disk_bytes, "the checkpoint")
    blocks = calibration_blocks(prepared, reporter) if prepared.needs_data else None
    if evaluation:
        check_evaluation(prepared, reporter)
    prepared.source.forget_tokenizer()  # the evaluation, long after, reads it again
    return blocks


def _finished(out: Path, identity: dict[str, Any]) -> Outcome | None:
    """Return the outcome of exactly this run if `out` holds it."""
    if not is_finished(out, identity):
        return None
    recover(out)  # a run killed right after its commit left its journal
    drop_scratch(out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Outcome(out, report, missed_gates=tuple(report["missed_gates"]), already_finished=True)


def _activations(ran: Ran) -> dict[str, Any] | None:
    """Return what the activation stage did, None without one."""
    plan = ran.prepared.activations
    if plan is None or ran.thinned is None:
        return None
    return describe_thinned(ran.prepared.model, plan, ran.thinned)


def _commit(
    ran: Ran,
    staged: StagedCheckpoint,
    report: dict[str, Any],
    scores: EvaluationReport | None,
) -> Outcome:
    """Complete the report, write it, and put the checkpoint into place."""
    report["bytes"] = {"source": ran.prepared.source.weights.total_bytes, "output": weights_bytes(staged.folder)}
    report["peak_memory_bytes"] = peak_memory_bytes()
    report["errors"] = summarise(report).errors()
    written = pages(report, ran.prepared.source.folder)
    for name, data in written.items():
        staged.write_file(name, data)
    committed = staged.commit(
        {**_manifest(ran), "base": base(report["model"])},
        volatile=written.keys(),  # they hold timings
    )
    drop_scratch(committed)
    return Outcome(committed, report, scores, tuple(report["missed_gates"]))


def _manifest(ran: Ran) -> dict[str, Any]:
    """Return what the manifest says of the tensors; one that several stages pruned is what the last made of it."""
    tensors = {name: facts for result in ran.results for name, facts in result.tensors.items()}
    packed = ran.results[-1].packed if ran.results else {}
    return {
        "layout": "packed" if is_packed(ran.prepared) else "dense",
        "tools": tools(),
        "tensors": {name: facts for name, facts in tensors.items() if name not in packed},
        "packed": {name: {**facts, **tensors[name]} for name, facts in packed.items()},
        **_gates(ran),
    }


def _gates(ran: Ran) -> dict[str, Any]:
    """Return what the manifest says of activation sparsity, nothing without any."""
    said = _activations(ran)
    if said is None:
        return {}
    keys = ("method", "options", "sparsity", "budget", "found_sparsity", "allocate", "propagate", "protocol")
    return {"activations": {"file": SIDECAR, **{key: said[key] for key in keys}, "held_out": said["held_out"]}}


def _refuse_different_ranks(identity: dict[str, Any]) -> None:
    """Refuse ranks that would do something else than the first.

    Raises:
        RunError: naming the rank and what differs.
    """
    first, *others = ranks.gather(identity)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise RunError(
                f"rank {rank} differs from rank 0 in {differences(first, other)}",
                hint="Start all ranks with the same command, model and versions.",
            )


def _refuse_source(source: ModelSource, out: Path) -> None:
    """Refuse an OUT that holds the model or lies in its folder, whatever --overwrite says.

    Raises:
        OutputExists: with both paths.
    """
    place = Path(os.path.realpath(out))
    folder = Path(os.path.realpath(source.folder))
    given = Path(source.name).expanduser()  # a .gguf file, whose folder is a cache
    weights = [source.weights.path(file) for file in source.weights.files]
    for path in (folder, *weights, *([given] if given.exists() else [])):
        if Path(os.path.realpath(path)).is_relative_to(place):
            raise OutputExists(
                f"holds the model that is to be pruned ({path})", where=str(out), hint="Choose another output with -o."
            )
    if place.is_relative_to(folder):
        raise OutputExists(
            f"lies in the folder of the model that is to be pruned ({folder})",
            where=str(out),
            hint="Choose another output with -o.",
        )


def _refuse_unmeasured(recipe: Recipe) -> None:
    """A gate that is passed because nobody measured is worse than none, and a null needs something beside it."""
    if recipe.evaluate.nulls:
        raise UsageError(
            f"--no-evaluate leaves nothing to compare the nulls with: {', '.join(recipe.evaluate.nulls)}",
            hint="Leave --no-evaluate out, or the nulls.",
        )
    gates = recipe.gates.model_dump(exclude_defaults=True)
    if gates:
        raise UsageError(
            f"--no-evaluate leaves the recipe's gates unchecked: {', '.join(gates)}",
            hint="Leave --no-evaluate out, or take the gates out of the recipe.",
        )


def _require_memory(prepared: Prepared, *, evaluation: bool) -> None:
    """Refuse before the work what would be killed in the middle of it, or at its end."""
    require_memory(
        BASE_MEMORY_BYTES + prepared.cost.whole_bytes,
        "the whole model, which an allocator measures changes of,",
        "Choose an allocator that reads one block at a time, such as owl, or use a machine with more memory.",
        by_all=True,
    )
    require_memory(
        BASE_MEMORY_BYTES + prepared.cost.gradient_bytes,
        "the gradients of all samples, which a pruner needs for one block after the other,",
        "Lower samples or sequence_length of the method, choose one without gradients, such as sparsegpt, or use a "
        "machine with more memory.",
        by_all=True,
    )
    require_memory(
        prepared.cost.memory_bytes,
        "the run",
        "Lower calibration.samples or calibration.sequence_length, or use a machine with more memory.",
        by_all=True,
    )
    for name, null in prepared.nulls.items():
        require_memory(
            null.cost.memory_bytes,
            f"the null {name}",
            "Leave the null out, or use a machine with more memory.",
            by_all=True,
        )
    if evaluation:
        require_memory(
            BASE_MEMORY_BYTES + 2 * prepared.source.weights.total_bytes,
            "measuring the pruned beside the dense model",
            "Add --no-evaluate, and measure with sparsekit eval where there is more memory.",
        )


def _identity(prepared: Prepared, blocks: TokenBlocks | None) -> dict[str, Any]:
    versions = tools()
    del versions["python"]  # does not change a result
    return {
        "recipe": prepared.recipe.resolved(),
        "model": prepared.source.identity(),
        "calibration": blocks.fingerprint if blocks else None,
        "versions": versions,
    }
