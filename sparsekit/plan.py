"""What a prune stage will do, decided before any weight is read: targets, coverage, budgets.

Everything that can be refused is refused here.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import budget as budgets
from sparsekit import ranks, registry
from sparsekit.checkpoint.shapes import Shapes
from sparsekit.contracts import Allocator, Anatomy, LayerPruner, LinearInfo, MaskRefiner, Reshaper, WeightUpdate
from sparsekit.errors import LowCoverage, OutOfMemory, PlanError, TooFewTokens
from sparsekit.lazy import torch
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.shapes import parameters, variant
from sparsekit.models.structure import find_stack
from sparsekit.pattern import NM, Pattern, parse_pattern
from sparsekit.permutation import check_permutation
from sparsekit.recipe.stages import PruneStage, ReshapeStage
from sparsekit.selection import fixed_counts, matches
from sparsekit.units import bytes_text

if TYPE_CHECKING:
    from torch import Tensor

BASE_MEMORY_BYTES = 700 << 20  # Python, torch and transformers themselves


@dataclass(frozen=True)
class StagePlan:
    """A prune stage applied to one model.

    Attributes:
        stage: The recipe's stage.
        pattern: Parsed pattern.
        targets: Linears to prune, in model order.
        ignored: Names of the block linears that stay dense.
        coverage: Share of all matrix weights of the blocks that are targets.
        budget: Weights kept in all targets together.
        pruner, allocator: The methods, with their options.
        refiner, update: What improves the pruner's masks and then moves the kept weights; None for neither.
        fixed: Kept weights of the targets whose sparsity the recipe overrides.
        notes: What the user should know before it runs.
    """

    stage: PruneStage
    pattern: Pattern
    targets: tuple[LinearInfo, ...]
    ignored: tuple[str, ...]
    coverage: float
    budget: int
    pruner: LayerPruner[Any]
    allocator: Allocator[Any]
    refiner: MaskRefiner[Any] | None = None
    update: WeightUpdate[Any] | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def free(self) -> tuple[LinearInfo, ...]:
        """Targets among which the allocator distributes what `fixed` leaves of the budget."""
        return tuple(linear for linear in self.targets if linear.name not in self.fixed)

    @property
    def numel(self) -> int:
        """Number of target weights."""
        return sum(linear.numel for linear in self.targets)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that are collected for every target while a block is pruned."""
        methods = (self.pruner, self.refiner, self.update)
        return frozenset().union(*(method.needs for method in methods if method is not None))

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all."""
        return bool(self.needs or self.allocator.needs or self.allocator.probes())

    @staticmethod
    def reads_inputs(needs: frozenset[str]) -> bool:
        """Whether any of these statistics is one of the linears' inputs."""
        return any(registry.load("stats", name).of == "inputs" for name in needs)

    def probed(self, samples: Tensor | None) -> Tensor | None:
        """Return the part of the calibration ids [samples, sequence_length] that the pruner needs gradients on."""
        probes = self.pruner.probes()
        return samples[: probes.samples, : probes.sequence_length] if probes and samples is not None else None


