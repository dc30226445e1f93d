"""How far a model's predictions are from the dense model's: KL over the dense model's likeliest tokens.

    KL(p || q) = sum over the k likeliest tokens of p (log p - log q) + P (log P - log Q)

where P and Q are the masses of all other tokens, one bucket. Keeping k = 512 of 128,000 tokens takes 3 KB per position
instead of 512; by the log sum inequality the result is never above the full divergence.
Source: Kullback & Leibler 1951; as a fitness in Sieberling et al. 2024, "EvoPress", arXiv 2410.14649.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_VALUES = 1 << 20  # logits in float32 at a time: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Reference:
    """What should be predicted at each position, such as what the dense model predicts.

    Attributes:
        tokens: The k likeliest, [positions, k] int32.
        log_p: Their logarithmic probabilities, [positions, k] float16.
        log_tail: Logarithmic probability of all others together, [positions] float32; -inf where k is all there are.
    """

    tokens: Tensor
    log_p: Tensor
    log_tail: Tensor


def reference(logits: Tensor, top: int) -> Reference:
    """Keep the `top` likeliest tokens of `logits: [positions, vocabulary]`."""
    tokens, log_p, tails = [], [], []
    for part in torch.split(logits, _positions(logits)):
        log = torch.log_softmax(part.float(), dim=1)
        best = log.topk(min(top, log.shape[1]), dim=1)
        kept = best.values.half()
        tokens.append(best.indices.int())
        log_p.append(kept)
        tails.append(_rest(kept.float()) if kept.shape[1] < log.shape[1] else torch.full((len(log),), -torch.inf))
    return Reference(torch.cat(tokens), torch.cat(log_p), torch.cat(tails))


def text_reference(ids: Tensor) -> Reference:
    """Return the text `ids: [tokens]` as what should be predicted at each position, the last left out.

    The divergence from it is the mean loss on the text, the logarithm of its perplexity.
    """
    targets = ids[1:, None].int()
    return Reference(targets, torch.zeros(targets.shape, dtype=torch.float16), torch.full((len(targets),), -torch.inf))


def divergence(dense: Reference, logits: Tensor) -> float:
    """Return the mean KL of `logits: [positions, vocabulary]` from the dense model's, nats per position."""
    total = 0.0
    step = _positions(logits)
    for first in range(0, len(logits), step):
        part = logits[first : first + step].float()
        span = slice(first, first + len(part))
        log_q = part.gather(1, dense.tokens[span].long()) - part.logsumexp(dim=1, keepdim=True)
        log_p = dense.log_p[span].float()
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        tail = dense.log_tail[span]
        has_tail = torch.isfinite(tail)
        if bool(has_tail.any()):
            missing = (tail - _rest(log_q))[has_tail]
            total += float((tail[has_tail].exp() * missing).sum(dtype=torch.float64))
    return total / len(logits)


def _positions(logits: Tensor) -> int:
    """Return how many positions of `logits: [positions, vocabulary]` are looked at together."""
    return max(_VALUES // logits.shape[1], 1)


def _rest(log: Tensor) -> Tensor:
    """Return log(1 - sum of exp(log)) along the last dimension, not below what float32 resolves."""
    return (1 - log.exp().sum(dim=-1)).clamp_min(1e-7).log()
