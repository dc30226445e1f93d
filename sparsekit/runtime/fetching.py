"""The file of gates of a checkpoint on the Hub, which transformers does not fetch with the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from sparsekit.checkpoint.source import SIDECAR
from sparsekit.models.gate_files import require_gates

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_gates(said: object, weights: Path, config: Any) -> Path:
    """Return the folder that holds the gates of a checkpoint, and its weights; fetch them from the Hub if need be.

    Args:
        said: What the `quantization_config` says of them.
        weights: A weight file that transformers has found: in a folder, or in its cache of the Hub.
        config: The model's configuration.

    Raises:
        CheckpointError: They are not there and cannot be fetched, or are not those that config.json means.
    """
    folder = weights.parent
    snapshot = next((place for place in weights.parents if _is_snapshot(place)), None)
    if snapshot is not None and not (folder / SIDECAR).is_file():
        cached_file(
            str(config._name_or_path),
            SIDECAR,
            revision=snapshot.name,
            cache_dir=snapshot.parents[2],
            subfolder="" if folder == snapshot else folder.relative_to(snapshot).as_posix(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    require_gates(said, folder)
    return folder


def _is_snapshot(folder: Path) -> bool:
    """Tell a commit's folder in the cache of the Hub, CACHE/models--OWNER--NAME/snapshots/COMMIT."""
    return (
        _COMMIT.fullmatch(folder.name) is not None
        and folder.parent.name == "snapshots"
        and folder.parents[1].name.startswith("models--")
    )
