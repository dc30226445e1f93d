"""Allocators against brute force, closed forms and their papers' definitions."""

from __future__ import annotations

import itertools
import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sparsekit import budget
from sparsekit.allocate.dp import knapsack
from sparsekit.allocate.sap import pq_index
from sparsekit.contracts import LinearInfo
from sparsekit.errors import PlanError
from sparsekit.pattern import Unstructured
from tests.contract.test_allocators import LINEARS, Quadratic, problem
from tests.support.allocation import allocator, context

# Attention and MLP of SmolLM2-135M: grouped queries make k and v small.
SMOLLM2 = [
    LinearInfo(f"{block}.{name}", block, *shape)
    for block in range(30)
    for name, shape in {
        "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
        "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
    }.items()
]  # fmt: skip


def density(counts, linear):
    return counts[linear.name] / linear.numel


def by_block(linears, counts):
    kept, numel = {}, {}
    for linear in linears:
        kept[linear.block] = kept.get(linear.block, 0) + counts[linear.name]
        numel[linear.block] = numel.get(linear.block, 0) + linear.numel
    return {block: kept[block] / numel[block] for block in kept}


# --- erk ---------------------------------------------------------------------------------------------------
def test_erk_of_equal_shapes_is_uniform():
    linears = [LinearInfo(f"l{i}", i, 12, 40) for i in range(5)]
    total = budget.total(linears, Unstructured(), 0.37)
    assert allocator("erk").allocate(context(linears), total) == allocator("uniform").allocate(context(linears), total)


def test_erk_is_the_fixed_point_of_solving_again():
    """The published procedure, in floats: scale, make dense what exceeds 1, scale the rest again."""
    for sparsity in (0.2, 0.5, 0.7, 0.9):
        total = budget.total(SMOLLM2, Unstructured(), sparsity)
        counts = allocator("erk").allocate(context(SMOLLM2), total)
        dense: set[str] = set()
        while True:
            free = [linear for linear in SMOLLM2 if linear.name not in dense]
            left = total - sum(linear.numel for linear in SMOLLM2 if linear.name in dense)
            scale = left / sum(linear.in_features + linear.out_features for linear in free)
            over = {x.name for x in free if scale * (x.in_features + x.out_features) > x.numel}
            if not over:
                break
            dense |= over
        for linear in SMOLLM2:
            wanted = scale * (linear.in_features + linear.out_features)
            assert abs(counts[linear.name] - (linear.numel if linear.name in dense else wanted)) < 1.5


def test_erk_under_grouped_queries_leaves_k_and_v_dense():
    counts = allocator("erk").allocate(context(SMOLLM2), budget.total(SMOLLM2, Unstructured(), 0.5))
    found = {linear.name.split(".")[1]: round(density(counts, linear), 2) for linear in SMOLLM2[:7]}
    assert found == {"q": 0.62, "k": 1, "v": 1, "o": 0.62, "gate": 0.43, "up": 0.43, "down": 0.43}


def test_erk_respects_limits_or_says_that_it_cannot():
    total = budget.total(SMOLLM2, Unstructured(), 0.5)
    counts = allocator("erk", min_density=0.45, max_density=0.8).allocate(context(SMOLLM2), total)
    assert all(0.45 <= density(counts, linear) <= 0.8 for linear in SMOLLM2)
    with pytest.raises(PlanError, match=r"from 0 to 0\.4 keep"):
        allocator("erk", max_density=0.4).allocate(context(SMOLLM2), total)


# --- depth, uniform_plus, random ---------------------------------------------------------------------------
def test_equal_densities_are_uniform():
    total = budget.total(SMOLLM2, Unstructured(), 0.6)
    uniform = allocator("uniform").allocate(context(SMOLLM2), total)
    assert allocator("depth", densities=(0.7, 0.7, 0.7)).allocate(context(SMOLLM2), total) == uniform
    assert allocator("uniform_plus", edge=1.0).allocate(context(SMOLLM2), total) == uniform


def test_depth_runs_in_straight_lines_through_its_points():
    linears = [LinearInfo(f"l{i}", i, 100, 100) for i in range(5)]
    counts = allocator("depth", densities=(1.5, 0.5, 1.0)).allocate(context(linears), 22500)
    relative = [1.5, 1.0, 0.5, 0.75, 1.0]
    assert [counts[linear.name] for linear in linears] == [round(22500 * r / sum(relative)) for r in relative]


