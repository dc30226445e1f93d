"""Layout `block`: blocks of r outputs x c inputs are kept whole; a bitmask over the grid of blocks says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.errors import PatternViolation
from sparsekit.pack.bits import offsets, pack_mask, unpack_mask
from sparsekit.pack.checks import require_mask, require_offsets
from sparsekit.pack.support import BlockSupport, Extent, Support
from sparsekit.pattern import Block, Pattern

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({"weight_bitmask", "weight_row_offsets"})
RAW = "weight_blocks"


def pack(keep: Tensor, pattern: Pattern, where: str) -> tuple[dict[str, Tensor], Support]:
    """Return grid bitmask and block offsets of `keep: [rows, cols]`, and the positions.

    Raises:
        PatternViolation: A block is kept in part, or the pattern has no blocks.
        PlanError: The blocks do not tile the matrix.
    """
    block = _block(pattern, where)
    pattern.check(*keep.shape, where=where)
    high, wide = keep.shape[0] // block.rows, keep.shape[1] // block.cols
    filled = keep.reshape(high, block.rows, wide, block.cols).sum(dim=(1, 3))
    broken = int(((filled != 0) & (filled != block.unit)).sum())
    if broken:
        raise PatternViolation(f"{broken} blocks of {block} are kept in part", where=where)
    grid = filled != 0
    return {"weight_bitmask": pack_mask(grid), "weight_row_offsets": offsets(grid.sum(dim=1))}, BlockSupport(
        grid, block
    )


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Support:
    """Return the positions of a checked grid bitmask."""
    block = _block(pattern, "")
    return BlockSupport(unpack_mask(tensors["weight_bitmask"], shape[1] // block.cols), block)


def check(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern, where: str) -> Extent:
    """Prove grid bitmask and block offsets; return the extent of the kept positions."""
    block = _block(pattern, where)
    pattern.check(*shape, where=where)
    counts = require_mask(tensors["weight_bitmask"], shape[0] // block.rows, shape[1] // block.cols, where)
    require_offsets(tensors["weight_row_offsets"], counts, where)
    return Extent(counts * block.unit, (int(counts.sum()), block.rows, block.cols))


def _block(pattern: Pattern, where: str) -> Block:
    if not isinstance(pattern, Block):
        raise PatternViolation(f"layout block needs a pattern such as 4x1, got {pattern}", where=where)
    return pattern
