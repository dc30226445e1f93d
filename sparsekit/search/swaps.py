"""Which parts of a model go: a choice of equal numbers within kinds, and its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

Choice = tuple[int, ...]
"""1 for each part that goes, 0 for those that stay."""


@dataclass(frozen=True)
class Swaps:
    """Mutation of a choice: a part that goes and one of its kind that stays change places.

    Source: Sieberling et al. 2024, "EvoPress", arXiv 2410.14649, section 3: min(U{1..most}, U{1..most}) swaps.

    Attributes:
        parts: Number of parts.
        kinds: Parts that can replace each other, those that may go at all.
        count: How many of each kind go.
        most: Most swaps of a mutation.
    """

    parts: int
    kinds: tuple[tuple[int, ...], ...]
    count: int
    most: int = 3

    @property
    def rigid(self) -> bool:
        """Whether there is only one choice."""
        return all(len(kind) == self.count for kind in self.kinds)

    def choice(self, going: Sequence[int]) -> Choice:
        """Return the choice of the parts `going`."""
        return tuple(int(part in going) for part in range(self.parts))

    def draw(self, random: Random) -> Choice:
        """Return a choice, each as likely as any other."""
        return self.choice([part for kind in self.kinds for part in random.sample(kind, self.count)])

    def mutate(self, choice: Choice, random: Random) -> Choice:
        """Return a neighbour, different from `choice`."""
        movable = [kind for kind in self.kinds if len(kind) > self.count]
        while True:
            changed = list(choice)
            for _ in range(min(random.randint(1, self.most), random.randint(1, self.most))):
                kind = random.choice(movable)
                going = random.choice([part for part in kind if changed[part]])
                staying = random.choice([part for part in kind if not changed[part]])
                changed[going], changed[staying] = 0, 1
            if tuple(changed) != choice:  # two swaps may undo each other
                return tuple(changed)

    def least(self, cost: Sequence[float]) -> Choice:
        """Return the choice of the parts of each kind with the least `cost: [parts]`, earlier ones among equals."""
        going = [part for kind in self.kinds for part in sorted(kind, key=lambda part: cost[part])[: self.count]]
        return self.choice(going)