def test_uniform_plus_raises_both_ends():
    total = budget.total(SMOLLM2, Unstructured(), 0.6)
    found = by_block(SMOLLM2, allocator("uniform_plus", edge=1.5).allocate(context(SMOLLM2), total))
    inside = found[1]
    assert all(found[block] == pytest.approx(inside, abs=1e-5) for block in range(1, 29))
    assert found[0] == pytest.approx(1.5 * inside, abs=1e-5)
    assert found[29] == pytest.approx(1.5 * inside, abs=1e-5)


@pytest.mark.parametrize("by", ["block", "linear"])
def test_random_densities_depend_on_seed_and_name_and_stay_in_their_span(by):
    total = budget.total(SMOLLM2, Unstructured(), 0.6)
    one, same, other = (
        allocator("random", seed=seed, by=by).allocate(context(linears), total)
        for seed, linears in ((1, SMOLLM2), (1, SMOLLM2[::-1]), (2, SMOLLM2))
    )
    assert one == same
    assert one != other
    spread = [density(one, linear) for linear in SMOLLM2]
    assert 0.05 < max(spread) - min(spread) <= 0.16 + 1e-4
    inside = {round(density(one, linear), 4) for linear in SMOLLM2 if linear.block == 3}
    assert (len(inside) == 1) == (by == "block")


# --- owl ---------------------------------------------------------------------------------------------------
def owl_by_hand(seen, sparsity, lam, outlier, mean):
    """The definition, block by block in float64."""
    scores, numel = {}, {}
    for linear, weight, stats in seen.visit(frozenset({"sumsq"})):
        stat = stats["sumsq"]
        norm = (stat.sumsq / stat.tokens).sqrt()
        scores.setdefault(linear.block, []).append((weight.double().abs() * norm).reshape(-1))
        numel[linear.block] = numel.get(linear.block, 0) + linear.numel
    percent = {}
    for block, parts in scores.items():
        if mean == "linear":
            parts = [part / part.mean() for part in parts]
        pooled = torch.cat(parts)
        limit = outlier * (1 if mean == "linear" else pooled.mean())
        percent[block] = 100 * float((pooled > limit).double().mean())
    low, high = min(percent.values()), max(percent.values())
    t = {block: 2 * lam * (d - low) / (high - low) for block, d in percent.items()}
    mean = sum(t[b] * numel[b] for b in t) / sum(numel.values())
    return {block: 1 - sparsity + t[block] - mean for block in t}


@pytest.mark.parametrize("mean", ["block", "linear"])
@pytest.mark.parametrize(("lam", "outlier"), [(0.08, 5.0), (0.15, 3.0)])
def test_owl_is_its_definition(lam, outlier, mean):
    seen = problem()
    total = budget.total(LINEARS, Unstructured(), 0.6)
    counts = allocator("owl", lam=lam, outlier=outlier, mean=mean).allocate(seen, total)
    wanted = owl_by_hand(seen, 0.6, lam, outlier, mean)
    assert len(set(wanted.values())) == 3
    for linear in LINEARS:  # uniform inside a block
        assert density(counts, linear) == pytest.approx(wanted[linear.block], abs=2.5 / linear.numel)
    assert set(seen.facts["outliers_percent"]) == {"0", "1", "2"}


@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.7, 0.95])
def test_owl_blocks_stay_within_two_lambda(sparsity):
    counts = allocator("owl").allocate(problem(), budget.total(LINEARS, Unstructured(), sparsity))
    for found in by_block(LINEARS, counts).values():
        assert abs(found - (1 - sparsity)) <= 0.16 + 5e-3
        assert 0 <= found <= 1


def test_owl_without_any_spread_is_uniform():
    weights = {linear.name: torch.ones(linear.out_features, linear.in_features) for linear in LINEARS}
    inputs = {linear.name: torch.ones(10, linear.in_features) for linear in LINEARS}
    total = budget.total(LINEARS, Unstructured(), 0.6)
    for scale in (1.0, 0.0):  # no outliers; no scores at all
        seen = context(LINEARS, {name: scale * weight for name, weight in weights.items()}, inputs)
        assert allocator("owl").allocate(seen, total) == allocator("uniform").allocate(seen, total)


