"""Tasks of lm-eval, run on a model that is already loaded.

Tasks are looked up first in `include_path`, then among those that ship with sparsekit, then among lm-eval's
own, which nearly all need the Hub. A local task names its data files relative to its own YAML file. A task
file may name Python functions, which lm-eval imports: use only folders that you trust.

Accuracy-like metrics are means over documents. Their standard errors are computed here from the single
values, and those values are kept, so that two models can be compared document by document.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.errors import EvaluationError, MissingExtra
from sparsekit.progress import Reporter, Silent
from sparsekit.recipe.catalog import trees

FEWSHOT_SEED = 1234
"""lm-eval's default, so that few-shot prompts are those of published numbers."""


@dataclass(frozen=True)
class TaskMetric:
    """One number of one task.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric, with its filter where that is not `none`: `exact_match,strip`.
        value: The number.
        stderr: Its standard error, where the metric is a mean over documents.
        higher_is_better: None where the task does not say.
        samples: Documents evaluated; None where lm-eval does not say.
        per_document: Value of each document in order, where the metric is their mean; otherwise empty.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None
    per_document: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that exist, with their documents loaded; may be run on several models.

    Attributes:
        names: Tasks, groups and tags, wildcards resolved.
        loaded: What lm-eval's TaskManager made of them.
    """

    names: tuple[str, ...]
    loaded: Any


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | TaskSelection,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    reporter: Reporter | None = None,
) -> list[TaskMetric]:
    """Run lm-eval tasks and return their metrics in the order lm-eval reports them.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        tasks: What `find_tasks` returned, or the names it takes.
        include_path: Folder with more task files.
        limit: Evaluate only the first documents of each task.
        num_fewshot: Examples in each prompt; None leaves it to the task.
        batch_size: Sequences run at once.
        reporter: Receives progress.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvaluationError: An unknown task, data that cannot be had, or results that make no sense.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be at least 1, got {limit}", where="tasks")
    reporter = reporter or Silent()
    if not isinstance(tasks, TaskSelection):
        tasks = find_tasks(tasks, include_path=include_path, reporter=reporter)
    import lm_eval.evaluator

    loaded = tasks.loaded
    with _quiet():
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        lm = _language_model(model, tokenizer, batch_size, reporter)
        results = lm_eval.evaluator.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return parse_results(results)


def require_lm_eval() -> None:
    """Raise MissingExtra unless lm-eval can be imported; call it before anything that takes long."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"tasks need lm-eval, which is not installed ({error})", hint="pip install 'sparsekit[eval]'"
        ) from error


def missing_lm_eval() -> MissingExtra | None:
    """Return why tasks cannot be run here, None if they can."""
    try:
        require_lm_eval()
    except MissingExtra as error:
        return error
    return None


def shipped_tasks() -> Path:
    """Return the folder of the tasks that ship with sparsekit."""
    return trees().configs / "eval" / "tasks"


def find_tasks(
    tasks: Sequence[str], *, include_path: str | Path | None = None, reporter: Reporter | None = None
) -> TaskSelection:
    """Look up tasks and load their documents; do it before anything that takes long.

    Args:
        tasks: Names of tasks, groups or tags; `*` and `?` are wildcards.
        include_path: Folder with more task files.
        reporter: Receives progress.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvaluationError: An unknown task, or a task whose data cannot be had.
    """
    require_lm_eval()
    with _quiet():
        return _load(tasks, include_path, reporter or Silent())


def parse_results(results: Any) -> list[TaskMetric]:
    """Return the metrics in what `lm_eval.evaluate` returned.

    Raises:
        EvaluationError: Nothing in it is a number with a name.
    """
    if not isinstance(results, Mapping):
        raise EvaluationError(f"lm-eval returned {type(results).__name__}, need results", where="tasks")
    metrics: dict[tuple[str, str], TaskMetric] = {}
    for section in ("results", "groups"):
        for task, values in (results.get(section) or {}).items():
            for key, value in values.items():
                metric = _metric(results, task, key, value, values)
                if metric is not None:
                    metrics.setdefault((task, metric.metric), metric)
    if not metrics:
        raise EvaluationError("lm-eval returned no metric", where=", ".join(results.get("results") or {}) or "tasks")
    return list(metrics.values())


