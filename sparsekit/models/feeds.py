"""Which outputs make the inputs of a linear, and reordering both so that the model computes the same.

Only two kinds of linears of a block have inputs that other linears of it make, channel by channel: those behind the
activation of an MLP, and those behind the heads of an attention. All others read the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.errors import UnsupportedFamily
from sparsekit.lazy import torch
from sparsekit.models.linears import Linear
from sparsekit.models.roles import MLP, Attention, FamilySpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """What makes the inputs of a linear.

    Attributes:
        makers: Linears and their rows [in]: input j is made of output `rows[j]` of each. One output may make several
            inputs: a value channel feeds all query heads of its group.
        sets: Inputs that may change places, [sets, copies, size]: within each set, in all copies alike.
    """

    makers: tuple[tuple[Linear, Tensor], ...]
    sets: Tensor


def feeds(
    spec: FamilySpec, config: Any, linears: Sequence[Linear], prefix: str, size: int | None = None
) -> dict[str, Feed]:
    """Return the feeds of the linears of one block that have one, by the linear's name.

    Args:
        spec: Roles of the family.
        config: The model's configuration, for its heads.
        linears: All linears of the block.
        prefix: Dotted name of the block.
        size: Channels of a head; None: as the configuration says.

    Raises:
        UnsupportedFamily: The block's linears are not those of the family, or have other shapes.
    """
    named = {linear.name.removeprefix(f"{prefix}."): linear for linear in linears}
    found = {named[mlp.down].name: _mlp_feed(mlp, named) for mlp in _present(spec.mlps, named)}
    if not found or spec.attention.output not in named:
        raise UnsupportedFamily("the block lacks the linears of its family", where=prefix)
    output = named[spec.attention.output]
    return {output.name: _attention_feed(spec.attention, config, named, size or head_size(config)), **found}


def reorder_inputs(linear: Linear, feed: Feed, order: Tensor) -> set[str]:
    """Put old input `order[j]` of a linear at place j, and the outputs that make it likewise: nothing else changes.

    Args:
        linear: Its columns are reordered.
        feed: What makes its inputs.
        order: [in] int64, a permutation inside the sets of `feed`.

    Returns:
        Names of the parameters that changed.
    """
    linear.replace(linear.weight()[:, order])
    changed = {linear.parameter_name}
    for maker, rows in feed.makers:
        weight = maker.weight().clone()
        weight[rows] = weight[rows[order]]
        maker.replace(weight)
        changed.add(maker.parameter_name)
        if (bias := maker.bias()) is not None:
            # Out of place: the parameter may be a view of the source file.
            moved = bias.clone()
            moved[rows] = bias[rows[order]]
            changed.add(maker.replace_bias(moved))
    return changed


def head_size(config: Any) -> int:
    """Return the channels of one head of a model's attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _present(mlps: Sequence[MLP], named: Mapping[str, Linear]) -> Iterator[MLP]:
    """Yield the MLPs that a block has, one for each expert."""
    for mlp in mlps:
        if "*" not in mlp.down:
            if mlp.down in named:
                yield mlp
            continue
        expert = 0
        while mlp.down.replace("*", str(expert)) in named:
            up, down, gate = (name and name.replace("*", str(expert)) for name in (mlp.up, mlp.down, mlp.gate))
            yield MLP(str(up), str(down), gate, mlp.rows)
            expert += 1


def _mlp_feed(mlp: MLP, named: Mapping[str, Linear]) -> Feed:
    down = named[mlp.down]
    width = down.info.in_features
    channels = torch.arange(width)
    if mlp.rows == "whole":
        makers = tuple((_maker(named, name, width, down), channels) for name in (mlp.gate, mlp.up) if name)
    else:
        fused = _maker(named, mlp.up, 2 * width, down)
        halves = (channels, channels + width) if mlp.rows == "halves" else (2 * channels, 2 * channels + 1)
        makers = tuple((fused, rows) for rows in halves)
    return Feed(makers, channels.reshape(1, 1, width))


def _attention_feed(attention: Attention, config: Any, named: Mapping[str, Linear], size: int) -> Feed:
    output = named[attention.output]
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    copies = heads // groups  # query heads that read the same values; a narrower block has fewer groups, no other ones
    width = output.info.in_features
    groups = width // (copies * size)
    if width != groups * copies * size:
        raise UnsupportedFamily(
            f"{width} inputs are no whole groups of {copies} heads of {size} channels", where=output.name
        )
    values = torch.arange(groups * size).reshape(groups, 1, size)
    if attention.rows == "whole":
        outputs = groups * size
    elif attention.rows == "parts":
        outputs = width + 2 * groups * size
        values = values + width + groups * size
    else:
        outputs = 3 * width
        values = values + 2 * size * torch.arange(1, groups + 1).reshape(groups, 1, 1)
    value = _maker(named, attention.value, outputs, output)
    rows = values.expand(groups, copies, size).reshape(width)
    return Feed(((value, rows),), torch.arange(width).reshape(groups, copies, size))


def _maker(named: Mapping[str, Linear], name: str, outputs: int, reader: Linear) -> Linear:
    """Return the linear that makes the inputs of `reader`; it must have so many outputs."""
    maker = named.get(name)
    if maker is None or maker.info.out_features != outputs:
        got = f"has {maker.info.out_features} outputs" if maker else "is not in the block"
        raise UnsupportedFamily(f"{name}, which makes its inputs, {got}, needed {outputs}", where=reader.name)
    return maker
