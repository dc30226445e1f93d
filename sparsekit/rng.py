"""One integer seed for a run; every consumer derives its own stream from it by name.

Deriving from names, not from call order, keeps each random draw independent of what else a run does.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str) -> int:
    """Return a 63-bit seed for the stream called `names`, stable across processes and versions."""
    digest = hashlib.sha256("\x00".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
