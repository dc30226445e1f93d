"""Source code that needs no network and no file: the modules of the standard library of this Python.

The modules are divided by a hash of their name, as the topics of `builtin` are.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from sparsekit.data.builtin import part_of
from sparsekit.data.documents import Documents, Part
from sparsekit.errors import EmptyText


def documents(part: Part) -> Documents:
    """Return one document per module of `part`, in the order of their names.

    Raises:
        EmptyText: This Python comes without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.glob("*.py")) if part_of(path.stem) == part]
    texts = tuple(text for path in files if (text := path.read_text(encoding="utf-8", errors="replace")).strip())
    if not texts:
        raise EmptyText("this Python comes without the sources of its standard library", where="stdlib")
    label = part.replace("_", "-")
    return Documents(texts, f"stdlib (sources of Python {platform.python_version()}), {label} part")
