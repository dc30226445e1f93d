"""Mean and variance of each input channel, pooled over all calibration tokens.

What it does: keeps the mean and the sum of squared deviations from it, merged exactly batch by batch.
Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
    (literature); what Zhang et al. 2023, "Dynamic Sparse No Training", arXiv 2310.08915, calls E[A] and Var(A).
Shapes: x [tokens, in] -> mean [in], variance [in] float64.
Cost: two passes over the inputs while they are in the cache; in x 16 bytes.
Deviations: reference code averages the variances inside sequences, which depends on how text is cut; this is the
    variance over all tokens.
Numbers: equals torch.var to float64 rounding, however the text is split (tests/unit/test_moments.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.contracts import Stat
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # tokens at a time: their float64 copy stays in the cache


class Moments(Stat):
    """Mean and variance per input channel."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.mean = torch.zeros(in_features, dtype=torch.float64)
        self._deviations = torch.zeros(in_features, dtype=torch.float64)  # sum of squares around the mean

    def update(self, x: Tensor) -> None:
        """Add `x: [tokens, in]`."""
        for first in range(0, x.shape[0], _ROWS):
            rows = x[first : first + _ROWS]
            deviations, mean = torch.var_mean(rows.to(torch.float64), dim=0, correction=0)
            self._add(mean, deviations.mul_(len(rows)), len(rows))
            self.tokens += len(rows)

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add `scale` times what `other` has seen."""
        assert isinstance(other, Moments)  # noqa: S101  (the walker merges only statistics of one kind)
        self._add(other.mean, other._deviations * scale, scale * other.tokens)
        self.tokens += round(scale * other.tokens)

    def reordered(self, order: Tensor) -> Moments:
        """Return the statistic of `x[:, order]`."""
        other = Moments(self.in_features)
        other.mean, other._deviations, other.tokens = self.mean[order], self._deviations[order], self.tokens
        return other

    def _add(self, mean: Tensor, deviations: Tensor, tokens: float) -> None:
        """Add so many tokens of that mean and sum of squared deviations."""
        if not tokens:
            return
        share = tokens / (self.tokens + tokens)
        distance = mean - self.mean
        self._deviations += deviations + distance.square() * (self.tokens * share)
        self.mean = self.mean + distance * share

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation of each channel over all tokens, [in] float64."""
        return self._deviations / max(self.tokens, 1)

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """Return the bytes of mean and deviations."""
        return 16 * in_features
