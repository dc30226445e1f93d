"""Integer budgets: the sum is exact whatever the shapes, limits hold, a larger budget takes from nobody."""

from __future__ import annotations

import random
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparsekit import budget
from sparsekit.contracts import LinearInfo
from sparsekit.errors import PlanError
from sparsekit.pattern import NM, Block, Unstructured
from tests.support.allocation import allocator, context

LINEARS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12).map(
    lambda shapes: [LinearInfo(f"l{i}", i, rows * 4, columns * 4) for i, (rows, columns) in enumerate(shapes)]
)
UNITS = st.sampled_from([1, 4, 16])
LIMITS = st.tuples(st.integers(0, 10), st.integers(0, 10)).map(lambda pair: tuple(n / 10 for n in sorted(pair)))


@st.composite
def cases(draw):
    """Linears, densities, unit, limits and the range of budgets that these allow."""
    linears = draw(LINEARS)
    weight = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.5, 1.0]))  # many ties, and anything
    densities = {linear.name: draw(weight) for linear in linears}
    unit, (low, high) = draw(UNITS), draw(LIMITS)
    least = [-(-budget.exact(low) * linear.numel // unit) for linear in linears]
    most = [budget.exact(high) * linear.numel // unit for linear in linears]
    if any(one > other for one, other in zip(least, most, strict=True)):
        low, high, least, most = 0.0, 1.0, [0], [sum(linear.numel for linear in linears) // unit]
    return linears, densities, unit, (low, high), (int(sum(least)), int(sum(most)))


def distribute(case, units):
    linears, densities, unit, (low, high), _ = case
    return budget.distribute(linears, densities, units * unit, unit, min_density=low, max_density=high)


@given(cases(), st.data())
def test_sum_limits_and_units_are_exact(case, data):
    linears, _, unit, (low, high), (least, most) = case
    units = data.draw(st.integers(least, most))
    counts = distribute(case, units)
    assert sum(counts.values()) == units * unit
    for linear in linears:
        assert counts[linear.name] % unit == 0
        assert budget.exact(low) * linear.numel <= counts[linear.name] <= budget.exact(high) * linear.numel


@given(cases(), st.data())
def test_a_larger_budget_takes_from_nobody(case, data):
    least, most = case[4]
    small, large = sorted(data.draw(st.integers(least, most)) for _ in range(2))
    before, after = distribute(case, small), distribute(case, large)
    assert all(before[name] <= after[name] for name in before)
    one_more = distribute(case, min(small + 1, most))
    assert sum(one_more[name] != before[name] for name in before) == (small < most)


@given(cases(), st.data(), st.randoms(use_true_random=False))
def test_the_order_of_the_linears_does_not_matter(case, data, shuffle):
    units = data.draw(st.integers(*case[4]))
    linears = list(case[0])
    shuffle.shuffle(linears)
    assert distribute((linears, *case[1:]), units) == distribute(case, units)


@given(cases(), st.data(), st.floats(0.01, 100))
def test_only_ratios_of_densities_count(case, data, factor):
    units = data.draw(st.integers(*case[4]))
    linears, densities, *rest = case
    scaled = {name: Fraction(density) * Fraction(factor) for name, density in densities.items()}
    assert distribute((linears, scaled, *rest), units) == distribute(case, units)


@given(cases(), st.data())
def test_it_is_water_filling(case, data):
    """One level explains every count to half a unit, but for what the limits cut off."""
    linears, densities, unit, (low, high), (least, most) = case
    counts = distribute(case, data.draw(st.integers(least, most)))
    lower, upper = [], []
    for linear in linears:
        kept, wanted = counts[linear.name], Fraction(densities[linear.name]) * linear.numel
        if kept + unit <= budget.exact(high) * linear.numel:
            upper.append((kept + Fraction(unit, 2)) / wanted)  # the level at which it would have got one more
        if kept - unit >= budget.exact(low) * linear.numel:
            lower.append((kept - Fraction(unit, 2)) / wanted)  # the level at which it got its last
    assert not lower or not upper or max(lower) <= min(upper)


def test_impossible_limits_are_told_with_numbers():
    linears = [LinearInfo("a", 0, 10, 10), LinearInfo("b", 0, 10, 10)]
    same = {"a": 1.0, "b": 1.0}
    with pytest.raises(PlanError, match=r"from 0\.4 to 0\.6 keep 80 to 120 weights, the budget is 130"):
        budget.distribute(linears, same, 130, 1, min_density=0.4, max_density=0.6)
    with pytest.raises(PlanError, match=r"budget is 70.* Widen min_density"):
        budget.distribute(linears, same, 70, 1, min_density=0.4)
    with pytest.raises(PlanError, match="a has no count between them"):
        budget.distribute(linears, same, 100, 100, min_density=0.4, max_density=0.6)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="b: a density of"):
            budget.distribute(linears, {"a": 1.0, "b": wrong}, 100, 1)


def test_limits_spill_over():
    linears = [LinearInfo("a", 0, 10, 10), LinearInfo("b", 0, 10, 10), LinearInfo("c", 0, 10, 10)]
    counts = budget.distribute(linears, {"a": 9.0, "b": 2.0, "c": 1.0}, 120, 1, max_density=0.6)
    assert counts == {"a": 60, "b": 40, "c": 20}
    counts = budget.distribute(linears, {"a": 9.0, "b": 2.0, "c": 1.0}, 120, 1, min_density=0.3)
    assert counts == {"a": 60, "b": 30, "c": 30}


@given(LINEARS, st.floats(-0.5, 0.5), st.randoms(use_true_random=False))
def test_offsets_spend_the_budget_and_stay_within_their_spread(linears, spread, source):
    offsets = {linear.name: spread * source.random() for linear in linears}
    numel = sum(linear.numel for linear in linears)
    densities = budget.offset(linears, offsets, numel // 2)
    assert sum(densities[linear.name] * linear.numel for linear in linears) == pytest.approx(numel // 2)
    counts = budget.distribute(linears, densities, numel // 2, 1)
    for linear in linears:
        assert abs(counts[linear.name] / linear.numel - 0.5) <= abs(spread) + 2 * len(linears) / linear.numel


@given(LINEARS, st.floats(0, 1), st.sampled_from([Unstructured(), Block(4, 1), Block(4, 4), Block(2, 2)]))
def test_uniform_is_exact_and_close_to_the_share(linears, sparsity, pattern):
    total = budget.total(linears, pattern, sparsity)
    counts = allocator("uniform").allocate(context(linears, pattern=pattern), total)
    assert sum(counts.values()) == total
    numel = sum(linear.numel for linear in linears)
    for linear in linears:
        assert 0 <= counts[linear.name] <= linear.numel
        assert counts[linear.name] % pattern.unit == 0
        # Rounding is to the nearest unit; what that misses in all is shared by size.
        rounding = pattern.unit * (1 + len(linears) * linear.numel / numel)
        assert abs(counts[linear.name] - total / numel * linear.numel) < rounding


@given(LINEARS, st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_sparsity_never_keeps_less(linears, one, other):
    low, high = sorted((one, other))
    assert budget.total(linears, Unstructured(), low) >= budget.total(linears, Unstructured(), high)


def test_sparsity_is_the_decimal_the_user_wrote():
    linears = [LinearInfo("l", 0, 1, 1000)]
    assert budget.total(linears, Unstructured(), 0.6) == 400
    assert budget.total(linears, Unstructured(), 0.7) == 300
    assert budget.total(linears, NM(1, 4), 0.75) == 250


def test_many_linears_take_no_time():
    """A mixture of experts has thousands; the award must not walk unit by unit."""
    source = random.Random(0)
    linears = [LinearInfo(f"l{i}", 0, 1024, 4096) for i in range(2000)]
    densities = {linear.name: source.random() + 0.1 for linear in linears}
    total = sum(linear.numel for linear in linears) // 3
    assert sum(budget.distribute(linears, densities, total, 1).values()) == total
