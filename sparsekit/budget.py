"""Integer budgets: how many weights each linear keeps. Sums are exact; no rounding is lost."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction

from sparsekit.contracts import LinearInfo
from sparsekit.errors import PlanError
from sparsekit.pattern import NM, Pattern


def total(linears: Sequence[LinearInfo], pattern: Pattern, sparsity: float) -> int:
    """Return the number of weights that all `linears` keep together at `sparsity`.

    N:M implies it; otherwise the nearest integer to (1 - sparsity) x weights that whole blocks can express.
    """
    numel = sum(linear.numel for linear in linears)
    if isinstance(pattern, NM):
        return numel // pattern.of * pattern.keep
    return round((1 - exact(sparsity)) * numel / pattern.unit) * pattern.unit


def exact(value: float) -> Fraction:
    """Return the decimal a user wrote: 0.6 is 3/5, not the nearest binary fraction."""
    return Fraction(repr(value))


def distribute(
    linears: Sequence[LinearInfo],
    densities: Mapping[str, float | Fraction],
    budget: int,
    unit: int,
    *,
    min_density: float = 0.0,
    max_density: float = 1.0,
) -> dict[str, int]:
    """Return kept weights per linear for densities that are right up to a common factor.

    Water-filling: each linear keeps level x density x weights, at least `min_density` and at most `max_density` of its
    weights, with the one level at which the sum is `budget`. Rounding follows a divisor method (Sainte-Lague): units
    are awarded one after the other, the k-th of a linear at level (k - 1/2) / (density x weights), ties by name. So
    the sum is exact, and a larger budget takes from nobody, which largest remainders do not promise.

    Args:
        linears: All that share the budget.
        densities: Positive and finite, per name.
        budget: Kept weights in all, a multiple of `unit`.
        unit: Weights that are kept or removed together.
        min_density: Least share of its weights that a linear keeps.
        max_density: Largest share of its weights that a linear keeps.

    Raises:
        PlanError: A density is not positive and finite, or the limits make the budget impossible.
    """
    wanted: dict[str, Fraction] = {}
    for linear in linears:
        density = densities[linear.name]
        if not (density > 0 and math.isfinite(density)):
            raise PlanError(f"a density of {float(density):g} cannot be scaled to a budget", where=linear.name)
        wanted[linear.name] = Fraction(density) * linear.numel / unit
    lowest = {linear.name: math.ceil(exact(min_density) * linear.numel / unit) for linear in linears}
    highest = {linear.name: math.floor(exact(max_density) * linear.numel / unit) for linear in linears}
    least, most = sum(lowest.values()) * unit, sum(highest.values()) * unit
    crossed = next((name for name in lowest if lowest[name] > highest[name]), None)
    if crossed or not least <= budget <= most:
        raise PlanError(
            f"densities from {min_density:g} to {max_density:g} keep {least:,} to {most:,} weights, "
            f"the budget is {budget:,}" + (f"; {crossed} has no count between them" if crossed else ""),
            hint="Widen min_density and max_density, or change the sparsity.",
        )
    counts = _award(wanted, lowest, highest, budget // unit)
    return {name: count * unit for name, count in counts.items()}


def offset(linears: Sequence[LinearInfo], offsets: Mapping[str, float], budget: int) -> dict[str, float]:
    """Return densities for `distribute`: the average, plus each linear's offset, minus the mean of all offsets.

    The mean is weighted by parameters, so the densities spend the budget; what would be zero or less is a
    millionth of the largest. `distribute` does the rest where they leave 0 to 1.
    """
    numel = sum(linear.numel for linear in linears)
    mean = sum(offsets[linear.name] * linear.numel for linear in linears) / numel
    return above_zero({linear.name: budget / numel + offsets[linear.name] - mean for linear in linears})


def above_zero(densities: Mapping[str, float]) -> dict[str, float]:
    """Return densities that are at least a millionth of the largest; all 1 where none is above zero."""
    largest = max(densities.values())
    return {name: max(density, 1e-6 * largest) if largest > 0 else 1.0 for name, density in densities.items()}


def _award(
    wanted: Mapping[str, Fraction], lowest: Mapping[str, int], highest: Mapping[str, int], units: int
) -> dict[str, int]:
    """Return integer counts that sum to `units`: those awarded up to one level, ties at that level by name."""
    level = _level(wanted, lowest, highest, units)
    counts = {
        name: min(max(math.floor(level * share + Fraction(1, 2)), lowest[name]), highest[name])
        for name, share in wanted.items()
    }
    missing = units - sum(counts.values())
    if missing > 0:
        next_up = [((counts[n] + Fraction(1, 2)) / wanted[n], n) for n in wanted if counts[n] < highest[n]]
        heapq.heapify(next_up)
        for _ in range(missing):
            at, name = heapq.heappop(next_up)
            counts[name] += 1
            if counts[name] < highest[name]:
                heapq.heappush(next_up, (at + 1 / wanted[name], name))
    # Taking back runs the award in reverse; the name that comes last in the order of ties loses first.
    rank = {name: -place for place, name in enumerate(sorted(wanted))}
    last = [((Fraction(1, 2) - counts[n]) / wanted[n], rank[n], n) for n in wanted if counts[n] > lowest[n]]
    heapq.heapify(last)
    for _ in range(-missing):
        at, place, name = heapq.heappop(last)
        counts[name] -= 1
        if counts[name] > lowest[name]:
            heapq.heappush(last, (at + 1 / wanted[name], place, name))
    return counts


def _level(
    wanted: Mapping[str, Fraction], lowest: Mapping[str, int], highest: Mapping[str, int], units: int
) -> Fraction:
    """Return the level at which the shares, kept within their limits, sum to `units` before rounding."""

    def filled(level: Fraction) -> Fraction:
        return sum(
            (min(max(level * wanted[n], Fraction(lowest[n])), Fraction(highest[n])) for n in wanted), Fraction(0)
        )

    bends = sorted({Fraction(limit[name]) / wanted[name] for limit in (lowest, highest) for name in wanted})
    above = min(bisect_left(bends, Fraction(units), key=filled), len(bends) - 1)
    if above == 0:
        return bends[0]
    low, high = bends[above - 1], bends[above]
    rise = filled(high) - filled(low)
    return low + (high - low) * (units - filled(low)) / rise if rise else high
