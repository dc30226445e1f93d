"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_SMALL = 1 << 20
"""Bytes up to which a parameter is copied out of the mapped file it was read from."""


def release_freed() -> None:
    """Return freed memory to the system, where the C library can (glibc); elsewhere do nothing.

    What is freed between pieces that stay in use is kept by the C library, and grows to more than all that is in use:
    imports, tokenizers and activations come and go in all sizes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def leave_files(model: nn.Module) -> None:
    """Copy small parameters of a model on the CPU out of the files they are mapped from.

    Each would otherwise keep the whole mapped file, with all that nobody needs any more, in memory.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.nbytes <= _SMALL:
            parameter.data = parameter.data.clone()


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        found: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of that kind
        return None
    return found
