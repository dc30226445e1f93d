"""OWL: blocks with more outliers keep more.

What it does: D_b = percent of the scores |W_ij| n_j of block b that are above M times the mean of their linear;
    density_b = (1 - s) + t_b - mean(t), where t is D scaled to [0, 2 lambda]. Inside a block all linears have one
    density.
Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", arXiv 2310.05175, section 4.
Shapes: linears, sumsq -> kept counts.
Cost: one forward of each dense block, and two passes over the weights.
Deviations: n_j is the norm per token, so that experts which saw few tokens count like others; mean(t) is weighted by
    parameters, which for equal blocks is the published mean; where all D are equal every density is the average, and
    nothing is divided by zero. Published is M times the mean over all linears of the block (`mean: block`): where score
    scales differ between them, that D measures the difference.
Numbers: LLaMA-7B at 70 %, WikiText-2: Wanda 85.77 -> 24.55, SparseGPT 26.30 -> 19.49. SmolLM2-135M, Wanda at 70 %:
    300 -> 331 as published, -> 243 with `mean: linear`; see docs/results.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsekit.budget import distribute, offset
from sparsekit.contracts import AllocationContext, Allocator, MethodOptions, Stats
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor


class OwlOptions(MethodOptions):
    """Options of `owl`."""

    lam: float = Field(default=0.08, ge=0, le=0.5, description="lambda: densities lie within 2 lambda of the average")
    outlier: float = Field(default=5, gt=0, description="M: a score above this multiple of the mean is an outlier")
    mean: Literal["block", "linear"] = Field(
        default="linear", description="whose mean a score is compared with; published: block"
    )


class Owl(Allocator[OwlOptions]):
    """Density of a block by its share of outliers."""

    options_type = OwlOptions
    looks = True
    needs = frozenset({"sumsq"})

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Count outliers per block, scale the counts to offsets, water-fill."""
        percent = self._outliers(context)
        least, most = min(percent.values()), max(percent.values())
        spread = most - least
        t = {block: 2 * self.options.lam * (d - least) / spread if spread else 0.0 for block, d in percent.items()}
        context.facts["outliers_percent"] = {str(block): round(d, 6) for block, d in percent.items()}
        densities = offset(context.linears, {linear.name: t[linear.block] for linear in context.linears}, budget)
        return distribute(context.linears, densities, budget, context.pattern.unit)

    def _outliers(self, context: AllocationContext) -> dict[int, float]:
        """Return D of every block: a walk for the norms and the means, then the weights again for the counts."""
        norms: dict[str, Tensor] = {}
        total: dict[str, float] = {}
        for linear, weight, stats in context.visit(self.needs):
            norms[linear.name] = _norm_per_token(stats)
            total[linear.name] = float(weight.abs().mul_(norms[linear.name]).double().sum())
        numel: dict[int, int] = {}
        pooled: dict[int, float] = {}
        for linear in context.linears:
            numel[linear.block] = numel.get(linear.block, 0) + linear.numel
            pooled[linear.block] = pooled.get(linear.block, 0.0) + total[linear.name]
        above = dict.fromkeys(numel, 0)
        for linear, weight, _ in context.visit(frozenset()):
            own = total[linear.name] / linear.numel
            mean = own if self.options.mean == "linear" else pooled[linear.block] / numel[linear.block]
            above[linear.block] += int((weight.abs().mul_(norms[linear.name]) > self.options.outlier * mean).sum())
        return {block: 100 * count / numel[block] for block, count in above.items()}


def _norm_per_token(stats: Stats) -> Tensor:
    """Return the root mean square of each input channel, [in] float32."""
    sumsq = stats["sumsq"]
    assert isinstance(sumsq, SumSq)  # noqa: S101  (the walker delivers what `needs` names)
    return sumsq.norm() / math.sqrt(max(sumsq.tokens, 1))
