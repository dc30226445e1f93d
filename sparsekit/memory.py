"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


def release_freed() -> None:
    """Return freed memory to the system, where the C library can (glibc); elsewhere do nothing.

    What is freed between pieces that stay in use is kept by the C library, and grows to more than all that is in use:
    imports, tokenizers and activations come and go in all sizes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        found: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of that kind
        return None
    return found
