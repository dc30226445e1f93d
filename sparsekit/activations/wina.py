"""WINA: small inputs are left out, weighed by the norm of the weights they meet.

What it does: drops entry j of a linear's input where |x_j| ||W_:,j|| does not exceed a threshold. If the columns of W
    are orthogonal, no other choice of as many entries has a smaller error.
Source: Chen et al. 2025, "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
    arXiv 2505.19427
Shapes: W [out, in] -> w [in]; threshold t_j = tau / w_j, [in].
Cost: one pass over the weights, one histogram per linear.
Deviations: column norms at every linear, and no rotation of its own. The authors' code rotates the residual stream and
    uses norms in k and gate only. The stage `reshape: rotate` in front (recipe `wina-rotated-50`) does the first, for
    two products of hidden x hidden per block. A calibrated threshold instead of a selection per token (`topk` with
    `weigh: columns` is that).
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Wina(ActivationCalibrator[MethodOptions]):
    """Entries count by their size times the norm of their column."""

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return the norms of the columns, [in]."""
        norms: Tensor = weight.norm(dim=0)
        return norms
