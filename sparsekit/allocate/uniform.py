"""Uniform allocation: every linear keeps the same share of its weights.

What it does: kept_l = (1 - sparsity) * numel_l, rounded so that the sum is exact.
Source: the default of the pruning literature.
Shapes: linears -> kept counts.
Cost: none.
Deviations: counts are integers that sum to the budget; references floor per row and lose weights.
Numbers: sums checked by property tests (tests/unit/test_budget.py).
"""

from __future__ import annotations

from sparsekit.budget import distribute
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions


class UniformOptions(MethodOptions):
    """`uniform` has no options."""


class Uniform(Allocator[UniformOptions]):
    """The same sparsity in every linear."""

    options_type = UniformOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Give each linear its proportional share."""
        densities = dict.fromkeys((linear.name for linear in context.linears), 1.0)
        return distribute(context.linears, densities, budget, context.pattern.unit)
