"""Cosine between the hidden states in front of and behind a block.

What it does: sums cos(x_t, y_t) over all calibration tokens, x_t the hidden state of token t that enters a block and
    y_t the one that leaves it. One minus the mean is the block's influence.
Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    arXiv 2403.03853, eq. 1.
Shapes: x [2, tokens, hidden]: in front of the block, behind it -> one number.
Cost: 6 operations per value.
Deviations: none.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import Stat
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Cosine(Stat):
    """Mean cosine between what enters and what leaves a block."""

    of = "flows"

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self._sum = 0.0

    def update(self, x: Tensor) -> None:
        """Add `x: [2, tokens, hidden]`; a token whose state is zero counts as unchanged if it stays zero, else 0."""
        before, after = x.to(torch.float32)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        cosine = torch.where((before == after).all(dim=-1), 1.0, cosine)
        self._sum += float(cosine.sum(dtype=torch.float64))
        self.tokens += x.shape[1]

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add `scale` times what `other` has seen."""
        assert isinstance(other, Cosine)  # noqa: S101  (the walker merges only statistics of one kind)
        self._sum += scale * other._sum
        self.tokens += round(scale * other.tokens)

    def reordered(self, order: Tensor) -> Cosine:
        """Return the same: the order of the channels does not matter."""
        other = Cosine(self.in_features)
        other._sum, other.tokens = self._sum, self.tokens
        return other

    @property
    def influence(self) -> float:
        """Return the block influence BI = 1 - mean cosine."""
        return 1 - self._sum / self.tokens

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """Return the bytes of the sum."""
        return 8
