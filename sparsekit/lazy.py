"""torch, imported on first use.

`--help`, `recipes` and `verify` read method files and schemas but compute nothing; importing torch costs them
seconds. Modules that compute therefore write `from sparsekit.lazy import torch`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING


def _lazy(name: str) -> ModuleType:
    """Return module `name`, loaded when an attribute of it is first read."""
    if name in sys.modules:
        return sys.modules[name]

    class _Deferred(ModuleType):
        def __getattr__(self, attribute: str) -> object:
            return getattr(importlib.import_module(name), attribute)

    return _Deferred(name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _lazy("torch")

__all__ = ["torch"]
