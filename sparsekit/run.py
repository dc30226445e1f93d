"""Executing a resolved recipe: plan, prune stage by stage, evaluate, report, commit."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsekit import __version__, fs
from sparsekit.checkpoint.staging import StagedCheckpoint, is_finished, recover
from sparsekit.contracts import AllocationContext
from sparsekit.data.blocks import load_blocks
from sparsekit.data.documents import TextSpec
from sparsekit.data.packing import TokenBlocks
from sparsekit.errors import CalibrationError, CheckpointError, OutputExists, PlanError, UsageError
from sparsekit.evaluate.evaluation import EvaluationReport, EvaluationRequest, evaluate
from sparsekit.evaluate.gates import GatesSpec, check
from sparsekit.evaluate.harness import find_tasks
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.source import ModelSource, open_model
from sparsekit.plan import BASE_MEMORY_BYTES, Cost, StagePlan, allocate, estimate, plan_stage, require_memory
from sparsekit.progress import Reporter
from sparsekit.prune import StageResult, checkpoint_tensors, prune_stage
from sparsekit.recipe.load import dump_yaml
from sparsekit.recipe.schema import Recipe
from sparsekit.report.pages import pages

OUTER = "outer"
"""Journal key of the shard with embeddings, final norm and head."""

# Weights and what only describes them, and what a run writes anew; everything else of a model folder goes along.
_NOT_SIDE_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx", "config.json", "README.md", "sparsekit.json", "recipe.yaml", "report.json",
    "report.html", ".*",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first weight is read."""

    recipe: Recipe
    source: ModelSource
    model: LazyModel
    plans: tuple[StagePlan, ...]
    cost: Cost

    @property
    def needs_data(self) -> bool:
        """Whether any stage reads calibration text."""
        return any(plan.needs_data for plan in self.plans)


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


def prepare(recipe: Recipe, source: ModelSource) -> Prepared:
    """Plan a recipe for a model; refuses all that can be refused without reading weights or text."""
    model = source.lazy()
    model.require_tensors()
    plans = tuple(
        plan_stage(model, stage, recipe.calibration.seed, where=f"stages.{position}")
        for position, stage in enumerate(recipe.stages)
    )
    spec = recipe.calibration
    length = spec.sequence_length or min(2048, source.max_length)
    if length > source.max_length:
        raise PlanError(
            f"calibration.sequence_length {length} is longer than the model's maximum {source.max_length}",
            hint=f"Set it to {source.max_length} or less.",
        )
    samples = spec.samples if any(plan.needs_data for plan in plans) else 0
    return Prepared(recipe, source, model, plans, estimate(model, plans, samples, length))


def default_out(recipe: Recipe, source: ModelSource) -> Path:
    """Return `<model name>-<recipe>` in the current folder."""
    return Path.cwd() / f"{source.label}-{recipe.name}"