@dataclass(frozen=True)
class ReshapePlan:
    """A reshape stage applied to one model.

    Attributes:
        stage: The recipe's stage.
        reshaper: The method, with its options.
        anatomy: The model's.
        before, after: Parameters of the model now, and as it will be; None where that depends on the text.
        notes: What the user should know before it runs.
    """

    stage: ReshapeStage
    reshaper: Reshaper[Any]
    anatomy: Anatomy
    before: int
    after: int | None
    notes: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read."""
        return bool(self.reshaper.needs or self.reshaper.probes())


def plan_reshapes(model: LazyModel, stages: Sequence[ReshapeStage], seed: int, first: int) -> tuple[ReshapePlan, ...]:
    """Resolve reshape stages against a model, each against what the one before it will leave.

    What a stage leaves is known where it has an outline; else the next stage is resolved against what there was.

    Args:
        model: The model as it is.
        stages: What to do with it, in this order.
        seed: Of all of them.
        first: Number of the first stage in its recipe, for errors.

    Raises:
        PlanError, UnsupportedFamily: A reshaper cannot do what it finds.
    """
    anatomy, plans = _anatomy(model.module, model.shapes), []
    for position, stage in enumerate(stages, first):
        try:
            plan, anatomy = _plan_reshape(anatomy, stage, seed, model.dtype)
        except PlanError as error:
            where = f"stages.{position}"
            error.where = f"{where}.{error.where}" if error.where else where
            raise
        plans.append(plan)
    return tuple(plans)


def _plan_reshape(anatomy: Anatomy, stage: ReshapeStage, seed: int, dtype: torch.dtype) -> tuple[ReshapePlan, Anatomy]:
    """Return the plan of a stage, and the anatomy of what it leaves."""
    _refuse_pruned(anatomy, stage)
    reshaper: Reshaper[Any] = registry.load("reshape", stage.method)(stage.method_options(), seed)
    _refuse_bases(reshaper, anatomy.shapes)
    reshaper.check(anatomy)
    before = parameters(anatomy.model)
    if (outline := reshaper.outline(anatomy)) is None:
        return ReshapePlan(stage, reshaper, anatomy, before, None), anatomy
    shapes = anatomy.shapes if outline.shapes is None else outline.shapes
    left = _anatomy(variant(anatomy.model, outline.config, shapes), shapes)
    after = parameters(left.model)
    if after >= before and not reshaper.grows:
        raise PlanError(
            f"the model would have {after:,} parameters, now it has {before:,}: no saving",
            hint="Take more away, or set allow_growth: true in the stage.",
        )
    notes = (_change(stage, dtype, before, after, shapes), *outline.notes)
    return ReshapePlan(stage, reshaper, anatomy, before, after, notes), left


def _anatomy(model: Any, shapes: Shapes) -> Anatomy:
    stack = find_stack(model)
    blocks = len(stack.blocks)
    linears = tuple(linear.info for index in range(blocks) for linear in stack.linears(index))
    return Anatomy(model, blocks, linears, stack.path, shapes)


def _refuse_pruned(anatomy: Anatomy, stage: ReshapeStage) -> None:
    """Refuse to fill the zeros of a pruned model."""
    pruned = getattr(anatomy.model.config, "sparsity_config", None)
    if pruned and not registry.load("reshape", stage.method).keeps_zeros:
        how = f" ({pruned.get('method')})" if isinstance(pruned, Mapping) and pruned.get("method") else ""
        raise PlanError(
            f"the model is pruned{how}, and {stage.method} would fill its zeros",
            hint="Reshape the dense model first and prune what is left, as slicegpt-25-sparsegpt-50 does.",
        )


def _refuse_bases(reshaper: Reshaper[Any], shapes: Shapes) -> None:
    """Refuse to compare what enters blocks with what leaves them where the two are in different bases."""
    if shapes.chained and any(registry.load("stats", name).of == "flows" for name in reshaper.needs):
        raise PlanError(
            "it compares what enters a block with what leaves it; shortcuts put the two into different bases",
            hint="Put this stage before the slicing.",
        )


def _change(stage: ReshapeStage, dtype: torch.dtype, before: int, after: int, shapes: Shapes) -> str:
    """Say what a stage makes of the size of a model, and who loads the result."""
    item = torch.empty(0, dtype=dtype).element_size()
    who = "plain transformers loads it" if shapes.plain else "it loads where sparsekit is imported"
    return (
        f"{stage.method}: {before:,} parameters become {after:,} ({after / before - 1:+.1%}), "
        f"{bytes_text(before * item)} become {bytes_text(after * item)}; {who}"
    )


def plan_stage(model: LazyModel, stage: PruneStage, seed: int, *, where: str) -> StagePlan:
    """Resolve a stage against a model; `where` names the stage in errors, such as `stages.0`.

    Raises:
        PlanError: A target, ignore or overrides entry matches nothing, the pattern does not fit a width or a
            permutation, or the overrides and the allocator cannot make up the budget.
        UnsupportedFamily: The pruner permutes and the architecture's roles are not known.
        LowCoverage: The targets cover less than the stage's min_coverage.
    """
    linears = [linear.info for index in range(model.blocks) for linear in model.stack.linears(index)]
    pattern = parse_pattern(stage.pattern)
    names = [linear.name for linear in linears]
    chosen = set(names) if not stage.targets else matches(stage.targets, names, names, f"{where}.targets")
    modules = [name for name, _ in model.module.named_modules()]
    ignored = matches(stage.ignore, names, modules, f"{where}.ignore")
    targets = tuple(linear for linear in linears if linear.name in chosen - ignored)
    if not targets:
        raise PlanError("no linear is left to prune", where=where, hint="Check targets and ignore.")
    refiner: MaskRefiner[Any] | None = _part(stage, "refine", seed)
    if refiner is not None:
        try:
            refiner.check(pattern)
        except PlanError as error:
            error.where = f"{where}.refine"
            raise
    for linear in targets:
        pattern.check(linear.out_features, linear.in_features, where=linear.name)
    total = model.stack.matrix_weights()
    covered = sum(linear.numel for linear in targets)
    if covered < stage.min_coverage * total:
        raise LowCoverage(
            f"the recipe covers {covered / total:.1%} of the block weights, it asks for {stage.min_coverage:.0%}; "
            f"left out: {_left_out(model, targets)}",
            where=where,
            hint="Widen targets, or set min_coverage in the stage to accept this.",
        )
    if isinstance(pattern, NM) and stage.allocate.method != "uniform":
        raise PlanError(
            f"pattern {pattern} fixes what every linear keeps, {stage.allocate.method} has nothing to distribute",
            where=f"{where}.allocate",
            hint="Leave allocate out, or use pattern: unstructured.",
        )
    budget = budgets.total(targets, pattern, stage.sparsity)
    pruner: LayerPruner[Any] = registry.load("pruners", stage.method)(stage.method_options(), seed)
    notes = check_permutation(model, targets, pattern, where=where) if pruner.permutes else []
    return StagePlan(
        stage=stage,
        pattern=pattern,
        targets=targets,
        ignored=tuple(name for name in names if name not in {linear.name for linear in targets}),
        coverage=covered / total,
        budget=budget,
        pruner=pruner,
        allocator=_part(stage, "allocate", seed),
        refiner=refiner,
        update=_part(stage, "update", seed),
        fixed=fixed_counts(stage.overrides, targets, pattern, budget, f"{where}.overrides"),
        notes=tuple(notes),
    )


def _part(stage: PruneStage, room: str, seed: int) -> Any:
    """Return the stage's allocator, refiner or update, None without one."""
    found = stage.part(room)
    return None if found is None else registry.load(room, found[0])(found[1], seed)


