"""A model beside its baseline on the same tokens.

Both models see the same blocks, so what differs per block is only the models: the standard error of the
difference is taken from paired blocks and is far smaller than that of either perplexity. The Kullback-Leibler
divergence looks at whole distributions instead of one drawn token each and resolves still smaller changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.data import TokenBlocks
from sparsekit.errors import EvaluationError
from sparsekit.evaluate.perplexity import (
    POSITIONS_AT_ONCE,
    Perplexity,
    TokenLosses,
    block_logits,
    check_blocks,
    chunks,
    log_likelihoods,
    standard_error,
    summarise,
)
from sparsekit.lazy import torch
from sparsekit.progress import Reporter, Silent, track

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """A model and its baseline on the same blocks.

    Attributes:
        model: Perplexity of the model.
        baseline: Perplexity of the baseline.
        ratio: Perplexity of the model over that of the baseline.
        loss_difference: Mean loss of the model minus that of the baseline, nats per token.
        loss_difference_stderr: Its standard error from paired blocks; None for a single block.
        kl: Mean KL(baseline || model) per predicted token, nats; 0 for equal models.
        kl_stderr: Its standard error from blocks; None for a single block.
        top1_agreement: Share of positions where both find the same token likeliest.
    """

    model: Perplexity
    baseline: Perplexity
    ratio: float
    loss_difference: float
    loss_difference_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1_agreement: float


def compare(
    model: Any,
    baseline: Any,
    blocks: TokenBlocks,
    *,
    positions_at_once: int = POSITIONS_AT_ONCE,
    reporter: Reporter | None = None,
) -> Comparison:
    """Run `model` and `baseline` over `blocks: ids [samples, sequence_length]` and compare their predictions.

    Raises:
        EvaluationError: The two have different vocabularies.
        NonFinite: NaN or infinity in the logits of one; names block and token.
    """
    check_blocks(model, blocks)
    check_blocks(baseline, blocks)
    indices = track(range(blocks.samples), reporter or Silent(), "comparison", blocks.samples, "sequences")
    from sparsekit.runtime.gates import prompt_tokens  # imports torch: not before it is needed

    prompt = max(prompt_tokens(each, blocks.sequence_length) for each in (model, baseline))
    rows = [_compare_block(model, baseline, blocks.ids[i], i, positions_at_once, prompt) for i in indices]
    loss, baseline_loss, kl, agreement = (torch.stack(column) for column in zip(*rows, strict=True))
    mine, other = (
        summarise(TokenLosses(per_token, blocks.source, blocks.sequence_length, prompt))
        for per_token in (loss, baseline_loss)
    )
    paired = loss - baseline_loss  # [samples, sequence_length - 1 - prompt] float64
    difference = float(paired.mean())
    return Comparison(
        model=mine,
        baseline=other,
        ratio=math.exp(difference) if difference < 700 else math.inf,
        loss_difference=difference,
        loss_difference_stderr=standard_error(paired.mean(dim=1)),
        kl=float(kl.mean()),
        kl_stderr=standard_error(kl.mean(dim=1)),
        top1_agreement=float(agreement.mean()),
    )


def _compare_block(
    model: Any, baseline: Any, ids: Tensor, index: int, positions_at_once: int, prompt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, baseline loss, KL and agreement of each predicted token: [sequence_length - 1 - prompt] float64."""
    logits, reference = (block_logits(each, ids)[prompt:] for each in (model, baseline))
    if logits.shape[1] != reference.shape[1]:
        raise EvaluationError(
            f"the model's vocabulary has {logits.shape[1]:,} tokens, the baseline's {reference.shape[1]:,}",
            where="comparison",
            hint="Compare with the model it was made from.",
        )
    columns: tuple[list[Tensor], ...] = ([], [], [], [])
    pairs = zip(*(chunks(each, positions_at_once, prompt) for each in (logits, reference)), strict=True)
    for (start, chunk), (_, other) in pairs:
        q = log_likelihoods(chunk, index, start)  # [positions, vocabulary] float32
        p = log_likelihoods(other, index, start).to(q.device)
        targets = ids[start + 1 : start + 1 + len(q), None].to(q.device)
        divergence = (p.exp() * (p - q)).sum(dim=-1, dtype=torch.float64)
        values = (
            -q.gather(1, targets)[:, 0],
            -p.gather(1, targets)[:, 0],
            # It cannot be negative; float32 log-softmax can make it so in the last digits.
            divergence.clamp_min(0.0),
            q.argmax(dim=-1) == p.argmax(dim=-1),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value.double().cpu())
    loss, baseline_loss, kl, agreement = (torch.cat(column) for column in columns)
    return loss, baseline_loss, kl, agreement
