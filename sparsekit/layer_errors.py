"""How far a pruned linear is from its dense one: relative squared errors of weights and of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekit.contracts import Stats
from sparsekit.lazy import torch
from sparsekit.stats.gram import Gram
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS = 1 << 18  # weights whose error is summed at a time: copies of a whole linear would be the peak of a run


def layer_errors(dense: Tensor, stored: Tensor, stats: Stats) -> dict[str, float | int]:
    """Return the relative squared errors that the statistics of the inputs tell.

    Args:
        dense: [out, in] float32.
        stored: [out, in] as it will be written.
        stats: Statistics of the linear's input X.

    Returns:
        `weight_error`: |W - W'|^2 / |W|^2. `output_error`: |X (W - W')^T|^2 / |X W^T|^2, with a gram matrix only.
        `output_error_diagonal`: the same as if inputs were uncorrelated, with channel norms only:
        sum (dW_ij n_j)^2 / sum (W_ij n_j)^2. `tokens`: what the statistics saw.
    """
    gram, sumsq = stats.get("gram"), stats.get("sumsq")
    metric: Tensor | None = None
    if isinstance(gram, Gram):
        metric = gram.metric
    elif isinstance(sumsq, SumSq):
        metric = sumsq.norm().square_()
    sums = dict.fromkeys(("dw", "w", "dy", "y"), 0.0)
    step = max(1, _ELEMENTS // dense.shape[1])
    for start in range(0, dense.shape[0], step):
        whole = dense[start : start + step]
        part = whole - stored[start : start + step].to(torch.float32)
        sums["dw"] += float(part.square().sum())
        sums["w"] += float(whole.square().sum())
        if metric is not None:
            sums["dy"] += _energy(part, metric)
            sums["y"] += _energy(whole, metric)
    facts: dict[str, float | int] = {"weight_error": sums["dw"] / sums["w"] if sums["w"] else 0.0}
    if metric is not None:
        facts["output_error" if metric.dim() == 2 else "output_error_diagonal"] = (
            sums["dy"] / sums["y"] if sums["y"] else 0.0
        )
        facts["tokens"] = next(stat.tokens for stat in (gram, sumsq) if stat is not None)
    return facts


def output_error(dense: Tensor, gram: Gram) -> Callable[[Tensor], float]:
    """Return what tells |X (W - W')^T|^2 / |X W^T|^2 of any W' in place of `dense: [out, in]`, float32.

    For many levels of one linear: what they share is computed once.
    """
    metric = gram.metric
    parts = torch.split(dense, max(1, _ELEMENTS // dense.shape[1]))
    whole = sum(_energy(part, metric) for part in parts)

    def error(pruned: Tensor) -> float:
        rows = torch.split(pruned, len(parts[0]))
        changed = sum(_energy(part - row, metric) for part, row in zip(parts, rows, strict=True))
        return changed / whole if whole else 0.0

    return error


def _energy(rows: Tensor, metric: Tensor) -> float:
    """Return sum of r M r^T over rows r; a vector stands for a diagonal M."""
    product = rows * metric if metric.dim() == 1 else rows @ metric
    return max(0.0, float(product.mul_(rows).sum()))
