"""Scores of a block's signals, and the gates that stand at a quantile of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.activation_plan import ActivationPlan
from sparsekit.contracts import Site, Stat
from sparsekit.lazy import torch
from sparsekit.models.gates import Gate, Gaussian, OfPrompt, Placed, Threshold, TopK, half_normal
from sparsekit.models.sites import Place
from sparsekit.stats.absolute import Absolute
from sparsekit.stats.scores import Scores
from sparsekit.walk import Visit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """What calibration has seen of a signal.

    Attributes:
        scores: Histogram of |a_j| w_j.
        importance: w, [width] or [experts, width] float32; None: ones.
    """

    scores: Scores
    importance: Tensor | None


def watch_scores(visit: Visit, plan: ActivationPlan, places: Collection[Place]) -> dict[str, Signal]:
    """Return what the samples of a walk show of these signals, as the block is now."""
    above = _watch_up(visit, plan, places)
    weights = {
        place.site.name: [
            plan.calibrator.importance(place.site, reader.weight().to(torch.float32), above.get(place.site.name, {}))
            for reader in place.readers
        ]
        for place in places
    }
    prefix, skip = f"{visit.prefix}.", plan.stage.dense_tokens
    inputs: dict[str, Stat] = {}
    outputs: dict[str, Stat] = {}
    for place in places:
        name, width = place.site.name, place.site.width
        for reader, w in zip(place.readers, weights[name], strict=True):
            if place.site.kind == "gate":
                outputs[name.removeprefix(prefix)] = Scores(width, w, skip)
            else:  # which tokens an expert gets is not known here; the first are few
                inputs[reader.name] = Scores(width, w, skip if place.experts is None else 0)
    seen = visit.watch(inputs, outputs)
    return {place.site.name: _signal(place, seen, prefix, weights[place.site.name]) for place in places}


def _signal(place: Place, seen: Mapping[str, Stat], prefix: str, weights: list[Tensor | None]) -> Signal:
    """Return what was seen of a place; scores of all experts are in one histogram."""
    name = place.site.name
    keys = [name.removeprefix(prefix)] if place.site.kind == "gate" else [reader.name for reader in place.readers]
    pooled = Scores(place.site.width)
    for key in keys:
        pooled.merge(seen[key])
    known = [w for w in weights if w is not None]
    return Signal(pooled, None if not known else known[0] if place.experts is None else torch.stack(known))


def _watch_up(visit: Visit, plan: ActivationPlan, places: Collection[Place]) -> Mapping[str, Mapping[str, Stat]]:
    """Return the statistics of what gates are multiplied by, for the sites that are gates."""
    if not plan.calibrator.needs:
        return {}
    gates = {place.site.name: place.site for place in places if place.site.kind == "gate" and place.site.up}
    linears = {linear.name: linear for linear in visit.linears}
    paths = {name: str(site.up).removeprefix(f"{visit.prefix}.") for name, site in gates.items()}
    seen = visit.watch(
        {}, {paths[name]: Absolute(linears[str(site.up)].info.out_features) for name, site in gates.items()}
    )
    found: dict[str, dict[str, Stat]] = {}
    for name, site in gates.items():
        stat = seen[paths[name]]
        rows = torch.arange(stat.in_features)[-site.width :]  # of a fused linear, up is the second half
        found[name] = {"absolute": stat.reordered(rows)}
    return found


def place_gate(plan: ActivationPlan, place: Place, level: float, signal: Signal, dtype: torch.dtype) -> Placed:
    """Return the gate that leaves this share of a signal out, as calibration has seen it.

    Args:
        plan: The stage.
        place: The signal's place.
        level: Share of what the signal costs to save, above 0.
        signal: What was seen of it.
        dtype: Of the model; thresholds are rounded to it, so that moving the model to it changes none.
    """
    remainder = (
        plan.calibrator.remainder(place.site, place.readers[0].weight().to(torch.float32), level)
        if place.site.kind == "input" and place.experts is None
        else None
    )
    if remainder is not None:
        remainder = type(remainder)(remainder.sparsity, remainder.left.to(dtype), remainder.right.to(dtype))
        level = remainder.sparsity
    return Placed(place.site.kind, _gate(plan, place, level, signal, dtype), remainder)


def _gate(plan: ActivationPlan, place: Place, level: float, signal: Signal, dtype: torch.dtype) -> Gate:
    w = signal.importance
    if plan.calibrator.rule == "top_k":
        return TopK(kept_entries(place.site, level), torch.ones(1) if w is None else w)
    if plan.calibrator.rule == "prompt":
        return OfPrompt(kept_entries(place.site, level))
    if plan.calibrator.rule == "gaussian":
        return Gaussian(half_normal(level))
    tau = torch.tensor([signal.scores.quantile(level)])
    return Threshold((tau if w is None else tau / w).to(dtype).to(torch.float32))


def kept_entries(site: Site, level: float) -> int:
    """Return how many entries of a signal are kept at a level, at least one."""
    return max(1, int(site.width * (1 - level)))
