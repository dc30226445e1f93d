"""Histogram of how much each entry of a signal matters.

What it does: counts |x_tj| w_j over all calibration tokens, those in front of `skip` of every sample left out. Bins are
    those of bfloat16: 128 to a factor of two, over everything a float32 can be. A bfloat16 signal with w = 1 is counted
    exactly.
Source: scores: Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models", arXiv 2408.14690 (TEAL);
    weighted: Chen et al. 2025, "WINA: Weight Informed Neuron Activation", arXiv 2505.19427.
Shapes: x [tokens, in], weights [in] -> counts [32768] int64.
Cost: one pass over the inputs; 256 KiB.
Deviations: TEAL's histogram is of signed values and its quantile assumes symmetry; this one is of sizes. Within a bin
    scores are taken to be spread evenly.
Numbers: quantiles within half a per cent of the exact ones in value (tests/unit/test_scores.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import Stat
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BINS = 1 << 15
"""Bit patterns of bfloat16 numbers that are not negative."""


class Scores(Stat):
    """Streamed histogram of |x_tj| w_j."""

    def __init__(self, in_features: int, weights: Tensor | None = None, skip: int = 0) -> None:
        """Start empty.

        Args:
            in_features: Width of the signal.
            weights: w, [in] float32; None: ones.
            skip: Leading tokens of each sample that are not counted.
        """
        super().__init__(in_features)
        self.weights = weights
        self.skip = skip
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Add the tokens of one sample, `x: [tokens, in]`."""
        rows = x[self.skip :].to(torch.float32).abs()
        if self.weights is not None:
            rows = rows * self.weights
        bins = rows.contiguous().view(torch.int32) >> 16
        self.counts += torch.bincount(bins.reshape(-1), minlength=BINS)
        self.tokens += rows.shape[0]

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add what `other` has counted, `scale` times."""
        assert isinstance(other, Scores)  # noqa: S101  (the walker merges only statistics of one kind)
        self.counts += other.counts if scale == 1.0 else (scale * other.counts).round().to(torch.int64)
        self.tokens += round(scale * other.tokens)

    def reordered(self, order: Tensor) -> Scores:
        """Return the same: all entries are in one histogram."""
        other = Scores(self.in_features, None if self.weights is None else self.weights[order], self.skip)
        other.counts, other.tokens = self.counts.clone(), self.tokens
        return other

    def quantile(self, share: float) -> float:
        """Return the score that this share of all entries does not exceed.

        Raises:
            ValueError: Nothing was counted.
        """
        total = int(self.counts.sum())
        if not total:
            raise ValueError("a quantile of nothing")
        reached = self.counts.cumsum(0)
        place = int(torch.searchsorted(reached, torch.tensor(share * total)))
        place = min(place, BINS - 1)
        before = int(reached[place - 1]) if place else 0
        inside = (share * total - before) / max(int(self.counts[place]), 1)
        low, high = (
            float(torch.tensor(edge << 16, dtype=torch.int32).view(torch.float32)) for edge in (place, place + 1)
        )
        return low + min(max(inside, 0.0), 1.0) * (high - low)

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """Return the bytes of the counts."""
        return 8 * BINS
