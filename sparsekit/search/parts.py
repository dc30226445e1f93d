"""Levels of whole parts of linears: groups of heads in front of one, neurons in front of another.

A level says how many parts a linear keeps. Parts go by structured OBS, what is left at every level is refitted; both
lie in a level database like those of masks, and any exchange of steps between linears of one kind keeps their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from sparsekit.budget import distribute, exact
from sparsekit.contracts import Level, LinearInfo, Pruned
from sparsekit.errors import PlanError
from sparsekit.lazy import torch
from sparsekit.pattern import Pattern
from sparsekit.search.grid import Grid
from sparsekit.search.switches import Levels, Switches
from sparsekit.solve.factor import inverse_factor
from sparsekit.solve.groups import remove_groups
from sparsekit.stats.gram import Gram

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """Linears of which parts of one kind can go, one for each block.

    Attributes:
        name: `groups` or `neurons`.
        linears: The linears whose inputs go.
        sets: Inputs of each part, [parts, channels] int64, by name of the linear.
        multiple: Parts that go together.
        rounds: Rounds of structured OBS from one level to the next.
    """

    name: str
    linears: tuple[LinearInfo, ...]
    sets: Mapping[str, Tensor]
    multiple: int
    rounds: int

    @property
    def unit(self) -> int:
        """Weights of the linear that go together."""
        first = self.linears[0]
        return first.out_features * self.sets[first.name].shape[1] * self.multiple

    def parts(self, linear: LinearInfo, weights: int) -> int:
        """Return how many parts so many kept weights of a linear are."""
        return weights // (self.unit // self.multiple)

    def uniform(self, sparsity: float) -> dict[str, int]:
        """Return the kept weights of each linear at the same sparsity, whole units removed.

        Raises:
            PlanError: Nothing would be left of a linear, or nothing would go.
        """
        numel = sum(linear.numel for linear in self.linears)
        removed = round(exact(sparsity) * numel / self.unit) * self.unit
        if not removed:
            raise PlanError(
                f"{sparsity:g} of {numel // self.unit} times {self.multiple} {self.name} removes nothing",
                hint="Let more go.",
            )
        same = {linear.name: 1.0 for linear in self.linears}
        gone = distribute(self.linears, same, removed, self.unit)
        kept = {linear.name: linear.numel - gone[linear.name] for linear in self.linears}
        if empty := [name for name, weights in kept.items() if weights < self.unit]:
            raise PlanError(
                f"{sparsity:g} of {numel // self.unit} times {self.multiple} {self.name} leaves none here",
                where=empty[0],
                hint="Let fewer go.",
            )
        return kept

    def step(self, sparsity: float, levels: int, halvings: int) -> int:
        """Return the weights between two levels: so many of them reach from uniform to 0 or twice the sparsity."""
        units = min(linear.numel for linear in self.linears) // self.unit
        return max(int(min(sparsity, 1 - sparsity) * units / max(levels, 1) / 2**halvings), 1) * self.unit

    def grid(self, kept: Mapping[str, int], step: int, levels: int) -> Grid:
        """Return so many levels on each side of `kept` weights; one unit of every linear always stays."""
        lowest = {name: -min(levels, (weights - self.unit) // step) for name, weights in kept.items()}
        highest = {one.name: min(levels, (one.numel - kept[one.name]) // step) for one in self.linears}
        return Grid(step, dict(kept), lowest, highest)

    def fit(self, linear: LinearInfo, weight: Tensor, gram: Gram, grid: Grid, damping: float) -> Level:
        """Return a linear, dense `weight: [out, in]` float32, with parts removed, at all levels of a grid."""
        counts = [grid.count(linear.name, level) for level in grid.levels(linear.name)]  # densest first
        sets = self.sets[linear.name]
        removed = [len(sets) - self.parts(linear, count) for count in counts]
        factor = gram.once(inverse_factor, damping)
        reduced = remove_groups(weight, gram.matrix, factor, sets, removed, rounds=self.rounds)
        found = dict(zip(counts, reduced, strict=True))

        def at(_: Pattern, count: int) -> Pruned:
            keep, whole = torch.zeros(weight.shape, dtype=torch.bool), torch.zeros_like(weight)
            keep[:, found[count].channels] = True
            whole[:, found[count].channels] = found[count].weight
            return Pruned(whole, keep)

        return at

    def kept(self, linear: LinearInfo, keep: Tensor) -> Tensor:
        """Return the parts that a mask [out, in] keeps, ascending."""
        return keep[0][self.sets[linear.name][:, 0]].nonzero()[:, 0]


class Exchanges:
    """Mutation of the levels of several kinds, one kind after the other: like is exchanged with like."""

    def __init__(self, kinds: Sequence[Kind], grids: Sequence[Grid], most: int) -> None:
        """Take grids of which at least one is not rigid.

        Args:
            kinds: In the order of the levels of a choice.
            grids: Their levels.
            most: Most exchanges of a mutation.
        """
        self._ranges: list[tuple[int, int, Switches]] = []
        place = 0
        for kind, grid in zip(kinds, grids, strict=True):
            if not grid.rigid:
                switches = Switches(grid, kind.linears, most=most)
                self._ranges.append((place, place + len(kind.linears), switches))
            place += len(kind.linears)
        self._length = place

    def mutate(self, levels: Levels, random: Random) -> Levels:
        """Return a neighbour, different from `levels`."""
        first, last, switches = random.choice(self._ranges)
        return levels[:first] + switches.mutate(levels[first:last], random) + levels[last:]

    def draw(self, random: Random) -> Levels:
        """Return levels far from where the search begins."""
        levels = [0] * self._length
        for first, last, switches in self._ranges:
            levels[first:last] = switches.draw(random)
        return tuple(levels)
