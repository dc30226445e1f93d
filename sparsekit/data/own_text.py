"""Calibration text that the model writes itself: no data set, works offline and for private domains.

Source: Williams, Chrysostomou & Aletras 2024, "Self-calibration for Language Model Quantization and Pruning",
arXiv 2410.17170. Every sample is drawn from the model's own distribution, beginning with nothing but its
start-of-text token; the first tokens are drawn at a higher temperature, so that samples differ, which falls to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsekit.data.packing import TokenBlocks, fingerprint
from sparsekit.errors import CalibrationError
from sparsekit.lazy import torch
from sparsekit.progress import Reporter
from sparsekit.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "self"
"""Its name in recipes."""
_HOT_TOKENS = 10
_HOTTEST = 2.0
_AT_ONCE = 32  # samples that are continued together


def write_blocks(
    model: Any, tokenizer: Any, *, samples: int, sequence_length: int, seed: int, reporter: Reporter
) -> TokenBlocks:
    """Draw `samples` texts of `sequence_length` tokens from a model.

    Args:
        model: A transformers causal language model on the CPU.
        tokenizer: Its tokenizer; the start-of-text token, or else the end-of-text token, begins every sample.
        samples: Number of texts.
        sequence_length: Tokens of each, the first one included. A text that ends is followed by another one.
        seed: Of the draws; every sample has its own.
        reporter: Told about every token position.

    Raises:
        CalibrationError: A tokenizer without such a token.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise CalibrationError(
            "the tokenizer has no start-of-text and no end-of-text token to begin with",
            where=SOURCE,
            hint="Set another calibration source.",
        )
    batches = []
    for first in range(0, samples, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, samples))
        draws = [torch.Generator().manual_seed(derive(seed, SOURCE, str(number))) for number in numbers]
        step = f"write calibration text ({first + len(numbers)} of {samples} samples)"
        reporter.start(step, sequence_length, "tokens")
        batches.append(_continue(model, start, sequence_length, draws, lambda step=step: reporter.advance(step)))
        reporter.finish(step)
    ids = torch.cat(batches)
    return TokenBlocks(ids, f"written by the model itself (seed {seed})", fingerprint(ids), tokens_available=None)


def _continue(model: Any, start: int, length: int, draws: list[torch.Generator], told: Any) -> Tensor:
    """Return ids [samples, length], drawn token by token."""
    ids = torch.full((len(draws), 1), start, dtype=torch.int64)
    cache = None
    told()
    with torch.inference_mode():
        for position in range(1, length):
            out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            heat = max(1.0, _HOTTEST - (_HOTTEST - 1) * (position - 1) / _HOT_TOKENS)
            chances = (out.logits[:, -1].to(torch.float32) / heat).softmax(-1)
            drawn = [torch.multinomial(row, 1, generator=draw) for row, draw in zip(chances, draws, strict=True)]
            ids = torch.cat([ids, torch.stack(drawn)], dim=1)
            told()
    return ids.clone()
