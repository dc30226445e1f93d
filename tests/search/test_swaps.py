"""Choices of what goes: equal numbers of each kind, and only parts that may go."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from sparsekit.search.swaps import Swaps


@st.composite
def choices(draw):
    blocks = draw(st.integers(3, 12))
    first, last = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    free = tuple(range(first, blocks - last))
    branches = draw(st.booleans())
    kinds = (free, tuple(blocks + block for block in free)) if branches else (free,)
    return Swaps((1 + branches) * blocks, kinds, draw(st.integers(1, len(free))), draw(st.integers(1, 4)))


@given(choices(), st.integers(0, 1 << 32))
def test_every_choice_drops_as_many_of_each_kind_and_nothing_else(swaps, seed):
    random = Random(seed)
    choice = swaps.draw(random)
    found = [choice]
    for _ in range(0 if swaps.rigid else 5):
        found.append(swaps.mutate(found[-1], random))
        assert found[-1] != found[-2]
    for state in found:
        going = {part for part, gone in enumerate(state) if gone}
        assert len(state) == swaps.parts
        assert going <= {part for kind in swaps.kinds for part in kind}
        assert all(len(going & set(kind)) == swaps.count for kind in swaps.kinds)


def test_every_choice_is_as_likely_as_any_other():
    swaps, random = Swaps(6, ((1, 2, 3, 4),), 2), Random(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        choice = swaps.draw(random)
        counts[choice] = counts.get(choice, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())


def test_least_takes_the_cheapest_of_each_kind():
    swaps = Swaps(8, ((1, 2), (5, 6)), 1)
    assert swaps.least([0, 2, 1, 0, 0, 3, 3, 0]) == (0, 0, 1, 0, 0, 1, 0, 0)
