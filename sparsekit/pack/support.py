"""Kept positions as a way between a dense matrix and the stream of its kept values, in storage order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from sparsekit.lazy import torch
from sparsekit.pack.bits import count_rows, place, select
from sparsekit.pack.types import as_bits
from sparsekit.pattern import NM, Block, Pattern

if TYPE_CHECKING:
    from torch import Tensor


_RANKED = 1024  # rows looked at together


class Support(Protocol):
    """The kept positions of one matrix."""

    @property
    def counts(self) -> Tensor:
        """Values per row (`block`: per row of blocks), i64."""

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape in which raw values are stored; its product is the number of kept weights."""

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept elements of `dense: [rows, cols]` in storage order, flat."""

    def scatter(self, stream: Tensor) -> Tensor:
        """Return [rows, cols] with `stream` at the kept positions and zeros elsewhere."""


@dataclass(frozen=True)
class Extent:
    """How many values a layout stores, known without unpacking its positions.

    Attributes:
        counts: As `Support.counts`.
        value_shape: As `Support.value_shape`.
    """

    counts: Tensor
    value_shape: tuple[int, ...]

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class DenseSupport:
    """Everything is kept."""

    rows: int
    cols: int

    @property
    def counts(self) -> Tensor:
        """Values per row, i64 [rows]."""
        return torch.full((self.rows,), self.cols, dtype=torch.int64)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """(rows, cols)."""
        return (self.rows, self.cols)

    def gather(self, dense: Tensor) -> Tensor:
        """Return `dense`, flat."""
        return dense.reshape(-1)

    def scatter(self, stream: Tensor) -> Tensor:
        """Return `stream` as [rows, cols]."""
        return stream.reshape(self.rows, self.cols)

    def rank(self, row: Tensor, col: Tensor) -> Tensor:
        """Return the places of weights `row, col: [n]` in the stream, i64 [n]."""
        return row * self.cols + col


@dataclass(frozen=True)
class MaskSupport:
    """The positions where `keep: [rows, cols]` is True, row by row."""

    keep: Tensor

    @cached_property
    def counts(self) -> Tensor:
        """Values per row, i64 [rows]."""
        return count_rows(self.keep)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """(number of kept weights,)."""
        return (int(self.counts.sum()),)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept elements, row-major."""
        return select(dense, self.keep)

    def scatter(self, stream: Tensor) -> Tensor:
        """Return [rows, cols] with zeros in the holes."""
        return place(stream, self.keep)

    def rank(self, row: Tensor, col: Tensor) -> Tensor:
        """Return the places of weights `row, col: [n]` in the stream, i64 [n]; -1 where one is not kept."""
        column = torch.arange(self.keep.shape[1])
        pieces = [slice(start, start + _RANKED) for start in range(0, len(row), _RANKED)]
        before = [(self.keep[row[piece]] & (column < col[piece, None])).sum(dim=1) for piece in pieces]
        rank = (self.counts.cumsum(0) - self.counts)[row] + torch.cat(before)
        return torch.where(self.keep[row, col], rank, -1)


@dataclass(frozen=True)
class ColumnSupport:
    """The same number of columns in every row: `columns: [rows, kept]` i64, ascending."""

    columns: Tensor
    cols: int

    @property
    def counts(self) -> Tensor:
        """Values per row, i64 [rows]."""
        return torch.full((self.columns.shape[0],), self.columns.shape[1], dtype=torch.int64)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """(rows, kept)."""
        return tuple(self.columns.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept elements, row-major."""
        return dense.gather(1, self.columns).reshape(-1)

    def scatter(self, stream: Tensor) -> Tensor:
        """Return [rows, cols] with zeros in the holes."""
        dense = torch.zeros((self.columns.shape[0], self.cols), dtype=stream.dtype)
        return dense.scatter_(1, self.columns, stream.reshape(self.columns.shape))


@dataclass(frozen=True)
class BlockSupport:
    """Whole blocks: `grid: [rows / r, cols / c]` bool says which."""

    grid: Tensor
    block: Block

    @property
    def counts(self) -> Tensor:
        """Values per row of blocks, i64."""
        return self.grid.sum(dim=1) * self.block.unit

    @property
    def value_shape(self) -> tuple[int, ...]:
        """(number of kept blocks, r, c)."""
        return (int(self.grid.sum()), self.block.rows, self.block.cols)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept blocks, row of blocks by row of blocks, each one row-major."""
        return self._tiles(dense)[self.grid].reshape(-1)

    def scatter(self, stream: Tensor) -> Tensor:
        """Return [rows, cols] with zeros in the holes."""
        shape = (self.grid.shape[0] * self.block.rows, self.grid.shape[1] * self.block.cols)
        dense = torch.zeros(shape, dtype=stream.dtype)
        self._tiles(dense)[self.grid] = stream.reshape(-1, self.block.rows, self.block.cols)
        return dense

    def _tiles(self, dense: Tensor) -> Tensor:
        """View [rows, cols] as [rows / r, cols / c, r, c]."""
        high, wide = self.grid.shape
        return dense.view(high, self.block.rows, wide, self.block.cols).permute(0, 2, 1, 3)


def keep_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return the smallest legal mask of a dense `weight: [out, in]`: all it has to keep so that no bit is lost.

    A weight is kept unless all its bits are 0, so -0.0 is kept. Under N:M a group with fewer than N such weights
    is filled up from its lowest columns; a group with more than N keeps them all, which is then no legal N:M mask.
    Under blocks a block is kept whole or not at all.
    """
    keep = as_bits(weight.contiguous()) != 0
    rows, cols = weight.shape
    if isinstance(pattern, NM):
        groups = keep.reshape(-1, pattern.of)
        missing = (pattern.keep - groups.sum(dim=1, keepdim=True)).clamp_min(0)
        holes = ~groups
        return (groups | (holes & (holes.cumsum(dim=1) <= missing))).reshape(rows, cols)
    if isinstance(pattern, Block):
        tiles = keep.reshape(rows // pattern.rows, pattern.rows, cols // pattern.cols, pattern.cols)
        grid = tiles.any(dim=3).any(dim=1)
        return grid.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    return keep
