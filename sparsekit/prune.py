"""Executing a prune stage: every block is fitted, checked, written as one shard and journalled.

A finished block's shard is at once the output and the resume point: a run that starts again takes it as it is and
only propagates the activations through it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import masks, ranks
from sparsekit.allocation import Allocation, Workspace, allocate, densities, uniform_counts
from sparsekit.checkpoint.safetensors_file import RawTensor, read_header
from sparsekit.checkpoint.staging import JournalEntry, StagedCheckpoint
from sparsekit.contracts import Level, Stat
from sparsekit.errors import IndexMismatch, NonFinite, SparsekitError
from sparsekit.lanes import SOLVED_AT_ONCE, Turns, side_by_side
from sparsekit.layer_errors import layer_errors
from sparsekit.lazy import torch
from sparsekit.memory import release_freed
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear
from sparsekit.models.raw import read_raw, to_raw, torch_dtype
from sparsekit.pack import Encoding, Layout, choose, files
from sparsekit.pattern import NM, parse_pattern
from sparsekit.permutation import Reordered, permute_block
from sparsekit.plan import StagePlan
from sparsekit.progress import Reporter
from sparsekit.walk import Visit, walk

if TYPE_CHECKING:
    from torch import Tensor


OUTER = "outer"
"""Journal key of the shard with embeddings, final norm and head."""
_EXPERT = re.compile(r"\.\d+\.(?=[^.]+\.weight$)")


@dataclass(frozen=True)
class Form:
    """How pruned tensors are packed: layout and encoding, None for the smallest that loses nothing."""

    layout: Layout | None = None
    encoding: Encoding | None = None


@dataclass(frozen=True)
class StageResult:
    """What a stage did: facts per linear and per stored tensor, from the journal (so also for resumed blocks).

    `allocation` holds the density of each block and what the allocator saw.
    """

    linears: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    packed: dict[str, dict[str, Any]]
    notes: list[str]
    resumed: int
    allocation: dict[str, dict[str, float]]


def prune_stage(
    model: LazyModel,
    plan: StagePlan,
    samples: Tensor | None,
    staged: StagedCheckpoint,
    shard_names: Sequence[str],
    reporter: Reporter,
    form: Form | None = None,
    workspace: Workspace | None = None,
) -> StageResult:
    """Prune every block of `model` and write its shards into `staged`.

    Args:
        model: Source of the blocks; redirected to the written shards as they are finished.
        plan: What to do.
        samples: Calibration ids [samples, sequence_length]; None when the plan needs no data.
        staged: Where shards and journal lines go.
        shard_names: File name per block.
        reporter: Told about every block.
        form: How pruned tensors are packed; None leaves them dense.
        workspace: Where the allocator may keep files.
    """
    journalled = ranks.share(lambda: _journalled_allocation(staged))
    allocation = journalled or allocate(plan, model, samples, reporter, workspace)
    budgets, uniform = allocation.counts, uniform_counts(plan)
    linears: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    packed_tensors: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    resumed = 0
    for visit in walk(
        model,
        samples if plan.reads_inputs(plan.needs) else None,
        reporter,
        propagate=plan.stage.propagate,
        probed=plan.probed(samples),
        task=f"prune ({plan.stage.method})",
    ):
        key = f"block-{visit.index}"
        entry = ranks.share(partial(staged.finished, key))
        shard = staged.folder / shard_names[visit.index]
        if entry is None:
            pruned = _prune_block(model, visit, plan, budgets, uniform)
            if visit.index == 0:
                pruned.facts["allocation"] = asdict(allocation)
            entry = ranks.share(partial(_write_block, model, visit.index, pruned, staged, shard.name, form))
        else:
            visit.adopt(shard)
            resumed += 1
        found: Any = entry.facts
        linears.update(found["linears"])
        tensors.update(found["tensors"])
        packed_tensors.update(found["packed"])
        notes.extend(found["notes"])
        model.redirect(visit.index, shard)
    told = {"density": densities(plan.targets, budgets), **allocation.facts}
    return StageResult(linears, tensors, packed_tensors, notes, resumed, told)


def _journalled_allocation(staged: StagedCheckpoint) -> Allocation | None:
    """Return what an interrupted run pruned its first block with, None without such a run.

    Looking again takes time, and on another number of threads losses may differ in the last bit.
    """
    entry = staged.finished("block-0")
    found: Any = entry.facts.get("allocation") if entry else None
    return Allocation(**found) if found else None


@dataclass(frozen=True)
class _PrunedBlock:
    """Facts for the journal, the changed tensors and the masks, under the names they have in the checkpoint."""

    facts: dict[str, Any]
    changed: dict[str, Tensor]
    keeps: dict[str, Tensor]


def _write_block(
    model: LazyModel, index: int, pruned: _PrunedBlock, staged: StagedCheckpoint, name: str, form: Form | None
) -> JournalEntry:
    """Pack and write the shard of a block, and journal it."""
    written = checkpoint_tensors(model, index, pruned.changed)
    packed = pack_changed(written, pruned.changed, pruned.keeps, pruned.facts["tensors"], form) if form else {}
    facts = {**pruned.facts, "packed": packed}
    return staged.write_shard(f"block-{index}", name, written, facts, files.metadata(packed))


def _prune_block(
    model: LazyModel, visit: Visit, plan: StagePlan, budgets: Mapping[str, int], uniform: Mapping[str, int]
) -> _PrunedBlock:
    """Prune the targets of one block in place."""
    targets = [linear for linear in visit.linears if linear.name in budgets]
    order = Reordered(visit.collect(targets, plan.needs) if targets else {}, {}, set())
    if plan.pruner.permutes and isinstance(plan.pattern, NM):
        order = permute_block(model, visit.index, plan.pruner, plan.pattern, order.stats)
    linears: dict[str, dict[str, Any]] = {}
    keeps: dict[str, Tensor] = {}
    solved = _solve(targets, plan, budgets, uniform, order.stats)
    for linear in targets:
        keep, facts, notes = solved.pop(linear.name)
        visit.notes.extend(f"{linear.name}: {note}" for note in notes)
        _note_mask(keeps, linear, keep)
        if linear.name in order.moved:
            facts["inputs_moved"] = order.moved[linear.name]
        linears[linear.name] = facts
    state = model.module.state_dict()
    changed = model.to_checkpoint({name: state[name] for name in keeps.keys() | order.parameters})
    stored_masks = model.to_checkpoint(keeps)
    turned = {linear.parameter_name for linear in targets if linear.transposed}
    transposed = model.to_checkpoint({name: keeps[name] for name in turned}).keys()
    tensors = {
        name: {
            "kept": int(mask.sum()),
            "pattern": str(plan.pattern),
            "method": plan.stage.method,
            "transposed": name in transposed,
        }
        for name, mask in stored_masks.items()
    }
    return _PrunedBlock({"linears": linears, "tensors": tensors, "notes": visit.notes}, changed, stored_masks)


Solved = tuple["Tensor", dict[str, Any], tuple[str, ...]]
"""Mask of a linear, facts for the journal, notes."""


def _solve(
    targets: Sequence[Linear],
    plan: StagePlan,
    budgets: Mapping[str, int],
    uniform: Mapping[str, int],
    stats: dict[str, dict[str, Stat]],
) -> dict[str, Solved]:
    """Prune the linears of a block in place, two at a time, each with half of the threads.

    Solvers have stretches that more threads do not speed up. Two lanes are enough: the widest linear of a block takes
    about as long as all others, and a third would only hold more memory. Statistics are dropped as they are used.
    Of several ranks each prunes some of the linears, and then they exchange them.
    """
    found: dict[str, Solved] = {}
    owners = _owners(targets)
    mine = [linear for linear, owner in owners if owner == ranks.here().rank]
    for name in stats.keys() - {linear.name for linear in mine}:
        del stats[name]

    def one(place: int, _: Turns) -> None:
        linear = mine[place]
        start = time.perf_counter()
        mask, facts, notes = _prune_linear(
            linear, plan, budgets[linear.name], uniform.get(linear.name), stats.pop(linear.name)
        )
        facts["seconds"] = round(time.perf_counter() - start, 4)
        found[linear.name] = mask, facts, notes
        release_freed()  # each linear leaves holes of its own size, and its copies are the peak of the run

    with ranks.together():
        side_by_side(len(mine), one, most=SOLVED_AT_ONCE)
    for linear, owner in owners:
        weight, solved = ranks.share(lambda: (linear.weight(), found[linear.name]), owner)  # noqa: B023  (called here)
        if owner != ranks.here().rank:
            linear.replace(weight)
            found[linear.name] = solved
    return found


def _owners(targets: Sequence[Linear]) -> list[tuple[Linear, int]]:
    """Return each linear with the rank that prunes it: the most work first, always to the rank that has the least."""
    work = [0] * ranks.here().size
    owners = []
    for linear in sorted(targets, key=lambda linear: -linear.info.numel * linear.info.in_features):
        owner = work.index(min(work))
        work[owner] += linear.info.numel * linear.info.in_features
        owners.append((linear, owner))
    return owners


def _prune_linear(
    linear: Linear, plan: StagePlan, budget: int, uniform: int | None, stats: Mapping[str, Stat]
) -> Solved:
    """Prune one linear in place; return its mask, facts for the journal and notes.

    Args:
        linear: It.
        plan: What to do.
        budget: Weights to keep.
        uniform: Weights that a uniform allocation would keep, None if that is `budget`.
        stats: Statistics of its input.
    """
    dense = linear.weight().to(torch.float32)  # [out, in]
    try:
        level = plan.pruner.fit(linear.info, dense, stats)
        pruned = level(plan.pattern, budget)
        notes = pruned.notes
        if plan.refiner is not None:
            pruned = plan.refiner.refine(linear.info, dense, pruned, plan.pattern, stats)
            notes += pruned.notes
        if plan.update is not None:
            pruned = plan.update.update(linear.info, dense, pruned, stats)
            notes += pruned.notes
    except SparsekitError as error:
        error.where = error.where or linear.name
        raise
    stored = linear.replace(pruned.weight)
    masks.check(stored, pruned.keep, plan.pattern, budget, where=linear.name)
    errors, null = layer_errors(dense, stored, stats, plan.pattern, budget)
    nulls = {"random": null}
    if uniform is not None and (other := _cheap_level(plan, level, uniform)) is not None:
        nulls["uniform"], _ = layer_errors(dense, other, stats, plan.pattern, uniform)
    facts = {
        "kept": budget,
        "numel": linear.info.numel,
        "shape": [linear.info.out_features, linear.info.in_features],
        "pattern": str(plan.pattern),
        "method": plan.stage.method,
        **errors,
        "nulls": nulls,
        **({"tokens": max(stat.tokens for stat in stats.values())} if stats else {}),
    }
    return pruned.keep, facts, notes


def _cheap_level(plan: StagePlan, level: Level, budget: int) -> Tensor | None:
    """Return the weight at another level, [out, in] float32; None where that takes more than a selection."""
    if isinstance(level, masks.Ranking) and plan.refiner is None and plan.update is None:
        return level(plan.pattern, budget).weight
    return None


def _note_mask(keeps: dict[str, Tensor], linear: Linear, keep: Tensor) -> None:
    """Enter a linear's mask into the mask of the parameter that stores it."""
    name = linear.parameter_name
    stored = linear.module.get_parameter(linear.parameter)
    if linear.expert is None:
        keeps[name] = keep.T if linear.transposed else keep
        return
    whole = keeps.setdefault(name, torch.ones(stored.shape, dtype=torch.bool))
    whole[linear.expert] = keep.T if linear.transposed else keep


