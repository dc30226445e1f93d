"""Gram matrix of the inputs' directions.

What it does: accumulates sum_t x_t x_t^T / mean(x_t^2) over all calibration tokens, so that every token counts alike.
Source: the gram matrix of what RMSNorm makes of the inputs (Zhang & Sennrich 2019, arXiv 1910.07467), without scales.
Shapes: x [tokens, in] -> [in, in] float64.
Cost: that of `gram`.
Deviations: none.
Numbers: a few tokens of a residual stream hold nearly all of its energy; without the division they decide alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.stats.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-30  # of a mean square; an input of zeros stays one


class Directions(Gram):
    """Sum of outer products of the inputs, each of mean square 1."""

    def update(self, x: Tensor) -> None:
        """Add `x: [tokens, in]`."""
        wide = x.to(torch.float32)
        super().update(wide / wide.square().mean(dim=-1, keepdim=True).clamp(min=_SMALLEST).sqrt())
