"""DSnoT: swaps removed weights for kept ones until the expected output error of each row is small.

What it does: C_ij = W_ij mean_j is what weight ij adds to the mean output of its row, E_i the sum over its removed
    weights. One cycle grows the removed weight of largest sign(E_i) C_ij / var_j and prunes the kept weight of opposite
    sign with the least |W_ij| ||X_:j||; both bring E_i towards zero. Each weight moves once. In an N:M mask the pruned
    weight is the one of least |W_ij| ||X_:j|| in the grown one's group.
Source: Zhang et al. 2023, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", arXiv 2310.08915,
    eq. 3 to 6 and algorithm 1.
Shapes: weight [out, in], keep [out, in], mean and variance [in] -> keep [out, in].
Cost: cycles x out x in comparisons; with the guard two float64 products of out x in and in x in.
Deviations: E_i is the bias of the row's error only. Its variance, dW Cov(X) dW^T, is the larger part and rises while
    |E_i| falls (docs/results.md). Hence the default: at most 2 % of a row's weights swapped, no swap that overshoots,
    |E_i| down to 2 % of its start, and a row's swaps accepted only if its true error, from the gram matrix, does not
    rise. `paper: true` is the published form: 50 cycles, overshoot allowed except for N:M, |E_i| <= 0.1 on sums over
    2048 tokens, every row accepted. It differs from the authors' code in the pooled variance, in stopping a row where
    no kept weight of opposite sign is left instead of going on, and in refining every linear, not attention alone.
Numbers: LLaMA-7B at 70 % from Wanda's 88.8 to 62.1 (published); SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import LinearInfo, MaskRefiner, MethodOptions, Pruned, Stats
from sparsekit.errors import PlanError
from sparsekit.lazy import torch
from sparsekit.masks import zeroed
from sparsekit.pattern import NM, Block, Pattern
from sparsekit.solve.masked_lstsq import row_errors
from sparsekit.stats.gram import Gram
from sparsekit.stats.moments import Moments
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # refined together: their scores stay in the cache
_PAPER_CYCLES = 50
_PAPER_STOP = 0.1 / 2048  # the published threshold is on sums over sequences of 2048 tokens
_STOP = 0.02
_SHARE = 0.02


class DSnoTOptions(MethodOptions):
    """Options of `dsnot`."""

    paper: bool = Field(default=False, description="the published form, which may make outputs worse")
    guard: bool | None = Field(
        default=None, description="accept a row only if its true error does not rise; null: unless `paper`"
    )
    cycles: int | None = Field(default=None, ge=0, description="most swaps in a row; null: 2 % of it, `paper`: 50")
    variance_power: float = Field(default=1.0, ge=0, description="of the variance that growing is divided by")


class DSnoT(MaskRefiner[DSnoTOptions]):
    """Swap weights so that the mean error of every output goes to zero."""

    options_type = DSnoTOptions
    needs = frozenset({"moments", "sumsq", "gram"})

    def check(self, pattern: Pattern) -> None:
        """Refuse blocks: one weight of a block cannot be swapped."""
        if isinstance(pattern, Block):
            raise PlanError(
                f"dsnot swaps single weights, which pattern {pattern} does not allow",
                hint="Use unstructured or N:M, or leave refine out.",
            )

    def refine(self, linear: LinearInfo, weight: Tensor, start: Pruned, pattern: Pattern, stats: Stats) -> Pruned:
        """Swap weights row by row; with the guard, take back what raised a row's true error."""
        moments, sumsq, gram = stats["moments"], stats["sumsq"], stats["gram"]
        assert isinstance(moments, Moments)  # noqa: S101  (the walker delivers what `needs` names)
        assert isinstance(sumsq, SumSq)  # noqa: S101
        assert isinstance(gram, Gram)  # noqa: S101
        self.check(pattern)
        paper, cycles = self.options.paper, self.options.cycles
        if cycles is None:
            cycles = _PAPER_CYCLES if paper else math.ceil(_SHARE * linear.in_features)
        variance = moments.variance.clamp_min(1e-9 * float(moments.variance.max()) + 1e-30)
        mean, spread = moments.mean.float(), variance.pow(self.options.variance_power).float()
        keep = start.keep.clone()
        for first in range(0, linear.out_features, _ROWS):
            rows = slice(first, first + _ROWS)
            added = weight[rows] * mean
            swaps = _Swaps(added, added / spread, weight[rows].abs() * sumsq.norm(), keep[rows])
            for _ in range(cycles):
                if not swaps.cycle(pattern.of if isinstance(pattern, NM) else None, paper):
                    break
        if not paper if self.options.guard is None else self.options.guard:
            before, after = (row_errors(weight, zeroed(weight, mask), gram.matrix) for mask in (start.keep, keep))
            keep = torch.where((after <= before)[:, None], keep, start.keep)
        return Pruned(zeroed(weight, keep), keep)


@dataclass
class _Swaps:
    """Some rows of a linear while weights are swapped; all tensors [rows, in].

    Attributes:
        added: C, what each weight adds to the mean output of its row.
        growth: C over the variance.
        importance: |W| times input norm: the least goes first.
        keep: The mask, changed in place.
    """

    added: Tensor
    growth: Tensor
    importance: Tensor
    keep: Tensor

    def __post_init__(self) -> None:
        self.error = (self.added * ~self.keep).sum(dim=1, dtype=torch.float64)  # E, [rows]
        self.start = self.error.abs()
        self.moved = torch.zeros_like(self.keep)
        self.active = torch.ones(len(self.keep), dtype=torch.bool)
        self.rows = torch.arange(len(self.keep))

    def cycle(self, of: int | None, paper: bool) -> bool:
        """Swap at most one pair in every row that is not done; return whether any row is left.

        Args:
            of: M of an N:M pattern.
            paper: Accept swaps that lower E no further, and overshoot where there are no groups.
        """
        self.active &= self.error.abs() > (_PAPER_STOP if paper else _STOP * self.start)
        sign = self.error.sign().float()[:, None]
        gain, grown = (sign * self.growth).masked_fill_(self.keep | self.moved, -torch.inf).max(dim=1)
        self.active &= gain > (-torch.inf if paper else 0)
        barred = ~self.keep | self.moved
        if of is None:
            barred |= sign * self.added >= 0  # only weights whose loss brings E towards zero
        else:
            barred |= torch.arange(self.keep.shape[1]) // of != (grown // of)[:, None]
        least, lost = self.importance.masked_fill(barred, torch.inf).min(dim=1)
        error = self.error - self.added[self.rows, grown].double() + self.added[self.rows, lost].double()
        overshot = error * self.error < 0
        found = least < torch.inf
        if of is None:
            self.active &= found & (paper | ~overshot)
        else:
            self.active &= ~(found & overshot)
        swapped = self.active & found & (paper | (error.abs() < self.error.abs()))
        self.error = torch.where(swapped, error, self.error)
        self.moved[self.rows[self.active], grown[self.active]] = True  # in a group without a gain: tried
        rows, grown, lost = self.rows[swapped], grown[swapped], lost[swapped]
        self.keep[rows, grown] = True
        self.keep[rows, lost] = False
        self.moved[rows, lost] = True
        return bool(self.active.any())