def test_owl_does_not_care_how_many_tokens_an_expert_saw():
    seen = problem()
    few = {linear.name: torch.randn(40, linear.in_features) for linear in LINEARS}
    many = {name: x.repeat(9 if name.endswith("1") else 1, 1) for name, x in few.items()}
    weights = {linear.name: weight for linear, weight, _ in seen.visit(frozenset())}
    total = budget.total(LINEARS, Unstructured(), 0.6)
    one, other = (allocator("owl", outlier=2.0).allocate(context(LINEARS, weights, x), total) for x in (few, many))
    assert one == other


def test_owl_by_linear_means_ignores_scales_of_linears():
    """A linear whose scores are all ten times larger has no outliers for it."""
    seen = problem()
    weights = {linear.name: weight for linear, weight, _ in seen.visit(frozenset())}
    inputs = {linear.name: torch.ones(10, linear.in_features) for linear in LINEARS}
    scaled = {name: weight * (10 if name == "1.2" else 1) for name, weight in weights.items()}
    total = budget.total(LINEARS, Unstructured(), 0.6)
    for mean, same in (("linear", True), ("block", False)):
        owl = allocator("owl", outlier=2.0, mean=mean)
        one, other = (owl.allocate(context(LINEARS, values, inputs), total) for values in (weights, scaled))
        assert (one == other) == same


# --- dp ----------------------------------------------------------------------------------------------------
ERRORS = st.lists(
    st.dictionaries(st.integers(-3, 3), st.floats(0, 1), min_size=1, max_size=4).map(lambda known: {0: 0.5, **known}),
    min_size=5,
    max_size=5,
)


def brute_force(errors, total):
    """Least error of all choices with that sum; None if there is none."""
    sums = [
        math.fsum(known[level] for known, level in zip(errors, levels, strict=True))
        for levels in itertools.product(*errors)
        if sum(levels) == total
    ]
    return min(sums, default=None)


@given(ERRORS, st.integers(-3, 3))
def test_the_knapsack_is_brute_force(errors, total):
    best = brute_force(errors, total)
    if best is None:
        with pytest.raises(PlanError, match="no choice"):
            knapsack(errors, total)
        return
    chosen = knapsack(errors, total)
    assert sum(chosen) == total
    assert math.fsum(known[level] for known, level in zip(errors, chosen, strict=True)) == pytest.approx(best)
    assert knapsack(errors, total) == chosen


def test_a_larger_budget_never_costs_error():
    source = random.Random(0)
    for _ in range(20):
        errors = []
        for _ in range(5):
            falling = sorted((source.random() for _ in range(7)), reverse=True)
            errors.append(dict(zip(range(-3, 4), falling, strict=True)))
        best = [
            math.fsum(known[level] for known, level in zip(errors, knapsack(errors, total), strict=True))
            for total in range(-15, 16)
        ]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(best))


@pytest.mark.parametrize("pruner", ["wanda", "magnitude", "sparsegpt"])
def test_dp_is_the_best_of_all_choices_of_its_levels(pruner):
    """Three linears, every choice of levels pruned and measured in float64."""
    linears = [LinearInfo(f"l{i}", i, 8, 12 + 4 * i) for i in range(3)]
    generator = torch.Generator().manual_seed(2)
    weights = {x.name: torch.randn(x.out_features, x.in_features, generator=generator) for x in linears}
    weights["l0"] = weights["l0"] ** 5  # few weights matter: it can do with fewer
    inputs = {x.name: torch.randn(80, x.in_features, generator=generator).exp() for x in linears}
    seen = context(linears, weights, inputs, pruner=pruner)
    total = budget.total(linears, Unstructured(), 0.5)
    counts = allocator("dp", levels=2).allocate(seen, total)
    step = 0.25 * 12**2 / 2
    uniform = allocator("uniform").allocate(seen, total)

    def error(levels):
        found = 0.0
        for (linear, weight, stats), level in zip(seen.visit(seen.pruner.needs), levels, strict=True):
            pruned = seen.pruner.fit(linear, weight, stats)(seen.pattern, uniform[linear.name] + level * int(step))
            x = inputs[linear.name].double()
            dense, sparse = (x @ w.double().T for w in (weight, pruned.weight))
            found += float((dense - sparse).square().sum() / dense.square().sum())
        return found

    best = min(error(levels) for levels in itertools.product(range(-2, 3), repeat=3) if sum(levels) == 0)
    summed = seen.facts["summed_output_error"]
    assert summed["all"] == pytest.approx(best, rel=1e-4)
    assert summed["uniform"] == pytest.approx(error((0, 0, 0)), rel=1e-4)
    assert summed["all"] < summed["uniform"]
    assert counts == {name: uniform[name] + int(level * step) for name, level in seen.facts["level"].items()}


