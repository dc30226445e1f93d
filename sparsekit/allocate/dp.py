"""DP allocation: the levels of least summed layer error, by dynamic programming.

What it does: prunes every dense linear with the stage's pruner at up to 2 `levels` + 1 counts around uniform, all steps
    the same number of weights; measures |X (W - W')^T|^2 / |X W^T|^2 of each; picks the level per linear whose errors
    sum to the least among all choices with the budget's sum: an exact knapsack in integers.
Source: Frantar & Alistarh 2022, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv 2201.13096, section 3; levels
    as in Sieberling et al. 2024, "EvoPress", arXiv 2410.14649.
Shapes: linears, gram -> kept counts.
Cost: one forward of each dense block; per linear 2 levels + 1 prunings and errors, out x in^2 each; the choice itself
    linears^2 x levels^2 additions.
Deviations: errors are those of the pruner on dense inputs, before a refiner or an update.
Numbers: equals brute force on 5 linears x 4 levels (tests/oracle/test_allocators.py). Layer errors do not add up to the
    model's loss: a baseline and a start, not a promise.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from sparsekit.contracts import AllocationContext, Allocator, MethodOptions
from sparsekit.errors import PlanError
from sparsekit.layer_errors import output_error
from sparsekit.search.grid import Grid, make_grid
from sparsekit.stats.gram import Gram

Errors = dict[int, float]
"""Error of a linear per level: a number of steps more (or fewer) kept weights than uniform."""


class DpOptions(MethodOptions):
    """Options of `dp`."""

    levels: int = Field(default=8, ge=1, le=32, description="levels on each side of uniform")
    span: float = Field(
        default=0.5, gt=0, le=1, description="reach of each side, as a share of min(s, 1 - s) x hidden^2 weights"
    )


class Dp(Allocator[DpOptions]):
    """Least summed relative output error over discrete levels."""

    options_type = DpOptions
    looks = True
    needs = frozenset({"gram"})

    def allocate(self, context: AllocationContext, budget: int) -> dict[str, int]:
        """Measure the errors of all levels, then choose."""
        options, unit = self.options, context.pattern.unit
        grid = make_grid(context.linears, budget, unit, levels=options.levels, span=options.span)
        errors = self._errors(context, grid)
        chosen = knapsack([errors[linear.name] for linear in context.linears], 0)
        levels = {linear.name: level for linear, level in zip(context.linears, chosen, strict=True)}
        context.facts["level"] = dict(levels)
        context.facts["summed_output_error"] = {
            "all": sum(errors[name][level] for name, level in levels.items()),
            "uniform": sum(known[0] for known in errors.values()),
        }
        return grid.counts(levels)

    def _errors(self, context: AllocationContext, grid: Grid) -> dict[str, Errors]:
        """Return the relative output error of every linear at every level."""
        found: dict[str, Errors] = {}
        for linear, weight, stats in context.visit(self.needs | context.pruner.needs):
            gram = stats["gram"]
            assert isinstance(gram, Gram)  # noqa: S101  (the walker delivers what `needs` names)
            error = output_error(weight, gram)
            at = context.pruner.fit(linear, weight, stats)
            found[linear.name] = {
                level: error(at(context.pattern, grid.count(linear.name, level)).weight)
                for level in grid.levels(linear.name)
            }
        return found


def knapsack(errors: Sequence[Errors], total: int) -> list[int]:
    """Return one level per linear such that the levels sum to `total` and their errors to the least.

    Ties go to the lower level of the later linear.

    Raises:
        PlanError: No choice has that sum.
    """
    best: Errors = {0: 0.0}  # sum of levels so far -> least error
    taken: list[dict[int, int]] = []  # per linear: sum of levels -> the level of this linear that reached it
    for known in errors:
        reached: Errors = {}
        by: dict[int, int] = {}
        for level in sorted(known):
            for before, error in best.items():
                if error + known[level] < reached.get(before + level, float("inf")):
                    reached[before + level] = error + known[level]
                    by[before + level] = level
        best = reached
        taken.append(by)
    if total not in best:
        raise PlanError(f"no choice of levels sums to {total}")
    chosen = []
    for by in reversed(taken):
        chosen.append(by[total])
        total -= chosen[-1]
    return chosen[::-1]
