"""Executing a reshape stage: the plan is made once and journalled, then every block that stays is written as a shard.

Blocks that do not change are copied byte for byte under their new number. What comes out is a whole model, which the
next stage opens as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsekit import ranks
from sparsekit.allocation import Workspace
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.safetensors_file import RawTensor
from sparsekit.checkpoint.shapes import Shapes
from sparsekit.checkpoint.staging import JournalEntry, StagedCheckpoint
from sparsekit.contracts import LinearInfo, NewLinear, OpenBlock, ReshapeContext, Reshaped, Stat, Stats, WholeModel
from sparsekit.errors import IndexMismatch, NonFinite, SparsekitError
from sparsekit.finite import all_finite
from sparsekit.lazy import torch
from sparsekit.memory import release_freed
from sparsekit.models.lazy_model import LazyModel
from sparsekit.models.linears import Linear
from sparsekit.models.raw import to_raw
from sparsekit.models.whole import LoadedModel
from sparsekit.models.widths import narrow_block
from sparsekit.plan import ReshapePlan
from sparsekit.progress import Reporter, track
from sparsekit.prune import OUTER, checkpoint_tensors
from sparsekit.walk import walk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReshapeResult:
    """What a reshape stage did.

    Attributes:
        blocks: Old blocks in their new order.
        config: Keys of config.json that changed.
        shapes: In what the shapes of what is left differ from those of its configuration.
        plan: What the reshaper decided.
        facts: What it saw.
        parameters: Those of the model before and after, shared ones once; of the result as it was opened again.
    """

    blocks: tuple[int, ...]
    config: dict[str, JSON]
    shapes: Shapes
    plan: dict[str, Any]
    facts: dict[str, dict[str, float]]
    parameters: tuple[int, int] = (0, 0)


def reshape_stage(
    model: LazyModel,
    plan: ReshapePlan,
    samples: Tensor | None,
    staged: StagedCheckpoint,
    name_shard: Callable[[int, int, bool], str],
    reporter: Reporter,
    workspace: Workspace,
) -> ReshapeResult:
    """Decide what goes, and write the shards of all blocks that stay.

    Args:
        model: The model as it is; blocks that become narrow stay so in it.
        plan: What to do.
        samples: Calibration ids [samples, sequence_length]; None when the plan needs no data.
        staged: Where shards and journal lines go.
        name_shard: File name of a block, from its number, how many blocks there are, and whether some are narrow.
        reporter: Told about every block.
        workspace: Where the reshaper may keep files.
    """
    decided = ranks.share(lambda: _journalled(staged)) or _decide(model, plan, samples, reporter, workspace)
    reshaped = plan.reshaper.apply(plan.anatomy, decided["plan"], workspace.folder)
    shapes = model.shapes if reshaped.shapes is None else reshaped.shapes
    task = f"reshape ({plan.stage.method})"
    count = len(reshaped.blocks)
    for place, old in enumerate(track(reshaped.blocks, reporter, task, count, "blocks")):
        name = name_shard(place, count, not shapes.plain)
        write = partial(_write_block, model, old, place, reshaped, decided, staged, name)
        if not ranks.share(partial(staged.finished, f"block-{place}")):
            ranks.share(write)
    if reshaped.tensors is not None and not ranks.share(partial(staged.finished, OUTER)):
        ranks.share(partial(_write_outer, model, reshaped, staged, name_shard(count, count, not shapes.plain)))
    return ReshapeResult(reshaped.blocks, {**reshaped.config}, shapes, decided["plan"], decided["facts"])


def _decide(
    model: LazyModel, plan: ReshapePlan, samples: Tensor | None, reporter: Reporter, workspace: Workspace
) -> dict[str, Any]:
    """Ask the reshaper; all ranks look at the model together."""
    context = _context(model, plan, samples, reporter, workspace)
    decided = {"plan": plan.reshaper.plan(context), "facts": context.facts}
    return ranks.share(lambda: decided)


def _write_block(
    model: LazyModel,
    old: int,
    place: int,
    reshaped: Reshaped,
    decided: dict[str, Any],
    staged: StagedCheckpoint,
    name: str,
) -> JournalEntry:
    """Write the shard of an old block in its new place, and journal it; the first with what was decided."""
    tensors = _renumbered(model, old, place, _written(model, old, reshaped))
    facts: dict[str, Any] = {"reshape": decided} if place == 0 else {}
    return staged.write_shard(f"block-{place}", name, tensors, facts)


def _write_outer(model: LazyModel, reshaped: Reshaped, staged: StagedCheckpoint, name: str) -> JournalEntry:
    """Write the shard of what is outside the blocks, which changes, and journal it."""
    assert reshaped.tensors is not None  # noqa: S101  (asked before)
    model.load_outer()
    tensors = _stored(model, None, {}, reshaped.tensors(None))
    model.release_outer()
    return staged.write_shard(OUTER, name, tensors, {})


def _journalled(staged: StagedCheckpoint) -> dict[str, Any] | None:
    """Return what an interrupted run had decided, None without one."""
    entry = staged.finished("block-0")
    found: Any = entry.facts.get("reshape") if entry else None
    return dict(found) if found else None


def _context(
    model: LazyModel, plan: ReshapePlan, samples: Tensor | None, reporter: Reporter, workspace: Workspace
) -> ReshapeContext:
    """Return what the reshaper may look at."""

    def visit(needs: frozenset[str]) -> Iterator[tuple[LinearInfo, Tensor, Stats]]:
        for block in walk(model, samples, reporter, propagate="none", task="reshape: statistics"):
            stats = block.collect(block.linears, needs)
            for linear in block.linears:
                yield linear.info, linear.weight().to(torch.float32), stats[linear.name]

    def flows(name: str) -> list[Stat]:
        task = "reshape: hidden states"
        return [block.flow(name) for block in walk(model, samples, reporter, propagate="none", task=task)]

    @contextmanager
    def whole() -> Iterator[WholeModel]:
        probes = plan.reshaper.probes()
        if probes is None or samples is None:
            raise SparsekitError(f"reshaper {plan.stage.method} asks for the whole model without naming its probes")
        ids = samples[: probes.samples, : probes.sequence_length]
        yield LoadedModel(model, ids, lambda: None, model.dtype if probes.own_dtype else None)
        release_freed()

    def blocks() -> Iterator[OpenBlock]:
        yield from walk(model, samples, reporter, task=f"reshape ({plan.stage.method})")

    return ReshapeContext(
        plan.anatomy,
        visit,
        flows,
        blocks,
        whole,
        reporter=reporter,
        folder=workspace.folder,
        identity=workspace.identity,
    )


def _written(model: LazyModel, old: int, reshaped: Reshaped) -> dict[str, RawTensor]:
    """Return the tensors of an old block, with the linears that change as they are to be."""
    changes, kept = reshaped.linears(old), reshaped.kept(old)
    if not changes and kept.all and reshaped.tensors is None:
        return checkpoint_tensors(model, old, {})
    model.load_block(old)
    names = narrow_block(model.module, model.stack, old, kept)
    linears = {linear.name: linear for linear in model.stack.linears(old)}
    names |= {name for linear, new in changes.items() for name in _replace(linears[linear], new)}
    state = model.module.state_dict()
    changed = {name: state[name] for name in names}
    tensors = _stored(model, old, changed, {} if reshaped.tensors is None else reshaped.tensors(old))
    model.release_block(old)
    return tensors


def _stored(
    model: LazyModel, block: int | None, changed: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, RawTensor]:
    """Return the tensors of a block (None: everything outside the blocks) with these parameters, as they are written.

    One of `others` that the source does not hold, such as a head that was tied, has its own name and the model's dtype.
    """
    for name, value in others.items():
        if not all_finite(value):
            raise NonFinite("the reshaped weight is not finite", where=name)
    fresh = {name: value for name, value in others.items() if name not in model.stored}
    known = {**changed, **{name: value for name, value in others.items() if name not in fresh}}
    tensors = checkpoint_tensors(model, block, model.to_checkpoint(known))
    return {**tensors, **{model.new_name(name): to_raw(value.to(model.dtype)) for name, value in fresh.items()}}


def _replace(linear: Linear, new: NewLinear) -> set[str]:
    """Store a linear's new weight and bias; return the names of the parameters that changed."""
    for value in (new.weight, new.bias):
        if value is not None and not all_finite(value):
            raise NonFinite("the reshaped weight is not finite", where=linear.name)
    changed = {linear.parameter_name}
    linear.replace(new.weight)
    if new.bias is not None and (old := linear.bias()) is not None:
        changed.add(linear.replace_bias(new.bias.to(old.dtype)))
    return changed


def _renumbered(model: LazyModel, old: int, new: int, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Return the tensors of block `old` under the names of block `new`."""
    stack = model.stack.path.rpartition(".")[2]
    pattern = re.compile(rf"(^|\.){re.escape(stack)}\.{old}\.")
    renamed = {pattern.sub(rf"\g<1>{stack}.{new}.", name, count=1): tensor for name, tensor in tensors.items()}
    unnumbered = [name for name in tensors if not pattern.search(name)]
    if unnumbered:
        raise IndexMismatch(
            f"its name does not say that it belongs to block {old}, so it cannot be renamed", where=unnumbered[0]
        )
    return renamed
