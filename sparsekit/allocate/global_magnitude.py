"""Global magnitude allocation: one ranking of |W| over the whole model decides what each linear keeps.

What it does: kept_l = number of linear l's weights among the `budget` largest magnitudes of all target linears. With
    `method: magnitude, group: linear` the result is the global magnitude mask.
Source: Jaiswal et al. 2023, "The Emergence of Essential Sparsity in Large Pre-trained Models", arXiv 2306.03805.
Shapes: linears -> kept counts.
Cost: two passes over the weights, 0.5 MB per linear; no data.
Deviations: exact rank by a two-level histogram over the float32 bit pattern, instead of one sort of all weights in
    memory. Ties at the threshold go to linears in the order of the model.
Numbers: equals a sort of all weights (tests/oracle); starves linears of small scale: never a default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import AllocationContext, Allocator, MethodOptions
from sparsekit.errors import PlanError
from sparsekit.lazy import torch
from sparsekit.pattern import Unstructured

if TYPE_CHECKING:
    from torch import Tensor


class GlobalMagnitudeOptions(MethodOptions):
    """`global_magnitude` has no options."""


class GlobalMagnitude(Allocator[GlobalMagnitudeOptions]):
    """Counts of one magnitude ranking over all target linears."""

    options_type = GlobalMagnitudeOptions
    looks = True

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Find the magnitude of rank `budget` and count the weights above it in each linear."""
        if not isinstance(context.pattern, Unstructured):
            raise PlanError(
                f"allocate: global_magnitude ranks single weights, the pattern is {context.pattern}",
                hint="Use pattern: unstructured, or allocate: uniform.",
            )
        high = {linear.name: _histogram(_bits(weight) >> 16) for linear, weight, _ in context.visit(frozenset())}
        high_bin, wanted = _locate(torch.stack(list(high.values())).sum(0), budget)
        low = {
            linear.name: _histogram(bits[(bits >> 16) == high_bin] & 0xFFFF)
            for linear, weight, _ in context.visit(frozenset())
            for bits in (_bits(weight),)
        }
        low_bin, wanted = _locate(torch.stack(list(low.values())).sum(0), wanted)
        counts: dict[str, int] = {}
        for name in high:
            above = int(high[name][high_bin + 1 :].sum()) + int(low[name][low_bin + 1 :].sum())
            ties = min(wanted, int(low[name][low_bin]))
            wanted -= ties
            counts[name] = above + ties
        return counts


def _bits(weight: Tensor) -> Tensor:
    """Return the bit patterns of |weight| in float32 as int32: for non-negative floats their order is the value's."""
    return weight.to(torch.float32).abs().reshape(-1).view(torch.int32)


def _histogram(bins: Tensor) -> Tensor:
    return torch.bincount(bins, minlength=1 << 16)


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the `rank`-th largest entry, and how many of that bin are still wanted."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < rank).sum())
    taken = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, rank - taken
