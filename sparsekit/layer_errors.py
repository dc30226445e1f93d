"""How far a pruned linear is from its dense one: relative squared errors of weights and of outputs.

Beside them stands what a random mask is expected to cost. Let each weight be removed with probability s, two of one
group together with probability p, two of different groups with q; then for a row w and the inputs' gram matrix G

    E |X dw|^2 = (s - p) sum_j w_j^2 G_jj + (p - q) sum_groups w_g G_gg w_g^T + q w G w^T.

A mask drawn from all those that keep as many weights of the linear has, with u units (weights or blocks) of which r go,
s = p = r / u and q = s (r - 1) / (u - 1). N:M removes r = M - N in each group, independent of other groups:
s = r / M, p = s (r - 1) / (M - 1), q = s^2. With a diagonal G the relative error is s, the sparsity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsekit.contracts import Stats
from sparsekit.lazy import torch
from sparsekit.pattern import NM, Block, Pattern
from sparsekit.stats.gram import Gram
from sparsekit.stats.sumsq import SumSq

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENTS = 1 << 18  # weights whose error is summed at a time: copies of a whole linear would be the peak of a run

Errors = dict[str, float]


def layer_errors(dense: Tensor, stored: Tensor, stats: Stats, pattern: Pattern, kept: int) -> tuple[Errors, Errors]:
    """Return the relative squared errors that the statistics of the inputs tell, and those of a random mask.

    Args:
        dense: [out, in] float32.
        stored: [out, in] as it will be written.
        stats: Statistics of the linear's input X.
        pattern: What a random mask follows too.
        kept: How many weights it keeps.

    Returns:
        (errors, expected errors of a random mask whose weights stay as they are), of the same keys.
        `weight_error`: |W - W'|^2 / |W|^2. `output_error`: |X (W - W')^T|^2 / |X W^T|^2, with a gram matrix only.
        `output_error_diagonal`: the same as if inputs were uncorrelated, with channel norms only:
        sum (dW_ij n_j)^2 / sum (W_ij n_j)^2.
    """
    gram, sumsq = stats.get("gram"), stats.get("sumsq")
    metric: Tensor | None = None
    if isinstance(gram, Gram):
        metric = gram.metric
    elif isinstance(sumsq, SumSq):
        metric = sumsq.norm().square_()
    width = pattern.of if isinstance(pattern, NM) else pattern.cols if isinstance(pattern, Block) else 1
    sums = dict.fromkeys(("dw", "w", "dy", "y", "own", "group"), 0.0)
    for whole, other in _parts(dense, stored):
        part = whole - other.to(torch.float32)
        sums["dw"] += float(part.square().sum())
        sums["w"] += float(whole.square().sum())
        if metric is None:
            continue
        sums["dy"] += _energy(part, metric)
        sums["y"] += _energy(whole, metric)
        if metric.dim() == 2:
            sums["own"] += _group_energy(whole, metric, 1)
            sums["group"] += _group_energy(whole, metric, width)
    sparsity = 1 - kept / dense.numel()
    errors: Errors = {"weight_error": _ratio(sums["dw"], sums["w"])}
    null: Errors = {"weight_error": sparsity if sums["w"] else 0.0}
    if metric is not None:
        key = "output_error" if metric.dim() == 2 else "output_error_diagonal"
        errors[key] = _ratio(sums["dy"], sums["y"])
        if metric.dim() == 2:
            same, apart = _removed_together(pattern, kept, dense.numel())
            lost = (sparsity - same) * sums["own"] + (same - apart) * sums["group"] + apart * sums["y"]
            null[key] = _ratio(lost, sums["y"])
        else:
            null[key] = sparsity if sums["y"] else 0.0
    return errors, null


def output_error(dense: Tensor, gram: Gram) -> Callable[[Tensor], float]:
    """Return what tells |X (W - W')^T|^2 / |X W^T|^2 of any W' in place of `dense: [out, in]`, float32.

    For many levels of one linear: what they share is computed once.
    """
    metric = gram.metric
    whole = sum(_energy(part, metric) for part, _ in _parts(dense, dense))

    def error(pruned: Tensor) -> float:
        return _ratio(sum(_energy(part - row, metric) for part, row in _parts(dense, pruned)), whole)

    return error


def _parts(one: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of two weights [out, in], some at a time."""
    rows = max(1, _ELEMENTS // one.shape[1])
    return list(zip(torch.split(one, rows), torch.split(other, rows), strict=True))


def _removed_together(pattern: Pattern, kept: int, numel: int) -> tuple[float, float]:
    """Return the probabilities p and q that a random mask removes two weights of a row: of one group, of two."""
    if isinstance(pattern, NM):
        gone = pattern.of - pattern.keep
        return gone * (gone - 1) / max(pattern.of * (pattern.of - 1), 1), (gone / pattern.of) ** 2
    units = numel // pattern.unit
    gone = units - kept // pattern.unit
    return gone / units, gone * (gone - 1) / max(units * (units - 1), 1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _energy(rows: Tensor, metric: Tensor) -> float:
    """Return sum of r M r^T over rows r; a vector stands for a diagonal M."""
    product = rows * metric if metric.dim() == 1 else rows @ metric
    return max(0.0, float(product.mul_(rows).sum()))


def _group_energy(rows: Tensor, metric: Tensor, width: int) -> float:
    """Return sum of r M r^T over rows r, of M only the blocks of `width` columns on its diagonal."""
    if width == 1:
        return _energy(rows, metric.diagonal())
    groups = rows.reshape(len(rows), -1, width).transpose(0, 1)  # [groups, rows, width]
    own = torch.stack([metric[at : at + width, at : at + width] for at in range(0, len(metric), width)])
    return max(0.0, float((groups @ own).mul_(groups).sum()))
