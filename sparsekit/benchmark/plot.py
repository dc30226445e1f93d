"""A picture of a benchmark: speed, memory and disk as bars."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from sparsekit import fs
from sparsekit.benchmark.result import METRICS, Benchmark, Metric
from sparsekit.errors import MissingExtra, UsageError

_KINDS = (".png", ".svg")
_PANELS = {
    "decode_tokens_per_second": "Decode",
    "prefill_tokens_per_second": "Prefill",
    "resident_bytes": "Resident memory",
    "disk_bytes": "Weights on disk",
}
_STYLES = {
    "packed": ("sparsekit", "#2a6f97"),
    "streaming": ("tuned dense", "#a9b4bd"),
    "torch": ("torch eager", "#cfd5da"),
}
_INK, _FAINT = "#1f2a33", "#5c6770"


def require(path: Path) -> None:
    """Refuse early what cannot be drawn.

    Raises:
        UsageError: Another kind of file, or no such folder.
        MissingExtra: matplotlib is not installed.
    """
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"--plot {path}: need a name that ends with {' or '.join(_KINDS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder", hint="Make it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("drawing needs matplotlib", hint="Install it: pip install 'sparsekit[report]'")


def draw(found: Benchmark, path: Path) -> None:
    """Write the picture.

    Raises:
        UsageError, MissingExtra: As `require`.
        ResourceError: The file cannot be written.
    """
    require(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    metrics = [metric for metric in METRICS if metric.key in _PANELS]
    with rc_context({"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "sparsekit", "text.color": _INK}):
        engine = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, hspace=0.06, wspace=0.06)
        figure = Figure(figsize=(9, 4.4), layout=engine)
        axes = figure.subplots(2, 2)
        for axis, metric in zip(axes.flat, metrics, strict=True):
            _bars(axis, found, metric)
        figure.suptitle(_title(found), fontsize=11, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=path.suffix[1:].lower(), dpi=160, metadata={"Date": None} if _is_svg(path) else None
        )
    fs.replace_file(path, buffer.getvalue())


def _is_svg(path: Path) -> bool:
    return path.suffix.lower() == ".svg"


def _title(found: Benchmark) -> str:
    settings, machine = found.settings, found.machine
    where = ", ".join(
        str(text) for text in (machine["processor"], f"{settings['threads']} threads", machine["isa"]) if text
    )
    return f"{Path(found.model).name} beside {Path(found.baseline).name}, batch 1\n{where}"


def _bars(axis: Any, found: Benchmark, metric: Metric) -> None:
    """Draw one panel: a bar per contender, its value and how it compares written beside it."""
    contenders = found.contenders
    names = [_STYLES[contender.name][0] for contender in contenders]
    if not found.ours.runtime.packed:
        names[0] = "this model"
    values = [metric.of(contender) or 0.0 for contender in contenders]
    places = range(len(contenders))
    axis.barh(places, values, height=0.66, color=[_STYLES[c.name][1] for c in contenders])
    for place, contender, value in zip(places, contenders, values, strict=True):
        quotient = None if place == 0 else found.quotient(metric, contender)
        text = metric.text(value)
        if quotient is not None:
            text += f"   ({names[0]} {metric.quotient_text(quotient)})"
        axis.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", color=_INK, fontsize=9)
    unit = {"speed": "tokens/s, more is better", "bytes": "less is better", "seconds": "less is better"}[metric.kind]
    axis.set_title(_PANELS[metric.key], loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    axis.set_title(unit, loc="right", fontsize=8.5, color=_FAINT)
    axis.set_yticks(places, names, color=_INK)
    axis.set_xlim(0, 1.8 * max(values, default=1.0) or 1.0)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color("#b8c0c7")
