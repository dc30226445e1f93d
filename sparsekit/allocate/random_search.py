"""Random search: the null of every search over layers.

What it does: draws levels per linear independently of each other, at the exact budget; compares them in the same
    stages, on as many tokens, by the same divergence from the dense model as `evopress`; keeps the best.
Source: Bergstra & Bengio 2012, "Random Search for Hyper-Parameter Optimization" (literature); as a null of
    Sieberling et al. 2024, "EvoPress", arXiv 2410.14649.
Shapes: linears -> kept counts.
Cost: that of `evopress` with as many generations.
Deviations: a draw is a random walk of switches from uniform, 20 for each linear, within the levels there are.
Numbers: equal tokens beside `evopress` in docs/results.md.
"""

from __future__ import annotations

import time

from sparsekit.contracts import AllocationContext, Allocator, Probes
from sparsekit.search.layers import LevelSearchOptions, layer_search
from sparsekit.search.switches import Switches


class RandomSearchOptions(LevelSearchOptions):
    """Options of `random_search`."""


class RandomSearch(Allocator[RandomSearchOptions]):
    """The best of many independent choices of levels."""

    options_type = RandomSearchOptions
    looks = True

    def probes(self) -> Probes:
        """Return the part of the calibration text that choices are compared on."""
        return self.options.probes(1)

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Draw and compare."""
        began = time.perf_counter()
        grid = self.options.grid(context, budget)
        if grid.rigid:
            return dict(grid.uniform)
        with layer_search(context, self.options, grid, self.seed) as search:
            schedule = search.schedule(time.perf_counter() - began, 1)
            samples = schedule.generations * schedule.evaluated()
            draw = Switches(grid, context.linears).draw
            best, fitness = search.random(draw, schedule, samples)
        context.facts["level"] = {name: float(level) for name, level in zip(search.names, best, strict=True)}
        context.facts["fitness"] = {"random_search": fitness}
        context.facts["tokens_searched"] = {"all": float(samples * self.options.sequence_length)}
        return search.counts(best)
