"""Mean size of each channel.

What it does: E|x_j| over all calibration tokens.
Source: He et al. 2024, "CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification",
    arXiv 2409.01366.
Shapes: x [tokens, in] -> sums [in] float64.
Cost: one pass over the inputs; in x 8 bytes.
Deviations: none.
Numbers: exact to float64 rounding against a direct computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import Stat
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Absolute(Stat):
    """Mean of |x| per channel."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.sums = torch.zeros(in_features, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add `x: [tokens, in]`."""
        self.sums += x.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += x.shape[0]

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add `scale` times what `other` has seen."""
        assert isinstance(other, Absolute)  # noqa: S101  (the walker merges only statistics of one kind)
        self.sums += scale * other.sums
        self.tokens += round(scale * other.tokens)

    def reordered(self, order: Tensor) -> Absolute:
        """Return the statistic of `x[:, order]`."""
        other = Absolute(self.in_features)
        other.sums, other.tokens = self.sums[order], self.tokens
        return other

    def mean(self) -> Tensor:
        """Return E|x_j|, [in] float32."""
        return (self.sums / max(self.tokens, 1)).to(torch.float32)
