"""The dense model that a checkpoint is measured against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsekit import fs
from sparsekit.checkpoint.manifest import FILE, read_manifest
from sparsekit.errors import ModelError, UsageError
from sparsekit.models.source import ModelSource

_REPORT = "report.json"


def find_baseline(ours: ModelSource, given: str | None) -> str:
    """Return the baseline: the given one, or the model that the checkpoint was made from.

    That one is taken only if it is a folder on this disk whose configuration is the recorded one.

    Raises:
        UsageError: None is given, and none is found.
    """
    if given is not None:
        return given
    name = _recorded_name(ours.folder)
    if name is None:
        raise UsageError(
            "it is not recorded what this checkpoint was made from",
            where=ours.name,
            hint="Name the dense model: --baseline MODEL",
        )
    if _is_recorded(Path(name), ours.folder):
        return name
    raise UsageError(
        f"the checkpoint was made from {name}, which is not here, or not as it was then",
        where=ours.name,
        hint="Name the dense model: --baseline MODEL",
    )


def require_same_vocabulary(ours: ModelSource, baseline: ModelSource) -> None:
    """Refuse a baseline that cannot read the same prompt.

    Raises:
        ModelError: With both sizes.
    """
    sizes = [source.config.get_text_config().vocab_size for source in (ours, baseline)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"its vocabulary has {sizes[1]:,} tokens, that of {ours.name} {sizes[0]:,}: not the model it was made from",
            where=baseline.name,
            hint="Give the dense model that was pruned as --baseline.",
        )


def _recorded_name(folder: Path) -> str | None:
    """Return what the report calls the source model."""
    try:
        report: Any = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        name = report["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a plain model folder has no report
    return name if isinstance(name, str) and name else None


def _is_recorded(candidate: Path, folder: Path) -> bool:
    config = candidate / "config.json"
    if not config.is_file() or not (folder / FILE).is_file():
        return False
    base: Any = read_manifest(folder).raw.get("base")
    files = base.get("files") if isinstance(base, dict) else None
    return isinstance(files, dict) and files.get("config.json") == fs.sha256_file(config).sha256
