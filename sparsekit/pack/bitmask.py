"""Layout `bitmask`: one bit for each weight says whether it is kept; the values follow row by row.

A bit says *kept*, never "is not zero as a float": a kept -0.0 or 0.0 is a value like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.pack.bits import offsets, pack_mask, unpack_mask
from sparsekit.pack.checks import require_mask, require_offsets
from sparsekit.pack.support import Extent, MaskSupport, Support
from sparsekit.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({"weight_bitmask", "weight_row_offsets"})
RAW = "weight_nz"


def pack(keep: Tensor, pattern: Pattern, where: str) -> tuple[dict[str, Tensor], Support]:
    """Return bitmask and row offsets of `keep: [rows, cols]`, and the positions."""
    support = MaskSupport(keep)
    return {"weight_bitmask": pack_mask(keep), "weight_row_offsets": offsets(support.counts)}, support


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Support:
    """Return the positions of a checked bitmask."""
    return MaskSupport(unpack_mask(tensors["weight_bitmask"], shape[1]))


def check(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern, where: str) -> Extent:
    """Prove bitmask and row offsets; return the extent of the kept positions."""
    counts = require_mask(tensors["weight_bitmask"], *shape, where)
    require_offsets(tensors["weight_row_offsets"], counts, where)
    return Extent(counts, (int(counts.sum()),))
