"""Gradients of the loss with respect to the weight, one for each sample.

What it does: keeps g_s = dL_s / dW of every sample s, L_s the mean next-token loss of that sample. The empirical Fisher
    matrix is F = (1 / m) sum_s g_s g_s^T.
Source: Amari 1998, "Natural gradient works efficiently in learning" (literature); as the curvature of one-shot pruning
    in Singh & Alistarh 2020, "WoodFisher", arXiv 2004.14340.
Shapes: m times [out, in] float32.
Cost: m x out x in x 4 bytes; nothing is computed.
Deviations: none.
Numbers: equal to autograd of the whole loss at once (tests/models/test_gradients.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from sparsekit.contracts import Stat
from sparsekit.errors import SparsekitError

if TYPE_CHECKING:
    from torch import Tensor


class Grad(Stat):
    """The gradients of all samples, in their order."""

    of = "gradients"

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Add the gradient `x: [out, in]` of one sample."""
        self.samples.append(x)

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add the samples of another, each counted `scale` times in F."""
        assert isinstance(other, Grad)  # noqa: S101  (only statistics of one kind are merged)
        self.samples += [sample * scale**0.5 for sample in other.samples]

    def reordered(self, order: Tensor) -> Self:
        """Refuse: with inputs, the rows of what makes them are reordered, and their gradients would not follow."""
        raise SparsekitError(
            "a pruner that reorders inputs and needs gradients is not supported", hint="Turn its permutation off."
        )
