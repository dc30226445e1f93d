"""The order of a linear's inputs in which an N:M pattern keeps most of a score.

Heaviest channels are first dealt out over the groups of M, to and fro, as cards in snake order. Then one slot of every
group is emptied at a time, and its channels are assigned to groups anew. A channel of scores x that joins a group whose
N-th best other scores are t makes it keep max(x, t) in place of t. As 2 max(x, t) = x + t + |x - t|, the assignment
that keeps most is the one with the largest sum of L1 distances between x and t.
Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
ICLR 2024, section 3.2 and algorithm 1; Kuhn 1955, "The Hungarian method for the assignment problem" (literature).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.errors import NonFinite
from sparsekit.finite import all_finite
from sparsekit.lazy import torch
from sparsekit.pattern import NM

if TYPE_CHECKING:
    from torch import Tensor

PART = 512
"""Groups whose channels are assigned together: time grows with its square for each, with its cube in the worst case."""
_TINY = 1e-30
_ELEMENTS = 1 << 20  # scores ranked at a time
_GAIN = 1e-3  # a round over all slots that gains less of the score is the last; the first gains some 1e-2


def best_order(score: Tensor, pattern: NM, sets: Tensor, *, part: int = PART) -> Tensor:
    """Return an order of the inputs that keeps at least as much of the score as the one they have.

    Args:
        score: [out, in] float32, not negative, larger = keep.
        pattern: Groups of M consecutive inputs, of which N are kept in every row.
        sets: [sets, copies, size], all inputs; M divides the size. Inputs change places inside their set only, in all
            copies alike.
        part: Groups of a set whose channels are assigned together, after all channels have been dealt out. Fewer take
            less time and keep a little less.

    Returns:
        [in] int64: the old input for each place; a permutation.

    Raises:
        PlanError: M does not divide the size of a set.
        NonFinite: A score is NaN or infinite.
    """
    _, copies, size = sets.shape
    pattern.check(len(score), size, where="channel permutation")
    if not all_finite(score):
        raise NonFinite(
            f"{int((~torch.isfinite(score)).sum())} of {score.numel()} scores are not finite",
            hint="Weights times activations leave the range of float32: check the model and the calibration text.",
        )
    order = torch.empty(score.shape[1], dtype=torch.int64)
    for members in sets:
        rows = score[:, members.reshape(-1)].reshape(len(score) * copies, size)  # a copy is more rows
        order[members] = members[:, _best_of_set(rows, pattern, part)]
    return order


def kept_score(score: Tensor, pattern: NM, order: Tensor | None = None) -> float:
    """Return the sum of the scores `[out, in]` that N:M keeps with the inputs in that order, summed in float64."""
    total = 0.0
    for rows in torch.split(score, max(1, _ELEMENTS // score.shape[1])):
        ordered = rows if order is None else rows[:, order]
        total += float(ordered.reshape(-1, pattern.of).topk(pattern.keep, dim=1).values.sum(dtype=torch.float64))
    return total


def snake(score: Tensor, of: int) -> Tensor:
    """Deal the channels of `score: [out, in]` by falling column sum to in/M groups, to and fro; return the order."""
    ranked = score.sum(dim=0, dtype=torch.float64).argsort(descending=True, stable=True)
    rounds = ranked.reshape(of, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def _best_of_set(score: Tensor, pattern: NM, part: int) -> Tensor:
    """Return the order of the channels of one set; `score: [rows, size]`."""
    stay, dealt = torch.arange(score.shape[1]), snake(score, pattern.of)
    start = max(stay, dealt, key=lambda order: kept_score(score, pattern, order))
    channels = score.T.contiguous().div_(score.max().clamp_min(_TINY))  # [size, rows]; sums over rows stay in range
    parts = torch.split(start.reshape(-1, pattern.of), part)
    return torch.cat([_assign(score, channels, some, pattern) for some in parts]).reshape(-1)


def _assign(score: Tensor, channels: Tensor, groups: Tensor, pattern: NM) -> Tensor:
    """Assign the channels of `groups: [groups, M]` slot by slot while it gains; return the new groups."""
    from scipy.optimize import linear_sum_assignment

    kept = kept_score(score, pattern, groups.reshape(-1))
    while pattern.keep < pattern.of:
        before = kept
        for slot in range(pattern.of):
            others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], dim=1)
            bars = _nth_best(channels, others, pattern.keep)  # [groups, rows]
            gains = torch.cdist(channels[groups[:, slot]], bars, p=1)
            moved, into = linear_sum_assignment(gains.numpy(), maximize=True)
            tried = groups.clone()
            tried[into, slot] = groups[moved, slot]
            value = kept_score(score, pattern, tried.reshape(-1))
            if value > kept:  # distances are float32: what is equal in them may fall
                groups, kept = tried, value
        if kept - before <= _GAIN * before:
            break
    return groups


def _nth_best(channels: Tensor, groups: Tensor, nth: int) -> Tensor:
    """Return each row's `nth` best score in each of `groups: [groups, members]`; `channels: [in, rows]`."""
    step = max(1, _ELEMENTS // (groups.shape[1] * channels.shape[1]))
    return torch.cat([channels[some].topk(nth, dim=1).values[:, -1] for some in torch.split(groups, step)])
