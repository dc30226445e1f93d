"""Running a search: how much it may do, its progress, its state on disk, and the random search beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from sparsekit import ranks
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.progress import Reporter
from sparsekit.search.evolution import Schedule, evolve, random_search
from sparsekit.search.landscape import DivergenceLandscape
from sparsekit.search.options import SearchOptions
from sparsekit.search.saved import SavedSearch
from sparsekit.units import seconds_text

State = tuple[int, ...]
"""What is searched over: an integer for each linear, block or module."""


@dataclass
class Search:
    """A search that is ready to begin.

    Attributes:
        options: How much it does.
        landscape: Measures states.
        tokens_per_second: Speed at which it does, from predicting the pool with the dense model.
        reporter: Told how it goes on.
        seed: Of all random choices.
        folder: Where its state is kept.
        identity: What else than options and seed makes it another search.
    """

    options: SearchOptions
    landscape: DivergenceLandscape[State]
    tokens_per_second: float
    reporter: Reporter
    seed: int
    folder: Path
    identity: Mapping[str, JSON]

    def __post_init__(self) -> None:
        """Find what an interrupted run of it left."""
        own: dict[str, JSON] = {"seed": self.seed, "options": self.options.model_dump(mode="json")}
        self._saved = ranks.share(lambda: SavedSearch(self.folder, {**self.identity, **own}))

    @property
    def history(self) -> dict[str, float]:
        """Fitness of the best by generation: the start, and whenever it fell."""
        return {str(number): value for number, value in self._saved.history.items()}

    @property
    def begun(self) -> State | None:
        """What an interrupted run of this search had found, None without one."""
        return self._saved.last.best if self._saved.last else None

    def schedule(self, passed_seconds: float, searches: int) -> Schedule:
        """Return the stages that the budget allows each of so many searches; an interrupted search keeps its own."""
        passed = ranks.share(lambda: passed_seconds)
        found = self.options.affordable_schedule(self.tokens_per_second, passed, searches)
        return replace(found, generations=self._saved.decide(found.generations))

    def evolve(
        self, start: State, mutate: Callable[[State, Random], State], schedule: Schedule, null: str, base: float
    ) -> tuple[State, int]:
        """Return the best state and the samples that finding it took; `null` has the fitness `base`, for progress."""
        reporter, task = self.reporter, "search: generations"
        tokens = (schedule.generations * schedule.evaluated() + schedule.fixed) * self.options.sequence_length
        speed = self.tokens_per_second
        reporter.note(
            f"search: {schedule.generations} generations of {schedule.offspring}, "
            f"{1 + schedule.generations * schedule.evaluations():,} evaluations, {tokens:,} tokens, "
            f"about {seconds_text(tokens / speed)} at {speed:,.0f} tokens/s"
        )
        begun = self._saved.last
        reporter.start(task, schedule.generations, "generations")
        done = 0
        for found in evolve(begun or start, mutate, self.landscape, schedule, self.seed):
            if found is not begun:
                self._saved.add(found)
            gain = 1 - found.fitness / base if base else 0.0
            reporter.tell(task, f"{self.options.measure} {found.fitness:.4f}, {gain:.1%} below {null}")
            if found.number > done:
                reporter.advance(task, found.number - done)
                done = found.number
        reporter.finish(task)
        return found.best, found.samples

    def random(self, draw: Callable[[Random], State], schedule: Schedule, samples: int) -> tuple[State, float]:
        """Spend `samples` on independent states; return the best and its fitness."""
        reporter, task = self.reporter, "search: random choices"
        reporter.start(task, samples, "samples")
        self.landscape.tick = lambda count: reporter.advance(task, count)
        found = random_search(draw, self.landscape, schedule, samples, self.seed)
        self.landscape.tick = lambda count: None
        reporter.finish(task)
        return found

    def fitness(self, state: State, schedule: Schedule) -> float:
        """Return the fitness of one state on the fixed samples."""
        return self.landscape.fitness([state], range(schedule.fixed))[0]
