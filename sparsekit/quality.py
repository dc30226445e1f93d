"""Measuring what a run made: the staged checkpoint beside the dense model, and the recipe's nulls beside both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsekit import ranks
from sparsekit.checkpoint.staging import StagedCheckpoint
from sparsekit.data import TextSpec, load_blocks
from sparsekit.data.packing import TokenBlocks
from sparsekit.errors import NonFinite, NumericalError
from sparsekit.evaluate.evaluation import EvaluationReport, EvaluationRequest, NullScore, evaluate
from sparsekit.evaluate.harness import find_tasks, missing_lm_eval
from sparsekit.memory import release_freed
from sparsekit.models.source import open_model
from sparsekit.prepared import Prepared
from sparsekit.progress import Reporter
from sparsekit.recipe.optional import left_out_note
from sparsekit.stages import drop_scratch, null_folder, run_stages


def check_evaluation(prepared: Prepared, reporter: Reporter) -> None:
    """Find out before the work, not after it, that text, tokenizer or tasks of the evaluation are missing."""
    source = prepared.source
    text = _text(prepared)
    load_blocks(text, source.tokenizer, model_max_length=source.max_length, part="held_out", reporter=reporter)
    tasks, left_out = _tasks(prepared)
    if left_out:
        reporter.note(left_out_note(left_out))
    if tasks:
        find_tasks(tasks, reporter=reporter)


def measure(prepared: Prepared, staged: StagedCheckpoint, reporter: Reporter) -> EvaluationReport:
    """Measure the staged checkpoint, under the name it will have, against the dense model."""
    tasks, left_out = _tasks(prepared)
    request = EvaluationRequest(
        model=staged.out.name,
        baseline=prepared.source.label,
        text=_text(prepared),
        tasks=tasks,
        limit=prepared.recipe.evaluate.limit if tasks else None,
        open_model=_opener(prepared, staged.out.name, staged.folder, reporter),
        reporter=reporter,
    )
    return replace(evaluate(request), left_out=left_out)


def with_nulls(
    report: EvaluationReport,
    prepared: Prepared,
    blocks: TokenBlocks | None,
    staged: StagedCheckpoint,
    reporter: Reporter,
    *,
    resume: bool,
) -> EvaluationReport:
    """Return the report with the perplexity of every null of the recipe, one after the other.

    Args:
        report: Of the staged checkpoint.
        prepared: The plan.
        blocks: Calibration text; None when no stage reads any.
        staged: The checkpoint that the nulls stand beside.
        reporter: Told about every step.
        resume: Go on with a null that a killed run left.
    """
    nulls = []
    for name, null in prepared.nulls.items():
        reporter.note(f"Null {name}: the recipe once more, for comparison")
        identity = {"run": staged.run_id, "null": name}
        folder = null_folder(staged.out, name)
        begin = partial(StagedCheckpoint.open, folder, identity, overwrite=True, resume=resume)
        with ranks.share(begin) as work:
            try:
                run_stages(null, blocks, work, reporter, resume=resume)
                nulls.append(ranks.share(partial(_score, name, null, report, work, reporter)))
            except (NonFinite, NumericalError) as error:  # as bad as can be, which is for a null to show
                reporter.note(f"Null {name} has no finite outputs: {error.message}")
                nulls.append(NullScore(name, math.inf, None, math.inf))
            finally:
                if ranks.here().rank == 0:
                    drop_scratch(folder)
                    work.discard()
        release_freed()
    return replace(report, nulls=tuple(nulls))


def _score(
    name: str, null: Prepared, report: EvaluationReport, work: StagedCheckpoint, reporter: Reporter
) -> NullScore:
    request = EvaluationRequest(
        model=name, text=_text(null), open_model=_opener(null, name, work.folder, reporter), reporter=reporter
    )
    found = evaluate(request).perplexity
    assert found is not None  # noqa: S101  (the request has a text)
    assert report.comparison is not None  # noqa: S101  (so had the report's)
    difference = found.loss - report.comparison.baseline.loss
    return NullScore(name, found.perplexity, found.stderr, math.exp(difference) if difference < 700 else math.inf)


def _tasks(prepared: Prepared) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks to run, and the optional ones that cannot be."""
    spec = prepared.recipe.evaluate
    optional = tuple(task for task in spec.optional_tasks if task not in spec.tasks)
    return (spec.tasks, optional) if optional and missing_lm_eval() else (spec.tasks + optional, ())


def _text(prepared: Prepared) -> TextSpec:
    spec = prepared.recipe.evaluate
    length = min(spec.sequence_length or 2048, prepared.source.max_length)
    return TextSpec(source=spec.text, samples=spec.samples, sequence_length=length)


def _opener(prepared: Prepared, name: str, folder: Path, reporter: Reporter) -> Callable[[str], tuple[Any, Any]]:
    """Return what opens a staged folder under `name`, and under every other name the dense model."""
    source = prepared.source

    def open_for_evaluation(wanted: str) -> tuple[Any, Any]:
        trust = source.trust_remote_code
        opened = open_model(str(folder), reporter, trust_remote_code=trust) if wanted == name else source
        return opened.load(), source.tokenizer

    return open_for_evaluation
