"""CHESS: gates are left out by what they would do to their neuron, and small inputs of queries and outputs.

What it does: drops entry j of an MLP's activated gate where |g_j| E|up_j| does not exceed a threshold: the expected
    change of the product g * up is then smallest. With `attention`, small inputs of the query and output projections
    are dropped too; keys and values stay dense, since their errors live on in the cache.
Source: He et al. 2024, "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
    arXiv 2409.01366; selective sparsification: section 3.3.
Shapes: g [tokens, neurons], E|up| [neurons] -> threshold t_j = tau / E|up_j|, [neurons].
Cost: one pass for the means, one histogram per signal.
Deviations: quantiles pool all tokens; the authors take the mean over documents of each document's.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats
from sparsekit.stats.absolute import Absolute

if TYPE_CHECKING:
    from torch import Tensor


class ChessOptions(MethodOptions):
    """Options of `chess`."""

    attention: bool = Field(default=True, description="thin out the inputs of query and output projections too")


class Chess(ActivationCalibrator[ChessOptions]):
    """Gates count by their size times the mean size of what they are multiplied by."""

    options_type = ChessOptions
    needs = frozenset({"absolute"})
    kinds = frozenset({"gate", "input"})
    least_coverage = 0.2

    def covers(self, site: Site) -> bool:
        """Return whether it is a gate, or an input of queries or outputs."""
        return site.kind == "gate" or (self.options.attention and site.role in ("query", "output"))

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return E|up_j| for a gate, [neurons]; None for an input."""
        if site.kind == "input":
            return None
        up = stats["absolute"]
        assert isinstance(up, Absolute)  # noqa: S101  (named in needs)
        return up.mean()
