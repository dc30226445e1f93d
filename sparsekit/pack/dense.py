"""Layout `dense`: every weight is stored; what pruned weights take where packing does not pay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.pack.support import DenseSupport, Extent, Support
from sparsekit.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES: frozenset[str] = frozenset()
RAW = "weight"


def pack(keep: Tensor, pattern: Pattern, where: str) -> tuple[dict[str, Tensor], Support]:
    """Return no tensors, and all positions."""
    return {}, DenseSupport(*keep.shape)


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Support:
    """Return all positions."""
    return DenseSupport(*shape)


def check(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern, where: str) -> Extent:
    """Return the extent of all positions; there is nothing that could be wrong."""
    support = DenseSupport(*shape)
    return Extent(support.counts, support.value_shape)
