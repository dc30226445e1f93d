"""Charts as plain geometry: numbers and texts that the page's template turns into SVG, escaping every text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekit.report.summary import Group, LinearResult, Summary
from sparsekit.report.text import number

WIDTH = 960
"""Of every chart, in SVG units."""

LINE_LEFT = 64
"""Room for the numbers of an axis."""
RIGHT = 14
"""Margin."""
LINE_HEIGHT = 190
"""Of the part of a line chart that holds the line."""

_LEFT = 190  # room for the names of linears
_LABELS = 24  # height of the block numbers below
_TITLES = {
    "sparsity": "Sparsity",
    "weight_error": "Weight error",
    "output_error": "Output error",
}
MEASURES = tuple(_TITLES)


@dataclass(frozen=True)
class Mark:
    """A text at a place."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heat map; `strength` between 0 and 1 is how much of the colour shows."""

    x: float
    y: float
    width: float
    height: float
    strength: float
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Kinds of linears against blocks."""

    measure: str
    title: str
    height: float
    cells: tuple[Cell, ...]
    rows: tuple[Mark, ...]
    columns: tuple[Mark, ...]
    low: str
    high: str
    remark: str


@dataclass(frozen=True)
class LineChart:
    """A quantity against blocks, or generations of a search.

    Attributes:
        title: What is drawn.
        height: In SVG units.
        line, points: The values, as points of a polyline and each with its words.
        ticks, columns: Numbers of the axes.
        band: Range of what a value is the mean of, as a polygon; empty where it is one number.
        marks: What the values are compared with, as short lines; empty without any.
    """

    title: str
    height: float
    line: str
    points: tuple[Cell, ...]
    ticks: tuple[Mark, ...]
    columns: tuple[Mark, ...]
    band: str = ""
    marks: tuple[Cell, ...] = ()


def heat_map(summary: Summary, measure: str) -> HeatMap | None:
    """Return the heat map of `sparsity`, `weight_error` or `output_error`; None if it is not known."""
    blocks, kinds = list(summary.by_block()), list(summary.by_kind())
    groups = _cells(summary.linears)
    values = {place: value for place, group in groups.items() if (value := group.mean(measure)) is not None}
    if not values:
        return None
    low, high = min(values.values()), max(values.values())
    remark = ""
    if measure == "sparsity" and high - low < 0.0005:
        remark = f"{number(low)} everywhere"
        low, high = 0.0, 1.0  # nothing to tell apart: show it on the whole scale
    step = (WIDTH - _LEFT - RIGHT) / len(blocks)
    row = 26.0 if len(kinds) <= 16 else 18.0
    cells = []
    for (block, kind), value in values.items():
        x, y = _LEFT + step * blocks.index(block), row * kinds.index(kind)
        gap = 1.5 if step > 8 else 0.3
        cells.append(
            Cell(
                round(x, 2),
                round(y, 2),
                round(step - gap, 2),
                row - 1.5,
                _strength(value, low, high),
                _tooltip(groups[block, kind], block, kind, measure),
            )
        )
    height = row * len(kinds)
    return HeatMap(
        measure,
        _TITLES[measure],
        height + _LABELS,
        tuple(cells),
        tuple(Mark(_LEFT - 8, row * (i + 0.5) + 4, _fit(kind)) for i, kind in enumerate(kinds)),
        _block_marks(blocks, step, _LEFT, height + 16),
        number(low),
        number(high),
        remark,
    )


def line_chart(summary: Summary, measure: str) -> LineChart | None:
    """Return mean and range of a measure per block; None if it is not known."""
    known = [
        (block, mean, limits)
        for block, group in summary.by_block().items()
        if (mean := group.mean(measure)) is not None and (limits := group.range(measure)) is not None
    ]
    return block_chart(_TITLES[measure], known) if known else None


def block_chart(
    title: str,
    known: Sequence[tuple[int, float, tuple[float, float]]],
    marks: Sequence[float] = (),
    marked: str = "",
) -> LineChart:
    """Return the chart of (block, mean, (least, greatest)).

    Args:
        title: What it shows.
        known: One entry for each block that has a value.
        marks: For each of them, what its mean is compared with.
        marked: What the marks are.
    """
    ticks = axis(max([*(limits[1] for _, _, limits in known), *marks]))
    step = (WIDTH - LINE_LEFT - RIGHT) / len(known)
    xs = [LINE_LEFT + step * (i + 0.5) for i in range(len(known))]

    def y(value: float) -> float:
        return round(10 + LINE_HEIGHT * (1 - value / ticks[-1]), 2)

    upper = [f"{x:.1f},{y(limits[1])}" for x, (_, _, limits) in zip(xs, known, strict=True)]
    lower = [f"{x:.1f},{y(limits[0])}" for x, (_, _, limits) in zip(xs, known, strict=True)]
    points = [
        Cell(round(x, 1), y(mean), 0, 0, 1, f"block {block}: mean {number(mean)}, {number(low)} to {number(high)}")
        for x, (block, mean, (low, high)) in zip(xs, known, strict=True)
    ]
    half = min(step / 2 - 1, 14.0)
    return LineChart(
        title,
        LINE_HEIGHT + 10 + _LABELS,
        " ".join(f"{point.x},{point.y}" for point in points),
        tuple(points),
        tuple(Mark(LINE_LEFT, y(tick), f"{tick:g}") for tick in ticks),
        _block_marks([block for block, _, _ in known], step, LINE_LEFT, LINE_HEIGHT + 28),
        band=" ".join([*upper, *reversed(lower)]),
        marks=tuple(
            Cell(round(x - half, 1), y(mark), round(2 * half, 1), 0, 1, f"block {block}: {marked} {number(mark)}")
            for x, mark, (block, _, _) in zip(xs, marks, known, strict=False)  # none, or one each
        ),
    )


def axis(highest: float) -> list[float]:
    """Return about five round numbers from 0 to at least `highest`."""
    if highest <= 1e-12 or not math.isfinite(highest):  # below what the ticks are rounded to
        return [0.0, 1.0]
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [round(step * i, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _cells(linears: Sequence[LinearResult]) -> dict[tuple[int, str], Group]:
    places: dict[tuple[int, str], list[LinearResult]] = {}
    for linear in linears:
        places.setdefault((linear.block, linear.kind), []).append(linear)
    return {place: Group(tuple(members)) for place, members in places.items()}


def _strength(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return round(0.08 + 0.92 * share, 3)  # the least is still visible


def _tooltip(group: Group, block: int, kind: str, measure: str) -> str:
    mean, limits = group.mean(measure), group.range(measure)
    text = f"block {block}, {kind}: {_TITLES[measure].lower()} {number(mean)}"
    if len(group.linears) > 1 and limits is not None:
        text += f" (mean of {len(group.linears)}, {number(limits[0])} to {number(limits[1])})"
    return text


def _block_marks(blocks: Sequence[int], step: float, left: float, y: float) -> tuple[Mark, ...]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= 22 or n == 1000)
    return tuple(
        Mark(round(left + step * (i + 0.5), 1), y, str(block)) for i, block in enumerate(blocks) if block % every == 0
    )


def _fit(name: str) -> str:
    """Return the name, its beginning left out where it is too long for its place."""
    return name if len(name) <= 27 else f"…{name[-26:]}"
