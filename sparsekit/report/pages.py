"""The pages a run leaves beside the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.report.card import README, model_card
from sparsekit.report.page import html_page


def pages(report: Mapping[str, Any], source_folder: Path) -> dict[str, bytes]:
    """Return file name -> content of report.json, report.html and the model card.

    Args:
        report: Content of report.json.
        source_folder: Folder of the source model, whose card is kept and extended.
    """
    strict = _strict(report)
    return {
        "report.json": (json.dumps(strict, indent=2, allow_nan=False) + "\n").encode(),
        "report.html": html_page(strict).encode(),
        README: model_card(strict, source_folder).encode(),
    }


def _strict(value: Any) -> Any:
    """Return the value with infinity and NaN as text, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
