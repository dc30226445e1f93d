"""The empirical Fisher matrix of a linear's weights, block-diagonal, and what its inverse says, from m gradients.

For each run of `size` weights, in the order of the rows, F = lam I + (1 / m) G^T G with G [m, size] the gradients. F is
never formed: by the Woodbury identity

    F^-1 = (I - G^T S^-1 G) / lam,    S = m lam I + G G^T,

all that is needed is the Cholesky factor of S [m, m]. Frantar et al. 2021, "M-FAC", arXiv 2107.03356, eq. 4 to 6, build
the same inverse by m rank-one updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sparsekit.errors import NumericalError
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS = 1 << 22  # of G that are in float64 at a time


class BlockFisher:
    """F of one linear, in float64."""

    def __init__(self, gradients: Sequence[Tensor], damping: float, size: int) -> None:
        """Note the gradients; they are copied only where a linear is stored transposed.

        Args:
            gradients: m times [out, in], float32.
            damping: lam as a multiple of the mean of the diagonal of (1 / m) G^T G.
            size: Weights of one diagonal block; the last may be shorter.
        """
        self._gradients = [gradient.reshape(-1) for gradient in gradients]
        self._shape = gradients[0].shape
        self._size = min(size, gradients[0].numel())
        mean = sum(float(gradient.double().square_().sum()) for gradient in self._gradients)
        self.lam = damping * mean / (len(gradients) * gradients[0].numel())

    @property
    def is_empty(self) -> bool:
        """Whether all gradients are zero: no sample says anything about this linear."""
        return self.lam == 0

    def inverse_diagonal(self) -> Tensor:
        """Return lam times the diagonal of F^-1, [out, in] float64: in (0, 1], 1 where all gradients are zero.

        Raises:
            NumericalError: lam is lost in rounding; so do the updates.
        """

        def diagonal(g: Tensor) -> Tensor:
            half: Tensor = torch.linalg.solve_triangular(self._factor(g), g, upper=False)  # [blocks, m, size]
            rest = 1 - half.square_().sum(dim=1)
            self._require(bool((rest > 0).all()), g)
            return rest

        return self._each(diagonal)

    def joint(self, weight: Tensor, keep: Tensor) -> Tensor:
        """Return the weight of least d^T F d among those that are zero outside `keep`; d is the change.

        With R the removed weights and K the kept ones, d_R = -w_R and  d_K = F_KK^-1 F_KR w_R, and by Woodbury on the
        kept columns alone  d_K = G_K^T (m lam I + G_K G_K^T)^-1 G_R w_R.

        Args:
            weight: [out, in] float32, the dense one.
            keep: [out, in] bool.
        """

        def solve(g: Tensor, w: Tensor, kept: Tensor) -> Tensor:
            answer = g @ (w * ~kept)[..., None]  # G_R w_R, [blocks, m, 1]
            g = g * kept[:, None]
            return (w + (g.mT @ torch.cholesky_solve(answer, self._factor(g)))[..., 0]) * kept

        return self._each(solve, weight, keep).float()

    def single(self, weight: Tensor, keep: Tensor, scaled_diagonal: Tensor) -> Tensor:
        """Return the weight after the sum of the updates that each removed weight asks for by itself.

        d = sum over removed p of -w_p F^-1 e_p / [F^-1]_pp (eq. 2); outside `keep` the result is zero.

        Args:
            weight: [out, in] float32, the dense one.
            keep: [out, in] bool.
            scaled_diagonal: What `inverse_diagonal` returned.
        """

        def add(g: Tensor, w: Tensor, kept: Tensor, diagonal: Tensor) -> Tensor:
            u = (w * ~kept / diagonal)[..., None]  # zero on kept weights, so the I of F^-1 adds nothing there
            return (w + (g.mT @ torch.cholesky_solve(g @ u, self._factor(g)))[..., 0]) * kept

        return self._each(add, weight, keep, scaled_diagonal).float()

    def _factor(self, g: Tensor) -> Tensor:
        """Return the lower Cholesky factors of S, [blocks, m, m], for `g: [blocks, m, size]`."""
        s = g @ g.mT
        s.diagonal(dim1=1, dim2=2).add_(len(self._gradients) * self.lam)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(s)
        self._require(not info.any(), g)
        return factor

    def _require(self, sound: bool, g: Tensor) -> None:
        if not sound:
            raise NumericalError(
                f"the Fisher matrix of {g.shape[2]} weights has no inverse in float64 with lambda {self.lam:.3g}",
                hint="Raise the method's damping.",
            )

    def _each(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Call `work(g, *parts)` for some blocks at a time; return its results [blocks, size] as one [out, in].

        `g` is [blocks, m, size], and a part [blocks, size] belongs to each of `tensors: [out, in]`. A last block that
        is shorter is a call of its own.
        """
        flat = [tensor.reshape(-1) for tensor in tensors]
        out = torch.empty(self._gradients[0].numel(), dtype=torch.float64)
        for start, end, size in self._chunks():
            g = torch.stack([gradient[start:end].reshape(-1, size) for gradient in self._gradients], dim=1).double()
            parts = [tensor[start:end].reshape(-1, size) for tensor in flat]
            parts = [part.double() if part.is_floating_point() else part for part in parts]
            out[start:end] = work(g, *parts).reshape(-1)
        return out.reshape(self._shape)

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first weight, last + 1, size of a block) of what is worked on at a time."""
        total, size = self._gradients[0].numel(), self._size
        step = max(1, _ELEMENTS // (len(self._gradients) * size)) * size
        whole = total // size * size
        for start in range(0, whole, step):
            yield start, min(start + step, whole), size
        if whole < total:
            yield whole, total, total - whole
