"""Plans and results as JSON values: what --dry-run shows, what report.json and the manifest hold."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsekit import __version__
from sparsekit.allocation import allocate_unseen
from sparsekit.contracts import Probes
from sparsekit.data.packing import TokenBlocks
from sparsekit.describe_activations import describe_activation_plan
from sparsekit.errors import CheckpointError
from sparsekit.models.lazy_model import LazyModel
from sparsekit.plan import ReshapePlan, StagePlan
from sparsekit.prepared import Prepared
from sparsekit.prune import StageResult
from sparsekit.recipe.stages import PARTS, ReshapeStage
from sparsekit.reshaping import ReshapeResult


def describe_plan(prepared: Prepared, out: Path) -> dict[str, Any]:
    """Return what `execute` would do, as JSON values: per stage and kind of linear, with the cost.

    Budgets of an allocator that looks at the model first are known only when it runs; its kinds show the average.
    """
    return {
        "model": prepared.source.name,
        "recipe": prepared.recipe.name,
        "out": str(out),
        "blocks": prepared.model.blocks,
        "reshapes": [_describe_reshape(plan) for plan in prepared.reshapes],
        "stages": [_describe_plan(prepared.model, plan) for plan in prepared.plans],
        "activations": prepared.activations and describe_activation_plan(prepared.model, prepared.activations),
        "notes": list(prepared.notes),
        "cost": asdict(prepared.cost),
        "nulls": {name: asdict(null.cost) for name, null in prepared.nulls.items()},
    }


def _describe_plan(model: LazyModel, plan: StagePlan) -> dict[str, Any]:
    budgets = allocate_unseen(plan)
    kinds: dict[tuple[str, int, int], list[float]] = {}
    for linear in plan.targets:
        kind = linear.name.removeprefix(f"{model.stack.prefix(linear.block)}.")
        kind = re.sub(r"\.\d+\.", ".*.", kind)  # experts of one layer are one kind
        key = (kind, linear.out_features, linear.in_features)
        kinds.setdefault(key, []).append(1 - budgets[linear.name] / linear.numel)
    return {
        "method": plan.stage.method,
        **_parts(plan),
        "allocated": not plan.allocator.looks,
        "search": _search(plan.allocator.probes()),
        "pattern": str(plan.pattern),
        "sparsity": plan.stage.sparsity,
        "overrides": plan.stage.overrides,
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


def _describe_reshape(plan: ReshapePlan) -> dict[str, Any]:
    return {
        "method": plan.stage.method,
        "options": plan.stage.method_options().model_dump(mode="json"),
        "search": _search(plan.reshaper.probes()),
    }


def _search(probes: Probes | None) -> dict[str, float] | None:
    """Return the tokens or the seconds that a search may spend, None without one."""
    if probes is None or not (probes.searched_tokens or probes.searched_seconds):
        return None
    return {"tokens": probes.searched_tokens, "seconds": probes.searched_seconds}


def _parts(plan: StagePlan) -> dict[str, Any]:
    """Return the names of allocator, refiner and update; None for those a stage has not."""
    found = {room: plan.stage.part(room) for room in PARTS}
    return {room: part and part[0] for room, part in found.items()}


def describe_model(prepared: Prepared) -> dict[str, Any]:
    """The source model, for report.json."""
    source = prepared.source
    return {
        "name": source.name,
        "label": source.label,
        "revision": source.revision,
        "model_type": source.config.model_type,
        "blocks": prepared.model.blocks,
        **source.identity(),
    }


def base(model: dict[str, Any]) -> dict[str, Any]:
    """Return the source model as the manifest names it: manifests are published, local paths are not."""
    return {key: value for key, value in model.items() if key != "name"}


def describe_blocks(blocks: TokenBlocks | None) -> dict[str, Any] | None:
    """The calibration text, None when a run read none."""
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


def describe_stage(plan: StagePlan, result: StageResult) -> dict[str, Any]:
    """What a stage did; proves that the realised counts meet the budget."""
    kept = sum(int(facts["kept"]) for facts in result.linears.values())
    if kept != plan.budget:
        raise CheckpointError(f"{kept} weights are kept in all linears together, the budget is {plan.budget}")
    return {
        "method": plan.stage.method,
        "options": plan.stage.method_options().model_dump(mode="json"),
        **_parts(plan),
        "pattern": str(plan.pattern),
        "sparsity": plan.stage.sparsity,
        "overrides": plan.stage.overrides,
        "allocation": result.allocation,
        "achieved_sparsity": 1 - kept / plan.numel,
        "kept": kept,
        "numel": plan.numel,
        "coverage": plan.coverage,
        "ignored": list(plan.ignored),
        "linears": result.linears,
        "notes": result.notes,
        "resumed_blocks": result.resumed,
    }


def describe_reshape(stage: ReshapeStage, result: ReshapeResult) -> dict[str, Any]:
    """What a reshape stage did."""
    before, after = result.parameters
    return {
        "method": stage.method,
        "options": stage.method_options().model_dump(mode="json"),
        "plan": result.plan,
        "facts": result.facts,
        "blocks": len(result.blocks),
        "parameters_before": before,
        "parameters_after": after,
    }


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


def weights_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
