"""M-FAC: weights whose removal raises the loss least by the empirical Fisher matrix, which is never formed.

What it does: with F = lam I + (1 / m) sum_s g_s g_s^T of the gradients of m samples, block-diagonal, removes the
    weights of least w^2 / (2 [F^-1]_pp). `compensate: joint` moves the kept ones to the minimum of d^T F d for that
    mask; `single` is the published sum of -w_p F^-1 e_p / [F^-1]_pp over the removed weights; `none` leaves them.
Source: Frantar, Kurtic & Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
    arXiv 2107.03356, eq. 1 to 6.
Shapes: weight [out, in], m gradients [out, in] -> weight and keep [out, in].
Cost: m^2 x out x in multiplications in float64 for the scores and as many for each joint level; m gradients of a block
    of the model in memory. Small models.
Deviations: the inverse comes from a Cholesky factor of m x m numbers instead of m rank-one updates (the same to
    rounding). `joint` is not in the paper: its updates, summed, forget that the other removed weights go too. lam is a
    multiple of the mean of F's diagonal, where the paper has 1e-5 for all models: mean squares of gradients are 1e-8
    in a q_proj and 3e-5 in the v_proj beside it. Each linear has its own budget; the paper ranks the whole model.
    Gradients are those of the dense model, whatever `propagate` says.
Numbers: SmolLM2-135M at 50 % 1.82 times the dense perplexity, as Wanda; SparseGPT 1.40 (docs/results.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsekit.contracts import LayerPruner, Level, LinearInfo, MethodOptions, Probes, Pruned, Stats
from sparsekit.masks import Group, ranked, select, zeroed
from sparsekit.pattern import Pattern
from sparsekit.solve.fisher import BlockFisher
from sparsekit.stats.grad import Grad

if TYPE_CHECKING:
    from torch import Tensor


class MFACOptions(MethodOptions):
    """Options of `mfac`."""

    samples: int = Field(default=64, ge=2, description="m, calibration samples with a gradient each")
    sequence_length: int = Field(default=128, ge=8, description="tokens of each sample")
    damping: float = Field(default=1.0, gt=0, description="lambda, as a multiple of the mean of F's diagonal")
    block: int = Field(default=128, ge=1, description="weights of one diagonal block of F, along the rows")
    compensate: Literal["joint", "single", "none"] = Field(default="joint", description="how the kept weights move")
    group: Group = "linear"


class MFAC(LayerPruner[MFACOptions]):
    """Remove the weights that the loss misses least."""

    options_type = MFACOptions
    needs = frozenset({"grad"})

    def probes(self) -> Probes:
        """Return the part of the calibration text whose gradients make F."""
        return Probes(self.options.samples, self.options.sequence_length)

    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Score every weight; a level is a selection and an update for its mask."""
        grad = stats["grad"]
        assert isinstance(grad, Grad)  # noqa: S101  (the walker delivers what `needs` names)
        fisher = BlockFisher(grad.samples, self.options.damping, self.options.block)
        if fisher.is_empty:
            return self._unseen(weight)
        diagonal = fisher.inverse_diagonal()  # times lam, which ranks all weights alike
        score = (weight / diagonal.sqrt()).abs_().float()  # the root of eq. 1: blocks sum squares
        if self.options.compensate == "none":
            return ranked(weight, score, self.options.group)

        def at(pattern: Pattern, budget: int) -> Pruned:
            keep = select(score, pattern, budget, self.options.group)
            if self.options.compensate == "single":
                return Pruned(zeroed(fisher.single(weight, keep, diagonal), keep), keep)
            return Pruned(zeroed(fisher.joint(weight, keep), keep), keep)

        return at

    def _unseen(self, weight: Tensor) -> Level:
        """Rank by magnitude where no sample has a gradient: then F = lam I for any lam."""

        def at(pattern: Pattern, budget: int) -> Pruned:
            keep = select(weight.abs(), pattern, budget, self.options.group)
            return Pruned(zeroed(weight, keep), keep, ("no sample has a gradient here: ranked by magnitude",))

        return at
