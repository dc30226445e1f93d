"""Statistical top-k: inputs are left out that are small for their token.

What it does: drops entry j of a linear's input where |x_j| does not exceed z times the root mean square of the token's
    entries. z is the quantile of a half-normal distribution, so the share that is dropped is the one asked for as far
    as inputs are Gaussian around zero. Needs no calibration.
Source: You et al. 2025, "Spark Transformer: Reactivating Sparsity in FFN and Attention", arXiv 2506.06644
Shapes: x [tokens, in] -> z per linear.
Cost: none but what allocation takes.
Deviations: sizes instead of signed values, and nothing is subtracted from what is kept: the model was not trained so.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class GaussianInputs(ActivationCalibrator[MethodOptions]):
    """Entries are compared with the deviation of their own token."""

    rule = "gaussian"

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return None: all entries count alike."""
        return None
