"""What every pruner promises, found by the registry: a new method is under these tests with no edit here."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from sparsekit import masks, registry
from sparsekit.contracts import LinearInfo
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.recipe.load import recipe_from

METHODS = registry.names("pruners")
SHAPES = [(12, 16), (8, 48), (40, 8)]
PATTERNS = [Unstructured(), NM(2, 4), NM(1, 4), NM(4, 8), Block(4, 2)]
HEADINGS = ("What it does:", "Source:", "Shapes:", "Cost:", "Deviations:", "Numbers:")


def problem(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(6 * shape[1], shape[1], generator=generator) * torch.linspace(0.1, 3, shape[1])
    return LinearInfo("layer.linear", 0, *shape), weight, x


def fitted(method, linear, weight, x, seed=0):
    cls = registry.load("pruners", method)
    stats = {}
    for name in cls.needs:
        kind = registry.load("stats", name)
        stats[name] = kind(linear.in_features)
        for seen in [x] if kind.of == "inputs" else gradients(linear, x):
            stats[name].update(seen)
    return cls(cls.options_type(), seed).fit(linear, weight, stats)


def gradients(linear, x, samples=6):
    """Gradients [out, in] of samples of some tokens each: outer products of answers and inputs."""
    generator = torch.Generator().manual_seed(1)
    tokens = x.reshape(samples, -1, linear.in_features)
    return torch.randn(samples, linear.out_features, tokens.shape[1], generator=generator) @ tokens


def budget(pattern, numel, sparsity):
    if isinstance(pattern, NM):
        return numel // pattern.of * pattern.keep
    return round(numel * (1 - sparsity) / pattern.unit) * pattern.unit


def test_there_are_methods_to_test():
    assert set(METHODS) >= {"random", "magnitude", "wanda"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_pattern_and_support(method, shape, pattern):
    linear, weight, x = problem(shape)
    at = fitted(method, linear, weight, x)
    for sparsity in (0.0, 0.3, 0.5, 0.97, 1.0):
        kept = budget(pattern, weight.numel(), sparsity)
        pruned = at(pattern, kept)
        masks.check(pruned.weight, pruned.keep, pattern, kept, where=method)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_changed_and_results_repeat(method):
    linear, weight, x = problem((12, 16))
    before = weight.clone()
    one = fitted(method, linear, weight, x)(Unstructured(), 96)
    two = fitted(method, linear, weight, x)(Unstructured(), 96)
    assert torch.equal(weight, before)
    assert torch.equal(one.keep, two.keep)
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_removed_is_nothing_changed(method):
    linear, weight, x = problem((12, 16))
    pruned = fitted(method, linear, weight, x)(Unstructured(), weight.numel())
    assert torch.equal(pruned.weight, weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_budget_keeps_no_more(method):
    linear, weight, x = problem((12, 16))
    at = fitted(method, linear, weight, x)
    kept = [int(at(Unstructured(), count).keep.sum()) for count in (0, 40, 96, 150, 192)]
    assert kept == [0, 40, 96, 150, 192]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zeros", "constant", "dead inputs"])
def test_degenerate_weights_and_inputs_still_give_the_budget(method, kind):
    linear, weight, x = problem((12, 16))
    if kind == "zeros":
        weight = torch.zeros_like(weight)
    elif kind == "constant":
        weight = torch.full_like(weight, 0.5)
    else:
        x = x * 0
    pruned = fitted(method, linear, weight, x)(Unstructured(), 96)
    masks.check(pruned.weight, pruned.keep, Unstructured(), 96, where=method)


@pytest.mark.parametrize("method", METHODS)
def test_probes_are_named_where_gradients_are_needed_and_only_there(method):
    cls = registry.load("pruners", method)
    needed = any(registry.load("stats", name).of == "gradients" for name in cls.needs)
    assert (cls(cls.options_type(), 0).probes() is not None) == needed


@pytest.mark.parametrize("method", METHODS)
def test_options_are_strict_and_reach_recipes(method):
    cls = registry.load("pruners", method)
    assert cls.options_type.model_config["extra"] == "forbid"
    stage = {"stage": "prune", "method": method, "sparsity": 0.5}
    recipe = recipe_from({"sparsekit": 1, "name": "r", "description": "d", "stages": [stage]})
    assert recipe.stages[0].method_options() == cls.options_type()


@pytest.mark.parametrize("room", registry.ROOMS)
def test_module_texts_have_their_headings(room):
    for name in registry.names(room):
        text = importlib.import_module(f"sparsekit.{room}.{name}").__doc__ or ""
        missing = [heading for heading in HEADINGS if heading not in text]
        assert not missing, (room, name, missing)
        assert re.search(r"arXiv \d{4}\.\d{4,5}|literature", text), name


def test_a_new_method_is_one_file(tmp_path, monkeypatch):
    """A file dropped into the room is a method: named, described, usable in a recipe; nothing else is edited."""
    import sparsekit.pruners

    (tmp_path / "smallest.py").write_text(
        '"""Keep the smallest weights.\n\nWhat it does: the opposite of magnitude.\n"""\n'
        "from sparsekit.contracts import LayerPruner, MethodOptions\n"
        "from sparsekit.masks import ranked\n"
        "class SmallestOptions(MethodOptions):\n"
        "    power: float = 1.0\n"
        "class Smallest(LayerPruner[SmallestOptions]):\n"
        "    options_type = SmallestOptions\n"
        "    def fit(self, linear, weight, stats):\n"
        "        return ranked(weight, -weight.abs() ** self.options.power, 'row')\n"
    )
    monkeypatch.setattr(sparsekit.pruners, "__path__", [*sparsekit.pruners.__path__, str(tmp_path)])
    registry._builtin.cache_clear()
    registry.names.cache_clear()
    try:
        stage = {"stage": "prune", "method": "smallest", "sparsity": 0.5, "power": 2.0}
        recipe = recipe_from({"sparsekit": 1, "name": "r", "description": "d", "stages": [stage]})
        assert recipe.stages[0].method_options().power == 2.0
        linear, weight, x = problem((12, 16))
        pruned = fitted("smallest", linear, weight, x)(Unstructured(), 96)
        assert weight[pruned.keep].abs().mean() < weight[~pruned.keep].abs().mean()
    finally:
        registry._builtin.cache_clear()
        registry.names.cache_clear()
