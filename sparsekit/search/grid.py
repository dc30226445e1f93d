"""Levels of linears: every step moves the same number of weights, so any exchange of steps keeps the budget exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsekit.budget import distribute
from sparsekit.contracts import LinearInfo


@dataclass(frozen=True)
class Grid:
    """The levels that each linear can have.

    A level is the number of steps that a linear keeps more (or, negative, fewer) than at uniform sparsity; the levels
    of all linears sum to 0.

    Attributes:
        step: Weights between two levels, the same for all linears.
        uniform: Kept weights at level 0, per name.
        lowest, highest: First and last level per name, so that between none and all of the weights are kept.
    """

    step: int
    uniform: Mapping[str, int]
    lowest: Mapping[str, int]
    highest: Mapping[str, int]

    @property
    def rigid(self) -> bool:
        """Whether no two linears can exchange a step: uniform is all there is."""
        givers = {name for name, level in self.lowest.items() if level < 0}
        takers = {name for name, level in self.highest.items() if level > 0}
        return not givers or not takers or (givers == takers and len(givers) == 1)

    def levels(self, name: str) -> range:
        """Return the levels of a linear, densest first."""
        return range(self.highest[name], self.lowest[name] - 1, -1)

    def count(self, name: str, level: int) -> int:
        """Return the kept weights of a linear at a level."""
        return self.uniform[name] + level * self.step

    def counts(self, levels: Mapping[str, int]) -> dict[str, int]:
        """Return the kept weights of all linears."""
        return {name: self.count(name, level) for name, level in levels.items()}

    def nearest(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the levels next to counts that spend the same budget; what rounding loses goes where it fits best."""
        exact = {name: (counts[name] - self.uniform[name]) / self.step for name in self.uniform}
        levels = {name: min(max(round(level), self.lowest[name]), self.highest[name]) for name, level in exact.items()}
        while excess := sum(levels.values()):
            sign = 1 if excess > 0 else -1
            movable = [n for n in levels if self.lowest[n] <= levels[n] - sign <= self.highest[n]]
            chosen = max(movable, key=lambda name: (sign * (levels[name] - exact[name]), name))
            levels[chosen] -= sign
        return levels


def make_grid(linears: Sequence[LinearInfo], budget: int, unit: int, *, levels: int, span: float) -> Grid:
    """Return the grid around uniform sparsity.

    Source: Sieberling et al. 2024, "EvoPress", arXiv 2410.14649: every step moves as many weights as a `levels`-th of
    `span` x min(s, 1 - s) of a hidden x hidden matrix.

    Args:
        linears: All that share the budget.
        budget: Kept weights in all.
        unit: Weights that are kept or removed together.
        levels: Steps on each side of uniform; levels below no weight or above all weights do not exist.
        span: Reach of each side.

    """
    same = dict.fromkeys((linear.name for linear in linears), 1.0)
    uniform = distribute(linears, same, budget, unit)
    density = budget / sum(linear.numel for linear in linears)
    hidden = min(max(linear.out_features, linear.in_features) for linear in linears)
    step = max(round(span * min(density, 1 - density) * hidden**2 / levels / unit), 1) * unit
    lowest = {name: -min(levels, count // step) for name, count in uniform.items()}
    highest = {each.name: min(levels, (each.numel - uniform[each.name]) // step) for each in linears}
    return Grid(step, uniform, lowest, highest)
