"""ERK allocation: small and lopsided linears keep more.

What it does: density_l ~ (in + out) / (in * out), scaled to the budget; those that would exceed 1 stay dense and the
    rest is scaled again, until none exceeds 1.
Source: Mocanu et al. 2018, "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity",
    arXiv 1707.04780, eq. 3; for matrices as in Evci et al. 2020, "Rigging the Lottery", arXiv 1911.11134, section 3.
Shapes: linears -> kept counts.
Cost: none; no data.
Deviations: the re-solving is one water-filling, with limits of the user's choice; counts are exact.
Numbers: at 50 % on SmolLM2 q, o 0.62, k, v 1, MLP 0.43: under grouped queries it means "leave k, v dense".
"""

from __future__ import annotations

from fractions import Fraction

from pydantic import Field

from sparsekit.budget import distribute
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions


class ErkOptions(MethodOptions):
    """Options of `erk`."""

    min_density: float = Field(default=0, ge=0, le=1, description="least share of its weights that a linear keeps")
    max_density: float = Field(default=1, ge=0, le=1, description="largest share of its weights that a linear keeps")


class Erk(Allocator[ErkOptions]):
    """Density in proportion to the number of connected units over the number of weights."""

    options_type = ErkOptions

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Water-fill with (in + out) / (in * out)."""
        densities = {
            linear.name: Fraction(linear.in_features + linear.out_features, linear.numel) for linear in context.linears
        }
        limits = self.options.model_dump()
        return distribute(context.linears, densities, budget, context.pattern.unit, **limits)
