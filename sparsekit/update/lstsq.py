"""Masked least squares: the best values for a given mask.

What it does: gives the kept weights of every row the values for which the linear's outputs on the calibration text
    change least, w_K = (G_KK)^-1 (G w)_K.
Source: the normal equations (literature); as the exact end of Optimal Brain Surgeon's updates in Hassibi & Stork 1992
    and Frantar & Alistarh 2023, "SparseGPT", arXiv 2301.00774, section 3.1.
Shapes: weight [out, in], keep [out, in], gram [in, in] -> weight [out, in].
Cost: the sweep of `obs`, then 10 to 100 products of out x in and in x in; factors instead if masks are few or narrow.
Deviations: the gram matrix is damped as for SparseGPT, which pulls weights towards their dense values: an undamped fit
    learns the noise of the text. It starts from the OBS sweep. A row whose error on the text would rise stays as it is.
Numbers: equals torch.linalg.lstsq on the kept columns (tests/oracle/test_lstsq.py); SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsekit.contracts import LinearInfo, MethodOptions, Pruned, Stats, TokenNeed, WeightUpdate
from sparsekit.solve.factor import damped, inverse_factor
from sparsekit.solve.masked_lstsq import better_rows, masked_lstsq
from sparsekit.solve.obs import compensate
from sparsekit.stats.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor


class LstSqOptions(MethodOptions):
    """Options of `lstsq`."""

    damping: float = Field(default=0.01, gt=0, le=0.3, description="added to the diagonal, as a share of its mean")


class LstSq(WeightUpdate[LstSqOptions]):
    """Solve for the kept weights of a given mask."""

    options_type = LstSqOptions
    needs = frozenset({"gram"})
    tokens = TokenNeed(least=1, advised=4)

    def update(self, linear: LinearInfo, weight: Tensor, start: Pruned, stats: Stats) -> Pruned:
        """Go on from the OBS sweep to the optimum; no row ends above its error in `start`."""
        gram = stats["gram"]
        assert isinstance(gram, Gram)  # noqa: S101  (the walker delivers what `needs` names)
        factor = gram.once(inverse_factor, self.options.damping)
        matrix = gram.matrix
        solved = masked_lstsq(
            weight, start.keep, damped(matrix, factor.damping), compensate(weight, factor, start.keep)
        )
        return Pruned(better_rows(weight, start.weight, solved, matrix), start.keep, factor.notes)
