"""CATS: neurons whose gate is small are left out.

What it does: drops entry j of an MLP's activated gate where its size does not exceed a threshold, a quantile of the
    layer's sizes. Row j of `up` and column j of `down` need not be read then; `gate` is computed in full.
Source: Lee et al. 2024, "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
    arXiv 2404.08763.
Shapes: g [tokens, neurons] -> threshold [1] per block.
Cost: one histogram per block.
Deviations: no histogram of fixed range (the authors' ends at 2); allocation between blocks by measured errors, if asked
    for.
Numbers: Mistral-7B, 50 %: within 1 to 2 points of dense on downstream tasks. SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import ActivationCalibrator, MethodOptions, Site, Stats

if TYPE_CHECKING:
    from torch import Tensor


class Cats(ActivationCalibrator[MethodOptions]):
    """Gates count by their size alone."""

    kinds = frozenset({"gate"})
    least_coverage = 0.2

    def importance(self, site: Site, weight: Tensor, stats: Stats) -> Tensor | None:
        """Return None: all gates count alike."""
        return None
