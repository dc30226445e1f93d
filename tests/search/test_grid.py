"""Grids of levels: budgets exact whatever is exchanged."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.contracts import LinearInfo
from sparsekit.search.grid import make_grid
from sparsekit.search.switches import Switches

shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=7)


def linears(sizes):
    return [LinearInfo(f"{place}", place, *size) for place, size in enumerate(sizes)]


@settings(max_examples=80, deadline=None)
@given(sizes=shapes, share=st.floats(0, 1), levels=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_candidate_spends_the_budget(sizes, share, levels, seed):
    them = linears(sizes)
    budget = round(share * sum(linear.numel for linear in them))
    grid = make_grid(them, budget, 1, levels=levels, span=0.5)
    assert sum(grid.uniform.values()) == budget
    if grid.rigid:
        return
    names = tuple(linear.name for linear in them)
    switches, random = Switches(grid, them, whole_blocks=0.5), Random(seed)
    state = switches.draw(random)
    for _ in range(20):
        after = switches.mutate(state, random)
        assert after != state
        state = after
        counts = grid.counts(dict(zip(names, state, strict=True)))
        assert sum(counts.values()) == budget
        assert all(0 <= counts[linear.name] <= linear.numel for linear in them)
        assert all(abs(level) <= levels for level in state)


@settings(max_examples=60, deadline=None)
@given(sizes=shapes, seed=st.integers(0, 99))
def test_the_nearest_levels_of_a_choice_are_itself(sizes, seed):
    them = linears(sizes)
    grid = make_grid(them, sum(linear.numel for linear in them) // 2, 1, levels=4, span=0.5)
    if grid.rigid:
        return
    names = tuple(linear.name for linear in them)
    levels = dict(zip(names, Switches(grid, them, whole_blocks=0.5).draw(Random(seed)), strict=True))
    assert grid.nearest(grid.counts(levels)) == levels


@settings(max_examples=60, deadline=None)
@given(sizes=shapes, seed=st.integers(0, 99))
def test_the_nearest_levels_of_any_counts_spend_the_budget(sizes, seed):
    them, random = linears(sizes), Random(seed)
    budget = sum(linear.numel for linear in them) // 2
    grid = make_grid(them, budget, 1, levels=4, span=0.5)
    counts = {linear.name: random.randint(0, linear.numel) for linear in them}
    nearest = grid.nearest(counts)
    assert sum(nearest.values()) == 0
    assert all(grid.lowest[name] <= level <= grid.highest[name] for name, level in nearest.items())


@pytest.mark.parametrize(
    ("budget", "rigid"), [(0, True), (32, True), (16, False)], ids=["nothing kept", "all kept", "half kept"]
)
def test_what_cannot_be_exchanged_is_rigid(budget, rigid):
    assert make_grid(linears([(4, 4), (4, 4)]), budget, 1, levels=8, span=0.5).rigid == rigid


def test_one_linear_is_rigid():
    assert make_grid(linears([(4, 4)]), 8, 1, levels=8, span=0.5).rigid


def test_a_step_is_that_of_the_paper():
    """half of min(s, 1 - s) x hidden^2 in 8 steps, in whole blocks."""
    them = [LinearInfo("a", 0, 64, 32), LinearInfo("b", 0, 32, 64)]
    assert make_grid(them, 2 * 64 * 32 * 3 // 10, 1, levels=8, span=0.5).step == round(0.5 * 0.3 * 64**2 / 8)
    assert make_grid(them, 2 * 64 * 32 // 4, 16, levels=8, span=0.5).step % 16 == 0
