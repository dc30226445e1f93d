"""What a prune stage will do, decided before any weight is read: targets, coverage, budgets, cost.

Everything that can be refused is refused here.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import budget as budgets
from sparsekit import registry
from sparsekit.contracts import Allocator, LayerPruner, LinearInfo, MaskRefiner, Stat, WeightUpdate
from sparsekit.errors import LowCoverage, OutOfMemory, PlanError, TooFewTokens
from sparsekit.lanes import MAX_LANES
from sparsekit.lazy import torch
from sparsekit.models.lazy_model import LazyModel
from sparsekit.pattern import NM, Pattern, parse_pattern
from sparsekit.permutation import check_permutation
from sparsekit.recipe.schema import PruneStage
from sparsekit.selection import fixed_counts, matches
from sparsekit.units import bytes_text

if TYPE_CHECKING:
    from torch import Tensor

BASE_MEMORY_BYTES = 700 << 20  # Python, torch and transformers themselves
PREDICTION_BYTES = 6 * 512  # for each position: the likeliest tokens of the dense model and their probabilities
FACTOR_COPIES = 6  # of a gram matrix while it is factored or decomposed and used; 4.2 to 5.4 measured


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


def check_probes(plan: StagePlan, samples: int, sequence_length: int, *, where: str) -> None:
    """Refuse calibration text that is less than the allocator measures losses on, or the pruner gradients.

    Raises:
        TooFewTokens: with both amounts.
    """
    for key, name, what, probes in (
        ("allocate", plan.stage.allocate.method, "losses", plan.allocator.probes()),
        ("method", plan.stage.method, "gradients", plan.pruner.probes()),
    ):
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


@dataclass(frozen=True)
class Cost:
    """What a run needs.

    Attributes:
        memory_bytes: Expected peak of resident memory.
        whole_bytes: Part of it for the whole model in float32, which an allocator measures losses of; 0 without one.
        gradient_bytes: Part of it for gradients that a pruner needs, with the states they are made from; 0 without.
        disk_bytes: Size of the output, all in one staged folder before it is moved into place.
        seconds: Expected time of the block forwards, from a short measurement on this machine; None without data.
        tokens: Calibration tokens.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float | None
    tokens: int
    whole_bytes: int = 0
    gradient_bytes: int = 0


def estimate(model: LazyModel, plans: Sequence[StagePlan], samples: int, sequence_length: int) -> Cost:
    """Estimate memory, disk and time of running `plans` on `samples` sequences of `sequence_length` tokens."""
    item = torch.empty(0, dtype=model.dtype).element_size()
    largest_block = max(sum(p.numel() for p in block.parameters()) for block in model.stack.blocks)
    largest_linear = max(linear.numel for plan in plans for linear in plan.targets)
    outer = sum(
        (e := location.entry).end - e.start for key in model.keys(None) for location in (model.weights.tensors[key],)
    )
    tokens = samples * sequence_length
    hidden = int(getattr(model.module.config, "hidden_size", 0) or 0)
    copies = 16 + 8 * any(plan.pruner.permutes for plan in plans)  # bytes a weight
    memory = BASE_MEMORY_BYTES + largest_block * (item + 1) + largest_linear * copies
    memory += max(_statistics_bytes(plan) + _factor_bytes(plan) for plan in plans)
    if tokens:
        memory += max(tokens * hidden * item + largest_block * item, outer)
    gradients = max(_gradient_bytes(model, plan) for plan in plans)
    memory += gradients
    whole = max(_whole_bytes(model, plan) for plan in plans)
    return Cost(
        memory_bytes=max(memory, BASE_MEMORY_BYTES + whole),
        disk_bytes=model.weights.total_bytes + (16 << 20),
        seconds=_forward_seconds(model, plans, tokens, sequence_length) if tokens else None,
        tokens=tokens,
        whole_bytes=whole,
        gradient_bytes=gradients,
    )


def _whole_bytes(model: LazyModel, plan: StagePlan) -> int:
    """Return the memory of the whole model, with the logits and hidden states of the allocator's probes."""
    probes = plan.allocator.probes()
    if probes is None:
        return 0
    parameters: int = sum(parameter.numel() for parameter in model.module.parameters())
    hidden = int(getattr(model.module.config, "hidden_size", 0) or 0)
    largest_linear = max(linear.numel for linear in plan.targets)
    logits = 3 * probes.sequence_length * model.vocabulary  # and their softmax and its logarithm
    if probes.own_dtype:  # with a dense copy of the targets, and the predictions that are compared
        item = torch.empty(0, dtype=model.dtype).element_size()
        predictions = probes.samples * probes.sequence_length * PREDICTION_BYTES
        return item * (parameters + plan.numel) + 4 * logits + predictions
    return 4 * (parameters + logits + 2 * probes.samples * probes.sequence_length * hidden + 3 * largest_linear)


