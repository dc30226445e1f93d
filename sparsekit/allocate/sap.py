"""SAP: linears whose magnitudes are spread evenly keep more, by the PQ index.

What it does: I = 1 - n^(1/q - 1/p) |w|_p / |w|_q of a linear's n weights, p < q; at least
    n (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p)) of them are worth keeping, and density_l ~ that share of n.
Source: Diao et al. 2023, "Pruning Deep Neural Networks from a Sparsity Perspective", arXiv 2302.05601, section 3.
Shapes: linears -> kept counts.
Cost: one pass over the weights; no data.
Deviations: the published method prunes in rounds with retraining between; here the bound is used once, as a weight, so
    eta and gamma, factors common to all linears, have no effect and are left out.
Numbers: I is 0 for a constant, 1 - 1/n for one nonzero weight, .153 for Gaussian, .215 for Laplace weights (p .5, q 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from sparsekit.budget import above_zero, distribute
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions

if TYPE_CHECKING:
    from torch import Tensor


class SapOptions(MethodOptions):
    """Options of `sap`."""

    p: float = Field(default=0.5, gt=0, description="exponent of the norm above the line")
    q: float = Field(default=1.0, gt=0, description="exponent of the norm below the line, larger than p")
    min_density: float = Field(default=0, ge=0, le=1, description="least share of its weights that a linear keeps")
    max_density: float = Field(default=1, ge=0, le=1, description="largest share of its weights that a linear keeps")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.p >= self.q:
            raise ValueError(f"p {self.p:g} must be below q {self.q:g}")
        return self


class Sap(Allocator[SapOptions]):
    """Density by the share of weights that the PQ index says matter."""

    options_type = SapOptions
    looks = True

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Measure the index of every linear and water-fill."""
        p, q = self.options.p, self.options.q
        index = {linear.name: pq_index(weight, p, q) for linear, weight, _ in context.visit(frozenset())}
        context.facts["pq_index"] = {name: round(value, 6) for name, value in index.items()}
        densities = above_zero({name: (1 - value) ** (p * q / (q - p)) for name, value in index.items()})
        limits = self.options.model_dump(include={"min_density", "max_density"})
        return distribute(context.linears, densities, budget, context.pattern.unit, **limits)


def pq_index(weight: Tensor, p: float, q: float) -> float:
    """Return the PQ index of a weight's magnitudes: 0 all equal, towards 1 few that matter; 1 for a weight of zeros."""
    magnitude = weight.abs().double()
    largest = float(magnitude.max())
    if not largest:
        return 1.0
    magnitude /= largest  # the index has no scale; powers of tiny weights would underflow
    norms: list[float] = [float(magnitude.pow(power).mean()) ** (1 / power) for power in (p, q)]  # |w|_p n^(-1/p)
    return 1.0 - norms[0] / norms[1]
