"""EvoPress: levels per linear by evolutionary search on the whole model.

What it does: begins at the best allocation that is known without a search; every generation tries offspring that move a
    few steps of weights from one linear to another, compares them on few and then on more tokens by their divergence
    from the dense model, and keeps what is better. Layer errors do not add up to the model's loss, so the model itself
    is asked.
Source: Sieberling et al. 2024, "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
    arXiv 2410.14649, algorithm 1.
Shapes: linears -> kept counts.
Cost: one pruning of each dense linear at 2 levels + 1 counts, stored as one byte per weight; the model twice in memory
    in its own dtype; tokens as the options say, 16 x 512 + 8,192 per generation by default.
Deviations: the start is the best of uniform and the nulls, not always uniform; half of the offspring exchange steps
    between whole blocks; linears never exchange with themselves; the last
    stage is the same tokens in all generations, so the best never gets worse; the divergence keeps the dense model's
    512 likeliest tokens and one bucket for the others. Levels are those of the pruner on dense inputs, before a refiner
    or an update.
Numbers: 70 %, WikiText-2, uniform / OWL / EvoPress: Llama-3-8B 85.84, 48.07, 28.76; Mistral-7B 23.08, 17.22, 14.42
    (SparseGPT). SmolLM2-135M see docs/results.md.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from sparsekit import registry
from sparsekit.contracts import AllocationContext, Allocator, Probes
from sparsekit.search.layers import LayerSearch, LevelSearchOptions, layer_search, null
from sparsekit.search.switches import Switches
from sparsekit.search.verdict import verdict

Null = Literal["uniform", "owl", "dp", "random_search"]


class EvopressOptions(LevelSearchOptions):
    """Options of `evopress`."""

    switches: int = Field(default=3, ge=1, description="most exchanges between a parent and its offspring")
    whole_blocks: float = Field(
        default=0.5, ge=0, le=1, description="share of offspring that exchange steps between whole blocks; published: 0"
    )
    start: Literal["best", "uniform"] = Field(
        default="best",
        description="where the search begins: at the best of uniform and the nulls, or (published) uniform",
    )
    nulls: tuple[Null, ...] = Field(
        default=("uniform", "owl", "dp", "random_search"),
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
        with layer_search(context, self.options, grid, self.seed) as search:
            schedule = search.schedule(time.perf_counter() - began, self._searches())
            mutation = self._mutation(context, search)
            known = {"uniform": (0,) * len(search.names)}
            known |= {name: search.choice(counts) for name, counts in nulls.items()}
            found = {name: search.fitness(choice, schedule) for name, choice in known.items()}
            first = min(found, key=lambda name: found[name]) if self.options.start == "best" else "uniform"
            told = f"{self.options.measure} {found[first]:.4f} (uniform {found['uniform']:.4f})"
            context.reporter.note(f"search: begins at {first}, {told}")
            best, spent = search.evolve(known[first], mutation.mutate, schedule, "uniform", found["uniform"])
            found["evopress"] = search.fitness(best, schedule)
            if "random_search" in self.options.nulls:
                found["random_search"] = search.random(mutation.draw, schedule, spent)[1]
        context.facts["level"] = {name: float(level) for name, level in zip(search.names, best, strict=True)}
        context.facts["fitness_by_generation"] = search.history
        context.facts["fitness"] = found
        context.reporter.note(f"search: {verdict('evopress', found)}")
        context.facts["generations"] = {"all": float(schedule.generations)}
        context.facts["tokens_searched"] = {"all": float(spent * self.options.sequence_length)}
        return search.counts(best)

    def _mutation(self, context: AllocationContext, search: LayerSearch) -> Switches:
        options = self.options
        return Switches(search.grid, context.linears, most=options.switches, whole_blocks=options.whole_blocks)

    def _searches(self) -> int:
        """Return how many searches share the budget: this one, and a random one of as many tokens."""
        return 2 if "random_search" in self.options.nulls else 1