def _gradient_bytes(model: LazyModel, plan: StagePlan) -> int:
    """Return the memory of a block's gradients, one per sample, and of what they are computed from.

    That is what enters and leaves every block, a block in float32 with its activations and, before the blocks are asked
    for, the outer tensors with the logits.
    """
    probes = plan.pruner.probes()
    if probes is None:
        return 0
    hidden = int(getattr(model.module.config, "hidden_size", 0) or 0)
    lanes = min(torch.get_num_threads(), probes.samples, MAX_LANES)
    per_block: dict[int, int] = {}
    for linear in plan.targets:
        per_block[linear.block] = per_block.get(linear.block, 0) + linear.numel
    states = 2 * model.blocks * probes.samples * probes.sequence_length * hidden
    widths = max(
        sum(x.info.in_features + x.info.out_features for x in model.stack.linears(b)) for b in range(model.blocks)
    )
    largest_block = max(sum(p.numel() for p in block.parameters()) for block in model.stack.blocks)
    block = largest_block + 2 * lanes * probes.sequence_length * widths
    kept = probes.samples * (max(per_block.values()) + max(linear.numel for linear in plan.targets))
    inner = {id(p) for block in model.stack.blocks for p in block.parameters()}
    outer: int = sum(p.numel() for p in model.module.parameters() if id(p) not in inner)
    behind = outer + 3 * lanes * probes.sequence_length * model.vocabulary
    return 4 * (states + max(block + kept, behind))


def _statistics_bytes(plan: StagePlan) -> int:
    """Return the memory of the largest block's statistics of inputs, of the allocator's walk or of the pruning one.

    Linears that share an input share them; linears of one module and one width are taken to share, all but the last.
    """
    kinds_of: list[list[type[Stat]]] = [
        [kind for kind in (registry.load("stats", name) for name in needs) if kind.of == "inputs"]
        for needs in (plan.needs, plan.allocator.needs and plan.allocator.needs | plan.pruner.needs)
    ]
    blocks: dict[int, dict[tuple[str, int], int]] = {}
    for linear in plan.targets:
        inputs = blocks.setdefault(linear.block, {})
        key = (linear.name.rpartition(".")[0], linear.in_features)
        inputs[key] = min(inputs.get(key, 0) + 1, 2)
    return max(
        sum(count * kind.nbytes(width) for (_, width), count in inputs.items() for kind in kinds)
        for inputs in blocks.values()
        for kinds in kinds_of
    )


def _factor_bytes(plan: StagePlan) -> int:
    """Return what solving with the largest gram matrix takes besides the matrix itself."""
    if "gram" not in plan.needs:
        return 0
    return FACTOR_COPIES * int(registry.load("stats", "gram").nbytes(max(t.in_features for t in plan.targets)))


def require_memory(peak_bytes: int, what: str, hint: str) -> None:
    """Refuse what this machine's available memory cannot hold.

    Args:
        peak_bytes: Expected peak of resident memory, what this process holds already included.
        what: What needs it, for the message.
        hint: What to do about it.

    Raises:
        OutOfMemory: with needed and available bytes.
    """
    available = available_memory_bytes()
    if available is None:
        return
    more = peak_bytes - _statm(1)
    if more > available:
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


def _forward_seconds(model: LazyModel, plans: Sequence[StagePlan], tokens: int, sequence_length: int) -> float:
    """Time one linear of the model on random data and scale to all block forwards."""
    linear = max((linear for plan in plans for linear in plan.targets), key=lambda linear: linear.numel)
    weight = torch.zeros(linear.out_features, linear.in_features, dtype=model.dtype)
    x = torch.zeros(sequence_length, linear.in_features, dtype=model.dtype)
    torch.nn.functional.linear(x, weight)
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 0.2:
        torch.nn.functional.linear(x, weight)
        rounds += 1
    per_multiply = (time.perf_counter() - start) / rounds / (linear.numel * sequence_length)
    walks = (2 * plan.reads_inputs(plan.needs) + plan.reads_inputs(plan.allocator.needs) for plan in plans)
    forwards: float = sum(walks) * tokens
    searched = 0.0
    for plan in plans:
        if probes := plan.pruner.probes():  # three times forwards, twice back to the inputs, once to the weights
            forwards += 6 * probes.samples * probes.sequence_length
        if (probes := plan.allocator.probes()) is None:
            continue
        if probes.own_dtype:
            forwards += probes.searched_tokens
            searched += probes.searched_seconds
        else:  # two losses per linear and sample, each on average half of the blocks
            forwards += len(plan.free) * probes.samples * probes.sequence_length
    # Attention, norms and selection cost about as much again as half the linears.
    return searched + 1.5 * forwards * model.stack.matrix_weights() * per_multiply
