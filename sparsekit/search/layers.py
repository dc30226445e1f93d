"""A search over the levels of all linears: what evolution and its nulls share.

The levels of all linears are stored once, the dense model's predictions on a pool of calibration samples are kept, and
then any choice of levels is measured by changing only the linears that differ from the choice measured before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from sparsekit import fs, registry
from sparsekit.contracts import AllocationContext, LinearInfo, MethodOptions, Probes, WholeModel
from sparsekit.errors import NonFinite, SparsekitError
from sparsekit.lanes import side_by_side
from sparsekit.lazy import torch
from sparsekit.progress import Reporter, track
from sparsekit.search.budget import parse_budget
from sparsekit.search.divergence import Reference, divergence, reference
from sparsekit.search.evolution import Schedule, Stage, random_search
from sparsekit.search.grid import Grid, make_grid
from sparsekit.search.levels import LevelDatabase
from sparsekit.search.switches import Levels
from sparsekit.units import bytes_text

if TYPE_CHECKING:
    from torch import Tensor


class SearchOptions(MethodOptions):
    """Options of all searches over levels."""

    levels: int = Field(default=8, ge=1, le=100, description="levels on each side of uniform")
    span: float = Field(
        default=0.5, gt=0, le=1, description="reach of each side, as a share of min(s, 1 - s) x hidden^2 weights"
    )
    generations: int = Field(default=400, ge=1, description="most generations")
    budget: str | None = Field(default=None, description="time (10min, 2h) or tokens (20Mtokens) that end it earlier")
    offspring: int = Field(default=16, ge=1, description="choices that are tried in each generation")
    survivors: tuple[int, ...] = Field(default=(1, 1), min_length=1, description="choices left after each stage")
    tokens: tuple[int, ...] = Field(
        default=(512, 8192), min_length=1, description="tokens of each stage; the last stage has the same ones always"
    )
    samples: int = Field(default=64, ge=1, description="calibration samples that tokens are drawn from")
    sequence_length: int = Field(default=512, ge=8, description="tokens of each sample")
    top: int = Field(default=512, ge=1, description="likeliest tokens of the dense model that are compared")

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, text: str | None) -> str | None:
        if text is not None:
            parse_budget(text)
        return text

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.survivors) != len(self.tokens):
            raise ValueError(f"{len(self.survivors)} numbers of survivors for {len(self.tokens)} stages of tokens")
        for tokens in self.tokens:
            if tokens <= 0 or tokens % self.sequence_length:
                raise ValueError(f"{tokens} tokens are no whole samples of {self.sequence_length}")
        try:
            self.schedule()
        except SparsekitError as error:
            raise ValueError(str(error)) from None
        return self

    def schedule(self) -> Schedule:
        """Return the stages in samples."""
        samples = [tokens // self.sequence_length for tokens in self.tokens]
        stages = tuple(Stage(*pair) for pair in zip(self.survivors, samples, strict=True))
        return Schedule(self.generations, self.offspring, stages, self.samples)

    def grid(self, context: AllocationContext, budget: int) -> Grid:
        """Return the levels of the linears; where they cannot be exchanged, say so."""
        found = make_grid(context.linears, budget, context.pattern.unit, levels=self.levels, span=self.span)
        if found.rigid:
            context.reporter.note("search: no two linears can exchange weights, uniform is all there is")
        return found

    def affordable(self, tokens: int, searches: int) -> int:
        """Return the generations that so many searches of as many can have with `tokens` in all."""
        whole = self.schedule()
        fit = (tokens // searches // self.sequence_length - whole.fixed) // whole.evaluated()
        return max(min(self.generations, fit), 1)

    def probes(self, searches: int) -> Probes:
        """Return the part of the calibration text that choices are compared on, for so many searches."""
        limit = parse_budget(self.budget) if self.budget else None
        if limit and limit.seconds:
            return Probes(self.samples, self.sequence_length, own_dtype=True, searched_seconds=limit.seconds)
        whole = self.schedule()
        generations = self.affordable(limit.tokens, searches) if limit and limit.tokens else self.generations
        tokens = searches * (generations * whole.evaluated() + whole.fixed) * self.sequence_length
        return Probes(self.samples, self.sequence_length, own_dtype=True, searched_tokens=tokens)


@dataclass
class LayerSearch:
    """A search that is ready to begin.

    Attributes:
        grid: Levels of the linears.
        names: Linears in the order of the model, which is that of the levels of a choice.
        landscape: Measures choices.
        tokens_per_second: Speed at which it does, from predicting the pool with the dense model.
    """

    grid: Grid
    names: tuple[str, ...]
    landscape: LayerLandscape
    tokens_per_second: float

    def schedule(self, options: SearchOptions, passed_seconds: float, searches: int) -> Schedule:
        """Return the stages, with as many generations as the options' budget leaves for each of so many searches."""
        whole = options.schedule()
        if options.budget is None:
            return whole
        limit = parse_budget(options.budget)
        tokens = limit.tokens
        if tokens is None:
            assert limit.seconds is not None  # noqa: S101  (one of both is given)
            tokens = int(max(limit.seconds - passed_seconds, 0) * self.tokens_per_second)
        return replace(whole, generations=options.affordable(tokens, searches))

    def random(
        self, context: AllocationContext, draw: Callable[[Random], Levels], schedule: Schedule, samples: int, seed: int
    ) -> tuple[Levels, float]:
        """Spend `samples` on independent choices; return the best and its fitness."""
        reporter, task = context.reporter, "search: random choices"
        reporter.start(task, samples, "samples")
        self.landscape.tick = lambda count: reporter.advance(task, count)
        found = random_search(draw, self.landscape, schedule, samples, seed)
        reporter.finish(task)
        return found

    def choice(self, counts: dict[str, int]) -> Levels:
        """Return the levels next to an allocation of the same budget."""
        nearest = self.grid.nearest(counts)
        return tuple(nearest[name] for name in self.names)

    def counts(self, choice: Levels) -> dict[str, int]:
        """Return the kept weights per linear."""
        return self.grid.counts(dict(zip(self.names, choice, strict=True)))


