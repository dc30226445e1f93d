"""What every allocator promises, found by the registry."""

from __future__ import annotations

import pytest
import torch

from sparsekit import budget, registry
from sparsekit.contracts import LinearInfo, WholeModel
from sparsekit.errors import PlanError
from sparsekit.pattern import Block, Unstructured
from sparsekit.recipe.load import recipe_from
from tests.support.allocation import allocator, context

METHODS = registry.names("allocate")
SHAPES = [(12, 16), (8, 48), (40, 8)]
LINEARS = [LinearInfo(f"{block}.{i}", block, *shape) for block in range(3) for i, shape in enumerate(SHAPES)]


class Quadratic(WholeModel):
    """Loss |W - T|^2 / 2 of the linear that is changed, a target T per linear and sample."""

    def __init__(self, weights, samples=32):
        self.weights = weights
        self.now = dict(weights)
        generator = torch.Generator().manual_seed(5)
        self.targets = {
            name: torch.randn(samples, *weight.shape, generator=generator) * (1 + int(name[0]))
            for name, weight in weights.items()
        }
        self.inputs = {
            name: torch.randn(8, 4, weight.shape[1], generator=generator) for name, weight in weights.items()
        }

    def weight(self, linear):
        return self.weights[linear.name]

    def replace(self, linear, weight):
        self.now[linear.name] = weight

    def logits(self, sample):
        """Four positions whose vocabulary are the outputs of all linears."""
        return torch.cat([self.inputs[name][sample % 8] @ weight.T for name, weight in self.now.items()], dim=1)

    def tokens(self, sample):
        raise AssertionError("divergence is measured from the dense model")

    def omit(self, blocks, silent=()):
        raise AssertionError("levels leave every block in its place")

    def loss(self, linear, weight, sample):
        return float((weight.double() - self.targets[linear.name][sample].double()).square().sum() / 2)


@pytest.fixture
def make(tmp_path):
    """Return what makes a problem for an allocator that may keep files."""
    return lambda pattern=None, linears=LINEARS: problem(pattern, linears, tmp_path)


def problem(pattern=None, linears=LINEARS, folder=None):
    generator = torch.Generator().manual_seed(0)
    weights = {
        linear.name: torch.randn(linear.out_features, linear.in_features, generator=generator) * (1 + linear.block)
        for linear in linears
    }
    inputs = {linear.name: torch.randn(60, linear.in_features, generator=generator).exp() for linear in linears}
    return context(linears, weights, inputs, pattern=pattern, whole=Quadratic(weights), folder=folder)


def refused(name, pattern):
    return name == "global_magnitude" and not isinstance(pattern, Unstructured)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2)], ids=str)
@pytest.mark.parametrize("sparsity", [0, 0.01, 0.3, 0.5, 0.7, 0.99, 1])
def test_every_linear_once_sum_exact_whole_units(make, name, pattern, sparsity):
    total = budget.total(LINEARS, pattern, sparsity)
    if refused(name, pattern):
        with pytest.raises(PlanError, match="ranks single weights"):
            allocator(name).allocate(make(pattern), total)
        return
    counts = allocator(name).allocate(make(pattern), total)
    assert sorted(counts) == sorted(linear.name for linear in LINEARS)
    assert sum(counts.values()) == total
    for linear in LINEARS:
        assert 0 <= counts[linear.name] <= linear.numel
        assert counts[linear.name] % pattern.unit == 0


@pytest.mark.parametrize("name", METHODS)
def test_results_repeat_and_what_is_looked_at_stays(make, name):
    seen = make()
    total = budget.total(LINEARS, Unstructured(), 0.6)
    before = {linear.name: weight.clone() for linear, weight, _ in seen.visit(frozenset())}
    first, second = (allocator(name, seed=3).allocate(seen, total) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[linear.name], weight) for linear, weight, _ in seen.visit(frozenset()))


@pytest.mark.parametrize("name", METHODS)
def test_one_linear_gets_everything(make, name):
    counts = allocator(name).allocate(make(linears=LINEARS[:1]), 77)
    assert counts == {"0.0": 77}


@pytest.mark.parametrize("name", METHODS)
def test_what_it_says_of_itself_is_true(make, name):
    """`looks`, `needs` and `probes` decide what a dry run shows and whether text is read at all."""
    method = allocator(name)
    total = budget.total(LINEARS, Unstructured(), 0.6)
    asked = set()
    seen = make()

    def visit(needs):
        asked.update({"a visit", *needs})
        return seen.visit(needs)

    def whole():
        asked.add("the whole model")
        return seen.whole()

    method.allocate(context_with(seen, visit, whole), total)
    assert ("a visit" in asked or "the whole model" in asked) == method.looks
    assert ("the whole model" in asked) == (method.probes() is not None)
    assert asked - {"a visit", "the whole model"} <= (
        method.needs | seen.pruner.needs if method.needs or method.probes() else set()
    )


def context_with(seen, visit, whole):
    from dataclasses import replace

    return replace(seen, visit=visit, whole=whole)


@pytest.mark.parametrize("name", METHODS)
def test_options_are_strict_and_reach_recipes(name):
    options = registry.load("allocate", name).options_type
    assert options.model_config["extra"] == "forbid"
    stage = {"stage": "prune", "method": "wanda", "sparsity": 0.5, "allocate": name}
    recipe = recipe_from({"sparsekit": 1, "name": "r", "description": "d", "stages": [stage]})
    assert recipe.stages[0].part("allocate") == (name, options())


def test_there_are_allocators_to_test():
    assert set(METHODS) >= {"uniform", "erk", "owl", "ecoflap", "dp", "sap", "depth", "random", "global_magnitude"}
