"""Running a stage's allocator: what it may look at, what the recipe fixes by name, and the proof of what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import ranks
from sparsekit.budget import distribute
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.contracts import AllocationContext, LinearInfo, Stats, WholeModel
from sparsekit.errors import PlanError, SparsekitError
from sparsekit.lazy import torch
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.whole import LoadedModel
from sparsekit.pattern import NM
from sparsekit.plan import StagePlan
from sparsekit.progress import Reporter
from sparsekit.walk import walk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """Kept weights per target, and what led to them: quantity -> block, linear or `all` -> value."""

    counts: dict[str, int]
    facts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Workspace:
    """Where an allocator may keep files, and what they belong to: all but the allocator's own options."""

    folder: Path
    identity: Mapping[str, JSON]


def allocate(
    plan: StagePlan, model: LazyModel, samples: Tensor | None, reporter: Reporter, workspace: Workspace | None = None
) -> Allocation:
    """Distribute a stage's budget; `samples` are calibration ids [samples, sequence_length].

    Raises:
        PlanError: The allocator cannot hold its own limits, or returned other than it was asked for.
    """

    def visit(needs: frozenset[str]) -> Iterator[tuple[LinearInfo, Tensor, Stats]]:
        return _visit(plan, model, samples, reporter, needs)

    @contextmanager
    def whole() -> Iterator[WholeModel]:
        probes = plan.allocator.probes()
        if probes is None or samples is None:
            raise SparsekitError(f"allocator {type(plan.allocator).__name__} asks for losses without naming its probes")
        ids = samples[: probes.samples, : probes.sequence_length]
        if probes.own_dtype:
            yield LoadedModel(model, ids, lambda: None, model.dtype)
            return
        task = f"allocate: losses on {probes.samples} x {probes.sequence_length} tokens"
        reporter.start(task, len(plan.free), "linears")
        yield LoadedModel(model, ids, lambda: reporter.advance(task))
        reporter.finish(task)

    context = AllocationContext(
        plan.free,
        plan.pattern,
        visit,
        plan.pruner,
        whole,
        reporter=reporter,
        folder=workspace.folder if workspace else None,
        identity=workspace.identity if workspace else {},
        dtype=model.dtype,
    )
    found = _asked(plan, context)  # by all ranks, which look at the model together
    return ranks.share(lambda: found)


def allocate_unseen(plan: StagePlan) -> dict[str, float]:
    """Return kept weights per target as far as they are known before the model is read.

    An allocator that looks at the model leaves the targets that the recipe does not fix at their average.
    """
    if plan.allocator.looks:
        numel = sum(linear.numel for linear in plan.free)
        rest = plan.budget - sum(plan.fixed.values())
        return {**plan.fixed, **{linear.name: rest / numel * linear.numel for linear in plan.free}}
    context = AllocationContext(plan.free, plan.pattern, lambda needs: iter(()), plan.pruner, _unread)
    return {**_asked(plan, context).counts}


def uniform_counts(plan: StagePlan) -> dict[str, int]:
    """Return kept weights per target at one sparsity for all; empty if the stage allocates just so, or N:M does."""
    if isinstance(plan.pattern, NM) or (plan.stage.allocate.method == "uniform" and not plan.fixed):
        return {}
    return distribute(plan.targets, {linear.name: 1.0 for linear in plan.targets}, plan.budget, plan.pattern.unit)


def densities(linears: Sequence[LinearInfo], counts: dict[str, int]) -> dict[str, float]:
    """Return the share of its target weights that each block keeps, under the block's number."""
    kept: dict[int, list[int]] = {}
    for linear in linears:
        sums = kept.setdefault(linear.block, [0, 0])
        sums[0] += counts[linear.name]
        sums[1] += linear.numel
    return {str(block): round(part / whole, 6) for block, (part, whole) in kept.items()}


def _unread() -> AbstractContextManager[WholeModel]:
    raise SparsekitError("an allocator that does not say that it looks asks for the whole model")


def _asked(plan: StagePlan, context: AllocationContext) -> Allocation:
    """Ask the allocator and prove its counts: every free target once, sum exact, whole units, legal N:M."""
    if isinstance(plan.pattern, NM):  # leaves nothing to distribute, and plan_stage no other allocator than uniform
        keep, of = plan.pattern.keep, plan.pattern.of
        return Allocation({linear.name: linear.numel // of * keep for linear in plan.free}, {})
    if not plan.free:
        return Allocation(dict(plan.fixed), {})
    budget = plan.budget - sum(plan.fixed.values())
    counts = plan.allocator.allocate(context, budget)
    name = type(plan.allocator).__name__
    if sorted(counts) != sorted(linear.name for linear in plan.free):
        raise PlanError(f"allocator {name} returned counts for other linears than the targets")
    if sum(counts.values()) != budget:
        raise PlanError(f"allocator {name} returned {sum(counts.values())} kept weights, the budget is {budget}")
    for linear in plan.free:
        count = counts[linear.name]
        if not 0 <= count <= linear.numel or count % plan.pattern.unit:
            raise PlanError(f"allocator {name} keeps {count} of {linear.numel} weights", where=linear.name)
    return Allocation({**plan.fixed, **counts}, context.facts)


def _visit(
    plan: StagePlan, model: LazyModel, samples: Tensor | None, reporter: Reporter, needs: frozenset[str]
) -> Iterator[tuple[LinearInfo, Tensor, Stats]]:
    """Walk the dense model; yield the targets that share the budget."""
    free = {linear.name for linear in plan.free}
    inputs = samples if plan.reads_inputs(needs) else None
    probed = plan.probed(samples) if needs & plan.pruner.needs else None
    for block in walk(model, inputs, reporter, propagate="none", probed=probed, task="allocate"):
        linears = [linear for linear in block.linears if linear.name in free]
        stats = block.collect(linears, needs) if linears else {}
        for linear in linears:
            yield linear.info, linear.weight().to(torch.float32), stats[linear.name]
