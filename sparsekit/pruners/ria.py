"""RIA: relative importance and activations.

What it does: score_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_:j||_2 ^ power: a weight counts by its
    share of what its input channel sends and of what its output receives, so that no channel is emptied.
Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024 (literature), eq. 2 and 4.
Shapes: weight [out, in], sumsq norm [in] -> keep [out, in].
Cost: as Wanda's.
Deviations: exact counts. The paper's channel permutation for N:M is refused: a group of M permuted channels is no N:M
    group as stored, unless the layer before is permuted too. The published speed path leaves the activations as they
    are, which is wrong.
Numbers: 50 % on Llama-3-8B 9.34 (dense 6.14; Wanda 10.82), 2:4 23.08 (Wanda 24.18); SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sparsekit.contracts import LayerPruner, Level, LinearInfo, MethodOptions, Stats
from sparsekit.masks import Group, ranked
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30  # a sum of zeros divides zeros only


class RIAOptions(MethodOptions):
    """Options of `ria`."""

    power: float = Field(default=0.5, ge=0, le=4, description="of the input norm; 0: relative importance alone")
    group: Group = "linear"
    permute: bool = Field(default=False, description="channel permutation for N:M; true is refused, see the text")

    @field_validator("permute")
    @classmethod
    def _refuse(cls, permute: bool) -> bool:
        if permute:
            raise ValueError("needs the layer before permuted too, which is not implemented; leave it out")
        return permute


class RIA(LayerPruner[RIAOptions]):
    """Keep the weights of largest relative importance times a power of the input norm."""

    options_type = RIAOptions
    needs = frozenset({"sumsq"})

    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Score every weight by its shares of its column and row, times the norm of its input channel to the power."""
        sumsq = stats["sumsq"]
        assert isinstance(sumsq, SumSq)  # noqa: S101  (the walker delivers what `needs` names)
        size = weight.abs()
        shares = size / size.sum(dim=0).clamp_min(_TINY) + size / size.sum(dim=1, keepdim=True).clamp_min(_TINY)
        return ranked(weight, shares.mul_(sumsq.norm().pow_(self.options.power)), self.options.group)  # eq. 4
