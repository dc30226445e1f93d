"""TEAL: small inputs of every linear are left out.

What it does: an entry of a linear's input is dropped where its size does not exceed a threshold, the quantile of the
    sizes that were seen in calibration.
Source: Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models", arXiv 2408.14690.
Shapes: x [tokens, in] -> threshold [1] per linear.
Cost: one histogram per linear.
Deviations: the quantile of sizes, where the paper takes that of signed values and assumes symmetry; calibrated on
    inputs that earlier sites have thinned out already (`propagate: dense` is the paper's); allocation by measured
    errors of whole blocks, once per linear and level, instead of one block forward per greedy step.
Numbers: Llama-3-8B, WikiText-2: 5.87 dense, 5.94 / 6.21 / 6.67 at 25 / 40 / 50 %, the second half of each window only.
    SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Teal(ActivationCalibrator[MethodOptions]):
    """Entries count by their size alone."""

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return None: all entries count alike."""
        return None
