"""EvoPress: levels per linear by evolutionary search on the whole model.

What it does: begins at uniform sparsity; every generation tries offspring that move a few steps of weights from one
    linear to another, compares them on few and then on more tokens by their divergence from the dense model, and keeps
    what is better. Layer errors do not add up to the model's loss, so the model itself is asked.
Source: Sieberling et al. 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
    arXiv 2410.14649, algorithm 1.
Shapes: linears -> kept counts.
Cost: one pruning of each dense linear at 2 levels + 1 counts, stored as one byte per weight; the model twice in memory
    in its own dtype; tokens as the options say, 16 x 512 + 8,192 per generation by default.
Deviations: half of the offspring exchange steps between whole blocks; linears never exchange with themselves; the last
    stage is the same tokens in all generations, so the best never gets worse; the divergence keeps the dense model's
    512 likeliest tokens and one bucket for the others. Levels are those of the pruner on dense inputs, before a refiner
    or an update.
Numbers: 70 %, WikiText-2, uniform / OWL / EvoPress: Llama-3-8B 85.84, 48.07, 28.76; Mistral-7B 23.08, 17.22, 14.42
    (SparseGPT). SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from pydantic import Field

from sparsekit import registry
from sparsekit.contracts import AllocationContext, Allocator, Probes
from sparsekit.search.evolution import Schedule, evolve
from sparsekit.search.layers import LayerSearch, SearchOptions, layer_search, null
from sparsekit.search.saved import SavedSearch
from sparsekit.search.switches import Levels, Switches
from sparsekit.search.verdict import verdict
from sparsekit.units import seconds_text

Null = Literal["uniform", "owl", "dp", "random_search"]


class EvopressOptions(SearchOptions):
    """Options of `evopress`."""

    switches: int = Field(default=3, ge=1, description="most exchanges between a parent and its offspring")
    whole_blocks: float = Field(
        default=0.5, ge=0, le=1, description="share of offspring that exchange steps between whole blocks; published: 0"
    )
    nulls: tuple[Null, ...] = Field(
        default=("uniform", "owl", "random_search"),
        description="what the result is compared with on the tokens of the last stage; random_search spends as many "
        "tokens as the search, and half of its budget",
    )


class Evopress(Allocator[EvopressOptions]):
    """The levels with which the whole model stays closest to the dense one."""

    options_type = EvopressOptions
    looks = True

    def __init__(self, options: EvopressOptions, seed: int) -> None:
        """Needs are those of the allocators it is compared with."""
        super().__init__(options, seed)
        others = [registry.load("allocate", name) for name in options.nulls if name != "random_search"]
        self.needs = frozenset().union(*(other.needs for other in others))  # type: ignore[misc]  # of this search only

    def probes(self) -> Probes:
        """Return the part of the calibration text that choices are compared on."""
        return self.options.probes(self._searches())

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Search, compare with the nulls, report."""
        began = time.perf_counter()
        grid = self.options.grid(context, budget)
        if grid.rigid:
            return dict(grid.uniform)
        nulls = {
            name: null(name, context, budget, self.seed)
            for name in self.options.nulls
            if name not in ("uniform", "random_search")
        }
        with layer_search(context, self.options, grid) as search:
            saved = self._saved(context)
            schedule = self._schedule(search, saved, time.perf_counter() - began)
            best, spent = self._evolve(context, search, saved, schedule)
            fixed = range(schedule.fixed)
            found = {"evopress": search.landscape.fitness([best], fixed)[0]}
            for name, counts in nulls.items():
                found[name] = search.landscape.fitness([search.choice(counts)], fixed)[0]
            if "uniform" in self.options.nulls:
                found["uniform"] = search.landscape.fitness([(0,) * len(best)], fixed)[0]
            if "random_search" in self.options.nulls:
                draw = self._mutation(context, search).draw
                found["random_search"] = search.random(context, draw, schedule, spent, self.seed)[1]
        context.facts["level"] = {name: float(level) for name, level in zip(search.names, best, strict=True)}
        context.facts["fitness_by_generation"] = {str(number): value for number, value in saved.history.items()}
        context.facts["divergence_from_dense"] = found
        context.reporter.note(f"search: {verdict('evopress', found)}")
        context.facts["generations"] = {"all": float(schedule.generations)}
        context.facts["tokens_searched"] = {"all": float(spent * self.options.sequence_length)}
        return search.counts(best)

    def _saved(self, context: AllocationContext) -> SavedSearch:
        assert context.folder is not None  # noqa: S101  (layer_search has refused its absence)
        return SavedSearch(context.folder, {"seed": self.seed, "options": self.options.model_dump(mode="json")})

    def _schedule(self, search: LayerSearch, saved: SavedSearch, passed_seconds: float) -> Schedule:
        """Return the stages, with as many generations as the budget leaves; an interrupted search keeps its number."""
        schedule = search.schedule(self.options, passed_seconds, self._searches())
        return replace(schedule, generations=saved.decide(schedule.generations))

    def _mutation(self, context: AllocationContext, search: LayerSearch) -> Switches:
        options = self.options
        return Switches(search.grid, context.linears, most=options.switches, whole_blocks=options.whole_blocks)

    def _searches(self) -> int:
        """Return how many searches share the budget: this one, and a random one of as many tokens."""
        return 2 if "random_search" in self.options.nulls else 1

    def _evolve(
        self, context: AllocationContext, search: LayerSearch, saved: SavedSearch, schedule: Schedule
    ) -> tuple[Levels, int]:
        """Return the best levels and the samples that finding them took."""
        reporter, task = context.reporter, "search: generations"
        tokens = (schedule.generations * schedule.evaluated() + schedule.fixed) * self.options.sequence_length
        speed = search.tokens_per_second
        reporter.note(
            f"search: {schedule.generations} generations of {schedule.offspring}, "
            f"{1 + schedule.generations * schedule.evaluations():,} evaluations, {tokens:,} tokens, "
            f"about {seconds_text(tokens / speed)} at {speed:,.0f} tokens/s"
        )
        uniform = (0,) * len(search.names)
        mutation = self._mutation(context, search)
        begun = saved.last
        reporter.start(task, schedule.generations, "generations")
        done = 0
        for found in evolve(begun or uniform, mutation.mutate, search.landscape, schedule, self.seed):
            if found is not begun:
                saved.add(found)
            gain = 1 - found.fitness / saved.history[0]
            reporter.tell(task, f"KL {found.fitness:.4f}, {gain:.1%} below uniform")
            if found.number > done:
                reporter.advance(task, found.number - done)
                done = found.number
        reporter.finish(task)
        return found.best, found.samples
