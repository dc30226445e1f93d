"""Random allocation: the null that every allocator has to beat.

What it does: density_b = (1 - s) + t_b - mean(t), t_b uniform in [0, 2 span] from the seed; the mean is weighted by
    parameters. The shape is that of `owl`, the scores are noise.
Source: the random baseline of the allocation literature.
Shapes: linears -> kept counts.
Cost: none; no data.
Deviations: none.
Numbers: densities within span of each other's mean, sum exact (tests/oracle/test_allocators.py).
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from sparsekit.budget import distribute, offset
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions
from sparsekit.rng import derive


class RandomAllocationOptions(MethodOptions):
    """Options of the allocator `random`."""

    span: float = Field(default=0.08, gt=0, le=1, description="largest distance from the middle of the densities")
    by: Literal["block", "linear"] = Field(default="block", description="what has a density of its own")


class RandomAllocation(Allocator[RandomAllocationOptions]):
    """Densities drawn from the seed and a name, whatever the order of the linears."""

    options_type = RandomAllocationOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Water-fill with random offsets."""
        offsets = {
            linear.name: self._draw(str(linear.block) if self.options.by == "block" else linear.name)
            for linear in context.linears
        }
        densities = offset(context.linears, offsets, budget)
        return distribute(context.linears, densities, budget, context.pattern.unit)

    def _draw(self, name: str) -> float:
        return 2 * self.options.span * random.Random(derive(self.seed, "allocate", name)).random()  # noqa: S311