def execute(
    prepared: Prepared,
    out: Path,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    resume: bool = True,
    evaluation: bool = True,
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
        command: What the user typed, for the model card.

    Raises:
        SparsekitError: with what is wrong; `out` is then as it was.
    """
    start = time.perf_counter()
    _refuse_source(prepared.source, out)
    if not evaluation:
        _refuse_unchecked_gates(prepared.recipe)
    if extra := prepared.model.extra:
        reporter.note(f"{len(extra)} tensors have no place in the model and are copied unchanged, first {extra[0]}")
    _require_memory(prepared, evaluation=evaluation)
    fs.require_space(out, prepared.cost.disk_bytes, "the checkpoint")
    blocks = _calibration(prepared, reporter) if prepared.needs_data else None
    if evaluation:
        _check_evaluation(prepared, reporter)
    identity = _identity(prepared, blocks)
    if is_finished(out, identity):
        recover(out)  # a run killed right after its commit left its journal
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return Outcome(out, report, missed_gates=tuple(report["missed_gates"]), already_finished=True)
    with StagedCheckpoint.open(out, identity, overwrite=overwrite, resume=resume) as staged:
        results = _run_stages(prepared, blocks, staged, reporter, resume=resume)
        _write_model_files(prepared, staged)
        scores = _evaluate(prepared, staged, reporter) if evaluation else None
        missed = check(GatesSpec(**prepared.recipe.gates.model_dump()), scores) if scores else []
        report = {
            "schema": 1,
            "run_id": staged.run_id,
            "command": list(command),
            "model": _describe_model(prepared),
            "recipe": prepared.recipe.resolved(),
            "calibration": _describe_blocks(blocks),
            "stages": [_describe_stage(plan, result) for plan, result in zip(prepared.plans, results, strict=True)],
            "bytes": {"source": prepared.source.weights.total_bytes, "output": _weights_bytes(staged.folder)},
            "evaluation": scores.to_json() if scores else None,
            "missed_gates": missed,
            "seconds": round(time.perf_counter() - start, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "tools": tools(),
        }
        written = pages(report, prepared.source.folder)
        for name, data in written.items():
            staged.write_file(name, data)
        # A tensor that several stages pruned is what the last of them made of it.
        tensors = {name: facts for result in results for name, facts in result.tensors.items()}
        committed = staged.commit(
            {"layout": "dense", "tools": tools(), "tensors": tensors, "base": _base(report["model"])},
            volatile=written.keys(),  # they hold timings
        )
    for position in range(len(prepared.plans) - 1):
        with _intermediate(out, staged.run_id, position, resume=resume) as work:
            work.discard()
    return Outcome(committed, report, scores, tuple(missed))


def describe_plan(prepared: Prepared, out: Path) -> dict[str, Any]:
    """Return what `execute` would do, as JSON values: per stage and kind of linear, with the cost.

    Budgets of an allocator that looks at the model first are known only when it runs; its kinds show the average.
    """
    return {
        "model": prepared.source.name,
        "recipe": prepared.recipe.name,
        "out": str(out),
        "blocks": prepared.model.blocks,
        "stages": [_describe_plan(prepared.model, plan) for plan in prepared.plans],
        "cost": asdict(prepared.cost),
    }


def _describe_plan(model: LazyModel, plan: StagePlan) -> dict[str, Any]:
    share = plan.budget / plan.numel
    budgets = {linear.name: share * linear.numel for linear in plan.targets}
    if not plan.allocator.looks:
        budgets |= allocate(plan, AllocationContext(plan.targets, plan.pattern, lambda needs: iter(())))
    kinds: dict[tuple[str, int, int], list[float]] = {}
    for linear in plan.targets:
        kind = linear.name.removeprefix(f"{model.stack.prefix(linear.block)}.")
        kind = re.sub(r"\.\d+\.", ".*.", kind)  # experts of one layer are one kind
        key = (kind, linear.out_features, linear.in_features)
        kinds.setdefault(key, []).append(1 - budgets[linear.name] / linear.numel)
    return {
        "method": plan.stage.method,
        "allocate": plan.stage.allocator()[0],
        "pattern": str(plan.pattern),
        "sparsity": plan.stage.sparsity,
        "targets": len(plan.targets),
        "ignored": list(plan.ignored),
        "coverage": plan.coverage,
        "kept": plan.budget,
        "numel": plan.numel,
        "linears": {
            linear.name: {"shape": [linear.out_features, linear.in_features], "kept": round(budgets[linear.name])}
            for linear in plan.targets
        },
        "kinds": [
            {
                "kind": kind,
                "shape": [rows, columns],
                "count": len(sparsities),
                "pattern": str(plan.pattern),
                "sparsity_range": [min(sparsities), max(sparsities)],
            }
            for (kind, rows, columns), sparsities in kinds.items()
        ],
    }


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


def _refuse_unchecked_gates(recipe: Recipe) -> None:
    """A gate that is passed because nobody measured is worse than none."""
    gates = recipe.gates.model_dump(exclude_defaults=True)
    if gates:
        raise UsageError(
            f"--no-evaluate leaves the recipe's gates unchecked: {', '.join(gates)}",
            hint="Leave --no-evaluate out, or take the gates out of the recipe.",
        )


def _require_memory(prepared: Prepared, *, evaluation: bool) -> None:
    """Refuse before the work what would be killed in the middle of it, or at its end."""
    require_memory(
        prepared.cost.memory_bytes,
        "the run",
        "Lower calibration.samples or calibration.sequence_length, or use a machine with more memory.",
    )
    if evaluation:
        require_memory(
            BASE_MEMORY_BYTES + 2 * prepared.source.weights.total_bytes,
            "measuring the pruned beside the dense model",
            "Add --no-evaluate, and measure with sparsekit eval where there is more memory.",
        )


def tools() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "sparsekit": __version__,
        **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _calibration(prepared: Prepared, reporter: Reporter) -> TokenBlocks:
    spec = TextSpec(**prepared.recipe.calibration.model_dump())
    source = prepared.source
    blocks = load_blocks(
        spec, source.tokenizer, model_max_length=source.max_length, part="calibration", reporter=reporter
    )
    highest, vocabulary = int(blocks.ids.max()), prepared.model.vocabulary
    if highest >= vocabulary:
        raise CalibrationError(
            f"token id {highest:,} does not exist in the model's vocabulary of {vocabulary:,}",
            where=blocks.source,
            hint="Use the tokenizer that belongs to the model.",
        )
    return blocks


def _identity(prepared: Prepared, blocks: TokenBlocks | None) -> dict[str, Any]:
    versions = tools()
    del versions["python"]  # does not change a result
    return {
        "recipe": prepared.recipe.resolved(),
        "model": prepared.source.identity(),
        "calibration": blocks.fingerprint if blocks else None,
        "versions": versions,
    }


def _run_stages(
    prepared: Prepared, blocks: TokenBlocks | None, staged: StagedCheckpoint, reporter: Reporter, *, resume: bool
) -> list[StageResult]:
    """Run the stages in order; each reads its blocks from the shards of the one before.

    Every stage but the last works in a folder of its own beside OUT, so that a killed run finds its shards again.
    """
    count = prepared.model.blocks + 1
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count)]
    results = []
    for position, plan in enumerate(prepared.plans):
        samples = blocks.ids if blocks is not None and plan.needs_data else None
        if position == len(prepared.plans) - 1:
            results.append(prune_stage(prepared.model, plan, samples, staged, names, reporter))
        else:
            with _intermediate(staged.out, staged.run_id, position, resume=resume) as work:
                results.append(prune_stage(prepared.model, plan, samples, work, names, reporter))
    return results


def _intermediate(out: Path, run_id: str, position: int, *, resume: bool) -> StagedCheckpoint:
    folder = out.with_name(f"{out.name}.stage-{position}")
    return StagedCheckpoint.open(folder, {"run": run_id, "stage": position}, overwrite=True, resume=resume)


def _write_model_files(prepared: Prepared, staged: StagedCheckpoint) -> None:
    """Write what makes the shards a model: the outer shard, index, config, recipe, side files of the source."""
    model, source = prepared.model, prepared.source
    count = model.blocks + 1
    if staged.finished(OUTER) is None:
        name = f"model-{count:05d}-of-{count:05d}.safetensors"
        staged.write_shard(OUTER, name, checkpoint_tensors(model, None, {}), {})
    staged.write_file("model.safetensors.index.json", _index(staged.folder))
    staged.write_file("config.json", _config(prepared))
    staged.write_file("recipe.yaml", dump_yaml(prepared.recipe.resolved()).encode())
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_SIDE_FILES):
            staged.copy_file(path, path.name)


def _index(folder: Path) -> bytes:
    from sparsekit.checkpoint.safetensors_file import read_header

    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("model-*.safetensors")):
        for name, entry in read_header(path).tensors.items():
            weight_map[name] = path.name
            total += entry.end - entry.start
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _config(prepared: Prepared) -> bytes:
    """Return the source's config.json, with the dtype the weights now have and a note of what was done.

    A top-level key is inert in transformers and vLLM; one inside quantization_config would not be.
    """
    config = json.loads((prepared.source.folder / "config.json").read_text(encoding="utf-8"))
    if prepared.source.cast:
        config.pop("torch_dtype", None)
        config["dtype"] = str(prepared.source.dtype).removeprefix("torch.")
    stage = prepared.recipe.stages[-1]
    config["sparsity_config"] = {
        "tool": "sparsekit",
        "recipe": prepared.recipe.name,
        "method": stage.method,
        "sparsity": stage.sparsity,
        "pattern": stage.pattern,
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _evaluation_text(prepared: Prepared) -> TextSpec:
    spec = prepared.recipe.evaluate
    length = min(spec.sequence_length or 2048, prepared.source.max_length)
    return TextSpec(source=spec.text, samples=spec.samples, sequence_length=length)


def _check_evaluation(prepared: Prepared, reporter: Reporter) -> None:
    """Find out before the work, not after it, that text, tokenizer or tasks of the evaluation are missing."""
    source = prepared.source
    text = _evaluation_text(prepared)
    load_blocks(text, source.tokenizer, model_max_length=source.max_length, part="held_out", reporter=reporter)
    if prepared.recipe.evaluate.tasks:
        find_tasks(prepared.recipe.evaluate.tasks, reporter=reporter)


def _evaluate(prepared: Prepared, staged: StagedCheckpoint, reporter: Reporter) -> EvaluationReport:
    """Measure the staged checkpoint, under the name it will have, against the dense model."""
    source = prepared.source
    name = staged.out.name

    def open_for_evaluation(wanted: str) -> tuple[Any, Any]:
        trust = source.trust_remote_code
        opened = open_model(str(staged.folder), reporter, trust_remote_code=trust) if wanted == name else source
        return opened.load(), source.tokenizer

    request = EvaluationRequest(
        model=name,
        baseline=source.label,
        text=_evaluation_text(prepared),
        tasks=prepared.recipe.evaluate.tasks,
        open_model=open_for_evaluation,
        reporter=reporter,
    )
    return evaluate(request)


def _describe_model(prepared: Prepared) -> dict[str, Any]:
    source = prepared.source
    return {
        "name": source.name,
        "label": source.label,
        "revision": source.revision,
        "model_type": source.config.model_type,
        "blocks": prepared.model.blocks,
        **source.identity(),
    }


def _base(model: dict[str, Any]) -> dict[str, Any]:
    """Return the source model as the manifest names it: manifests are published, local paths are not."""
    return {key: value for key, value in model.items() if key != "name"}


def _describe_blocks(blocks: TokenBlocks | None) -> dict[str, Any] | None:
    if blocks is None:
        return None
    samples, length = blocks.ids.shape
    return {
        "source": blocks.source,
        "samples": samples,
        "sequence_length": length,
        "tokens": samples * length,
        "fingerprint": blocks.fingerprint,
    }


def _describe_stage(plan: StagePlan, result: StageResult) -> dict[str, Any]:
    kept = sum(int(facts["kept"]) for facts in result.linears.values())
    if kept != plan.budget:
        raise CheckpointError(f"{kept} weights are kept in all linears together, the budget is {plan.budget}")
    return {
        "method": plan.stage.method,
        "options": plan.stage.method_options().model_dump(mode="json"),
        "allocate": plan.stage.allocator()[0],
        "pattern": str(plan.pattern),
        "sparsity": plan.stage.sparsity,
        "achieved_sparsity": 1 - kept / plan.numel,
        "kept": kept,
        "numel": plan.numel,
        "coverage": plan.coverage,
        "ignored": list(plan.ignored),
        "linears": result.linears,
        "notes": result.notes,
        "resumed_blocks": result.resumed,
    }


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