def check_tokens(plan: StagePlan, tokens: int, *, where: str) -> tuple[str, ...]:
    """Compare calibration tokens with what the stage's solvers need; return notes where more are advised.

    A gram matrix of fewer tokens than inputs has directions it knows nothing of, and a solver moves weights along
    them at no visible cost.

    Raises:
        TooFewTokens: Fewer than the least a method can work with.
    """
    notes = []
    widest = max(plan.targets, key=lambda linear: linear.in_features)
    for key, method in (("method", plan.pruner), ("update", plan.update)):
        need = method.tokens if method is not None else None
        if need is None:
            continue
        name = plan.stage.method if key == "method" else plan.stage.update.method  # type: ignore[union-attr]
        least, advised = (math.ceil(share * widest.in_features) for share in (need.least, need.advised))
        told = f"{tokens} calibration tokens for {widest.in_features} inputs of {widest.name}"
        if tokens < least:
            raise TooFewTokens(
                f"{name} needs at least {least} tokens, got {told}",
                where=f"{where}.{key}",
                hint=f"Raise calibration.samples or sequence_length; {advised} tokens or more give good results.",
            )
        if tokens < advised:
            notes.append(f"{told}: {name} is better with {advised} or more")
    return tuple(notes)


def check_reshape_tokens(plan: ReshapePlan, tokens: int, *, where: str) -> None:
    """Refuse fewer calibration tokens than a reshaper must have.

    Raises:
        TooFewTokens: with both numbers.
    """
    needed = plan.reshaper.tokens(plan.anatomy) if plan.needs_data else 0
    if tokens < needed:
        raise TooFewTokens(
            f"{plan.stage.method} needs at least {needed} tokens, got {tokens}",
            where=f"{where}.method",
            hint="Raise calibration.samples or sequence_length; ten times as many give good results.",
        )


