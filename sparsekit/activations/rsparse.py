"""R-Sparse: small inputs go through a product of low rank instead of their columns.

What it does: y = W S(x) + W_r (x - S(x)), where S keeps the entries of large |x_j| ||W_:,j|| and W_r is the best
    approximation of W of rank r. A share `channels` of what the linear may cost goes to kept columns, the rest to the
    rank: (1 - s) channels of the entries are kept, r = (1 - s) (1 - channels) in out / (in + out).
Source: Zhang et al. 2025, "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", arXiv 2504.19449.
Shapes: W [out, in] -> left [out, r], right [r, in]; threshold [in].
Cost: a singular value decomposition per linear; r (in + out) values more to store and read.
Deviations: one share for all linears instead of an evolutionary search (the released mean is 0.962); thresholds are
    stored, not estimated anew at every load.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Remainder, Site, Stats
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class RSparseOptions(MethodOptions):
    """Options of `rsparse`."""

    channels: float = Field(default=0.96, gt=0, le=1, description="share of a linear's cost that kept columns take")


class RSparse(ActivationCalibrator[RSparseOptions]):
    """Entries count by their size times the norm of their column; what is dropped is approximated."""

    options_type = RSparseOptions

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return the norms of the columns, [in]."""
        norms: Tensor = weight.norm(dim=0)
        return norms

    def remainder(self, site: Site, weight: Tensor, sparsity: float) -> Remainder | None:
        """Return the product of low rank; None where the rank rounds to nothing."""
        rows, columns = weight.shape
        cost, channels = 1 - sparsity, self.options.channels
        rank = int(cost * (1 - channels) * rows * columns / (rows + columns))
        if not rank:
            return None
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return Remainder(1 - cost * channels, u[:, :rank] * s[:rank], v[:rank])
