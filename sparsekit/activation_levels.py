"""How much of each signal is left out, so that the blocks' outputs change least.

Every signal is thinned out alone, at nine levels, with the rest of its block dense, and the relative squared error of
the block's output is noted, averaged over tokens. Then the steps that save most weights for their error are taken until
the target is met. Errors are not convex, so the steps run along the lower convex hull of each signal's errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sparsekit import ranks
from sparsekit.activation_plan import LEVELS, ActivationPlan
from sparsekit.contracts import Site
from sparsekit.lazy import torch
from sparsekit.models.expert_gates import place_at
from sparsekit.models.gates import Scope
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.sites import Place
from sparsekit.progress import Reporter
from sparsekit.signals import Signal, place_gate, watch_scores
from sparsekit.walk import Visit, walk

if TYPE_CHECKING:
    from torch import Tensor

Errors = Mapping[str, Sequence[float]]
"""Name of a site -> errors at LEVELS."""


def uniform_levels(plan: ActivationPlan, sparsity: float) -> dict[str, float]:
    """Return the same level for all signals."""
    return {site.name: sparsity for site in plan.sites}


def allocated_levels(plan: ActivationPlan, errors: Errors, sparsity: float) -> dict[str, float]:
    """Return the level of every signal; weighed by the weights they skip, their mean is `sparsity`.

    Args:
        plan: Its allocation says whether each block has that mean, or only the whole model.
        errors: Of all sites.
        sparsity: Share of the weights to skip.
    """
    if plan.stage.allocate == "global":
        return spend(plan.sites, errors, sparsity)
    blocks: dict[int, list[Site]] = {}
    for site in plan.sites:
        blocks.setdefault(site.block, []).append(site)
    return {name: level for sites in blocks.values() for name, level in spend(sites, errors, sparsity).items()}


def spend(sites: Sequence[Site], errors: Errors, sparsity: float) -> dict[str, float]:
    """Return levels whose mean, weighed by the weights that sites skip, is `sparsity`, for little error.

    Raises levels in the order of the slopes of the errors' lower convex hulls; the last step is cut to fit.
    """
    left = sparsity * sum(site.numel for site in sites)
    steps = sorted(
        ((slope, site.name, site.numel, rise) for site in sites for slope, rise in _hull(site, errors)),
        key=lambda step: step[0],
    )
    levels = {site.name: 0.0 for site in sites}
    for _, name, numel, rise in steps:
        gain = min(rise * numel, left)
        levels[name] += gain / numel
        left -= gain
        if left <= 0:
            break
    return levels


def _hull(site: Site, errors: Errors) -> Iterator[tuple[float, float]]:
    """Yield (error per skipped weight, rise of the level) along the lower convex hull of a site's errors."""
    points = [(0.0, 0.0), *zip(LEVELS, errors[site.name], strict=True)]
    at = 0
    while at < len(points) - 1:
        level, error = points[at]
        slopes = [(e - error) / ((to - level) * site.numel) for to, e in points[at + 1 :]]
        best = min(range(len(slopes)), key=slopes.__getitem__)
        yield slopes[best], points[at + 1 + best][0] - level
        at += 1 + best


def measure_errors(model: LazyModel, plan: ActivationPlan, samples: Tensor, reporter: Reporter) -> Errors:
    """Return the relative squared error of the block's output for every signal, thinned out alone, at every level.

    Args:
        model: The model; every block sees what the dense ones before it return.
        plan: The stage.
        samples: ids [samples, sequence_length].
        reporter: Told about every block.
    """
    errors: dict[str, list[float]] = {}
    for visit in walk(model, samples, reporter, task=f"errors ({plan.stage.method})"):
        places = plan.places(model, visit.index)
        scores = watch_scores(visit, plan, places)
        dense = visit.outputs()
        for place in places:
            errors[place.site.name] = [
                _error(visit, plan, place, level, scores[place.site.name], dense) for level in LEVELS
            ]
    return errors


def _error(
    visit: Visit, plan: ActivationPlan, place: Place, level: float, signal: Signal, dense: list[Tensor]
) -> float:
    """Return the mean over tokens of |y' - y|^2 / |y|^2 of the block's outputs; tokens that stay dense do not count.

    Each token is compared with itself: the states of a few are so large that sums would see nothing else.
    """
    skip = plan.dense(dense[0].shape[-2])
    placed = place_gate(plan, place, level, signal, visit.dtype)
    undo = place_at(place, placed, Scope(skip))
    try:
        thinned = visit.outputs()
    finally:
        undo()
    error, tokens = 0.0, 0
    for y, z in zip(dense, thinned, strict=True):
        y, z = y[..., skip:, :].double(), z[..., skip:, :].double()
        size = y.square().sum(dim=-1)
        error += float(((z - y).square().sum(dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny)).sum())
        tokens += size.numel()
    errors, counts = zip(*ranks.gather((error, tokens)), strict=True)
    return float(sum(errors)) / int(sum(counts))
