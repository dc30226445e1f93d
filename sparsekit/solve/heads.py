"""Heads of fewer channels: which channels of queries and keys stay, and the directions that values are turned into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.models.block import Block, pairs_to_channels
from sparsekit.models.linears import Linear
from sparsekit.solve.modular import SecondMoments, cr_scores, largest, value_output

if TYPE_CHECKING:
    from torch import Tensor


def narrow_heads(block: Block, moments: SecondMoments, count: int) -> dict[str, Tensor]:
    """Return the channels of all heads of a block that stay, and the linears that are not just cut to them.

    Args:
        block: The block, loaded.
        moments: Of what queries, keys and values are made from.
        count: Channels of a head.
    """
    roles = block.spec.attention
    query, key, value, output = (block.named[name] for name in (roles.query, roles.key, roles.value, roles.output))
    rows, key_rows = block.head_rows()
    paired = roles.rotary == "halves"
    energy = [moments.energy(linear.weight(), linear.bias()) for linear in (query, key)]
    scores = cr_scores(energy[0][rows], energy[1][key_rows], paired=paired)
    tensors: dict[str, Tensor] = {}

    def keep(linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
        tensors[f"{linear.name}.weight"] = weight.to(linear.weight().dtype)
        if bias is not None:
            tensors[f"{linear.name}.bias"] = bias.to(linear.weight().dtype)

    if paired:
        tensors["channels"] = pairs_to_channels(largest(scores.sum(dim=0), count // 2), rows.shape[-1])
    else:
        tensors["channels"] = torch.arange(count)
        chosen = largest(scores, count)
        for linear, places, all_rows in (
            (query, chosen[:, None].expand(*rows.shape[:2], count), rows),
            (key, chosen, key_rows),
        ):
            stay = all_rows.gather(-1, places).flatten()
            bias = linear.bias()
            keep(linear, linear.weight()[stay], None if bias is None else bias[stay])
    second = moments.of(value.weight(), value.bias())
    weight, bias, reader = value.weight().double(), value.bias(), output.weight().double()
    made, shifted, read = [], [], []
    for heads, own in zip(rows, key_rows, strict=True):
        onto, back = value_output(second[own][:, own], torch.cat([reader[:, head] for head in heads]), count)
        made.append(onto @ weight[own])
        shifted += [] if bias is None else [onto @ bias[own].double()]
        read += [reader[:, head] @ back for head in heads]
    keep(value, torch.cat(made), torch.cat(shifted) if shifted else None)
    keep(output, torch.cat(read, dim=1), None)
    return tensors
