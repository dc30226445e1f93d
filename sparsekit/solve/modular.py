"""Modular decomposition: two linears with what lies between them become narrower together.

- An activation lies between (MLP): Nystrom approximation. With C the gram matrix of the activations the neurons of the
  largest ridge leverage scores diag(C (C + l)^-1) stay, and what reads them is solved again by least squares.
- A product of two linear outputs lies between, channel by channel (queries and keys): CR decomposition. The channels,
  or pairs of them that positions turn together, with the largest product of their norms in C_q^1/2 and C_k^1/2 stay.
- Nothing lies between (values and what reads the heads): the singular value decomposition of C^1/2 W_V W_O, which is
  the best there is of its rank.

Source: Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632,
algorithms 1 to 3. The columns of C_q^1/2 have the norms of the diagonal of C_q, and W_V^T C W_V says all of C that the
values do, so that no root of a matrix over the hidden states is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.lazy import torch
from sparsekit.solve.factor import damped, inverse_factor
from sparsekit.solve.masked_lstsq import refit_columns

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the inputs of linears.

    Attributes:
        product: Mean of x x^T, [in, in] float64.
        mean: Mean of x, [in] float64.
    """

    product: Tensor
    mean: Tensor

    def energy(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the mean squares of the outputs of a linear, `weight: [out, in]` and `bias: [out]`; [out] float64."""
        weight = weight.double()
        energy: Tensor = ((weight @ self.product) * weight).sum(dim=1)
        if bias is not None:
            energy = energy + 2 * bias.double() * (weight @ self.mean) + bias.double().square()
        return energy.clamp_min(0)

    def of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the mean of y y^T of the outputs of a linear, [out, out] float64."""
        weight = weight.double()
        product: Tensor = weight @ self.product @ weight.T
        if bias is not None:
            cross = torch.outer(weight @ self.mean, bias.double())
            product = product + cross + cross.T + torch.outer(bias.double(), bias.double())
        return product


def leverage(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the ridge leverage score of every channel, [in] float64 from 0 to 1, and the damping that was needed.

    Args:
        gram: [in, in] float64.
        damping: The ridge l, as a share of the mean diagonal.

    Raises:
        NonFinite, NumericalError: As `inverse_factor`.
    """
    factor = inverse_factor(gram, damping)
    ridge = float((damped(gram, factor.damping) - gram).diagonal()[0])
    return 1 - ridge * factor.upper.square().sum(dim=0), factor.damping


def nystrom(weight: Tensor, gram: Tensor, count: int, damping: float) -> tuple[Tensor, Tensor]:
    """Return the input channels of a linear that stay, [count] int64 ascending, and their columns refitted.

    Args:
        weight: What reads the activations, [out, in] float32.
        gram: Of the activations, [in, in] float64.
        count: How many stay.
        damping: Added to the diagonal, as a share of its mean.
    """
    scores, damping = leverage(gram, damping)
    kept = largest(scores, count)
    keep = torch.zeros(len(gram), dtype=torch.bool)
    keep[kept] = True
    return kept, refit_columns(weight, keep, damped(gram, damping))


def cr_scores(query: Tensor, key: Tensor, *, paired: bool) -> Tensor:
    """Return what each channel, or each pair of them half a head apart, carries of the products of queries and keys.

    Args:
        query: Mean squares of the queries' channels, [groups, copies, size] float64; `copies` heads share their keys.
        key: Those of the keys, [groups, size].
        paired: Positions turn pairs of channels.

    Returns:
        [groups, size], or [groups, size / 2] of pairs.
    """
    query = query.sum(dim=1)
    if paired:
        query, key = (each.reshape(len(each), 2, -1).sum(dim=1) for each in (query, key))
    return (query * key).sqrt()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores along the last axis, [..., count] ascending; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def value_output(value: Tensor, output: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, size] and B [size, rank] such that B A v stands for v where only W_O v is seen.

    Of all pairs of that rank they leave the least error of W_O v, over what second moments say of v.

    Args:
        value: Mean of v v^T of one group's values, [size, size] float64.
        output: W_O of all heads that read the group, one below the other, [copies x out, size].
        rank: Channels that stay.
    """
    squares, vectors = torch.linalg.eigh(value)
    spread = squares.clamp_min(0).sqrt()
    # A direction in which no value ever lay has nothing to be divided by.
    inverse = torch.where(spread > 1e-7 * spread.max(), 1 / spread, 0)
    seen = (output.double() @ vectors) * spread
    turned = torch.linalg.eigh(seen.T @ seen).eigenvectors.flip(1)[:, :rank]
    return (turned.T * inverse) @ vectors.T, (vectors * spread) @ turned
