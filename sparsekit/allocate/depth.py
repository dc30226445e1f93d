"""Depth allocation: relative densities along the depth of the model, as the recipe says.

What it does: density_b = d(b / (blocks - 1)), scaled to the budget; d runs in straight lines through `densities`, which
    lie at evenly spaced depths from the first block to the last.
Source: explicit schedules of the pruning literature.
Shapes: linears -> kept counts.
Cost: none; no data.
Deviations: none.
Numbers: equal densities are uniform (tests/oracle/test_allocators.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sparsekit.budget import distribute
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions


class DepthOptions(MethodOptions):
    """Options of `depth`."""

    densities: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1.2, 0.8), min_length=2, description="relative densities from the first block to the last"
    )
    min_density: float = Field(default=0, ge=0, le=1, description="least share of its weights that a linear keeps")
    max_density: float = Field(default=1, ge=0, le=1, description="largest share of its weights that a linear keeps")


class Depth(Allocator[DepthOptions]):
    """Density as a function of depth."""

    options_type = DepthOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Water-fill with the densities of the blocks."""
        first, last = (end(linear.block for linear in context.linears) for end in (min, max))
        densities = {linear.name: self._at((linear.block - first) / max(last - first, 1)) for linear in context.linears}
        context.facts["relative_density"] = {str(linear.block): densities[linear.name] for linear in context.linears}
        limits = self.options.model_dump(include={"min_density", "max_density"})
        return distribute(context.linears, densities, budget, context.pattern.unit, **limits)

    def _at(self, depth: float) -> float:
        """Return the relative density at a depth from 0 (first block) to 1 (last)."""
        points = self.options.densities
        before = min(int(depth * (len(points) - 1)), len(points) - 2)
        share = depth * (len(points) - 1) - before
        return points[before] + share * (points[before + 1] - points[before])