def checkpoint_tensors(model: LazyModel, index: int | None, changed: Mapping[str, Tensor]) -> dict[str, RawTensor]:
    """Return the tensors of a block (None: everything outside the blocks) as they go into the output.

    Unchanged tensors are copied byte for byte; changed ones are written in the dtype the source stores them in. When
    the user asked for another dtype, floating tensors are cast to it.
    """
    tensors: dict[str, RawTensor] = {}
    headers: dict[Path, Any] = {}
    unknown = sorted(set(changed) - set(model.keys(index)))
    if unknown:
        raise IndexMismatch(
            f"pruned tensor {unknown[0]} does not stand in the source block", where=str(model.weights.folder)
        )
    for key in model.keys(index):
        path = model.origin(index, key)
        if path not in headers:
            headers[path] = read_header(path)
        entry = headers[path].tensors[key]
        stored = torch_dtype(entry.dtype)
        target = model.target_dtype(stored)
        if key in changed:
            tensors[key] = to_raw(changed[key].to(target))
        elif target is not None and target != stored:
            tensors[key] = to_raw(_cast(_load(path, key), target, key))
        else:
            tensors[key] = read_raw(path, entry)
    return tensors


def pack_changed(
    written: dict[str, RawTensor],
    changed: Mapping[str, Tensor],
    keeps: Mapping[str, Tensor],
    tensors: Mapping[str, Mapping[str, Any]],
    form: Form,
    shared: dict[str, Form] | None = None,
) -> dict[str, dict[str, Any]]:
    """Replace pruned matrices in `written` by their packed parts; return the facts of those that were packed.

    Experts of one layer become one fused parameter when they are loaded, from lists of equal parts. So they share a
    layout and an encoding, and values are raw: the encoding split may or may not have patches. `shared` remembers
    their form from one call to the next, for experts of one layer that come in several.
    """
    facts: dict[str, dict[str, Any]] = {}
    shared = {} if shared is None else shared
    for key, keep in keeps.items():
        if not files.packable(key, tuple(keep.shape)):
            continue
        kind = expert_kind(key)
        wanted = form if kind == key else shared.get(kind, Form(form.layout, form.encoding or Encoding.RAW))
        packed = choose(
            changed[key].to(torch_dtype(written[key].dtype)),
            keep,
            parse_pattern(str(tensors[key]["pattern"])),
            layout=wanted.layout,
            encoding=wanted.encoding,
            transposed=bool(tensors[key]["transposed"]),
            where=key,
        )
        if kind != key:
            shared[kind] = Form(packed.layout, packed.encoding)
        if files.is_plain(packed):
            continue
        del written[key]
        written |= {name: to_raw(part) for name, part in files.parts(key, packed).items()}
        facts[key] = packed.facts()
    return facts


def expert_kind(key: str) -> str:
    """Return the tensor's name with an expert's number as `*`; the name itself for what is no expert."""
    return _EXPERT.sub(".*.", key)


def _cast(stored: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Return a tensor in the dtype that the user asked for; what does not fit into it is refused."""
    cast = stored.to(dtype)
    lost = int((torch.isfinite(stored) & ~torch.isfinite(cast)).sum())
    if lost:
        raise NonFinite(
            f"{lost} of {stored.numel()} values overflow {str(dtype).removeprefix('torch.')}",
            where=key,
            hint="Run with --dtype bf16 or --dtype fp32.",
        )
    return cast


def _load(path: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor
