"""A search over the levels of all linears: what evolution and its nulls share.

The levels of all linears are stored once, the dense model's predictions on a pool of calibration samples are kept, and
then any choice of levels is measured by changing only the linears that differ from the choice measured before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from sparsekit import fs, ranks, registry
from sparsekit.contracts import AllocationContext, LinearInfo, Stats, WholeModel
from sparsekit.errors import SparsekitError
from sparsekit.lazy import torch
from sparsekit.search.conduct import Search
from sparsekit.search.grid import Grid, make_grid
from sparsekit.search.landscape import DivergenceLandscape, Predictions, predictions
from sparsekit.search.levels import LevelDatabase
from sparsekit.search.options import SearchOptions
from sparsekit.search.switches import Levels
from sparsekit.units import bytes_text

if TYPE_CHECKING:
    from torch import Tensor


class LevelSearchOptions(SearchOptions):
    """Options of searches over the levels of linears."""

    levels: int = Field(default=8, ge=1, le=100, description="levels on each side of uniform")
    span: float = Field(
        default=0.5, gt=0, le=1, description="reach of each side, as a share of min(s, 1 - s) x hidden^2 weights"
    )

    def grid(self, context: AllocationContext, budget: int) -> Grid:
        """Return the levels of the linears; where they cannot be exchanged, say so."""
        found = make_grid(context.linears, budget, context.pattern.unit, levels=self.levels, span=self.span)
        if found.rigid:
            context.reporter.note("search: no two linears can exchange weights, uniform is all there is")
        return found


@dataclass
class LayerSearch(Search):
    """A search over levels.

    Attributes:
        grid: Levels of the linears.
        names: Linears in the order of the model, which is that of the levels of a choice.
    """

    grid: Grid
    names: tuple[str, ...]

    def choice(self, counts: dict[str, int]) -> Levels:
        """Return the levels next to an allocation of the same budget."""
        nearest = self.grid.nearest(counts)
        return tuple(nearest[name] for name in self.names)

    def counts(self, choice: Levels) -> dict[str, int]:
        """Return the kept weights per linear."""
        return self.grid.counts(dict(zip(self.names, choice, strict=True)))


@contextmanager
def layer_search(
    context: AllocationContext, options: LevelSearchOptions, grid: Grid, seed: int
) -> Iterator[LayerSearch]:
    """Build the level database where it is not there, load the model, predict the pool with the dense one."""
    if context.folder is None:
        raise SparsekitError("a search over levels needs a folder for its database")
    names = tuple(linear.name for linear in context.linears)
    begin = partial(LevelDatabase, context.folder, context.identity, grid)
    with ranks.share(begin) as database:
        build(database, context)
        with context.whole() as model:
            dense = predictions(model, options, context.reporter)
            landscape = LayerLandscape(context.linears, database, model, dense)
            yield LayerSearch(
                options, landscape, dense.tokens_per_second, context.reporter, seed, context.folder, {}, grid, names
            )
            landscape.leave()


def build(database: LevelDatabase, context: AllocationContext) -> None:
    """Prune every linear that the database lacks at all of its levels, on the inputs of the dense model."""
    missing = ranks.share(lambda: database.missing(context.linears))
    if not missing:
        return
    nested, dtype = context.pruner.nested, context.dtype or torch.float32
    size = database.expected_bytes(missing, nested=nested, dtype=dtype)
    ranks.share(lambda: fs.require_space(database.folder, size, "the level database"))
    context.reporter.note(f"search: level database of {bytes_text(size)} in {database.folder}")
    wanted = {linear.name for linear in missing}
    visited = (each for each in context.visit(context.pruner.needs) if each[0].name in wanted)

    def parts(each: tuple[LinearInfo, Tensor, Stats]) -> dict[str, Tensor]:
        linear, weight, stats = each
        at = context.pruner.fit(linear, weight, stats)
        return database.parts(linear, weight, at, context.pattern, nested=nested, dtype=dtype)

    while batch := list(islice(visited, ranks.here().size)):
        for (linear, *_), found in zip(batch, ranks.spread(batch, parts), strict=True):
            database.keep(linear, found)


class Store(Protocol):
    """Where the levels of linears are."""

    def weight(self, linear: LinearInfo, dense: Tensor, level: int) -> Tensor:
        """Return a linear at a level, [out, in] of the dtype of `dense`."""


class LayerLandscape(DivergenceLandscape[Levels]):
    """Divergence of any choice of levels."""

    def __init__(self, linears: Sequence[LinearInfo], database: Store, model: WholeModel, dense: Predictions) -> None:
        """Begin at the dense model, whose predictions are `dense`."""
        super().__init__(model, dense)
        self._linears = linears
        self._database = database
        self._weights = {linear.name: model.weight(linear).clone() for linear in linears}
        self._now: list[int | None] = [None] * len(linears)

    def enter(self, state: Levels) -> None:
        """Change the linears whose level is another one than before."""
        for place, (linear, level) in enumerate(zip(self._linears, state, strict=True)):
            if self._now[place] != level:
                self._model.replace(linear, self._at(linear, level))
                self._now[place] = level

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
