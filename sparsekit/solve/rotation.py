"""Orthonormal bases of the residual stream: what a narrower stream keeps of it.

A norm divides by the length of its input and by nothing else, so a stream that is turned by an orthogonal matrix is
divided by the same number: turned weights undo the turn, exactly. Directions left out make the length too small by what
the stream had along them, which principal components make least. The narrow stream z is scaled so that a norm, which
takes the mean over fewer entries, still divides by what it divided by: |z|^2 / width = |x|^2 / hidden.

A norm that subtracts the mean (LayerNorm) sees only what is orthogonal to the all-ones vector. Its narrow stream must
have mean zero too: its principal components are found among centred vectors, one fewer than the width, and turned into
the hyperplane of mean zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.errors import NumericalError
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """A narrower stream z [..., width] for a stream x [..., hidden]: z = scale x C; x is taken to be z B^T / scale.

    Attributes:
        columns: C [hidden, width] float64; C C^T is the projection on what is kept.
        back: B [hidden, width] float64; C itself where what is left out cannot be told from what is kept.
    """

    columns: Tensor
    back: Tensor

    @property
    def scale(self) -> float:
        """What z is multiplied by."""
        hidden, width = self.columns.shape
        return math.sqrt(width / hidden)

    @property
    def width(self) -> int:
        """Entries of z."""
        return int(self.columns.shape[1])

    def project(self, x: Tensor) -> Tensor:
        """Return what is kept of `x: [..., hidden]`, in its own space and dtype."""
        columns = self.columns.to(torch.promote_types(x.dtype, torch.float32))
        kept: Tensor = (x.to(columns.dtype) @ columns) @ columns.T
        return kept.to(x.dtype)


def principal_basis(gram: Tensor, width: int, *, centred: bool = False) -> Basis:
    """Return the basis that keeps most of the vectors summed in a gram matrix.

    Args:
        gram: X^T X [hidden, hidden] float64 of vectors x.
        width: Entries of the narrow stream, at most hidden.
        centred: The norms subtract the mean.

    Raises:
        NumericalError: The decomposition fails.
    """
    hidden = len(gram)
    kept = width
    if centred:
        gram = _centred(gram)
        gram = gram - (1.0 + float(gram.diagonal().sum())) / hidden  # the all-ones vector comes last
        kept = width - 1
    try:
        _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    except RuntimeError as error:
        raise NumericalError(f"the principal components of the residual stream were not found: {error}") from error
    columns = vectors.flip(1)[:, :kept]
    largest = columns.abs().argmax(dim=0)
    columns = columns * torch.sign(columns[largest, torch.arange(kept)])  # a sign that does not depend on the machine
    columns = columns @ _mean_zero(width).T if centred else columns
    return Basis(columns, columns)


def refitted(basis: Basis, gram: Tensor, *, centred: bool = False, damping: float = 1e-4) -> Basis:
    """Return a basis of the same columns from which the vectors of another gram matrix are told best.

    B = G C (C^T G C)^-1 is the least squares solution of x = B C^T x. It differs from C where the vectors are not those
    whose principal components C holds: what they have along the directions left out goes with what is kept.

    Args:
        basis: What is kept.
        gram: X^T X [hidden, hidden] float64 of the vectors that are to be told.
        centred: The norms subtract the mean, so that nothing is to be told of it.
        damping: Added to the diagonal of C^T G C, as a share of its mean.
    """
    gram = _centred(gram) if centred else gram
    kept = basis.columns.T @ gram @ basis.columns
    kept.diagonal().add_(damping * kept.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(kept)
    if failed:
        raise NumericalError("the narrow residual stream has a gram matrix that is not positive definite")
    # What C keeps comes back as it is; only the rest is fitted.
    rest = gram @ basis.columns - basis.columns @ (basis.columns.T @ gram @ basis.columns)
    return Basis(basis.columns, basis.columns + torch.cholesky_solve(rest.T, factor).T)


def random_orientation(basis: Basis, seed: int, *, centred: bool = False) -> Basis:
    """Return a basis of the same space, turned at random.

    Args:
        basis: What is kept.
        seed: Of the turn.
        centred: The norms subtract the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    size = basis.width - centred
    turn, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn = turn * torch.sign(upper.diagonal())
    if centred:
        plane = _mean_zero(basis.width)
        turn = plane @ turn @ plane.T
    return Basis(basis.columns @ turn, basis.back @ turn)


def shortcut(before: Basis | None, after: Basis | None) -> Tensor:
    """Return the matrix [width after, width before] float64 that carries a stream from one basis to the next.

    None is the stream as it was; not both are None.
    """
    if before is None:
        assert after is not None  # noqa: S101  (nothing to carry over)
        return after.scale * after.columns.T
    if after is None:
        return before.back / before.scale
    return (after.scale / before.scale) * (after.columns.T @ before.back)


def _mean_zero(width: int) -> Tensor:
    """Return an orthonormal basis [width, width - 1] of the vectors of mean zero: Helmert's contrasts."""
    contrasts = torch.zeros(width, width - 1, dtype=torch.float64)
    for column in range(1, width):
        length = math.sqrt(column * (column + 1))
        contrasts[:column, column - 1] = 1 / length
        contrasts[column, column - 1] = -column / length
    return contrasts


def _centred(gram: Tensor) -> Tensor:
    """Return the gram matrix of the same vectors, each less its mean."""
    less = gram - gram.mean(dim=0, keepdim=True)
    return less - less.mean(dim=1, keepdim=True)