def _metric(
    results: Mapping[str, Any], task: str, key: str, value: Any, values: Mapping[str, Any]
) -> TaskMetric | None:
    """Return the metric under `key` ("acc,none"), or None if it is something else."""
    name, comma, filter_name = key.partition(",")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not comma or not is_number or name.endswith("_stderr"):
        return None
    per_document = _per_document(results, task, name, filter_name, float(value))
    n = len(per_document)
    stderr = _number(values.get(f"{name}_stderr,{filter_name}"))
    if stderr is None and n > 1:
        mean = sum(per_document) / n
        stderr = math.sqrt(sum((x - mean) ** 2 for x in per_document) / (n - 1) / n)
    counts = (results.get("n-samples") or {}).get(task) or {}
    samples = counts.get("effective") or values.get("sample_len") or n or None
    return TaskMetric(
        task=task,
        metric=name if filter_name == "none" else key,
        value=float(value),
        stderr=stderr,
        higher_is_better=((results.get("higher_is_better") or {}).get(task) or {}).get(name),
        samples=samples if isinstance(samples, int) else None,
        per_document=per_document,
    )


def _per_document(
    results: Mapping[str, Any], task: str, name: str, filter_name: str, value: float
) -> tuple[float, ...]:
    """Return the values of the documents if the metric is their mean, else nothing."""
    records = [r for r in (results.get("samples") or {}).get(task, ()) if r.get("filter") == filter_name]
    found = [_number(record.get(name)) for record in sorted(records, key=lambda r: r.get("doc_id", 0))]
    numbers = tuple(number for number in found if number is not None)
    if not numbers or len(numbers) != len(found):
        return ()
    return numbers if math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-9) else ()


def _number(value: Any) -> float | None:
    """Return `value` as a float; lm-eval writes "N/A" where it has none."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None


def _load(tasks: Sequence[str], include_path: str | Path | None, reporter: Reporter) -> TaskSelection:
    import datasets

    manager, names = _resolve(tasks, include_path, reporter)
    try:
        return TaskSelection(tuple(names), manager.load(names))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EvaluationError(
            f"the task's data cannot be loaded: {reason[0]}",
            where=", ".join(names),
            hint="Without the Hub use tasks of sparsekit: sparsekit_continue, sparsekit_smoke_choice, "
            "sparsekit_smoke_generate, or your own with --include-path.",
        ) from error


def _resolve(tasks: Sequence[str], include_path: str | Path | None, reporter: Reporter) -> tuple[Any, list[str]]:
    """Return a TaskManager that knows all `tasks`, and their names with wildcards resolved."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationError("no such folder", where=str(include_path), hint="Check --include-path.")
    folders = [shipped_tasks(), *([Path(include_path)] if include_path is not None else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(not manager.match_tasks([task]) for task in tasks):
        reporter.note("Reading the list of lm-eval's own tasks")
        manager = TaskManager(include_path=folders, include_defaults=True)
    names: dict[str, None] = {}
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.6)
            guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise EvaluationError(
                f"Unknown task {task!r}.{guess}",
                hint="List them with: lm_eval ls tasks; own tasks need --include-path.",
            )
        names.update(dict.fromkeys(matches))
    _anchor_data_files(manager, folders)
    return manager, list(names)


def _anchor_data_files(manager: Any, folders: Sequence[Path]) -> None:
    """Make the data files of local tasks relative to their YAML file; lm-eval takes the current directory."""
    from lm_eval.tasks._yaml_loader import load_yaml

    roots = [folder.resolve() for folder in folders]
    for entry in manager.task_index.values():
        path = entry.yaml_path
        if path is None or not any(Path(path).resolve().is_relative_to(root) for root in roots):
            continue
        options = (entry.cfg or {}).get("dataset_kwargs") or {}
        if "data_files" not in options or not entry.cfg.get("task"):
            continue
        here = Path(path).resolve().parent
        entry.cfg = load_yaml(path) | {
            "dataset_kwargs": {**options, "data_files": _anchored(options["data_files"], here)}
        }
        entry.yaml_path = None  # lm-eval would read the file again and lose the resolved paths


def _anchored(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _anchored(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_anchored(value, folder) for value in files]
    return files if "://" in files else str(folder / files)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Do what lm-eval's own entry does: a task that fixes 0 examples keeps it."""
    fixed = task.get_config("num_fewshot")
    if num_fewshot is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _language_model(model: Any, tokenizer: Any, batch_size: int, reporter: Reporter) -> Any:
    from lm_eval.models.huggingface import HFLM

    class ReportingLM(HFLM):  # type: ignore[misc]
        """lm-eval's adapter with progress through `reporter` instead of bars of its own."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with _step(reporter, "answer likelihoods", len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with _step(reporter, "answer likelihoods", None):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with _step(reporter, "generation", len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, *args, **{**options, "disable_tqdm": True})

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            reporter.advance("answer likelihoods", len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            tokens = super()._model_generate(context, *args, **options)
            reporter.advance("generation", len(context))
            return tokens

    return ReportingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextlib.contextmanager
def _step(reporter: Reporter, task: str, total: int | None) -> Iterator[None]:
    reporter.start(task, total, "requests")
    try:
        yield
    finally:
        reporter.finish(task)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval and datasets say off stdout, and their warnings and bars off the screen."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
