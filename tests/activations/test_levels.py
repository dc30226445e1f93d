"""Levels: their mean is what was asked for, and they cost least where errors are convex."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.activation_levels import spend
from sparsekit.activation_plan import HIGHEST, LEVELS
from sparsekit.contracts import LinearInfo, Site


def site(name: str, numel: int) -> Site:
    return Site(name, "input", 0, 1, (LinearInfo(name, 0, numel, 1),))


def error(errors: list[float], level: float) -> float:
    """Return the error at a level, linear between those measured."""
    points = [(0.0, 0.0), *zip(LEVELS, errors, strict=True)]
    for (low, before), (high, after) in itertools.pairwise(points):
        if level <= high + 1e-12:
            return before + (after - before) * (level - low) / (high - low)
    return errors[-1]


amounts = st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10), st.floats(1.0, 4.0)), min_size=1, max_size=6)


@given(amounts, st.floats(0.05, HIGHEST))
def test_the_weighed_mean_is_what_was_asked_for(linears: list[tuple[int, float, float]], target: float) -> None:
    sites = [site(f"l{place}", numel) for place, (numel, _, _) in enumerate(linears)]
    errors = {
        f"l{place}": [scale * level**power for level in LEVELS] for place, (_, scale, power) in enumerate(linears)
    }
    levels = spend(sites, errors, target)
    whole = sum(each.numel for each in sites)
    assert sum(levels[each.name] * each.numel for each in sites) == pytest.approx(target * whole)
    assert all(-1e-9 <= level <= HIGHEST + 1e-9 for level in levels.values())


@given(amounts, st.floats(0.05, HIGHEST))
def test_convex_errors_are_never_above_those_of_equal_levels(
    linears: list[tuple[int, float, float]], target: float
) -> None:
    sites = [site(f"l{place}", numel) for place, (numel, _, _) in enumerate(linears)]
    errors = {
        f"l{place}": [scale * level**power for level in LEVELS] for place, (_, scale, power) in enumerate(linears)
    }
    levels = spend(sites, errors, target)
    ours, equal = (
        sum(error(errors[each.name], level[each.name]) for each in sites)
        for level in (levels, dict.fromkeys(errors, target))
    )
    assert ours <= equal * (1 + 1e-9) + 1e-12


def test_two_signals_by_hand() -> None:
    """One costs nothing up to 0.5, the other is twice as large and costs from the beginning."""
    free = [0.0] * 5 + [1.0, 2.0, 3.0, 4.0]
    dear = [0.1 * step for step in range(1, 10)]
    levels = spend([site("free", 10), site("dear", 20)], {"free": free, "dear": dear}, 0.3)
    assert levels["free"] == pytest.approx(0.5)
    assert levels["dear"] == pytest.approx(0.2)


def test_a_step_that_is_only_good_as_a_whole_is_taken_as_one() -> None:
    """Errors that rise first and then stay have their hull as the way."""
    errors = {"a": [1.0] * 9, "b": [0.3 * step for step in range(1, 10)]}
    levels = spend([site("a", 10), site("b", 10)], errors, 0.45)
    assert levels["a"] == pytest.approx(0.9)
    assert levels["b"] == pytest.approx(0.0)
