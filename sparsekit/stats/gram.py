"""Gram matrix of the inputs, X^T X.

What it does: accumulates G = sum_t x_t x_t^T over all calibration tokens; the squared output error of any change D of
    the weight is tr(D G D^T).
Source: Hassibi & Stork 1992, "Second order derivatives for network pruning" (literature); as the Hessian of layer-wise
    pruning in Frantar & Alistarh 2023, "SparseGPT", arXiv 2301.00774, section 3.
Shapes: x [tokens, in] -> G [in, in] float64.
Cost: tokens x in^2 multiplications (the upper half only), native ones for bf16 inputs where the processor has them;
    in^2 x 8 bytes, and x 4 while a sample of another dtype is added.
Deviations: the sum over tokens, not 2 / samples of it: every method that uses it scales it itself.
Numbers: equals a direct float64 computation to 1e-6 (tests/unit/test_gram.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sparsekit.contracts import Stat
from sparsekit.lazy import torch
from sparsekit.runtime import native

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_COLUMNS = 512  # columns of a block: large enough for full speed of the product, small enough to save near half of it
_ROWS = 2048  # tokens summed in float32 before they are added to the float64 sums


class Gram(Stat):
    """Sum of outer products of the inputs."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float64)  # blocks on and above the diagonal
        self._results: dict[Any, Any] = {}
        self._lock = threading.RLock()  # linears that share the statistic are pruned side by side

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs of it: neither lock nor results."""
        return {"in_features": self.in_features, "tokens": self.tokens, "_upper": self._upper, "_results": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what another process has sent."""
        self.__dict__ = {**state, "_lock": threading.RLock()}

    def update(self, x: Tensor) -> None:
        """Add `x: [tokens, in]`."""
        self._results.clear()
        self.tokens += x.shape[0]
        if native.add_gram(self._upper, x):
            return
        for first in range(0, x.shape[0], _ROWS):
            rows = x[first : first + _ROWS].to(torch.float32)
            for start in range(0, self.in_features, _COLUMNS):
                end = min(start + _COLUMNS, self.in_features)
                self._upper[start:end, start:] += rows[:, start:end].T @ rows[:, start:]

    def merge(self, other: Stat, scale: float = 1.0) -> None:
        """Add `scale` times what `other` has seen."""
        assert isinstance(other, Gram)  # noqa: S101  (the walker merges only statistics of one kind)
        self._results.clear()
        self._upper.add_(other._upper, alpha=scale)
        self.tokens += round(scale * other.tokens)

    def reordered(self, order: Tensor) -> Gram:
        """Return the statistic of `x[:, order]`."""
        other = Gram(self.in_features)
        other._upper, other.tokens = self.matrix[order[:, None], order], self.tokens
        return other

    @property
    def matrix(self) -> Tensor:
        """G, [in, in] float64, symmetric; a copy."""
        return _mirrored(self._upper)

    @property
    def metric(self) -> Tensor:
        """G, [in, in] float32, symmetric, kept until more is seen; nobody may change it."""
        with self._lock:
            if "metric" not in self._results:
                self._results["metric"] = _mirrored(self._upper.to(torch.float32))
            metric: Tensor = self._results["metric"]
        return metric

    def once(self, make: Callable[Concatenate[Tensor, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `make(matrix, ...)`, computed once: q, k and v share a statistic, gate and up, and so its factors.

        The result lives as long as the statistic sees nothing new; nobody may change it.
        """
        key = (make, args, tuple(sorted(kwargs.items())))
        with self._lock:
            if key not in self._results:
                self._results[key] = make(self.matrix, *args, **kwargs)
            result: T = self._results[key]
        return result

    @classmethod
    def nbytes(cls, in_features: int) -> int:
        """Return the bytes of the sums."""
        return 8 * in_features**2


def _mirrored(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix that has the same part on and above the diagonal."""
    upper = matrix.triu()
    return upper + upper.triu(1).T
