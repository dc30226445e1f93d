"""Evolution on landscapes whose optimum is known."""

from __future__ import annotations

from random import Random

import pytest

from sparsekit.contracts import LinearInfo
from sparsekit.errors import PlanError
from sparsekit.search.evolution import Schedule, Stage, evolve, random_search
from sparsekit.search.grid import make_grid
from sparsekit.search.switches import Switches

NAMES = tuple("abcdefgh")
LINEARS = [LinearInfo(name, block // 2, 16, 16) for block, name in enumerate(NAMES)]
GRID = make_grid(LINEARS, 8 * 128, 1, levels=5, span=0.5)
OPTIMUM = (3, -3, 2, -2, 1, -1, 0, 0)
SCHEDULE = Schedule(generations=60, offspring=16, stages=(Stage(4, 2), Stage(1, 8)), pool=32)


class Separable:
    """Squared distance from the optimum, with noise that depends on the sample."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def fitness(self, states, draw):
        self.asked.append((len(states), tuple(draw)))
        return [self._one(state, draw) for state in states]

    def _one(self, state, draw):
        distance = sum((level - best) ** 2 for level, best in zip(state, OPTIMUM, strict=True))
        noise = sum(Random(f"{state} {sample}").gauss(0, 1) for sample in draw) / len(draw)
        return distance + self.noise * noise


def run(landscape, schedule=SCHEDULE, seed=0, start=(0,) * 8, most=2):
    return list(evolve(start, Switches(GRID, LINEARS, most=most, whole_blocks=0.3).mutate, landscape, schedule, seed))


def test_finds_the_optimum_of_a_separable_landscape():
    found = run(Separable())[-1]
    assert found.best == OPTIMUM
    assert found.fitness == 0


def test_beats_random_choices_of_as_many_samples():
    landscape = Separable(noise=2.0)
    found = run(landscape)[-1]
    _, null = random_search(Switches(GRID, LINEARS).draw, Separable(noise=2.0), SCHEDULE, found.samples, 0)
    assert found.fitness < null


@pytest.mark.parametrize("seed", range(4))
def test_the_best_never_gets_worse(seed):
    fitness = [each.fitness for each in run(Separable(noise=30.0), seed=seed)]
    assert fitness == sorted(fitness, reverse=True)


def test_the_same_seed_is_the_same_search_and_another_is_not():
    first, second, other = run(Separable(3.0)), run(Separable(3.0)), run(Separable(3.0), seed=1)
    assert first == second
    assert first != other


@pytest.mark.parametrize("stopped", [0, 1, 17, 59, 60])
def test_goes_on_after_an_interruption_as_if_there_had_been_none(stopped):
    whole = run(Separable(3.0))
    begun = whole[stopped]
    again = run(Separable(3.0), start=begun)
    assert again == whole[stopped:]


def test_samples_are_drawn_anew_but_the_last_stage_is_fixed():
    landscape = Separable()
    run(landscape)
    first = [draw for count, draw in landscape.asked if count == 16]
    last = [draw for count, draw in landscape.asked if count != 16]
    assert len(set(first)) > 40
    assert set(last) == {tuple(range(8))}
    assert not {sample for draw in first for sample in draw} & set(range(8))


def test_samples_are_counted():
    landscape = Separable()
    found = run(landscape)[-1]
    assert found.samples == sum(count * len(draw) for count, draw in landscape.asked)
    assert found.samples == SCHEDULE.fixed + 60 * SCHEDULE.evaluated()


def test_random_search_spends_what_it_is_given():
    landscape = Separable()
    random_search(Switches(GRID, LINEARS).draw, landscape, SCHEDULE, 10 * SCHEDULE.evaluated(), 0)
    assert sum(count * len(draw) for count, draw in landscape.asked) == 10 * SCHEDULE.evaluated()


@pytest.mark.parametrize(
    ("stages", "pool", "message"),
    [
        ((Stage(2, 4),), 32, "leaves one survivor"),
        ((), 32, "leaves one survivor"),
        ((Stage(20, 1), Stage(1, 4)), 32, "leaves 20 of 16"),
        ((Stage(0, 1), Stage(1, 4)), 32, "leaves 0 of 16"),
        ((Stage(4, 30), Stage(1, 4)), 32, "draws 30 samples beside 4 fixed ones, it has 32"),
        ((Stage(1, 33),), 32, "draws 0 samples beside 33"),
    ],
)
def test_impossible_schedules_are_refused(stages, pool, message):
    with pytest.raises(PlanError, match=message):
        Schedule(10, 16, stages, pool)
