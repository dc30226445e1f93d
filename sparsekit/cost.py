"""What a run will need of memory, disk and time, estimated before any weight is read."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekit import registry
from sparsekit.activation_plan import ActivationPlan
from sparsekit.contracts import LinearInfo, Probes, Stat
from sparsekit.lanes import MAX_LANES, SOLVED_AT_ONCE
from sparsekit.lazy import torch
from sparsekit.models.lazy_model import LazyModel
from sparsekit.plan import BASE_MEMORY_BYTES, ReshapePlan, StagePlan

PREDICTION_BYTES = 6 * 512  # for each position: the likeliest tokens of the dense model and their probabilities
FACTOR_COPIES = 6  # of a gram matrix while it is factored or decomposed and used; 4.2 to 5.4 measured


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


def estimate(
    model: LazyModel,
    plans: Sequence[StagePlan],
    samples: int,
    sequence_length: int,
    reshapes: Sequence[ReshapePlan] = (),
    activations: ActivationPlan | None = None,
) -> Cost:
    """Estimate memory, disk and time of running `plans` on `samples` sequences of `sequence_length` tokens.

    What comes behind `reshapes` is counted as if the model still had its size.
    """
    item = torch.empty(0, dtype=model.dtype).element_size()
    largest_block = max(sum(p.numel() for p in block.parameters()) for block in model.stack.blocks)
    solved = max((sum(heapq.nlargest(SOLVED_AT_ONCE, (t.numel for t in plan.targets))) for plan in plans), default=0)
    outer = sum(
        (e := location.entry).end - e.start for key in model.keys(None) for location in (model.weights.tensors[key],)
    )
    tokens = samples * sequence_length
    hidden = int(getattr(model.module.config, "hidden_size", 0) or 0)
    copies = 16 + 8 * any(plan.pruner.permutes for plan in plans)  # bytes a weight
    memory = BASE_MEMORY_BYTES + largest_block * (item + 1) + solved * copies
    reshape = max(map(_reshape_bytes, reshapes), default=0)
    memory += max([reshape, *(_statistics_bytes(plan) + _factor_bytes(plan) for plan in plans)])
    if tokens:
        memory += max(tokens * hidden * item + largest_block * item, outer)
    gradients = max((_gradient_bytes(model, plan) for plan in plans), default=0)
    memory += gradients
    wholes = [_whole_bytes(model, plan.allocator.probes(), plan.targets) for plan in plans]
    whole = max([0, *wholes, *(_whole_bytes(model, plan.reshaper.probes(), ()) for plan in reshapes)])
    return Cost(
        memory_bytes=max(memory, BASE_MEMORY_BYTES + whole + reshape),  # the model is asked between two walks
        disk_bytes=model.weights.total_bytes + (16 << 20),
        seconds=_forward_seconds(model, plans, reshapes, activations, tokens, sequence_length) if tokens else None,
        tokens=tokens,
        whole_bytes=whole,
        gradient_bytes=gradients,
    )


def _whole_bytes(model: LazyModel, probes: Probes | None, changed: Sequence[LinearInfo]) -> int:
    """Return the memory of the whole model, with the logits and hidden states of probes and copies of some linears."""
    if probes is None:
        return 0
    parameters: int = sum(parameter.numel() for parameter in model.module.parameters())
    hidden = int(getattr(model.module.config, "hidden_size", 0) or 0)
    logits = 3 * probes.sequence_length * model.vocabulary  # and their softmax and its logarithm
    if probes.own_dtype:  # with a dense copy of the targets, and the predictions that are compared
        item = torch.empty(0, dtype=model.dtype).element_size()
        predictions = probes.samples * probes.sequence_length * PREDICTION_BYTES
        return item * (parameters + sum(linear.numel for linear in changed)) + 4 * logits + predictions
    largest_linear = max((linear.numel for linear in changed), default=0)
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


def _inputs(linears: Sequence[LinearInfo]) -> list[list[int]]:
    """Return for each block the widths of its linears' inputs, shared ones once.

    Linears of one module and one width are taken to share their input, all but the last.
    """
    blocks: dict[int, dict[tuple[str, int], int]] = {}
    for linear in linears:
        inputs = blocks.setdefault(linear.block, {})
        key = (linear.name.rpartition(".")[0], linear.in_features)
        inputs[key] = min(inputs.get(key, 0) + 1, 2)
    return [[width for (_, width), count in inputs.items() for _ in range(count)] for inputs in blocks.values()]


def _statistics_bytes(plan: StagePlan) -> int:
    """Return the memory of the largest block's statistics of inputs, of the allocator's walk or of the pruning one."""
    kinds_of: list[list[type[Stat]]] = [
        [kind for kind in (registry.load("stats", name) for name in needs) if kind.of == "inputs"]
        for needs in (plan.needs, plan.allocator.needs and plan.allocator.needs | plan.pruner.needs)
    ]
    return max(
        sum(kind.nbytes(width) for width in widths for kind in kinds)
        for widths in _inputs(plan.targets)
        for kinds in kinds_of
    )


def _reshape_bytes(plan: ReshapePlan) -> int:
    """Return the memory of the largest block's gram matrices, and of solving with the largest one; 0 without any."""
    nbytes = registry.load("stats", "gram").nbytes
    if plan.reshaper.sums_of == "stream":
        hidden = int(getattr(plan.anatomy.model.config, "hidden_size", 0) or 0)
        return (2 + FACTOR_COPIES) * int(nbytes(hidden))
    if "gram" not in plan.reshaper.needs:
        return 0
    inputs = _inputs(plan.anatomy.linears)
    summed: int = max(sum(map(nbytes, widths)) for widths in inputs)
    return summed + FACTOR_COPIES * int(nbytes(max(map(max, inputs))))


def _factor_bytes(plan: StagePlan) -> int:
    """Return what solving with the largest gram matrices takes besides the matrices themselves."""
    if "gram" not in plan.needs:
        return 0
    nbytes = registry.load("stats", "gram").nbytes
    largest: int = max(sum(map(nbytes, heapq.nlargest(SOLVED_AT_ONCE, widths))) for widths in _inputs(plan.targets))
    return FACTOR_COPIES * largest


def _forward_seconds(
    model: LazyModel,
    plans: Sequence[StagePlan],
    reshapes: Sequence[ReshapePlan],
    activations: ActivationPlan | None,
    tokens: int,
    sequence_length: int,
) -> float:
    """Time one linear of the model on random data and scale to all block forwards."""
    linear = max((linear.info for linear in model.stack.linears(0)), key=lambda linear: linear.numel)
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
        if (probes := plan.allocator.probes()) and not probes.own_dtype:
            # two losses per linear and sample, each on average half of the blocks
            forwards += len(plan.free) * probes.samples * probes.sequence_length
    for reshape in reshapes:
        forwards += tokens * bool(reshape.reshaper.needs)
    if activations is not None:
        forwards += activations.forwards(tokens, sequence_length) / model.blocks
    for probes in (*(plan.allocator.probes() for plan in plans), *(plan.reshaper.probes() for plan in reshapes)):
        if probes is not None:
            forwards += probes.searched_tokens
            searched += probes.searched_seconds
    # Attention, norms and selection cost about as much again as half the linears.
    return searched + 1.5 * forwards * model.stack.matrix_weights() * per_multiply
