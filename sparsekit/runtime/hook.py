"""After `import sparsekit`, plain `from_pretrained` reads packed checkpoints.

transformers is not imported for that: it costs seconds, and `sparsekit --help` needs none of it. Instead the module
that holds transformers' table of quantisation methods is watched, and sparsekit enters itself when it is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from sparsekit.runtime import versions

_refused: list[str] = []
_WATCHED = "transformers.quantizers.auto"


class _Watcher:
    """A finder that finds nothing itself; it puts a step behind the loading of one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with transformers now if it is loaded, else when it is. May be called again."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    found = str(sys.modules["transformers"].__version__)
    if versions.supported(found):
        importlib.import_module("sparsekit.runtime.quantizer")  # registers at its end
    elif not _refused:
        _refused.append(found)
        with contextlib.suppress(ImportError, AttributeError):
            versions.refuse(found)
