"""Documents to blocks of tokens.

Documents are tokenised without special tokens and joined with the tokenizer's end-of-sequence token between
them (without one: a blank line). The row of tokens is cut into equal blocks. If the tokenizer begins a text
with a beginning-of-sequence token, every block begins with it, as every text the model saw did; it takes one
of the block's `sequence_length` places. What is left over at the end is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsekit.data.documents import Documents, Part, TextSpec
from sparsekit.errors import CalibrationError, EmptyText, TooFewTokens
from sparsekit.lazy import torch
from sparsekit.progress import Reporter
from sparsekit.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

_DOCUMENTS_AT_ONCE = 32
_SHORTEST = 8  # the least sequence_length of recipes and of `eval`


@dataclass(frozen=True)
class TokenBlocks:
    """Equal blocks of tokens, ready for a model.

    Attributes:
        ids: [samples, sequence_length] int64.
        source: Where the text came from, for people: source, config, split, field, part.
        fingerprint: SHA-256 of shape and ids; equal text, tokenizer and seed give an equal fingerprint.
        tokens_available: Tokens the source holds; None for a stream, which was not read to its end.
    """

    ids: Tensor
    source: str
    fingerprint: str
    tokens_available: int | None

    @property
    def samples(self) -> int:
        """Number of blocks."""
        return int(self.ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """Tokens per block."""
        return int(self.ids.shape[1])


def pack(
    documents: Documents,
    spec: TextSpec,
    tokenizer: Any,
    *,
    sequence_length: int,
    part: Part,
    reporter: Reporter,
) -> TokenBlocks:
    """Tokenise `documents` and choose `spec.samples` blocks of `sequence_length` tokens.

    A source read whole has its blocks chosen by seed without replacement, kept in the order of the text. A
    streamed source, whose order is already drawn from the seed, gives its first blocks.

    Raises:
        EmptyText: No document, or none that gives a token.
        TooFewTokens: Fewer whole blocks than asked for.
    """
    start = _start_of_text(tokenizer)
    payload = sequence_length - len(start)
    if payload < 1:
        raise CalibrationError(
            f"sequence_length {sequence_length} leaves no room after the beginning-of-sequence token",
            where=documents.description,
            hint="Set a longer sequence_length.",
        )
    if documents.streamed and spec.samples is None:
        raise CalibrationError("samples must be a number for a stream", where=documents.description)
    wanted = None if spec.samples is None else spec.samples * payload
    row = _tokens(documents, tokenizer, wanted if documents.streamed else None, reporter)
    blocks = len(row) // payload
    if not row:
        raise EmptyText("no text in it", where=documents.description, hint="Name a source that holds text.")
    if blocks < (spec.samples or 1):
        raise _too_few(documents, spec, part, len(row), payload, sequence_length)
    chosen = torch.arange(blocks)
    if spec.samples is not None and not documents.streamed:
        generator = torch.Generator().manual_seed(derive(spec.seed, "blocks", part))
        chosen = torch.randperm(blocks, generator=generator)[: spec.samples].sort().values
    elif spec.samples is not None:
        chosen = chosen[: spec.samples]
    body = torch.tensor(row[: blocks * payload], dtype=torch.int64).reshape(blocks, payload)[chosen]
    head = torch.tensor(start, dtype=torch.int64).expand(len(chosen), len(start))
    ids = torch.cat([head, body], dim=1).contiguous()  # [samples, sequence_length]
    return TokenBlocks(
        ids=ids,
        source=documents.description,
        fingerprint=fingerprint(ids),
        tokens_available=None if documents.streamed else len(row),
    )


def fingerprint(ids: Tensor) -> str:
    """Return the SHA-256 of shape and values of `ids: [samples, sequence_length]`, equal on every machine."""
    digest = hashlib.sha256("x".join(map(str, ids.shape)).encode())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _start_of_text(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text: the beginning-of-sequence token, or nothing."""
    with_special = tokenizer("text", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and with_special and with_special[0] == bos else []


def _tokens(documents: Documents, tokenizer: Any, enough: int | None, reporter: Reporter) -> list[int]:
    """Return one row of tokens, stopping once `enough` are there."""
    eos = tokenizer.eos_token_id
    between = [eos] if eos is not None else _encode(tokenizer, ["\n\n"])[0]
    task = "tokenise text"
    reporter.start(task, enough, "tokens")
    row: list[int] = []
    try:
        for batch in _batches(iter(documents.texts)):
            before = len(row)
            for ids in _encode(tokenizer, batch):
                if ids and row:
                    row.extend(between)
                row.extend(ids)
            reporter.advance(task, len(row) - before)
            if enough is not None and len(row) >= enough:
                break
    finally:
        reporter.finish(task)
    return row


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        yield batch


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _too_few(
    documents: Documents, spec: TextSpec, part: Part, tokens: int, payload: int, sequence_length: int
) -> TooFewTokens:
    samples = spec.samples or 1
    blocks = tokens // payload
    prefix = "--set calibration." if part == "calibration" else ""
    possible = tokens // samples + sequence_length - payload
    choices = [f"{prefix}samples={blocks}"] if blocks else []
    choices += [f"{prefix}sequence_length={possible}"] if possible >= _SHORTEST else []
    return TooFewTokens(
        f"{tokens:,} tokens = {blocks:,} blocks of {payload:,}, need {samples:,} blocks = {samples * payload:,} tokens",
        where=documents.description,
        hint=f"Use {' or '.join([*choices, 'a source with more text'])}.",
    )
