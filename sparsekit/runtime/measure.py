"""Timing kernels side by side: contenders stream rotated copies of their weights and take turns.

On a machine that others use too, only ratios of medians of interleaved rounds mean anything. Copies that together
exceed the last-level cache make every call read its weight from memory, as the layers of a model do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparsekit.runtime import native


@dataclass
class Contender:
    """Something that multiplies.

    Attributes:
        name: What it is called in tables.
        run: `run(i)` uses copy number i.
        copies: Number of copies.
        nbytes: Bytes that one call reads.
        hold: What the calls point to and nothing else keeps.
        seconds: Of one call, in each round.
    """

    name: str
    run: Callable[[int], object]
    copies: int
    nbytes: int
    hold: object
    seconds: list[float] = field(default_factory=list)

    def round(self) -> None:
        """Go through all copies once and note the time of one call."""
        start = time.perf_counter()
        for i in range(self.copies):
            self.run(i)
        self.seconds.append((time.perf_counter() - start) / self.copies)

    @property
    def median(self) -> float:
        """Median seconds of a call, without the first round."""
        return statistics.median(self.seconds[1:])


def replicate(buffer: Tensor, total: int, most: int = 1 << 16) -> list[Tensor]:
    """Return copies of a u8 buffer that together reach `total` bytes, each on huge pages; at most `most` of them."""
    copies = []
    for _ in range(min(-(-total // max(buffer.numel(), 1)), most)):
        copy = native.allocate(buffer.numel())
        copies.append(copy.copy_(buffer))
    return copies


def interleave(contenders: Sequence[Contender], rounds: int) -> None:
    """Let contenders take turns for `rounds` rounds, after one that does not count."""
    for _ in range(rounds + 1):
        for contender in contenders:
            contender.round()
