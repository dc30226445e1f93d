"""RIA: relative importance and activations.

What it does: score_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_:j||_2 ^ power: a weight counts by its
    share of what its input channel sends and of what its output receives, so that no channel is emptied.
    `permute: true`: channels are first put in the order in which N:M keeps most of that score (solve/permute.py).
Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024 (literature), eq. 2 and 4.
Shapes: weight [out, in], sumsq norm [in] -> keep [out, in].
Cost: as Wanda's; the order: 2 M or 3 M times out x (in/M) x min(in/M, part_groups) differences and the assignments.
Deviations: exact counts. Reordered are only inputs that other linears of the block make, for those are reordered with
    them (o_proj inside a head, down_proj); inputs from the residual stream stay. The published speed path reorders
    every linear and leaves the activations as they are, which is wrong.
Numbers: 50 % on Llama-3-8B 9.34 (dense 6.14; Wanda 10.82), 2:4 23.08 (Wanda 24.18), permuted 20.05;
    SmolLM2-135M at 2:4 100.2, permuted 87.2 (docs/results.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import LayerPruner, Level, LinearInfo, MethodOptions, Stats
from sparsekit.masks import Group, ranked
from sparsekit.pattern import NM
from sparsekit.solve.permute import PART, best_order
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30  # a sum of zeros divides zeros only


class RIAOptions(MethodOptions):
    """Options of `ria`."""

    power: float = Field(default=0.5, ge=0, le=4, description="of the input norm; 0: relative importance alone")
    group: Group = "linear"
    permute: bool = Field(default=False, description="reorder channels so that an N:M pattern keeps more of the score")
    part_groups: int = Field(
        default=PART,
        ge=2,
        description="groups of M whose channels are assigned together; fewer: faster, a little worse",
    )


class RIA(LayerPruner[RIAOptions]):
    """Keep the weights of largest relative importance times a power of the input norm."""

    options_type = RIAOptions
    nested = True
    needs = frozenset({"sumsq"})

    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Score every weight by its shares of its column and row, times the norm of its input channel to the power."""
        return ranked(weight, self._score(weight, stats), self.options.group)

    @property
    def permutes(self) -> bool:
        """As the option says."""
        return self.options.permute

    def order(self, linear: LinearInfo, weight: Tensor, pattern: NM, sets: Tensor, stats: Stats) -> Tensor:
        """Return the order of inputs in which the pattern keeps most of the score."""
        return best_order(self._score(weight, stats), pattern, sets, part=self.options.part_groups)

    def _score(self, weight: Tensor, stats: Stats) -> Tensor:
        sumsq = stats["sumsq"]
        assert isinstance(sumsq, SumSq)  # noqa: S101  (the walker delivers what `needs` names)
        size = weight.abs()
        shares = size / size.sum(dim=0).clamp_min(_TINY) + size / size.sum(dim=1, keepdim=True).clamp_min(_TINY)
        return shares.mul_(sumsq.norm().pow_(self.options.power))  # eq. 4
