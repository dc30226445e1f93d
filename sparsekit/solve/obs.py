"""The column sweep: remove weights column by column, and move what is left so that the outputs change least.

Source: Frantar & Alistarh 2023, "SparseGPT", arXiv 2301.00774, algorithm 1. Removing w_j from a row costs
    w_j^2 / U_jj^2 and is made up for by  w_k -= (w_j / U_jj) U_jk  for all later columns k.

Columns are swept in strips; inside a strip in halves of halves, so that nearly all of the updates are matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.masks import zeroed

if TYPE_CHECKING:
    from torch import Tensor

Choose = Callable[["Tensor", int, int], "Tensor"]
"""`choose(current, first, last)`: the mask [out, last - first] of columns first..last-1, given their current values
[out, last - first]. Asked once for each group of columns, left to right."""

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
    errors = torch.empty(min(strip, len(columns)), columns.shape[1])

    def step(first: int, last: int, base: int) -> None:
        """Sweep columns first..last-1, whose values are current; `base` is the strip's first column."""
        if last - first <= max(group, _LEAF):
            for start in range(first, last, group):
                end = min(start + group, last)
                keep[start:end] = choose(columns[start:end].T, start, end).T
                for j in range(start, end):
                    error = errors[j - base]
                    torch.mul(columns[j], ~keep[j], out=error).div_(factor[j, j])
                    columns[j].mul_(keep[j])
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
