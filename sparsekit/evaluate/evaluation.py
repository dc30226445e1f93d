"""One evaluation: perplexity on a text, a baseline beside it, lm-eval tasks; the result is a plain value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekit.data import TextSpec, TokenBlocks, load_blocks
from sparsekit.errors import EvaluationError
from sparsekit.evaluate.compare import Comparison, compare
from sparsekit.evaluate.harness import TaskMetric, TaskSelection, find_tasks, run_tasks
from sparsekit.evaluate.perplexity import Perplexity, score, standard_error, summarise
from sparsekit.lazy import torch
from sparsekit.progress import Reporter, Silent

SCHEMA_VERSION = 1
"""Of `EvaluationReport.to_json`; a reader refuses what is newer."""

OpenModel = Callable[[str], tuple[Any, Any]]
"""Opens a model folder or id: (model, tokenizer)."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        model: Folder or id of the model.
        open_model: Opens it.
        baseline: Folder or id of the model to compare with.
        text: Text for perplexity and KL divergence; None leaves both out.
        tasks: Names of lm-eval tasks.
        include_path: Folder with more task files.
        limit: Evaluate only the first documents of each task.
        num_fewshot: Examples in each prompt; None leaves it to the task.
        reporter: Receives progress.
    """

    model: str
    open_model: OpenModel
    baseline: str | None = None
    text: TextSpec | None = None
    tasks: Sequence[str] = ()
    include_path: str | Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    reporter: Reporter | None = None


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, with the baseline's beside it where there is one.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: Of the model.
        stderr: Its standard error; None where unknown.
        baseline: Value of the baseline.
        baseline_stderr: Its standard error.
        difference: Value minus that of the baseline.
        difference_stderr: Its standard error, from pairs of documents; None where the metric is no mean.
        higher_is_better: None where the task does not say.
        samples: Documents evaluated.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    baseline: float | None
    baseline_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    higher_is_better: bool | None
    samples: int | None


@dataclass(frozen=True)
class NullScore:
    """What a null of the recipe reaches on the same text.

    Attributes:
        name: `uniform` or `random`.
        perplexity: Infinite where its outputs are not finite.
        stderr: Its standard error; None for a single block.
        ratio: Perplexity over that of the baseline.
    """

    name: str
    perplexity: float
    stderr: float | None
    ratio: float


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured, on what.

    Attributes:
        model: Name of the model.
        baseline: Name of the baseline.
        perplexity: Of the model; None without a text.
        comparison: With the baseline; None without a text or a baseline.
        tasks: One row per metric.
        text_fingerprint: SHA-256 of the tokens; equal means the same text, tokenizer and seed.
        tokens_available: Tokens the text source holds; None for a stream.
        limit: Documents per task at most.
        num_fewshot: Examples in each prompt as asked for; None means as the task says.
        nulls: What the recipe is compared with.
        left_out: Optional tasks of the recipe that were not run, since lm-eval is not installed.
    """

    model: str
    baseline: str | None
    perplexity: Perplexity | None
    comparison: Comparison | None
    tasks: tuple[TaskRow, ...]
    text_fingerprint: str | None
    tokens_available: int | None
    limit: int | None
    num_fewshot: int | None
    nulls: tuple[NullScore, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; infinite numbers become the text "inf", which JSON can hold."""
        report: dict[str, Any] = _finite({"schema": SCHEMA_VERSION, **asdict(self)})
        return report


def evaluate(request: EvaluationRequest) -> EvaluationReport:
    """Measure what `request` asks for; both models see the same tokens and documents.

    Raises:
        EvaluationError: Nothing to measure, an unknown task, or models that cannot be compared.
        CalibrationError: A text that cannot be used.
        NonFinite: NaN or infinity in the logits.
    """
    reporter = request.reporter or Silent()
    if request.text is None and not request.tasks:
        raise EvaluationError("nothing to evaluate", hint="Name a text or tasks.")
    selection = None
    if request.tasks:
        selection = find_tasks(request.tasks, include_path=request.include_path, reporter=reporter)
    reporter.note(f"Opening {request.model}")
    model, tokenizer = request.open_model(request.model)
    blocks = None
    if request.text is not None:
        maximum = model_max_length(model, tokenizer)
        blocks = load_blocks(request.text, tokenizer, model_max_length=maximum, part="held_out", reporter=reporter)
    perplexity, comparison, reference = None, None, None
    if request.baseline is None:
        if blocks is not None:
            perplexity = summarise(score(model, blocks, reporter=reporter))
    else:
        reporter.note(f"Opening the baseline {request.baseline}")
        baseline, baseline_tokenizer = request.open_model(request.baseline)
        if blocks is not None:
            comparison = compare(model, baseline, blocks, reporter=reporter)
            perplexity = comparison.model
        reference = _tasks(request, selection, baseline, baseline_tokenizer, "baseline")
        del baseline, baseline_tokenizer  # its memory is free while the model's tasks run
    metrics = _tasks(request, selection, model, tokenizer, "model")
    return _report(request, blocks, perplexity, comparison, pair(metrics, reference))


def model_max_length(model: Any, tokenizer: Any) -> int:
    """Return the longest sequence the model takes, in tokens: of its configuration, else of its tokenizer."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return int(tokenizer.model_max_length)


def pair(metrics: Sequence[TaskMetric], reference: Sequence[TaskMetric] | None) -> tuple[TaskRow, ...]:
    """Return `metrics` with those of the baseline beside them.

    Raises:
        EvaluationError: The baseline's tasks gave other metrics or other documents.
    """
    by_name = {(metric.task, metric.metric): metric for metric in reference or ()}
    rows = []
    for mine in metrics:
        other = by_name.get((mine.task, mine.metric))
        if reference is not None and (other is None or other.samples != mine.samples):
            raise EvaluationError(
                f"{mine.metric} has {mine.samples} documents for the model, "
                f"{other.samples if other else 'none'} for the baseline",
                where=mine.task,
            )
        rows.append(_row(mine, other))
    return tuple(rows)


def _row(mine: TaskMetric, other: TaskMetric | None) -> TaskRow:
    error = None
    if other is not None and mine.per_document and len(mine.per_document) == len(other.per_document):
        ours, theirs = (torch.tensor(m.per_document, dtype=torch.float64) for m in (mine, other))
        error = standard_error(ours - theirs)
    return TaskRow(
        task=mine.task,
        metric=mine.metric,
        value=mine.value,
        stderr=mine.stderr,
        baseline=other.value if other else None,
        baseline_stderr=other.stderr if other else None,
        difference=mine.value - other.value if other else None,
        difference_stderr=error,
        higher_is_better=mine.higher_is_better,
        samples=mine.samples,
    )


def _tasks(
    request: EvaluationRequest, selection: TaskSelection | None, model: Any, tokenizer: Any, which: str
) -> list[TaskMetric]:
    if selection is None:
        return []
    reporter = request.reporter or Silent()
    reporter.note(f"Running tasks on the {which}: {', '.join(selection.names)}")
    return run_tasks(
        model,
        tokenizer,
        selection,
        limit=request.limit,
        num_fewshot=request.num_fewshot,
        reporter=reporter,
    )


def _report(
    request: EvaluationRequest,
    blocks: TokenBlocks | None,
    perplexity: Perplexity | None,
    comparison: Comparison | None,
    tasks: tuple[TaskRow, ...],
) -> EvaluationReport:
    return EvaluationReport(
        model=request.model,
        baseline=request.baseline,
        perplexity=perplexity,
        comparison=comparison,
        tasks=tasks,
        text_fingerprint=blocks.fingerprint if blocks else None,
        tokens_available=blocks.tokens_available if blocks else None,
        limit=request.limit,
        num_fewshot=request.num_fewshot,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