@contextmanager
def layer_search(context: AllocationContext, options: SearchOptions, grid: Grid) -> Iterator[LayerSearch]:
    """Build the level database where it is not there, load the model, predict the pool with the dense one."""
    if context.folder is None:
        raise SparsekitError("a search over levels needs a folder for its database")
    names = tuple(linear.name for linear in context.linears)
    with LevelDatabase(context.folder, context.identity, grid) as database:
        build(database, context)
        with context.whole() as model:
            start = time.perf_counter()
            dense = predictions(model, options, context.reporter)
            speed = options.samples * options.sequence_length / (time.perf_counter() - start)
            landscape = LayerLandscape(context.linears, database, model, dense)
            yield LayerSearch(grid, names, landscape, speed)
            landscape.leave()


def build(database: LevelDatabase, context: AllocationContext) -> None:
    """Prune every linear that the database lacks at all of its levels, on the inputs of the dense model."""
    missing = database.missing(context.linears)
    if not missing:
        return
    nested, dtype = context.pruner.nested, context.dtype or torch.float32
    size = database.expected_bytes(missing, nested=nested, dtype=dtype)
    fs.require_space(database.folder, size, "the level database")
    context.reporter.note(f"search: level database of {bytes_text(size)} in {database.folder}")
    wanted = {linear.name for linear in missing}
    for linear, weight, stats in context.visit(context.pruner.needs):
        if linear.name in wanted:
            at = context.pruner.fit(linear, weight, stats)
            database.add(linear, weight, at, context.pattern, nested=nested, dtype=dtype)


def predictions(model: WholeModel, options: SearchOptions, reporter: Reporter) -> list[Reference]:
    """Return what the dense model predicts on every sample of the pool."""
    task = "search: predictions of the dense model"
    return [
        reference(model.logits(sample)[:-1], options.top)
        for sample in track(range(options.samples), reporter, task, options.samples, "samples")
    ]


class LayerLandscape:
    """Mean divergence from the dense model of any choice of levels."""

    def __init__(
        self, linears: Sequence[LinearInfo], database: LevelDatabase, model: WholeModel, dense: Sequence[Reference]
    ) -> None:
        """Begin at the dense model, whose predictions are `dense`."""
        self._linears = linears
        self._database = database
        self._model = model
        self._dense = dense
        self._weights = {linear.name: model.weight(linear).clone() for linear in linears}
        self._now: list[int | None] = [None] * len(linears)
        self.tick: Callable[[int], None] = lambda samples: None
        """Called with the number of samples after each choice that was measured."""

    def fitness(self, states: Sequence[Levels], draw: Sequence[int]) -> list[float]:
        """Return the mean divergence of each choice on the samples `draw`, nats per token."""
        return [self._measure(state, draw) for state in states]

    def _measure(self, levels: Levels, draw: Sequence[int]) -> float:
        for place, (linear, level) in enumerate(zip(self._linears, levels, strict=True)):
            if self._now[place] != level:
                self._model.replace(linear, self._at(linear, level))
                self._now[place] = level
        found = [0.0] * len(draw)

        def one(place: int, _: object) -> None:
            sample = draw[place]
            found[place] = divergence(self._dense[sample], self._model.logits(sample)[:-1])

        side_by_side(len(draw), one)
        mean = sum(found) / len(found)
        if mean != mean:
            raise NonFinite("a choice of levels makes the model predict NaN", hint="Run with --dtype fp32 or bf16.")
        self.tick(len(draw))
        return mean

    def leave(self) -> None:
        """Give the model its dense weights back."""
        for linear in self._linears:
            self._model.replace(linear, self._weights[linear.name])

    def _at(self, linear: LinearInfo, level: int) -> Tensor:
        return self._database.weight(linear, self._weights[linear.name], level)


def null(name: str, context: AllocationContext, budget: int, seed: int) -> dict[str, int]:
    """Return the allocation of another allocator with its own defaults, to compare a search with."""
    method = registry.load("allocate", name)
    own = AllocationContext(context.linears, context.pattern, context.visit, context.pruner, context.whole)
    counts: dict[str, int] = method(method.options_type(), seed).allocate(own, budget)
    return counts
