"""What every refiner and update promises, found by the registry."""

from __future__ import annotations

import pytest
import torch

from sparsekit import masks, registry
from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.errors import PlanError
from sparsekit.masks import select, zeroed
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.recipe.load import recipe_from

SHAPES = [(12, 16), (8, 48), (40, 8)]
PATTERNS = [Unstructured(), NM(2, 4), NM(1, 4), NM(4, 8), Block(4, 2)]
METHODS = [(room, name) for room in ("refine", "update") for name in registry.names(room)]


def problem(shape, pattern, sparsity=0.5, seed=0):
    """A weight, its inputs and a mask that ignores both."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(6 * shape[1], shape[1], generator=generator) * torch.linspace(0.1, 3, shape[1])
    if isinstance(pattern, NM):
        budget = weight.numel() // pattern.of * pattern.keep
    else:
        budget = round(weight.numel() * (1 - sparsity) / pattern.unit) * pattern.unit
    keep = select(torch.rand(shape, generator=generator), pattern, budget, "row")
    return weight, x, Pruned(zeroed(weight, keep), keep), budget


def applied(room, name, weight, x, start, pattern):
    cls = registry.load(room, name)
    linear = LinearInfo("layer.linear", 0, *weight.shape)
    stats = {}
    for need in cls.needs:
        stats[need] = registry.load("stats", need)(linear.in_features)
        stats[need].update(x)
    method = cls(cls.options_type(), 0)
    if room == "refine":
        return method.refine(linear, weight, start, pattern, stats)
    return method.update(linear, weight, start, stats)


def refused(room, name, pattern):
    """Whether a refiner says before it begins that it cannot do the pattern; then it says so for good, in one line."""
    cls = registry.load(room, name)
    if room != "refine":
        return False
    method = cls(cls.options_type(), 0)
    try:
        method.check(pattern)
    except PlanError:
        weight, x, start, _ = problem((12, 16), pattern)
        with pytest.raises(PlanError, match=f"pattern {pattern}"):
            applied(room, name, weight, x, start, pattern)
        return True
    return False


@pytest.mark.parametrize(("room", "name"), METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_pattern_and_support_stay(room, name, shape, pattern):
    if refused(room, name, pattern):
        return
    for sparsity in (0.0, 0.5, 0.97, 1.0):
        weight, x, start, budget = problem(shape, pattern, sparsity)
        result = applied(room, name, weight, x, start, pattern)
        masks.check(result.weight, result.keep, pattern, budget, where=name)
        if room == "refine":  # kept weights have their dense values
            assert torch.equal(result.weight, zeroed(weight, result.keep))
        else:
            assert torch.equal(result.keep, start.keep)


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_inputs_are_not_changed_and_results_repeat(room, name):
    weight, x, start, _ = problem((12, 16), Unstructured())
    before = weight.clone(), start.weight.clone(), start.keep.clone()
    one = applied(room, name, weight, x, start, Unstructured())
    two = applied(room, name, weight, x, start, Unstructured())
    assert all(map(torch.equal, before, (weight, start.weight, start.keep)))
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_an_update_never_raises_the_output_error(room, name):
    if room == "refine":
        return  # a refiner may lower another measure; what it promises is tested with it
    for seed in range(4):
        weight, x, start, _ = problem((12, 16), Unstructured(), seed=seed)
        result = applied(room, name, weight, x, start, Unstructured())
        error = [float((x @ (weight - w).T).square().sum()) for w in (start.weight, result.weight)]
        assert error[1] <= error[0] * 1.0001


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_options_are_strict_and_reach_recipes(room, name):
    options = registry.load(room, name).options_type
    assert options.model_config["extra"] == "forbid"
    stage = {"stage": "prune", "method": "wanda", "sparsity": 0.5, room: name}
    recipe = recipe_from({"sparsekit": 1, "name": "r", "description": "d", "stages": [stage]})
    assert recipe.stages[0].part(room) == (name, options())


def test_rooms_have_methods_to_test():
    assert set(METHODS) >= {("update", "obs"), ("update", "lstsq"), ("refine", "dsnot")}


@pytest.mark.parametrize(("room", "name"), [method for method in METHODS if method[0] == "refine"])
def test_a_refiner_does_unstructured_and_nm(room, name):
    for pattern in (Unstructured(), NM(2, 4), NM(16, 32)):
        assert not refused(room, name, pattern)
