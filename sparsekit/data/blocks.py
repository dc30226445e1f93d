"""From a text specification to blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsekit.data import builtin, files, hub, stdlib
from sparsekit.data.documents import Documents, Part, TextSpec
from sparsekit.data.own_text import SOURCE as OWN_TEXT
from sparsekit.data.packing import TokenBlocks, pack
from sparsekit.errors import CalibrationError
from sparsekit.progress import Reporter, Silent

DEFAULT_SEQUENCE_LENGTH = 2048
"""Tokens per block unless asked otherwise; a configuration's maximum is often 131,072 and never meant."""

_OWN_SOURCES: dict[str, Callable[[Part], Documents]] = {"builtin": builtin.documents, "stdlib": stdlib.documents}
_NO_MAXIMUM = 2**31
"""Tokenizers without a maximum say 1e30."""


def load_blocks(
    spec: TextSpec, tokenizer: Any, *, model_max_length: int, part: Part, reporter: Reporter | None = None
) -> TokenBlocks:
    """Return the blocks of tokens that `spec` describes.

    Args:
        spec: Which text and how much of it.
        tokenizer: A transformers tokenizer.
        model_max_length: Longest sequence the model takes, in tokens; huge values mean that none is known.
        part: `calibration` or `held_out`: chooses the part of `builtin` or `stdlib` and the default split of a Hub data
            set. Local files have no parts.
        reporter: Receives progress.

    Raises:
        CalibrationError: A specification that contradicts the source or the model.
        SourceUnavailable: A source that does not exist or cannot be reached.
        EmptyText: A source without text.
        TooFewTokens: A source with too little text.
    """
    reporter = reporter or Silent()
    length = _sequence_length(spec, model_max_length)
    documents = _documents(spec, part, reporter)
    return pack(documents, spec, tokenizer, sequence_length=length, part=part, reporter=reporter)


def _sequence_length(spec: TextSpec, model_max_length: int) -> int:
    known = 0 < model_max_length < _NO_MAXIMUM
    if spec.sequence_length is None:
        return min(DEFAULT_SEQUENCE_LENGTH, model_max_length) if known else DEFAULT_SEQUENCE_LENGTH
    if known and spec.sequence_length > model_max_length:
        raise CalibrationError(
            f"sequence_length {spec.sequence_length:,} exceeds the model's maximum {model_max_length:,}",
            where=spec.source,
            hint=f"Set sequence_length={model_max_length} or less.",
        )
    return spec.sequence_length


def _documents(spec: TextSpec, part: Part, reporter: Reporter) -> Documents:
    if spec.source == OWN_TEXT:
        raise CalibrationError(
            "text that the model writes itself serves for calibration only",
            where=OWN_TEXT,
            hint="Measure on another source, such as builtin.",
        )
    if own := _OWN_SOURCES.get(spec.source):
        if spec.config or spec.split or spec.field:
            raise CalibrationError(
                f"config, split and field choose within a Hub data set or file; {spec.source} has none",
                where=spec.source,
                hint="Remove them.",
            )
        return own(part)
    if spec.source not in hub.SHORTHANDS and files.looks_like_path(spec.source):
        return files.documents(spec, part)
    return hub.documents(spec, part, reporter)