# --- ecoflap -----------------------------------------------------------------------------------------------
def test_ecoflap_ranks_a_quadratic_toy_like_the_analytic_gradient():
    """Of |W - T|^2 / 2 the central difference along z is exactly z.(W - T): its mean is |W - T| times sqrt(2 / pi)."""
    seen = problem()
    weights = {linear.name: weight for linear, weight, _ in seen.visit(frozenset())}
    model = Quadratic(weights, samples=256)
    seen = context(LINEARS, weights, whole=model)
    counts = allocator("ecoflap", samples=256).allocate(seen, budget.total(LINEARS, Unstructured(), 0.6))
    analytic = dict.fromkeys("012", 0.0)
    for linear in LINEARS:
        distance = (weights[linear.name][None] - model.targets[linear.name]).square().sum(dim=(1, 2)).sqrt()
        analytic[str(linear.block)] += float(distance.mean()) * math.sqrt(2 / math.pi)
    score, noise = seen.facts["score"], seen.facts["standard_error"]
    for block, value in analytic.items():
        assert abs(score[block] - value) < 4 * noise[block] + 0.02 * value
        assert 0 < noise[block] < 0.1 * value
    assert sorted(score, key=score.get) == sorted(analytic, key=analytic.get)
    found = by_block(LINEARS, counts)
    assert found[0] < found[1] < found[2]


def test_ecoflap_keeps_in_proportion_to_the_score_but_for_the_margin():
    seen = problem()
    counts = allocator("ecoflap", margin=0.9).allocate(seen, budget.total(LINEARS, Unstructured(), 0.7))
    score = seen.facts["score"]
    found = by_block(LINEARS, counts)
    for block, value in found.items():  # blocks have one size
        assert value == pytest.approx(0.3 * 3 * score[str(block)] / sum(score.values()), abs=2e-3)
    narrow = by_block(
        LINEARS, allocator("ecoflap", margin=0.05).allocate(problem(), budget.total(LINEARS, Unstructured(), 0.7))
    )
    assert min(narrow.values()) == pytest.approx(0.25, abs=2e-3)
    assert sum(narrow.values()) == pytest.approx(0.9, abs=2e-3)


# --- sap ---------------------------------------------------------------------------------------------------
GAUSSIAN = (2**0.25 * math.gamma(0.75) / math.sqrt(math.pi)) ** 2 / math.sqrt(2 / math.pi)


def test_pq_index_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, 1000, generator=generator)
    laplace = torch.empty(1000, 1000).exponential_(generator=generator)
    one_hot = torch.zeros(100, 100)
    one_hot[3, 4] = -2
    assert pq_index(torch.full((10, 10), -3.0), 0.5, 1) == pytest.approx(0, abs=1e-12)
    assert pq_index(one_hot, 0.5, 1) == pytest.approx(1 - 1e-4)
    assert pq_index(normal, 0.5, 1) == pytest.approx(1 - GAUSSIAN, abs=2e-3)
    assert pq_index(laplace, 0.5, 1) == pytest.approx(1 - math.gamma(1.5) ** 2, abs=2e-3)
    assert pq_index(normal * 1e-30, 0.5, 1) == pytest.approx(pq_index(normal, 0.5, 1))
    assert pq_index(torch.zeros(4, 4), 0.5, 1) == 1


def test_sap_is_its_bound():
    seen = problem()
    p, q = 0.5, 1.0
    counts = allocator("sap").allocate(seen, budget.total(LINEARS, Unstructured(), 0.6))
    bound = {}
    for linear, weight, _ in seen.visit(frozenset()):
        n = linear.numel
        flat = weight.double().abs().reshape(-1)
        index = 1 - n ** (1 / q - 1 / p) * float(flat.norm(p) / flat.norm(q))
        bound[linear.name] = n * (1 - index) ** (p * q / (q - p))
    for linear in LINEARS:
        wanted = sum(counts.values()) * bound[linear.name] / sum(bound.values())
        assert abs(counts[linear.name] - wanted) < 1.5
