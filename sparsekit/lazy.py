"""torch, imported on first use, and only where it fits.

`--help`, `recipes` and `verify` read method files and schemas but compute nothing; importing torch costs them
seconds. Modules that compute therefore write `from sparsekit.lazy import torch`.
"""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sparsekit.errors import OutOfMemory

LIBRARIES_BYTES = 5 << 28
"""Address space that torch and transformers take."""


def _lazy(name: str) -> ModuleType:
    """Return module `name`, loaded when an attribute of it is first read."""
    if name in sys.modules:
        return sys.modules[name]

    class _Deferred(ModuleType):
        def __getattr__(self, attribute: str) -> object:
            return getattr(importlib.import_module(name), attribute)

    return _Deferred(name)


def require_address_space() -> None:
    """Refuse a `ulimit -v` that torch and transformers cannot be imported under.

    They would fail in ways that nobody can tell from a broken installation, or never come back.

    Raises:
        OutOfMemory: with limit and need.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = Path("/proc/self/statm")
    if soft == resource.RLIM_INFINITY or "torch" in sys.modules or not sizes.exists():
        return
    left = soft - int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    if left < LIBRARIES_BYTES:
        raise OutOfMemory(
            f"the limit on address space leaves {max(0, left) / 2**30:.2f} GiB, "
            f"torch and transformers need about {LIBRARIES_BYTES / 2**30:.2f} GiB",
            hint="Raise it: ulimit -v unlimited",
        )


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _lazy("torch")

__all__ = ["require_address_space", "torch"]
