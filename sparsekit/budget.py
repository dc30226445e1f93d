"""Integer budgets: how many weights each linear keeps. Sums are exact; no rounding is lost."""

from __future__ import annotations

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


def apportion(quotas: Mapping[str, Fraction], capacity: Mapping[str, int], budget: int, unit: int) -> dict[str, int]:
    """Turn fractional quotas into integers that sum to `budget`.

    Largest remainder: each name gets its quota rounded down to a multiple of `unit`, what is left goes to the
    largest fractions, ties by name.

    Args:
        quotas: Wanted kept weights per name; they sum to about `budget`.
        capacity: Most that each name can hold, a multiple of `unit`.
        budget: Multiple of `unit`.
        unit: Weights that are kept or removed together.

    Raises:
        PlanError: The capacities cannot hold the budget.
    """
    if budget > sum(capacity.values()) or budget < 0:
        raise PlanError(f"a budget of {budget} kept weights does not fit into {sum(capacity.values())} weights")
    counts: dict[str, int] = {}
    remainders: dict[str, Fraction] = {}
    for name, quota in quotas.items():
        wanted = min(max(quota / unit, Fraction(0)), Fraction(capacity[name] // unit))
        counts[name] = int(wanted)
        remainders[name] = wanted - counts[name]
    left = budget // unit - sum(counts.values())
    order = sorted(quotas, key=lambda name: (-remainders[name], name))
    while left > 0:
        open_names = [name for name in order if counts[name] < capacity[name] // unit]
        for name in open_names[:left]:
            counts[name] += 1
        left -= min(left, len(open_names))
    while left < 0:
        filled = [name for name in reversed(order) if counts[name] > 0]
        for name in filled[:-left]:
            counts[name] -= 1
        left += min(-left, len(filled))
    return {name: count * unit for name, count in counts.items()}
