"""Structured OBS: remove whole groups of input channels of a linear, and make up for each with what is left.

With B = W^T and H the (damped) gram matrix of the inputs, removing the channels of group g, once everything kept has
moved to its new optimum, costs and takes

    1/2 tr B_g^T ((H^-1)_gg)^-1 B_g      and      B -= (H^-1)_:g ((H^-1)_gg)^-1 B_g,

after which H^-1 loses what g knew: H^-1 -= (H^-1)_:g ((H^-1)_gg)^-1 (H^-1)_g:. The cheapest groups go, in rounds; what
a level keeps ends with masked least squares from the dense weight.

Source: Hassibi & Stork 1992, "Second order derivatives for network pruning" (literature), for groups as in
Li et al. 2025, "Tyr-the-Pruner", arXiv 2503.09657, section 3. Its code adds B_g (H B)_g to the cost; the plain form is
the exact increase of the loss and is what stands here.
Cost: about in^3 multiplications to remove everything, in^3 / 3 and a product of out x in and in for each level's refit;
float64 throughout, 5 x in^2 and 3 x in x out numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sparsekit.errors import NumericalError, PlanError
from sparsekit.lazy import torch
from sparsekit.solve.factor import InverseFactor, damped
from sparsekit.solve.masked_lstsq import refit_columns

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reduced:
    """A linear without some groups of its input channels.

    Attributes:
        groups: Groups that stay, [kept] int64, ascending.
        channels: Input channels that stay, [kept x size] int64, ascending.
        weight: Their columns at the optimum, [out, kept x size] float32.
    """

    groups: Tensor
    channels: Tensor
    weight: Tensor


def remove_groups(
    weight: Tensor, gram: Tensor, factor: InverseFactor, sets: Tensor, removed: Sequence[int], *, rounds: int
) -> list[Reduced]:
    """Remove more and more groups of input channels; every level goes on from the one before it.

    Args:
        weight: Dense weight, [out, in] float32; not changed.
        gram: Gram matrix of the inputs, [in, in] float64; not changed.
        factor: Of the inverse of that matrix; says how far it is damped.
        sets: Input channels of each group, [groups, size] int64; every channel stands in one group.
        removed: How many groups each level removes, ascending.
        rounds: Rounds from one level to the next. The costs of one round do not know of each other: more rounds choose
            better where groups can stand in for each other.

    Returns:
        One result for each of `removed`.

    Raises:
        PlanError: `removed` does not ascend, or leaves no group.
        NumericalError: Rounding has left the inverse without a Cholesky factor.
    """
    groups = len(sets)
    if any(a >= b for a, b in pairwise((-1, *removed, groups))):
        raise PlanError(
            f"levels that remove {', '.join(map(str, removed))} of {groups} groups; "
            f"needed are ascending numbers from 0 to {groups - 1}"
        )
    hessian = damped(gram, factor.damping)
    left = _Remaining.dense(weight, factor, sets)
    found, gone = [], 0
    for count in removed:
        for part in _parts(count - gone, rounds):
            left = left.without_cheapest(part)
        gone = count
        kept = torch.zeros(weight.shape[1], dtype=torch.bool)
        kept[sets[left.groups].reshape(-1)] = True
        found.append(Reduced(left.groups, kept.nonzero()[:, 0], refit_columns(weight, kept, hessian)))
    return found


def removal_costs(rows: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return what removing each group alone adds to the loss 1/2 tr (W - W0) H (W - W0)^T, [groups] float64.

    Args:
        rows: B = W^T, [groups x size, out] float64, at the optimum for the channels that are left; group by group.
        inverse: H^-1 over the same channels, in the same order.
        size: Channels of a group.

    Raises:
        NumericalError: A diagonal block of the inverse is not positive definite.
    """
    if size == 1:
        diagonal = inverse.diagonal()
        _require(bool((diagonal > 0).all()))
        return rows.square().sum(dim=1) / diagonal / 2
    groups = len(rows) // size
    blocks = inverse.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lower = _cholesky(blocks)
    whitened = torch.linalg.solve_triangular(lower, rows.reshape(groups, size, -1), upper=False)
    costs: Tensor = whitened.square().sum(dim=(1, 2)) / 2
    return costs


@dataclass(frozen=True)
class _Remaining:
    """The groups that are left: their numbers [kept], B [kept x size, out] and H^-1 over their channels, by group."""

    groups: Tensor
    rows: Tensor
    inverse: Tensor
    size: int

    @classmethod
    def dense(cls, weight: Tensor, factor: InverseFactor, sets: Tensor) -> _Remaining:
        order = sets.reshape(-1)
        upper = factor.upper[:, order]  # H^-1 = U^T U
        # A channel that no token has used costs nothing; its damped diagonal would say otherwise.
        rows = weight.T[order].double().masked_fill_(factor.dead[order, None], 0)
        return cls(torch.arange(len(sets)), rows, upper.T @ upper, sets.shape[1])

    def without_cheapest(self, count: int) -> _Remaining:
        """Remove the `count` cheapest groups together; of equal ones the first go."""
        costs = removal_costs(self.rows, self.inverse, self.size)
        keep = torch.ones(len(self.groups), dtype=torch.bool)
        keep[costs.argsort(stable=True)[:count]] = False
        channels = keep.repeat_interleave(self.size)
        across, rows = self.inverse[channels], self.rows[channels]
        cross = across[:, ~channels]  # (H^-1)_:g
        inverse = across[:, channels]
        lower = _cholesky(self.inverse[~channels][:, ~channels])
        whitened = torch.linalg.solve_triangular(lower, cross.T, upper=False)  # [removed, kept]
        rows -= whitened.T @ torch.linalg.solve_triangular(lower, self.rows[~channels], upper=False)
        inverse -= whitened.T @ whitened
        return _Remaining(self.groups[keep], rows, inverse, self.size)


def _parts(total: int, rounds: int) -> Iterator[int]:
    """Split a number of groups over rounds as evenly as it goes; rounds without any are left out."""
    bounds = [total * number // rounds for number in range(rounds + 1)]
    return (last - first for first, last in pairwise(bounds) if last > first)


def _cholesky(matrices: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(matrices)
    _require(not bool(failed.any()))
    factors: Tensor = lower
    return factors


def _require(sound: bool) -> None:
    if not sound:
        raise NumericalError(
            "the inverse gram matrix of the channels that are left is not positive definite any more",
            hint="Use more calibration text, or more damping.",
        )
