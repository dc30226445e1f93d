"""SparseGPT: one column sweep that removes weights and compensates for them.

What it does: for each strip of columns, from left to right, removes the weights of least w^2 / U_jj^2 and moves all
    weights to the right of each so that the outputs change least; G^-1 = U^T U for the damped gram matrix G.
Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774, eq. 3 and algorithm 1.
Shapes: weight [out, in], gram [in, in] -> weight and keep [out, in].
Cost: a Cholesky factor and a triangular inverse of in x in, then out x in^2 multiplications for each level.
Deviations: the budget of a linear is exact, spread over its strips in proportion to their width. N:M groups are chosen
    as the sweep reaches them, blocks at the start of their strip. A channel that was zero in all calibration tokens is
    the first to go but keeps its weights if the budget has room: unseen is not useless. Where Cholesky fails the
    damping rises in reported steps, then the run stops.
Numbers: 50 % on Llama-2-7B 6.51 (dense 5.12, WikiText-2 at 4096); on SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import LayerPruner, Level, LinearInfo, MethodOptions, Pruned, Stats, TokenNeed
from sparsekit.pattern import Pattern
from sparsekit.solve.factor import inverse_factor
from sparsekit.solve.obs import STRIP, prune
from sparsekit.stats.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor


class SparseGPTOptions(MethodOptions):
    """Options of `sparsegpt`."""

    damping: float = Field(default=0.01, gt=0, le=0.3, description="added to the diagonal, as a share of its mean")
    strip: int = Field(default=STRIP, ge=1, description="columns whose weights compete with each other")


class SparseGPT(LayerPruner[SparseGPTOptions]):
    """Remove the weights that cost least once the others have made up for them."""

    options_type = SparseGPTOptions
    needs = frozenset({"gram"})
    tokens = TokenNeed(least=0.125, advised=4)

    def fit(self, linear: LinearInfo, weight: Tensor, stats: Stats) -> Level:
        """Factor the gram matrix once; every level is a sweep of its own."""
        gram = stats["gram"]
        assert isinstance(gram, Gram)  # noqa: S101  (the walker delivers what `needs` names)
        factor = gram.once(inverse_factor, self.options.damping)

        def at(pattern: Pattern, budget: int) -> Pruned:
            return Pruned(*prune(weight, factor, pattern, budget, self.options.strip), factor.notes)

        return at
