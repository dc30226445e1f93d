"""Integer budgets: the sum is exact whatever the shapes, nothing is lost to rounding."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparsekit import budget
from sparsekit.contracts import AllocationContext, LinearInfo
from sparsekit.errors import PlanError
from sparsekit.pattern import NM, Block, Unstructured

LINEARS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12).map(
    lambda shapes: [LinearInfo(f"l{i}", i, rows * 4, columns * 4) for i, (rows, columns) in enumerate(shapes)]
)


def uniform(linears, pattern, total):
    from sparsekit.allocate.uniform import Uniform, UniformOptions

    def no_visit(needs):
        raise AssertionError

    return Uniform(UniformOptions(), 0).allocate(AllocationContext(linears, pattern, no_visit), total)


@given(LINEARS, st.floats(0, 1), st.sampled_from([Unstructured(), Block(4, 1), Block(4, 4), Block(2, 2)]))
def test_uniform_is_exact_and_within_one_unit_of_the_share(linears, sparsity, pattern):
    total = budget.total(linears, pattern, sparsity)
    counts = uniform(linears, pattern, total)
    assert sum(counts.values()) == total
    share = total / sum(linear.numel for linear in linears)
    for linear in linears:
        assert 0 <= counts[linear.name] <= linear.numel
        assert counts[linear.name] % pattern.unit == 0
        assert abs(counts[linear.name] - share * linear.numel) < pattern.unit + 1e-6


@given(LINEARS, st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_sparsity_never_keeps_less(linears, one, other):
    low, high = sorted((one, other))
    assert budget.total(linears, Unstructured(), low) >= budget.total(linears, Unstructured(), high)


def test_sparsity_is_the_decimal_the_user_wrote():
    linears = [LinearInfo("l", 0, 1, 1000)]
    assert budget.total(linears, Unstructured(), 0.6) == 400
    assert budget.total(linears, Unstructured(), 0.7) == 300
    assert budget.total(linears, NM(1, 4), 0.75) == 250


def test_apportion_respects_capacities():
    quotas = {"a": Fraction(90), "b": Fraction(10)}
    assert budget.apportion(quotas, {"a": 50, "b": 100}, 100, 1) == {"a": 50, "b": 50}
    with pytest.raises(PlanError, match="does not fit"):
        budget.apportion(quotas, {"a": 50, "b": 40}, 100, 1)
    assert sum(budget.apportion(quotas, {"a": 100, "b": 100}, 60, 1).values()) == 60
