"""(1 + lambda) evolution in stages: many offspring on few tokens, the best of them on more, the last on a fixed batch.

Source: Sieberling et al. 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", arXiv
2410.14649, algorithm 1. Here the last stage is the same tokens in all generations and the parent takes part in it, so
the fitness of the best never rises; the other stages draw theirs anew. Random choices derive from the seed and the
number of the generation alone: a search that goes on after an interruption, or on several machines, is the same search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, Protocol, TypeVar

from sparsekit.errors import PlanError
from sparsekit.rng import derive

State = TypeVar("State")
Measured = TypeVar("Measured", contravariant=True)


class Landscape(Protocol[Measured]):
    """What is searched: lower fitness is better."""

    def fitness(self, states: Sequence[Measured], draw: Sequence[int]) -> list[float]:
        """Return the fitness of each state on the samples `draw`."""


@dataclass(frozen=True)
class Stage:
    """One selection: how many states are left after it, and on how many samples they are compared."""

    survivors: int
    samples: int


@dataclass(frozen=True)
class Schedule:
    """How much a search does.

    Attributes:
        generations: Most generations.
        offspring: Mutants of the parent in each.
        stages: Selections, one after the other; the last leaves one state and compares on the fixed samples.
        pool: Samples there are: the fixed ones first, the others are drawn from.
    """

    generations: int
    offspring: int
    stages: tuple[Stage, ...]
    pool: int

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            PlanError: More samples than there are, or stages that do not narrow down to one.
        """
        if not self.stages or self.stages[-1].survivors != 1:
            raise PlanError("the last stage of a search leaves one survivor")
        left = self.offspring
        for number, stage in enumerate(self.stages):
            if not 1 <= stage.survivors <= left:
                raise PlanError(f"stage {number} of the search leaves {stage.survivors} of {left} states")
            left = stage.survivors
        drawn = max((stage.samples for stage in self.stages[:-1]), default=0)
        if drawn + self.fixed > self.pool:
            raise PlanError(
                f"the search draws {drawn} samples beside {self.fixed} fixed ones, it has {self.pool}",
                hint="Lower the tokens of its stages, or raise its samples and those of the calibration.",
            )

    @property
    def fixed(self) -> int:
        """Samples of the last stage."""
        return self.stages[-1].samples

    def evaluations(self) -> int:
        """Return how many times one generation measures a state."""
        return self.offspring + sum(stage.survivors for stage in self.stages[:-1])

    def evaluated(self) -> int:
        """Return how many samples one generation runs through the model."""
        left, total = self.offspring, 0
        for stage in self.stages:
            total += left * stage.samples
            left = stage.survivors
        return total


@dataclass(frozen=True)
class Generation(Generic[State]):
    """The best state after a generation.

    Attributes:
        number: 0 for the start.
        best: The state.
        fitness: Its fitness on the fixed samples.
        samples: Samples run through the model so far, the start's own included.
    """

    number: int
    best: State
    fitness: float
    samples: int


def evolve(
    start: Generation[State] | State,
    mutate: Callable[[State, Random], State],
    landscape: Landscape[State],
    schedule: Schedule,
    seed: int,
) -> Iterator[Generation[State]]:
    """Yield the best state after every generation, the start first.

    Args:
        start: A state, or the generation to go on from.
        mutate: Returns a neighbour of a state.
        landscape: Measures states.
        schedule: How much to do.
        seed: Of all random choices.
    """
    fixed = range(schedule.fixed)
    if not isinstance(start, Generation):
        start = Generation(0, start, landscape.fitness([start], fixed)[0], schedule.fixed)
    best = start
    yield best
    for number in range(best.number + 1, schedule.generations + 1):
        random = Random(derive(seed, "generation", str(number)))  # noqa: S311  (a search, no secret)
        states = [mutate(best.best, random) for _ in range(schedule.offspring)]
        for stage in schedule.stages[:-1]:
            draw = random.sample(range(schedule.fixed, schedule.pool), stage.samples)
            states = _fittest(states, landscape.fitness(states, draw), stage.survivors)
        found = landscape.fitness(states, fixed)
        least = min(range(len(states)), key=lambda place: (found[place], place))
        samples = best.samples + schedule.evaluated()
        if found[least] < best.fitness:
            best = Generation(number, states[least], found[least], samples)
        else:
            best = Generation(number, best.best, best.fitness, samples)
        yield best


def random_search(
    draw: Callable[[Random], State], landscape: Landscape[State], schedule: Schedule, samples: int, seed: int
) -> tuple[State, float]:
    """Spend `samples` on states drawn independently, selected in the stages of the schedule; return the best.

    The null of every search: as many samples, no inheritance.
    """
    best: tuple[float, int, State] | None = None
    rounds = max(samples // schedule.evaluated(), 1)
    fixed = range(schedule.fixed)
    for number in range(rounds):
        random = Random(derive(seed, "random search", str(number)))  # noqa: S311  (a search, no secret)
        states = [draw(random) for _ in range(schedule.offspring)]
        for stage in schedule.stages[:-1]:
            chosen = random.sample(range(schedule.fixed, schedule.pool), stage.samples)
            states = _fittest(states, landscape.fitness(states, chosen), stage.survivors)
        for state, fitness in zip(states, landscape.fitness(states, fixed), strict=True):
            if best is None or fitness < best[0]:
                best = (fitness, number, state)
    assert best is not None  # noqa: S101  (there is at least one round)
    return best[2], best[0]


def _fittest(states: Sequence[State], fitness: Sequence[float], count: int) -> list[State]:
    """Return the `count` states of least fitness, earlier ones first among equals."""
    order = sorted(range(len(states)), key=lambda place: (fitness[place], place))
    return [states[place] for place in order[:count]]
