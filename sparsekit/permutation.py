"""Reordering the inputs of a block's linears, and what makes them, before anything of the block is pruned.

The dense block computes the same afterwards, so masks, updates and refiners see nothing but weights and statistics in
another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsekit import ranks
from sparsekit.contracts import LayerPruner, LinearInfo, Stat
from sparsekit.errors import PlanError, SparsekitError
from sparsekit.lazy import torch
from sparsekit.models.block import Block
from sparsekit.models.feeds import Feed, reorder_inputs
from sparsekit.models.lazy_model import LazyModel
from sparsekit.pattern import NM, Pattern


def check_permutation(model: LazyModel, targets: Sequence[LinearInfo], pattern: Pattern, *, where: str) -> list[str]:
    """Refuse what a pruner that permutes cannot do; return notes on what it leaves as it is. Reads no weight.

    Args:
        model: Its skeleton is enough.
        targets: Linears of the stage.
        pattern: The stage's.
        where: The stage in errors.

    Raises:
        PlanError: The pattern has no groups of inputs, or no target has inputs that can change places.
        UnsupportedFamily: It is not known what makes the inputs of this architecture's linears.
    """
    if not isinstance(pattern, NM):
        raise PlanError(
            f"a permutation of channels is for N:M patterns; pattern {pattern} has no groups of inputs to fill",
            where=where,
            hint="Set permute: false, or an N:M pattern.",
        )
    try:
        found = [(name, feed) for index in range(model.blocks) for name, feed in block_feeds(model, index).items()]
    except SparsekitError as error:
        error.hint = error.hint or "Set permute: false, and every linear is pruned in the order it has."
        raise
    names = {linear.name for linear in targets}
    fed = [(name, feed) for name, feed in found if name in names]
    fit = [name for name, feed in fed if fits(feed, pattern)]
    if not fit:
        raise PlanError(
            f"no target has inputs that can change places in groups of {pattern.of}",
            where=where,
            hint="Set permute: false, or take the linears behind heads and activations into targets.",
        )
    notes = [f"channels of {len(fit)} linears are reordered, first {fit[0]}; the inputs of the others stay"]
    uneven = [(name, feed.sets.shape[2]) for name, feed in fed if not fits(feed, pattern)]
    if uneven:
        name, size = uneven[0]
        notes.append(
            f"channels of {len(uneven)} linears are not reordered: sets of {size}, first {name}, are not divisible "
            f"by {pattern.of}"
        )
    return notes


@dataclass(frozen=True)
class Reordered:
    """A block after its permutations.

    Attributes:
        stats: Statistics of each target's inputs as they stand now.
        moved: How many inputs have another place, for each linear that was asked about.
        parameters: Names of all parameters that changed.
    """

    stats: dict[str, dict[str, Stat]]
    moved: dict[str, int]
    parameters: set[str]


def permute_block(
    model: LazyModel, index: int, pruner: LayerPruner[Any], pattern: NM, stats: Mapping[str, dict[str, Stat]]
) -> Reordered:
    """Reorder the inputs of the linears of a loaded, dense block as the pruner wants them.

    Args:
        model: Block `index` is loaded; its outputs stay what they are.
        index: Number of the block.
        pruner: Is asked for each order.
        pattern: The stage's.
        stats: Statistics of each target's inputs.
    """
    linears = {linear.name: linear for linear in model.stack.linears(index)}
    result = Reordered(dict(stats), {}, set())
    for name, feed in block_feeds(model, index).items():
        if name not in stats or not fits(feed, pattern):
            continue
        linear = linears[name]
        try:
            weight = linear.weight().to(torch.float32)
            order = ranks.share(partial(pruner.order, linear.info, weight, pattern, feed.sets, stats[name]))
        except SparsekitError as error:
            error.where = error.where or name
            raise
        result.moved[name] = int((order != torch.arange(len(order))).sum())
        if result.moved[name]:
            result.parameters.update(reorder_inputs(linear, feed, order))
            # Others may share the statistic: theirs stays as it is.
            result.stats[name] = {key: stat.reordered(order) for key, stat in stats[name].items()}
    return result


def block_feeds(model: LazyModel, index: int) -> dict[str, Feed]:
    """Return what makes the inputs of the linears of a block, for those that something in it makes.

    Raises:
        UnsupportedFamily: The architecture is not listed, or the block is not as its family's are.
    """
    block = Block.of(model.module, model.stack, index)
    return {block.prefix + name: feed for name, feed in block.feeds.items()}


def fits(feed: Feed, pattern: NM) -> bool:
    """Tell whether whole groups of the pattern lie inside the sets of a feed."""
    return feed.sets.shape[2] % pattern.of == 0
