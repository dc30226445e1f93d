"""Top-k: the largest inputs of every token are kept.

What it does: keeps as many entries of a linear's input as asked for, those of the largest |x_j|, or of the largest
    |x_j| ||W_:,j|| with `weigh: columns`. Exact for every token on any text; costs a selection per linear and token.
Source: as a rule: Liu et al. 2024, arXiv 2408.14690; with column norms: Chen et al. 2025, arXiv 2505.19427.
Shapes: x [tokens, in] -> a count per linear, w [in].
Cost: none but what allocation takes.
Deviations: entries that equal the last one kept are kept as well.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class TopKOptions(MethodOptions):
    """Options of `topk`."""

    weigh: Literal["none", "columns"] = Field(default="none", description="by size alone, or times the column's norm")


class TopKInputs(ActivationCalibrator[TopKOptions]):
    """Keeps the same number of entries of every token."""

    options_type = TopKOptions
    rule = "top_k"

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return the norms of the columns, [in], if asked to."""
        return weight.norm(dim=0) if self.options.weigh == "columns" else None
