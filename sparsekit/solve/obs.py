"""The column sweep: remove weights column by column, and move what is left so that the outputs change least.

Source: Frantar & Alistarh 2023, "SparseGPT", arXiv 2301.00774, algorithm 1. Removing w_j from a row costs
    w_j^2 / U_jj^2 and is made up for by  w_k -= (w_j / U_jj) U_jk  for all later columns k.

Columns are swept in strips; inside a strip in halves of halves, so that nearly all of the updates are matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.masks import select, zeroed
from sparsekit.pattern import NM, Block, Pattern
from sparsekit.solve.factor import InverseFactor

if TYPE_CHECKING:
    from torch import Tensor

Choose = Callable[["Tensor", int, int], "Tensor"]
"""`choose(current, first, last)`: the mask [out, last - first] of columns first..last-1, given their current values
[out, last - first]. Asked once for each group of columns, left to right."""

STRIP = 128
"""Columns that compete with each other, as published; for a given mask only the speed depends on it."""

_LEAF = 32  # columns swept one by one


def sweep(weight: Tensor, upper: Tensor, choose: Choose, group: int, strip: int) -> tuple[Tensor, Tensor]:
    """Prune and compensate all columns from left to right.

    Args:
        weight: [out, in] float32; not changed.
        upper: U of G^-1 = U^T U, [in, in].
        choose: Decides what stays.
        group: Columns that are decided together, when the sweep reaches the first of them; divides `strip`.
        strip: Columns whose effect on all later columns is applied at once.

    Returns:
        (weight, keep): the compensated weight, zero where `keep` is False, and the mask; [out, in] each.
    """
    columns = weight.T.contiguous()  # [in, out]: a column of the weight is contiguous
    keep = torch.zeros(columns.shape, dtype=torch.bool)
    factor = upper.to(torch.float32)
    diagonal = factor.diagonal()
    errors = torch.empty(min(strip, len(columns)), columns.shape[1])

    def step(first: int, last: int, base: int) -> None:
        """Sweep columns first..last-1, whose values are current; `base` is the strip's first column."""
        if last - first <= max(group, _LEAF):
            for start in range(first, last, group):
                end = min(start + group, last)
                keep[start:end] = choose(columns[start:end].T, start, end).T
                removed = ~keep[start:end] / diagonal[start:end, None]
                for j in range(start, end):
                    error = torch.mul(columns[j], removed[j - start], out=errors[j - base])
                    columns[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            return
        middle = first + -(-(last - first) // 2 // group) * group
        step(first, middle, base)
        columns[middle:last].addmm_(factor[first:middle, middle:last].T, errors[first - base : middle - base], alpha=-1)
        step(middle, last, base)

    for base in range(0, len(columns), strip):
        end = min(base + strip, len(columns))
        step(base, end, base)
        columns[end:].addmm_(factor[base:end, end:].T, errors[: end - base], alpha=-1)
    kept = keep.T.contiguous()
    return zeroed(columns.T.contiguous(), kept), kept


def prune(weight: Tensor, factor: InverseFactor, pattern: Pattern, budget: int, strip: int) -> tuple[Tensor, Tensor]:
    """Sweep a linear and choose in each strip, on the weights as compensated so far, what costs most to remove.

    Args:
        weight: [out, in] float32; not changed.
        factor: Of the inputs' gram matrix.
        pattern: N:M groups are chosen as the sweep reaches them, all else at the start of a strip.
        budget: Kept weights; strips share it in proportion to their width.
        strip: Columns that compete with each other, rounded to the pattern's width.

    Returns:
        (weight, keep): [out, in] each, as from `sweep`.
    """
    out_features, in_features = weight.shape
    pattern.check(out_features, in_features, where="column sweep")
    width = pattern.of if isinstance(pattern, NM) else pattern.cols if isinstance(pattern, Block) else 1
    strip = max(strip // width, 1) * width
    cost = factor.upper.diagonal().square().reciprocal_().float().masked_fill_(factor.dead, 0)  # 1 / U_jj^2

    def share(first: int, last: int) -> int:
        """Return how many weights the columns first..last-1 keep, in whole units; all strips sum to the budget."""
        if isinstance(pattern, NM):
            return out_features * (last - first) // pattern.of * pattern.keep
        units = budget // pattern.unit
        return (units * last // in_features - units * first // in_features) * pattern.unit

    def choose(current: Tensor, first: int, last: int) -> Tensor:
        return select(current.square() * cost[first:last], pattern, share(first, last), "linear")  # eq. 3

    return sweep(weight, factor.upper, choose, pattern.of if isinstance(pattern, NM) else strip, strip)


def compensate(weight: Tensor, factor: InverseFactor, keep: Tensor) -> Tensor:
    """Sweep `weight: [out, in]` with a given mask [out, in]; return the compensated weight, zero outside the mask."""
    return sweep(weight, factor.upper, lambda _, first, last: keep[:, first:last], STRIP, STRIP)[0]