def check_probes(plan: StagePlan | ReshapePlan, samples: int, sequence_length: int, *, where: str) -> None:
    """Refuse calibration text that is less than what losses, gradients or predictions are computed on.

    Raises:
        TooFewTokens: with both amounts.
    """
    asked = (
        [("method", plan.stage.method, "predictions", plan.reshaper.probes())]
        if isinstance(plan, ReshapePlan)
        else [
            ("allocate", plan.stage.allocate.method, "losses", plan.allocator.probes()),
            ("method", plan.stage.method, "gradients", plan.pruner.probes()),
        ]
    )
    for key, name, what, probes in asked:
        if probes is not None and (samples < probes.samples or sequence_length < probes.sequence_length):
            raise TooFewTokens(
                f"{name} measures {what} on {probes.samples} samples of {probes.sequence_length} "
                f"tokens, the calibration has {samples} of {sequence_length}",
                where=f"{where}.{key}",
                hint=f"Lower samples or sequence_length of {name}, or raise the calibration's.",
            )


def _left_out(model: LazyModel, targets: Sequence[LinearInfo]) -> str:
    """Name the kinds of matrices that are not targets, without block numbers."""
    covered = {linear.name for linear in targets}
    kinds: dict[str, int] = {}
    for index in range(model.blocks):
        prefix = f"{model.stack.prefix(index)}."
        for linear in model.stack.linears(index):
            if linear.name not in covered:
                kind = linear.name.removeprefix(prefix)
                kinds[kind] = kinds.get(kind, 0) + 1
    shown = [f"{kind} ({count})" for kind, count in sorted(kinds.items())[:6]]
    return ", ".join(shown) or "matrices that are not linears"


def require_memory(peak_bytes: int, what: str, hint: str, *, by_all: bool = False) -> None:
    """Refuse what this machine's available memory cannot hold.

    Args:
        peak_bytes: Expected peak of resident memory, what this process holds already included.
        what: What needs it, for the message.
        hint: What to do about it.
        by_all: Every rank on this machine needs as much.

    Raises:
        OutOfMemory: with needed and available bytes.
    """
    available = available_memory_bytes()
    if available is None:
        return
    processes = ranks.here().local if by_all else 1
    more = (peak_bytes - _statm(1)) * processes
    if more > available:
        what += f" in {processes} processes" if processes > 1 else ""
        raise OutOfMemory(
            f"{what} needs about {bytes_text(more)} more memory, {bytes_text(available)} are free", hint=hint
        )


def available_memory_bytes() -> int | None:
    """Return the memory a new allocation could get, None where the system does not tell.

    A container's limit and a limit of the shell (`ulimit -v`) count where they are lower.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    free = [int(fields["MemAvailable"].split()[0]) << 10] if "MemAvailable" in fields else []
    limit, used, cached = _cgroup("memory.max"), _cgroup("memory.current"), _cgroup("memory.stat", "inactive_file")
    if limit is not None and used is not None:
        free.append(limit - used + (cached or 0))  # the kernel gives cached files back before it refuses
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free.append(soft - _statm(0))
    return max(0, min(free)) if free else None


def _statm(field: int) -> int:
    """Return a size of this process in bytes: 0 virtual, 1 resident. Linux only."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[field]) * resource.getpagesize()


def _cgroup(name: str, field: str | None = None) -> int | None:
    """Return a number of this process's cgroup, None without cgroup v2 or where there is no limit."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    if field is not None:
        text = next((line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{field} ")), "")
    return int(text) if text.isdigit() else None
