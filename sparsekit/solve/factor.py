"""The Cholesky factor of an inverse gram matrix, damped as far as it must be and no further in silence.

Source: Frantar & Alistarh 2023, "SparseGPT", arXiv 2301.00774, section 3.3: with G^-1 = U^T U, U upper triangular,
row j of U holds what removing column j needs, once columns 0..j-1 are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.errors import NonFinite, NumericalError
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 3.0
_MOST = 0.3
_LEAF = 64


@dataclass(frozen=True)
class InverseFactor:
    """U of G^-1 = U^T U for a damped gram matrix G.

    Attributes:
        upper: U, [in, in] float64, upper triangular.
        dead: Input channels that were zero in every token, [in] bool; their row and column of U are zero outside the
            diagonal, so nothing is ever moved onto or away from them.
        damping: What was added to the diagonal, as a share of its mean.
        notes: Says so if that is more than was asked for.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    notes: tuple[str, ...]


def damped(gram: Tensor, share: float) -> Tensor:
    """Return `gram: [in, in]` float64 plus `share` times the mean diagonal of the channels that were ever nonzero."""
    seen = gram.diagonal()[gram.diagonal() != 0]
    result = gram.clone()
    result.diagonal().add_(share * (float(seen.mean()) if len(seen) else 1.0))
    return result


@dataclass(frozen=True)
class ScaledEigen:
    """Eigendecomposition of a damped gram matrix, scaled to unit diagonal: H / (r r^T) = Q diag(values) Q^T.

    Attributes:
        scale: r, [in] float32: weights times it and inputs divided by it leave the outputs as they are.
        values: [in] float32, positive.
        vectors: Q, [in, in] float32.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor

    def inverse(self, shift: float) -> Tensor:
        """Return (H / (r r^T) + shift I)^-1, [in, in] float32."""
        return (self.vectors / (self.values + shift)) @ self.vectors.T


def scaled_eigen(gram: Tensor, damping: float) -> ScaledEigen:
    """Decompose `gram: [in, in]` float64, damped by a share of its mean diagonal and scaled to unit diagonal.

    Raises:
        NonFinite: The matrix is not finite.
    """
    _require_finite(gram)
    hessian = damped(gram, damping)
    scale = hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(hessian / torch.outer(scale, scale))
    # Rounding may leave an eigenvalue of a singular matrix below what the damping guarantees.
    least = damping * float(gram.diagonal().mean()) / float(hessian.diagonal().max())
    return ScaledEigen(scale.float(), values.clamp_min(least).float(), vectors.float())


def _require_finite(gram: Tensor) -> None:
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("the gram matrix of the inputs is not finite", hint="Run with --dtype fp32 or bf16.")


def inverse_factor(gram: Tensor, damping: float) -> InverseFactor:
    """Factor the inverse of a gram matrix; where Cholesky fails the damping is tripled, up to 30 %, and reported.

    Args:
        gram: [in, in] float64, symmetric.
        damping: Share of the mean diagonal that is added to the diagonal.

    Raises:
        NonFinite: The matrix is not finite.
        NumericalError: It is not positive definite even with 30 %.
    """
    _require_finite(gram)
    share = damping
    while True:
        # With G = R R^T, R upper triangular, U is R^-1. Reversing rows and columns turns Cholesky's lower into R.
        lower, failed = torch.linalg.cholesky_ex(damped(gram, share).flip(0, 1))
        if int(failed) == 0:
            break
        tripled = min(max(share, 1e-4) * _STEP, _MOST)
        if share >= _MOST:
            raise NumericalError(
                f"the gram matrix of the inputs is not positive definite, even with {share:.0%} damping",
                hint="Use more or other calibration text.",
            )
        share = tripled
    upper = invert_upper(lower.flip(0, 1))
    notes = () if share == damping else (f"damping raised from {damping:g} to {share:g} for a Cholesky factor",)
    return InverseFactor(upper, gram.diagonal() == 0, share, notes)


def invert_upper(matrix: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix [n, n].

    By halves, [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]]: a third of the work of solving against a unit
    matrix, nearly all of it matrix products.
    """
    if len(matrix) <= _LEAF:
        unit = torch.eye(len(matrix), dtype=matrix.dtype)
        inverse: Tensor = torch.linalg.solve_triangular(matrix, unit, upper=True)
        return inverse
    half = len(matrix) // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = invert_upper(matrix[:half, :half])
    inverse[half:, half:] = invert_upper(matrix[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ matrix[:half, half:]) @ inverse[half:, half:]
    return inverse
