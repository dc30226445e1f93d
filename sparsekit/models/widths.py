"""Blocks of different widths: fewer groups of heads and fewer neurons than the configuration says.

A key-value group with all its query heads is removed as a whole: rows of the query, key and value linears, columns of
the output linear. A neuron is removed with its rows in everything that makes it and its column in the down projection.
Which rows and columns these are follows from the table of roles. What the table cannot tell of a family is refused, so
that no parameter is ever left behind with its old meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.shapes import Widths
from sparsekit.contracts import Kept
from sparsekit.errors import ModelError, UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.feeds import Feed, feeds
from sparsekit.models.linears import Linear
from sparsekit.models.roles import FamilySpec, family
from sparsekit.models.structure import Stack

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    block = _Block.of(model, stack, index)
    return block.named[block.spec.attention.output], _heads(block).sets.flatten(1)


def neurons(model: Any, stack: Stack, index: int) -> tuple[Linear, Tensor]:
    """Return the down projection of a block, and its inputs one by one, [neurons, 1] int64.

    Args:
        model: A transformers model; its parameters may be on meta.
        stack: Its blocks.
        index: Number of the block.

    Raises:
        UnsupportedFamily: Neurons cannot be removed from this family; says why.
    """
    block = _Block.of(model, stack, index)
    return block.named[_down(block)], torch.arange(block.named[_down(block)].info.in_features)[:, None]


def cuts(model: Any, stack: Stack, index: int, kept: Kept) -> tuple[Cut, ...]:
    """Return the linears of a block that become narrower, and what of them stays. Reads no weight.

    Args:
        model: A transformers model; its parameters may be on meta.
        stack: Its blocks.
        index: Number of the block.
        kept: Groups and neurons that stay.

    Raises:
        UnsupportedFamily: What is removed cannot be removed from this family; says why.
    """
    block = _Block.of(model, stack, index)
    found: list[Cut] = []
    if kept.groups is not None:
        attention, feed = block.spec.attention, _heads(block)
        query = feed.sets[kept.groups].flatten()
        (_, values), *_ = feed.makers
        value = values.reshape(feed.sets.shape)[kept.groups, 0].flatten()  # one copy of what many heads read
        rows = {attention.query: query, attention.key: value, attention.value: value}
        found += [Cut(block.named[name], rows=stay) for name, stay in rows.items()]
        found.append(Cut(block.named[attention.output], columns=query))
    if kept.neurons is not None:
        down = _down(block)
        makers: dict[str, list[Tensor]] = {}
        for maker, rows_of in block.feeds[down].makers:
            makers.setdefault(maker.name, []).append(rows_of[kept.neurons])  # gate and up may be one linear
        by_name = {linear.name: linear for linear in block.named.values()}
        found += [Cut(by_name[name], rows=torch.cat(stay)) for name, stay in makers.items()]
        found.append(Cut(block.named[down], columns=kept.neurons))
    return tuple(found)


def narrow_block(model: Any, stack: Stack, index: int, kept: Kept) -> set[str]:
    """Remove all other groups and neurons of a block from its parameters, and correct the sizes its modules know.

    Args:
        model: A transformers model; the block is loaded, or on meta.
        stack: Its blocks.
        index: Number of the block.
        kept: Groups and neurons that stay.

    Returns:
        Names of the parameters that changed.

    Raises:
        UnsupportedFamily: As `cuts`.
    """
    changed = {name for cut in cuts(model, stack, index, kept) for name in _apply(cut)}
    if kept.groups is None:
        return changed
    block = _Block.of(model, stack, index)
    groups, copies, _ = block.feeds[block.spec.attention.output].sets.shape
    # Some families view their outputs by these numbers, others infer them.
    for name, count in (("num_heads", groups * copies), ("num_attention_heads", groups * copies), (_GROUPS, groups)):
        if hasattr(block.attention, name):
            setattr(block.attention, name, count)
    return changed


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
        )
        narrow_block(model, stack, index, kept)


@dataclass(frozen=True)
class _Block:
    """A block by the names that its family's roles use, relative to it."""

    spec: FamilySpec
    prefix: str
    attention: nn.Module
    named: Mapping[str, Linear]
    feeds: Mapping[str, Feed]

    @classmethod
    def of(cls, model: Any, stack: Stack, index: int) -> _Block:
        spec, prefix, linears = family(model), f"{stack.prefix(index)}.", stack.linears(index)
        found = feeds(spec, model.config, linears, stack.prefix(index))
        attention = stack.blocks[index].get_submodule(spec.attention.output.rpartition(".")[0])
        named = {linear.name.removeprefix(prefix): linear for linear in linears}
        return cls(spec, prefix, attention, named, {name.removeprefix(prefix): feed for name, feed in found.items()})


def _heads(block: _Block) -> Feed:
    """Return the feed of the linear behind the heads, if whole groups of heads can be removed."""
    roles = block.spec.attention
    output = block.prefix + roles.output
    if roles.rows != "whole":
        raise UnsupportedFamily(
            f"heads cannot be removed: queries, keys and values are one linear, {roles.query}", where=output
        )
    known = (roles.query, roles.key, roles.value, roles.output, *roles.head_norms)
    path = roles.output.rpartition(".")[0]
    for name, parameter in block.attention.named_parameters():
        if not f"{path}.{name}".startswith(tuple(f"{part}." for part in known)):
            raise UnsupportedFamily(
                f"heads cannot be removed: {path}.{name} {list(parameter.shape)} goes with all of them", where=output
            )
    feed = block.feeds[roles.output]
    needed = {roles.query: feed.sets.numel(), roles.key: feed.makers[0][0].info.out_features}
    for name, outputs in needed.items():
        if name not in block.named or block.named[name].info.out_features != outputs:
            got = f"has {block.named[name].info.out_features} outputs" if name in block.named else "is not there"
            raise UnsupportedFamily(f"heads cannot be removed: {name} {got}, needed {outputs}", where=output)
    return block.feeds[roles.output]


def _down(block: _Block) -> str:
    """Return the name of the one down projection, if there is one alone."""
    found = [name for name in block.feeds if name != block.spec.attention.output]
    if len(found) > 1:
        raise UnsupportedFamily(
            f"neurons cannot be removed: the block has {len(found)} MLPs, experts or beside experts",
            where=block.prefix + found[0],
        )
    return found[0]


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


def _damaged(problem: str) -> ModelError:
    return ModelError(
        f"its widths are not this model's: {problem}",
        where="config.json",
        hint="It was changed, or belongs to another model; fetch it again.",
    )
