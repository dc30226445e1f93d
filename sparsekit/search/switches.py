"""Neighbours of a choice of levels: switches that give one linear a step and take it from another."""

from __future__ import annotations

from random import Random

from sparsekit.search.grid import Grid

Levels = tuple[int, ...]
"""One level per linear, in the order of the model; they sum to 0."""


class Switches:
    """Mutation of levels within a grid; the sum never changes.

    Source: Sieberling et al. 2024, "EvoPress", arXiv 2410.14649, section 3: min(U{1..most}, U{1..most}) switches. A
    linear never exchanges with itself, which the published code allows.
    """

    def __init__(self, grid: Grid, names: tuple[str, ...], most: int = 3) -> None:
        """Take the linears of a grid in the order of `names`."""
        self._lowest = [grid.lowest[name] for name in names]
        self._highest = [grid.highest[name] for name in names]
        self._most = most

    def mutate(self, levels: Levels, random: Random) -> Levels:
        """Return a neighbour, different from `levels`."""
        while True:
            changed = list(levels)
            for _ in range(min(random.randint(1, self._most), random.randint(1, self._most))):
                self._switch(changed, random)
            if tuple(changed) != levels:  # two switches may undo each other
                return tuple(changed)

    def draw(self, random: Random) -> Levels:
        """Return levels far from uniform: a walk of switches long enough to forget where it began."""
        levels = [0] * len(self._lowest)
        for _ in range(20 * len(levels)):
            self._switch(levels, random)
        return tuple(levels)

    def _switch(self, levels: list[int], random: Random) -> None:
        """Move one step from a linear to another one, each chosen among those that can."""
        givers = [place for place, level in enumerate(levels) if level > self._lowest[place]]
        takers = [place for place, level in enumerate(levels) if level < self._highest[place]]
        while True:  # the grid is not rigid, so there is such a pair at uniform, and a switch can be undone
            giver, taker = random.choice(givers), random.choice(takers)
            if giver != taker:
                break
        levels[giver] -= 1
        levels[taker] += 1
