"""Uniform plus: uniform, with the first and the last block denser.

What it does: density_b = `edge` times the density of the blocks between, for b first and last, scaled to the budget.
Source: Gale et al. 2019, "The State of Sparsity in Deep Neural Networks", arXiv 1902.09574, section 5, where the first
    layer stays dense and the last keeps at least 20 %.
Shapes: linears -> kept counts.
Cost: none; no data.
Deviations: a factor for both edges instead of the fixed figures made for convolutions; `depth` draws any other profile.
Numbers: an edge of 1 is uniform (tests/oracle/test_allocators.py).
"""

from __future__ import annotations

from pydantic import Field

from sparsekit.budget import distribute
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions


class UniformPlusOptions(MethodOptions):
    """Options of `uniform_plus`."""

    edge: float = Field(default=1.5, gt=0, description="density of the first and last block, relative to the others")


class UniformPlus(Allocator[UniformPlusOptions]):
    """One density inside, another at both ends."""

    options_type = UniformPlusOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Water-fill with `edge` at the ends and 1 between."""
        blocks = [linear.block for linear in context.linears]
        ends = {min(blocks), max(blocks)}
        densities = {linear.name: self.options.edge if linear.block in ends else 1.0 for linear in context.linears}
        return distribute(context.linears, densities, budget, context.pattern.unit)
