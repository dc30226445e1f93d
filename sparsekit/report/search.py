"""What a search over layers found: fitness over generations, and that of what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparsekit.report.charts import LINE_HEIGHT, LINE_LEFT, RIGHT, WIDTH, Cell, LineChart, Mark, axis
from sparsekit.report.text import number
from sparsekit.search.verdict import verdict

_MARKS = 8  # numbers below the curve, at most


@dataclass(frozen=True)
class SearchPanel:
    """A search, ready to be drawn.

    Attributes:
        name: The allocator.
        header, rows: Fitness of its result and of every null, and how far each is below one of them.
        verdict: What that means, in a sentence.
        chart: Best fitness by generation, which falls in steps, with a point for each generation that improved.
    """

    name: str
    header: list[str]
    rows: list[list[str]]
    verdict: str
    chart: LineChart


def search_panels(report: Mapping[str, Any]) -> list[SearchPanel]:
    """Return a panel for every stage that searched."""
    return [
        *(
            _panel(_searched(change), change["facts"], "random_search", change["method"])
            for change in report.get("reshapes", ())
            if "fitness_by_generation" in change["facts"]
        ),
        *(
            _panel(stage["allocate"], stage["allocation"], "uniform", "allocation")
            for stage in report["stages"]
            if "fitness_by_generation" in stage["allocation"]
        ),
    ]


def _searched(change: Mapping[str, Any]) -> str:
    """Return what a reshape stage's search is called: as its method, or after the search that the method uses."""
    return change["method"] if change["method"] in change["facts"]["fitness"] else "evopress"


def _panel(name: str, facts: Mapping[str, Mapping[str, float]], null: str, what: str) -> SearchPanel:
    """Return the panel of search `name` with what its results are below `null`, for a table of `what`."""
    found = {key: float(value) for key, value in facts["fitness"].items()}
    history = sorted((int(key), float(value)) for key, value in facts["fitness_by_generation"].items())
    base = found.get(null)
    rows = [
        [key.replace("_", " "), number(value), f"{1 - value / base:+.1%}" if base else ""]
        for key, value in sorted(found.items(), key=lambda item: item[1])
    ]
    last = max(int(facts.get("generations", {}).get("all", 0)), history[-1][0], 1)
    top = axis(history[0][1])

    def x(generation: float) -> float:
        return round(LINE_LEFT + (WIDTH - LINE_LEFT - RIGHT) * generation / last, 1)

    def y(value: float) -> float:
        return round(10 + LINE_HEIGHT * (1 - value / top[-1]), 2)

    steps = [f"{x(history[0][0])},{y(history[0][1])}"]
    for (_, before), (generation, value) in pairwise(history):
        steps += [f"{x(generation)},{y(before)}", f"{x(generation)},{y(value)}"]
    steps.append(f"{x(last)},{y(history[-1][1])}")
    every = max(-(-last // _MARKS), 1)
    return SearchPanel(
        name,
        [what.replace("_", " "), "fitness", f"below {null.replace('_', ' ')}"],
        rows,
        verdict(name, found),
        LineChart(
            "Best fitness by generation",
            LINE_HEIGHT + 34,
            " ".join(steps),
            tuple(Cell(x(g), y(value), 0, 0, 1, f"generation {g}: {number(value)}") for g, value in history),
            tuple(Mark(LINE_LEFT, y(tick), f"{tick:g}") for tick in top),
            tuple(Mark(x(generation), LINE_HEIGHT + 28, str(generation)) for generation in range(0, last + 1, every)),
        ),
    )
