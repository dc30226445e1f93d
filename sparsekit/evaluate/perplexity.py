"""Perplexity of a model on blocks of tokens.

Every token of a block but its first is predicted from the tokens before it in the block. Losses are negative
log likelihoods in nats: log-softmax in float32, sums in float64. The standard error comes from the mean
losses of the blocks, which are independent draws as far as tokens of one text can be.

Of a model whose neurons are chosen by the prompt (see `runtime.gates`), the first part of a block is the prompt: it is
read, and the rest is scored. A baseline beside it is scored on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsekit.data import TokenBlocks
from sparsekit.errors import CalibrationError, EvaluationError, NonFinite
from sparsekit.lazy import torch
from sparsekit.progress import Reporter, Silent, track

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS_AT_ONCE = 128
"""Positions whose logits are in float32 at once: 64 MiB for a vocabulary of 128k."""


@dataclass(frozen=True)
class TokenLosses:
    """Negative log likelihoods of a model on blocks.

    Attributes:
        per_token: [samples, sequence_length - 1 - prompt] float64, in nats.
        source: Where the text came from.
        sequence_length: Tokens per block.
        prompt: Leading tokens of each block that are only read; their predictions are not scored.
    """

    per_token: Tensor
    source: str
    sequence_length: int
    prompt: int = 0

    @property
    def per_block(self) -> Tensor:
        """Mean loss of each block, [samples] float64."""
        return self.per_token.mean(dim=1)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity with what it was measured on.

    Attributes:
        perplexity: exp of the mean loss; infinite where that leaves the range of a float.
        stderr: Standard error of the perplexity; None for a single block.
        loss: Mean loss per token in nats.
        tokens: Number of predicted tokens.
        sequence_length: Tokens per block.
        source: Where the text came from.
        prompt: Leading tokens of each block that are only read.
    """

    perplexity: float
    stderr: float | None
    loss: float
    tokens: int
    sequence_length: int
    source: str
    prompt: int = 0


def score(
    model: Any,
    blocks: TokenBlocks,
    *,
    positions_at_once: int = POSITIONS_AT_ONCE,
    reporter: Reporter | None = None,
    task: str = "perplexity",
) -> TokenLosses:
    """Return the loss of every predicted token of `blocks`.

    Args:
        model: A causal language model of transformers; it is run without gradients, one block at a time.
        blocks: ids [samples, sequence_length].
        positions_at_once: Positions turned into float32 at once; the result does not depend on it.
        reporter: Receives progress, one unit a block.
        task: What progress calls this step.

    Raises:
        NonFinite: NaN or infinity in the logits; names block and token.
        CalibrationError: Blocks of one token, in which nothing is predicted.
        EvaluationError: Token ids that the model's vocabulary does not have.
    """
    from sparsekit.runtime.gates import prompt_tokens  # imports torch: not before its address space is checked

    check_blocks(model, blocks)
    prompt = prompt_tokens(model, blocks.sequence_length)
    rows = []
    for index in track(range(blocks.samples), reporter or Silent(), task, blocks.samples, "sequences"):
        ids = blocks.ids[index]
        logits = block_logits(model, ids)[prompt:]  # [sequence_length - 1 - prompt, vocabulary]
        losses = [
            -log_likelihoods(chunk, index, start).gather(1, _targets(ids, start, chunk))[:, 0]
            for start, chunk in chunks(logits, positions_at_once, prompt)
        ]
        rows.append(torch.cat(losses).double().cpu())
    return TokenLosses(torch.stack(rows), blocks.source, blocks.sequence_length, prompt)


def summarise(losses: TokenLosses) -> Perplexity:
    """Return the perplexity that `losses` amount to, with its standard error."""
    loss = float(losses.per_token.mean())
    perplexity = _exp(loss)
    error = standard_error(losses.per_block)
    return Perplexity(
        perplexity=perplexity,
        stderr=None if error is None else perplexity * error,
        loss=loss,
        tokens=losses.per_token.numel(),
        sequence_length=losses.sequence_length,
        source=losses.source,
        prompt=losses.prompt,
    )


def standard_error(values: Tensor) -> float | None:
    """Return the standard error of the mean of `values: [n]`; None for fewer than two."""
    n = values.numel()
    return float(values.double().std(correction=1)) / math.sqrt(n) if n > 1 else None


def check_blocks(model: Any, blocks: TokenBlocks) -> None:
    """Raise unless `model` can predict at least one token of each block."""
    if blocks.sequence_length < 2:
        raise CalibrationError(
            f"blocks of {blocks.sequence_length} token leave nothing to predict, need at least 2",
            where=blocks.source,
            hint="Set a longer sequence_length.",
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    highest = int(blocks.ids.max())
    if highest >= vocabulary:
        raise EvaluationError(
            f"token id {highest:,} does not exist in the model's vocabulary of {vocabulary:,}",
            where=blocks.source,
            hint="Use the tokenizer that belongs to the model.",
        )


def block_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [sequence_length - 1, vocabulary] that predict `ids[1:]`, in the model's dtype."""
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model(input_ids=ids.unsqueeze(0).to(device), use_cache=False)
    logits: Tensor = output.logits[0, :-1]
    return logits


def chunks(logits: Tensor, positions_at_once: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield (position in the block, logits [at most positions_at_once, vocabulary]); the logits begin at `first`."""
    for start in range(0, logits.shape[0], positions_at_once):
        yield first + start, logits[start : start + positions_at_once]


def log_likelihoods(chunk: Tensor, block: int, start: int) -> Tensor:
    """Return the log-softmax in float32 of `chunk: [positions, vocabulary]`, refusing what is not finite."""
    chunk = chunk.float()
    if not bool(torch.isfinite(chunk).all()):
        bad = (~torch.isfinite(chunk)).any(dim=1).nonzero()[0, 0]
        raise NonFinite(
            f"NaN or infinity in the logits of block {block}, first at token {start + int(bad)}",
            where="evaluation",
            hint="The weights or activations are damaged: run sparsekit verify, or use a wider dtype.",
        )
    return torch.log_softmax(chunk, dim=-1)


def _targets(ids: Tensor, start: int, chunk: Tensor) -> Tensor:
    return ids[start + 1 : start + 1 + chunk.shape[0], None].to(chunk.device)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
