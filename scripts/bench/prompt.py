"""Token ids for models with random weights, the same in every Python that measures one."""

from __future__ import annotations

VOCABULARY = 32000


def prompt(count: int) -> list[int]:
    """Return `count` different ids spread over the vocabulary."""
    return [(7919 * i + 1) % VOCABULARY for i in range(count)]
