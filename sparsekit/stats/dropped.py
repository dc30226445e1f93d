"""How much of a signal a gate leaves out, and how evenly.

What it does: counts the entries that a gate drops, per channel and per token, and how many are dropped by all of eight
    tokens in a row, which is what a batch of eight could skip.
Source: shares per neuron: Li et al. 2023, "The Lazy Neuron Phenomenon", arXiv 2210.06313; union over tokens in a row:
    Zhang et al. 2025, "Sparsing Law", arXiv 2411.02335.
Shapes: x [tokens, in] -> per channel [in] int64, and sums over tokens.
Cost: one pass over the inputs.
Deviations: none.
Numbers: SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekit.contracts import Stat
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 8
"""Tokens in a row whose kept entries are united."""


class Dropped(Stat):
    """Entries that a gate drops."""

    def __init__(self, in_features: int, keep: Callable[[Tensor, Tensor], Tensor] | None = None, skip: int = 0) -> None:
        """Start empty.

        Args:
            in_features: Width of the signal.
            keep: Returns which entries a gate keeps, [tokens, in] bool, given the `skip` tokens in front and the
                tokens behind; None: those that are not zero.
            skip: Leading tokens of each sample that are not counted.
        """
        super().__init__(in_features)
        self.keep = keep or _not_zero
        self.skip = skip
        self.per_channel = torch.zeros(in_features, dtype=torch.int64)
        self._squares = 0.0
        self._runs = 0
        self._dropped_by_all = 0

    def update(self, x: Tensor) -> None:
        """Add the tokens of one sample, `x: [tokens, in]`."""
        dropped = ~self.keep(x[: self.skip], x[self.skip :])
        self.per_channel += dropped.sum(dim=0)
        self._squares += float(dropped.to(torch.float32).mean(dim=1).square().sum(dtype=torch.float64))
        self.tokens += dropped.shape[0]
        runs = dropped[: dropped.shape[0] // TOGETHER * TOGETHER].reshape(-1, TOGETHER, dropped.shape[1])
        self._runs += runs.shape[0]
        self._dropped_by_all += int(runs.all(dim=1).sum())

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add what `other` has seen."""
        assert isinstance(other, Dropped)  # noqa: S101  (the walker merges only statistics of one kind)
        assert scale == 1.0  # noqa: S101  (nobody weighs counts)
        self.per_channel += other.per_channel
        self._squares += other._squares
        self.tokens += other.tokens
        self._runs += other._runs
        self._dropped_by_all += other._dropped_by_all

    def reordered(self, order: Tensor) -> Dropped:
        """Return the statistic of a gate for `x[:, order]`."""
        other = Dropped(self.in_features, self.keep, self.skip)
        other.merge(self)
        other.per_channel = self.per_channel[order]
        return other

    @property
    def share(self) -> float:
        """Share of all entries that is dropped."""
        return int(self.per_channel.sum()) / max(self.tokens * self.in_features, 1)

    @property
    def spread(self) -> float:
        """Standard deviation over tokens of the share that is dropped."""
        return math.sqrt(max(self._squares / max(self.tokens, 1) - self.share**2, 0.0))

    @property
    def together(self) -> float:
        """Share that is dropped by all of eight tokens in a row; NaN for shorter samples."""
        return self._dropped_by_all / (self._runs * self.in_features) if self._runs else math.nan

    def usage(self) -> Tensor:
        """Return how often each channel is kept, [in] float32, 0 to 1."""
        return (1 - self.per_channel / max(self.tokens, 1)).to(torch.float32)


def _not_zero(first: Tensor, x: Tensor) -> Tensor:
    return x != 0
