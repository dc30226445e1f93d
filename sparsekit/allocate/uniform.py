"""Uniform allocation: every linear keeps the same share of its weights.

What it does: quota_l = (1 - sparsity) * numel_l, rounded so that the sum is exact.
Source: the default of the pruning literature.
Shapes: linears -> kept counts.
Cost: none.
Deviations: counts are integers by largest remainder over the model; references floor per row and lose weights.
Numbers: sums checked by property tests (tests/property).
"""

from __future__ import annotations

from fractions import Fraction

from sparsekit.budget import apportion
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions


class UniformOptions(MethodOptions):
    """`uniform` has no options."""


class Uniform(Allocator[UniformOptions]):
    """The same sparsity in every linear."""

    options_type = UniformOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Give each linear its proportional share."""
        numel = {linear.name: linear.numel for linear in context.linears}
        share = Fraction(budget, sum(numel.values()) or 1)
        quotas = {name: share * count for name, count in numel.items()}
        return apportion(quotas, numel, budget, context.pattern.unit)
