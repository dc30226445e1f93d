"""What an activation stage will do and has done, as JSON values for the plan and for report.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sparsekit.activation_plan import ActivationPlan
from sparsekit.lazy import torch
from sparsekit.models.gate_files import protocol
from sparsekit.models.lazy_model import LazyModel
from sparsekit.stats.dropped import TOGETHER, Dropped
from sparsekit.thinning import Reading, Thinned

_USAGE_BINS = 20


def describe_activation_plan(model: LazyModel, plan: ActivationPlan) -> dict[str, Any]:
    """Return what a stage would do."""
    kinds: dict[str, int] = {}
    for site in plan.sites:
        kind = site.name.removeprefix(f"{model.stack.prefix(site.block)}.")
        kinds[kind] = kinds.get(kind, 0) + 1
    return {
        **_asked(plan),
        "signals": len(plan.sites),
        "kinds": [{"kind": kind, "count": count} for kind, count in kinds.items()],
        "coverage": plan.coverage,
        "numel": plan.numel,
    }


def describe_thinned(model: LazyModel, plan: ActivationPlan, thinned: Thinned) -> dict[str, Any]:
    """Return what a stage did.

    `weights_per_token` counts the weights that products with one token read: those of the blocks and the head.
    """
    head = model.module.get_output_embeddings()
    whole = model.stack.matrix_weights() + (0 if head is None else head.weight.numel())
    skipped = thinned.held_out.share * plan.numel
    item = torch.empty(0, dtype=model.dtype).element_size()
    return {
        **_asked(plan),
        "found_sparsity": thinned.sparsity,
        "coverage": plan.coverage,
        "calibrations": thinned.attempts,
        "search": [{"sparsity": sparsity, "ratio": ratio} for sparsity, ratio in thinned.search],
        "held_out": _reading(thinned.held_out),
        "other_text": {name: _reading(reading) for name, reading in thinned.others.items()},
        "weights_per_token": {"dense": whole, "read": round(whole - skipped)},
        "bytes_per_token": {"dense": whole * item, "read": round(whole - skipped) * item},
        "signals": {
            site.name: {
                "block": site.block,
                "numel": site.numel,
                "asked": thinned.levels[site.name],
                **_dropped(thinned.held_out.dropped.get(site.name)),
            }
            for site in plan.sites
        },
        "usage": _usage(model, plan, thinned),
    }


def _asked(plan: ActivationPlan) -> dict[str, Any]:
    stage = plan.stage
    return {
        "method": stage.method,
        "options": stage.method_options().model_dump(mode="json"),
        "sparsity": stage.sparsity,
        "budget": None if stage.budget is None else stage.budget.model_dump(mode="json"),
        "allocate": stage.allocate,
        "propagate": stage.propagate,
        "protocol": protocol(stage.dense_tokens, stage.prefill, by_prompt=plan.by_prompt),
    }


def _reading(reading: Reading) -> dict[str, Any]:
    stats = reading.dropped.values()
    return {
        "sparsity": reading.share,
        "perplexity_ratio": reading.ratio,
        "tokens": reading.tokens,
        "spread": _mean(stat.spread for stat in stats),
        f"together_{TOGETHER}": _mean(stat.together for stat in stats),
    }


def _dropped(stat: Dropped | None) -> dict[str, float]:
    if stat is None:
        return {"achieved": 0.0, "spread": 0.0, f"together_{TOGETHER}": 0.0}
    return {"achieved": stat.share, "spread": stat.spread, f"together_{TOGETHER}": stat.together}


def _usage(model: LazyModel, plan: ActivationPlan, thinned: Thinned) -> dict[str, list[int]]:
    """Return for each kind of signal how many of its entries are kept how often: bins from never to always."""
    found: dict[str, Any] = {}
    for site in plan.sites:
        stat = thinned.held_out.dropped.get(site.name)
        if stat is None:
            continue
        kind = re.sub(r"\.\d+\.", ".*.", site.name.removeprefix(f"{model.stack.prefix(site.block)}."))
        counts = torch.histc(stat.usage(), bins=_USAGE_BINS, min=0, max=1)
        found[kind] = found[kind] + counts if kind in found else counts
    return {kind: [int(count) for count in counts] for kind, counts in found.items()}


def _mean(values: Iterable[float]) -> float:
    listed = [value for value in values if value == value]
    return sum(listed) / len(listed) if listed else 0.0
