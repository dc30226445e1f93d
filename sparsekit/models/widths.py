"""Blocks of different widths: fewer heads, channels of heads or neurons than the configuration says.

A key-value group with all its query heads is removed as a whole: rows of the query, key and value linears, columns of
the output linear. A channel is removed from all heads of a block. A neuron is removed with its rows in everything that
makes it and its column in the down projection. Which rows and columns these are follows from the table of roles. What
the table cannot tell of a family is refused, so that no parameter is ever left behind with its old meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.shapes import Widths
from sparsekit.contracts import Kept, NewLinear
from sparsekit.errors import ModelError
from sparsekit.lazy import torch
from sparsekit.models.block import Block, give_channels, pairs_to_channels, require_channels
from sparsekit.models.linears import Linear
from sparsekit.models.structure import Stack

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS = "num_key_value_heads"


@dataclass(frozen=True)
class Cut:
    """Rows and columns of a linear that stay, int64; None: all of them. A bias keeps the same rows."""

    linear: Linear
    rows: Tensor | None = None
    columns: Tensor | None = None


def head_groups(model: Any, stack: Stack, index: int) -> tuple[Linear, Tensor]:
    """Return the linear behind the heads of a block, and its inputs by key-value group, [groups, channels] int64.

    Args:
        model: A transformers model; its parameters may be on meta.
        stack: Its blocks.
        index: Number of the block.

    Raises:
        UnsupportedFamily: Groups of heads cannot be removed from this family; says why.
    """
    block = Block.of(model, stack, index)
    return block.named[block.spec.attention.output], block.heads().sets.flatten(1)


def neurons(model: Any, stack: Stack, index: int) -> tuple[Linear, Tensor]:
    """Return the down projection of a block, and its inputs one by one, [neurons, 1] int64.

    Args:
        model: A transformers model; its parameters may be on meta.
        stack: Its blocks.
        index: Number of the block.

    Raises:
        UnsupportedFamily: Neurons cannot be removed from this family; says why.
    """
    block = Block.of(model, stack, index)
    return block.named[block.down], torch.arange(block.named[block.down].info.in_features)[:, None]


def cuts(model: Any, stack: Stack, index: int, kept: Kept) -> tuple[Cut, ...]:
    """Return the linears of a block that become narrower, and what of them stays. Reads no weight.

    Args:
        model: A transformers model; its parameters may be on meta.
        stack: Its blocks.
        index: Number of the block.
        kept: What stays.

    Raises:
        UnsupportedFamily: What is removed cannot be removed from this family; says why.
    """
    block = Block.of(model, stack, index)
    found: list[Cut] = []
    if kept.groups is not None or kept.channels is not None:
        attention = block.spec.attention
        query, value = block.head_rows()
        if kept.groups is not None:
            query, value = query[kept.groups], value[kept.groups]
        if kept.channels is not None:
            require_channels(model, block)
            query, value = query[..., kept.channels], value[..., kept.channels]
        query, value = query.flatten(), value.flatten()
        rows = {attention.query: query, attention.key: value, attention.value: value}
        found += [Cut(block.named[name], rows=stay) for name, stay in rows.items()]
        found.append(Cut(block.named[attention.output], columns=query))
    if kept.neurons is not None:
        down = block.down
        makers: dict[str, list[Tensor]] = {}
        for maker, rows_of in block.feeds[down].makers:
            makers.setdefault(maker.name, []).append(rows_of[kept.neurons])  # gate and up may be one linear
        by_name = {linear.name: linear for linear in block.named.values()}
        found += [Cut(by_name[name], rows=torch.cat(stay)) for name, stay in makers.items()]
        found.append(Cut(block.named[down], columns=kept.neurons))
    return tuple(found)


def narrow_block(model: Any, stack: Stack, index: int, kept: Kept) -> set[str]:
    """Remove all other groups, channels and neurons of a block, and correct the sizes its modules know.

    Args:
        model: A transformers model; the block is loaded, or on meta.
        stack: Its blocks.
        index: Number of the block.
        kept: What stays.

    Returns:
        Names of the parameters that changed.

    Raises:
        UnsupportedFamily: As `cuts`.
    """
    dense = Block.of(model, stack, index)
    changed = {name for cut in cuts(model, stack, index, kept) for name in _apply(cut)}
    if kept.channels is not None:
        give_channels(dense, kept.channels)
    if kept.groups is None:
        return changed
    block = Block.of(model, stack, index)
    groups, copies, _ = block.feeds[block.spec.attention.output].sets.shape
    # Some families view their outputs by these numbers, others infer them.
    for name, count in (("num_heads", groups * copies), ("num_attention_heads", groups * copies), (_GROUPS, groups)):
        if hasattr(block.attention, name):
            setattr(block.attention, name, count)
    return changed


def silence_rest(model: Any, stack: Stack, index: int, kept: Kept, new: Mapping[str, NewLinear]) -> None:
    """Make a loaded block, in the shapes it has, compute what the narrow one would: all that goes becomes zero.

    Args:
        model: A transformers model.
        stack: Its blocks.
        index: Number of the block, which is loaded.
        kept: What stays.
        new: Linears as they are to be, by name, of the shapes that `kept` leaves.
    """
    for cut in cuts(model, stack, index, kept):
        weight, bias = cut.linear.weight(), cut.linear.bias()
        found = new.get(cut.linear.name)
        rows = slice(None) if cut.rows is None else cut.rows
        columns = slice(None) if cut.columns is None else cut.columns
        full = torch.zeros_like(weight)
        full[rows, columns] = weight[rows, columns] if found is None else found.weight.to(weight.dtype)
        cut.linear.replace(full)
        if bias is not None and cut.rows is not None:
            whole = torch.zeros_like(bias)
            kept_bias = None if found is None else found.bias
            whole[rows] = bias[rows] if kept_bias is None else kept_bias.to(bias.dtype)
            cut.linear.replace_bias(whole)


def narrow(model: Any, stack: Stack, widths: Sequence[Widths]) -> None:
    """Give the blocks of a model on meta the shapes that belong to their widths.

    Args:
        model: A transformers model as its configuration says, parameters on meta.
        stack: Its blocks.
        widths: One for each block.

    Raises:
        ModelError: Not one for each block, or a block would grow or vanish.
        UnsupportedFamily: A family that cannot be narrowed so.
    """
    if len(widths) != len(stack.blocks):
        raise _damaged(f"they are of {len(widths)} blocks, the configuration has {len(stack.blocks)}")
    for index, width in enumerate(widths):
        if width == Widths():
            continue
        groups, neuron = width.groups, width.neurons
        kept = Kept(
            None if groups is None else _first(groups, head_groups(model, stack, index)[1], "groups", index),
            None if neuron is None else _first(neuron, neurons(model, stack, index)[1], "neurons", index),
            _channels(width, Block.of(model, stack, index), index),
        )
        narrow_block(model, stack, index, kept)


def _apply(cut: Cut) -> set[str]:
    """Keep the rows and columns of a cut; return the names of the parameters that changed."""
    linear = cut.linear
    changed = {linear.parameter_name}
    weight, bias = linear.weight(), linear.bias()
    if cut.rows is not None:
        weight = weight[cut.rows]
        if bias is not None:
            changed.add(linear.replace_bias(bias[cut.rows]))
    if cut.columns is not None:
        weight = weight[:, cut.columns]
    outputs, inputs = linear.replace(weight).shape
    names = ("nf", "nx") if linear.transposed else ("out_features", "in_features")
    for name, size in zip(names, (outputs, inputs), strict=True):
        setattr(linear.module, name, size)
    return changed


def _first(count: int, sets: Tensor, what: str, index: int) -> Tensor:
    if not 1 <= count <= len(sets):
        raise _damaged(f"block {index} has {count} {what}, by the rest of the configuration it has {len(sets)}")
    return torch.arange(count)


def _channels(width: Widths, block: Block, index: int) -> Tensor | None:
    """Return the channels that the heads of a block have; None: all of them."""
    if width.channels is None:
        return None
    size = block.heads("channels of heads").sets.shape[-1]
    paired = block.spec.attention.rotary != "none"
    if paired != (width.rotary is not None):
        raise _damaged(f"block {index} {'needs' if paired else 'has no'} pairs of channels that positions turn")
    if width.rotary is None:
        return _first(width.channels, block.heads().sets[0, 0], "channels", index)
    last = width.rotary[-1]
    if last >= size // 2:
        raise _damaged(f"block {index} has pair {last} of channels, by the rest of the configuration {size // 2} pairs")
    pairs = torch.tensor(width.rotary, device="cpu")  # transformers builds models on meta by default
    return pairs_to_channels(pairs, size)


def _damaged(problem: str) -> ModelError:
    return ModelError(
        f"its widths are not this model's: {problem}",
        where="config.json",
        hint="It was changed, or belongs to another model; fetch it again.",
    )
