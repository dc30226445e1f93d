"""What is asked of a text source, and what it hands out: documents, not yet tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sparsekit.errors import CalibrationError

Part = Literal["calibration", "held_out"]
"""Which text of a source: the one statistics are taken from, or the one quality is measured on."""

SHUFFLE_BUFFER = 1000
"""Documents held at once while a stream is shuffled."""


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how much of it.

    Attributes:
        source: `builtin`, `stdlib` (source code), a local file or glob, a shorthand (`c4`, `wikitext2`, `pile`) or a
            Hub data set id.
        config: Configuration of a Hub data set.
        split: Split of a Hub data set; None chooses by part.
        field: Name of the text in each record; None means `text`.
        samples: Number of blocks; None takes every whole block of a source that is not streamed.
        sequence_length: Tokens per block; None means min(2048, the model's maximum).
        seed: Chooses the blocks, or the order of a streamed source.
    """

    source: str = "builtin"
    config: str | None = None
    split: str | None = None
    field: str | None = None
    samples: int | None = 128
    sequence_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise CalibrationError(f"samples must be at least 1, got {self.samples}", where=self.source)
        if self.sequence_length is not None and self.sequence_length < 1:
            raise CalibrationError(f"sequence_length must be at least 1, got {self.sequence_length}", where=self.source)


@dataclass(frozen=True)
class Documents:
    """The documents of one source.

    Attributes:
        texts: Non-blank documents, in the order they are to be used.
        description: Source, configuration, split, field and part, for people.
        streamed: True if the end may be far away: the order is already seeded, only the beginning is read.
    """

    texts: Iterable[str]
    description: str
    streamed: bool = False


def offline_alternatives(part: Part) -> str:
    """Return the sentence that names the sources which need no network."""
    if part == "calibration":
        return (
            "Offline, use --set calibration.source=builtin (it is small: add --set calibration.samples=32 "
            "--set calibration.sequence_length=512), or a file: --set calibration.source=text.jsonl"
        )
    return "Offline, use the source 'builtin', or a file such as text.jsonl."


def shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Yield `texts` in an order drawn from `seed`, holding at most SHUFFLE_BUFFER of them."""
    order = random.Random(seed)  # noqa: S311 - an order, not a secret
    held: list[str] = []
    for text in texts:
        if len(held) < SHUFFLE_BUFFER:
            held.append(text)
            continue
        place = order.randrange(SHUFFLE_BUFFER)
        held[place], text = text, held[place]
        yield text
    order.shuffle(held)
    yield from held
