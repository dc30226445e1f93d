"""Neighbours of a choice of levels: switches that give one linear a step and take it from another."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sparsekit.contracts import LinearInfo
from sparsekit.search.grid import Grid

Levels = tuple[int, ...]
"""One level per linear, in the order of the model; they sum to 0."""


class Switches:
    """Mutation of levels within a grid; the sum never changes.

    Source: Sieberling et al. 2024, "EvoPress", arXiv 2410.14649, section 3: min(U{1..most}, U{1..most}) switches. A
    linear never exchanges with itself, which the published code allows. Ours: a share of the mutations exchanges whole
    blocks, linear by linear, since what distinguishes blocks is too small a gain in each single linear to be found.
    """

    def __init__(self, grid: Grid, linears: Sequence[LinearInfo], *, most: int = 3, whole_blocks: float = 0.0) -> None:
        """Take the linears of a grid in the order of the model.

        Args:
            grid: Their levels.
            linears: All that share the budget.
            most: Most switches of a mutation.
            whole_blocks: Share of the mutations whose switches are of blocks.
        """
        self._lowest = [grid.lowest[linear.name] for linear in linears]
        self._highest = [grid.highest[linear.name] for linear in linears]
        self._most = most
        blocks: dict[int, list[int]] = {}
        for place, linear in enumerate(linears):
            blocks.setdefault(linear.block, []).append(place)
        self._blocks = list(blocks.values())
        self._whole_blocks = whole_blocks if len(self._blocks) > 1 else 0.0

    def mutate(self, levels: Levels, random: Random) -> Levels:
        """Return a neighbour, different from `levels`."""
        while True:
            changed = list(levels)
            switch = self._switch_blocks if random.random() < self._whole_blocks else self._switch
            for _ in range(min(random.randint(1, self._most), random.randint(1, self._most))):
                switch(changed, random)
            if tuple(changed) != levels:  # two switches may undo each other, and full blocks cannot move
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

    def _switch_blocks(self, levels: list[int], random: Random) -> None:
        """Move one step from every linear of a block to its counterpart in another, where both can."""
        from_block, to_block = random.sample(self._blocks, 2)
        for giver, taker in zip(from_block, to_block, strict=False):  # blocks of one model may differ
            if levels[giver] > self._lowest[giver] and levels[taker] < self._highest[taker]:
                levels[giver] -= 1
                levels[taker] += 1
