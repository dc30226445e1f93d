"""Measuring choices of levels: only what differs is changed, and the model is given back as it was."""

from __future__ import annotations

import pytest
import torch

from sparsekit.contracts import LinearInfo, WholeModel
from sparsekit.errors import NonFinite
from sparsekit.masks import ranked
from sparsekit.pattern import Unstructured
from sparsekit.search.divergence import reference
from sparsekit.search.grid import make_grid
from sparsekit.search.landscape import Predictions
from sparsekit.search.layers import LayerLandscape
from sparsekit.search.levels import LevelDatabase

LINEARS = [LinearInfo(f"{block}.{name}", block, 16, 16) for block in range(3) for name in "ab"]
GRID = make_grid(LINEARS, 6 * 128, 1, levels=3, span=0.5)


class Chain(WholeModel):
    """One linear after the other on fixed inputs; the outputs of the last are the logits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(4, 9, 16, generator=generator)
        self.weights = {linear.name: torch.randn(16, 16, generator=generator) / 4 for linear in LINEARS}
        self.replaced: list[str] = []

    def weight(self, linear):
        return self.weights[linear.name]

    def replace(self, linear, weight):
        self.replaced.append(linear.name)
        self.weights[linear.name] = weight

    def logits(self, sample):
        x = self.inputs[sample]
        for linear in LINEARS:
            x = torch.tanh(x @ self.weights[linear.name].T)
        return x * 8

    def tokens(self, sample):
        raise AssertionError("divergence is measured from the dense model")

    def omit(self, blocks, silent=()):
        raise AssertionError("levels leave every block in its place")

    def loss(self, linear, weight, sample):
        raise AssertionError("a search asks for predictions")


@pytest.fixture
def landscape(tmp_path):
    model = Chain()
    with LevelDatabase(tmp_path, {"model": "chain"}, GRID) as database:
        for linear in LINEARS:
            weight = model.weight(linear)
            at = ranked(weight, weight.abs(), "row")
            database.keep(linear, database.parts(linear, weight, at, Unstructured(), nested=True, dtype=torch.float32))
        dense = Predictions(tuple(reference(model.logits(sample)[:-1], 16) for sample in range(4)), 1.0)
        yield LayerLandscape(LINEARS, database, model, dense), model


def test_only_linears_that_differ_are_changed(landscape):
    measured, model = landscape
    uniform, other = (0,) * 6, (1, 0, 0, -1, 0, 0)
    measured.fitness([uniform], [0])
    assert sorted(model.replaced) == sorted(linear.name for linear in LINEARS)
    model.replaced.clear()
    measured.fitness([other, uniform, uniform], [0, 1])
    assert model.replaced == ["0.a", "1.b", "0.a", "1.b"]


def test_what_was_measured_before_does_not_matter(landscape):
    measured, _ = landscape
    states = [(0,) * 6, (3, -3, 0, 0, 0, 0), (0, 0, 1, -1, 2, -2)]
    together = measured.fitness(states, [0, 2])
    alone = [measured.fitness([state], [0, 2])[0] for state in reversed(states)]
    assert together == alone[::-1]
    assert len(set(together)) == 3


def test_fitness_is_the_mean_over_the_samples(landscape):
    measured, _ = landscape
    state = (1, -1, 0, 0, 1, -1)
    single = [measured.fitness([state], [sample])[0] for sample in range(4)]
    assert measured.fitness([state], range(4))[0] == pytest.approx(sum(single) / 4)


def test_the_model_is_given_back_as_it_was(landscape):
    measured, model = landscape
    before = {name: weight.clone() for name, weight in model.weights.items()}
    measured.fitness([(2, -2, 1, -1, 0, 0)], [0])
    assert not all(torch.equal(before[name], weight) for name, weight in model.weights.items())
    measured.leave()
    assert all(torch.equal(before[name], weight) for name, weight in model.weights.items())


def test_predictions_that_are_no_numbers_stop_the_search(landscape):
    measured, model = landscape
    model.inputs[1, 2, 3] = torch.nan
    with pytest.raises(NonFinite, match="NaN"):
        measured.fitness([(0,) * 6], [0, 1])
