"""Structured OBS against re-solved least squares, in float64 and by a dense solver."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsekit.errors import NumericalError, PlanError
from sparsekit.solve import groups as module
from sparsekit.solve.factor import InverseFactor, damped, inverse_factor
from sparsekit.solve.groups import removal_costs, remove_groups
from sparsekit.solve.masked_lstsq import refit_columns, row_errors
from sparsekit.stats.gram import Gram

OUT, IN, DAMPING = 20, 48, 0.01
HEADS = torch.arange(IN).reshape(4, 2, 6).transpose(0, 1).reshape(2, 4, 6).reshape(8, 6)  # not in channel order
SETS = {"neurons": torch.arange(IN)[:, None], "heads": HEADS, "pairs": torch.arange(IN).reshape(2, IN // 2).T}


def problem(seed=0, tokens=400):
    """A weight and strongly correlated inputs: 48 channels made of 20 sources and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    sources = torch.randn(tokens, 20, generator=generator) @ torch.randn(20, IN, generator=generator)
    x = (sources + 0.5 * torch.randn(tokens, IN, generator=generator)) * torch.logspace(-0.5, 0.5, IN)
    return weight, x, x.double().T @ x.double()


def reduce(weight, gram, sets, removed, rounds=1):
    return remove_groups(weight, gram, inverse_factor(gram, DAMPING), sets, removed, rounds=rounds)


def full(reduced):
    """The whole width again, zero where channels are gone."""
    weight = torch.zeros(OUT, IN)
    weight[:, reduced.channels] = reduced.weight
    return weight


def loss(weight, other, hessian):
    return float(row_errors(weight, other, hessian).sum()) / 2


def optimum(weight, channels, hessian):
    """Least squares on some channels, by an explicit inverse in float64."""
    best = torch.zeros(OUT, IN, dtype=torch.float64)
    best[:, channels] = weight.double() @ hessian[:, channels] @ torch.linalg.inv(hessian[channels][:, channels])
    return best


@pytest.mark.parametrize("gone", [(), (2,), (0, 5)])
@pytest.mark.parametrize("kind", sorted(SETS))
def test_costs_are_the_increase_of_the_loss_with_all_else_solved_again(kind, gone):
    weight, _, gram = problem()
    sets, hessian = SETS[kind], damped(gram, DAMPING)
    left = [group for group in range(len(sets)) if group not in gone]
    channels = sets[left].reshape(-1)
    before = optimum(weight, channels, hessian)
    inverse = torch.linalg.inv(hessian[channels][:, channels])
    costs = removal_costs(before[:, channels].T, inverse, sets.shape[1])
    for place, group in enumerate(left):
        rest = sets[[other for other in left if other != group]].reshape(-1)
        increase = loss(weight, optimum(weight, rest, hessian), hessian) - loss(weight, before, hessian)
        assert float(costs[place]) == pytest.approx(increase, rel=1e-9)


@pytest.mark.parametrize("rounds", [1, 3, 48])
@pytest.mark.parametrize("kind", sorted(SETS))
def test_weights_equal_lstsq_on_the_kept_columns(kind, rounds):
    weight, x, gram = problem()
    sets = SETS[kind]
    ridge = DAMPING * float(gram.diagonal().mean())
    inputs = torch.cat([x.double(), ridge**0.5 * torch.eye(IN, dtype=torch.float64)])
    levels = [len(sets) // 4, len(sets) // 2, len(sets) - 1]
    for count, reduced in zip(levels, reduce(weight, gram, sets, levels, rounds), strict=True):
        assert len(reduced.groups) == len(sets) - count
        assert torch.equal(reduced.groups, reduced.groups.sort().values)
        assert torch.equal(reduced.channels, sets[reduced.groups].reshape(-1).sort().values)
        targets = inputs @ weight.double().T
        solution = torch.linalg.lstsq(inputs[:, reduced.channels], targets, driver="gelsd").solution.T
        torch.testing.assert_close(reduced.weight.double(), solution, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(SETS))
def test_one_group_a_round_is_greedy_removal_by_re_solving(kind):
    """Each round's choice is the one that a search with a solved system for every candidate makes."""
    weight, _, gram = problem()
    sets, hessian = SETS[kind], damped(gram, DAMPING)
    removed = list(range(len(sets)))
    left = list(range(len(sets)))
    for reduced in reduce(weight, gram, sets, removed):
        assert reduced.groups.tolist() == left
        candidates = [[group for group in left if group != gone] for gone in left]
        if len(left) > 1:
            left = min(candidates, key=lambda c: loss(weight, optimum(weight, sets[c].reshape(-1), hessian), hessian))


@pytest.mark.parametrize("kind", sorted(SETS))
def test_the_downdated_state_is_the_optimum_without_any_refit(kind):
    weight, _, gram = problem()
    sets, hessian = SETS[kind], damped(gram, DAMPING)
    state = module._Remaining.dense(weight, inverse_factor(gram, DAMPING), sets)
    for _ in range(3):
        state = state.without_cheapest(2)
        channels = sets[state.groups].reshape(-1)
        torch.testing.assert_close(state.rows.T, optimum(weight, channels, hessian)[:, channels], rtol=1e-8, atol=1e-9)
        inverse = torch.linalg.inv(hessian[channels][:, channels])
        torch.testing.assert_close(state.inverse, inverse, rtol=1e-8, atol=1e-12)


def test_nothing_removed_is_nothing_changed_and_the_inputs_stay_as_they_are():
    weight, _, gram = problem()
    before = weight.clone(), gram.clone()
    first, _ = reduce(weight, gram, HEADS, [0, 5])
    assert torch.equal(first.weight, weight)
    assert first.groups.tolist() == list(range(8))
    assert first.channels.tolist() == list(range(IN))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("kind", sorted(SETS))
def test_more_removed_is_nested_and_never_less_error(kind):
    weight, _, gram = problem()
    levels = reduce(weight, gram, SETS[kind], range(0, len(SETS[kind])), 2)
    errors = [loss(weight, full(reduced), damped(gram, DAMPING)) for reduced in levels]
    assert errors[0] == 0
    assert all(more > less for less, more in itertools.pairwise(errors))
    for less, more in itertools.pairwise(levels):
        assert set(more.groups.tolist()) < set(less.groups.tolist())


@pytest.mark.parametrize("kind", sorted(SETS))
@pytest.mark.parametrize("seed", range(3))
def test_beats_random_groups_and_the_largest_norms_with_the_same_refit(kind, seed):
    weight, _, gram = problem(seed)
    sets, hessian = SETS[kind], damped(gram, DAMPING)
    count = len(sets) // 2
    ours = loss(weight, full(reduce(weight, gram, sets, [count], 4)[0]), hessian)

    def refitted(groups):
        kept = torch.zeros(IN, dtype=torch.bool)
        kept[sets[groups].reshape(-1)] = True
        other = torch.zeros(OUT, IN)
        other[:, kept] = refit_columns(weight, kept, hessian)
        return loss(weight, other, hessian)

    generator = torch.Generator().manual_seed(seed)
    random = [refitted(torch.randperm(len(sets), generator=generator)[count:]) for _ in range(20)]
    norms = torch.stack([weight[:, group].square().sum() for group in sets])
    assert ours <= min(random) * 1.000001  # of few groups the best choice is among the random ones
    assert ours < 0.8 * sum(random) / len(random)
    assert ours <= refitted(norms.argsort()[count:])


def test_rounds_see_that_groups_stand_in_for_each_other():
    """Of two equal channels one round removes both, or none; two rounds remove one of each pair."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(300, 6, generator=generator)
    x = torch.cat([half, half + 1e-3 * torch.randn(300, 6, generator=generator)], dim=1)
    weight = torch.ones(4, 12) * torch.arange(1, 7).repeat(2)
    gram = Gram(12)
    gram.update(x)
    factor, sets = inverse_factor(gram.matrix, 1e-6), torch.arange(12)[:, None]
    errors = [
        loss(weight, torch.zeros(4, 12).index_copy(1, level.channels, level.weight), gram.matrix)
        for rounds in (1, 6)
        for level in remove_groups(weight, gram.matrix, factor, sets, [6], rounds=rounds)
    ]
    assert errors[1] < 1e-3 * errors[0]


def test_channels_that_were_never_seen_go_first():
    weight, x, _ = problem()
    x[:, 12:18] = 0
    gram = Gram(IN)
    gram.update(x)
    (reduced,) = reduce(weight, gram.matrix, SETS["neurons"], [6])
    assert not set(range(12, 18)) & set(reduced.groups.tolist())
    torch.testing.assert_close(reduced.weight, weight[:, reduced.channels], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("removed", [[8], [3, 3], [4, 2], [-1], [0, 9]])
def test_levels_that_do_not_ascend_or_leave_nothing_are_refused(removed):
    weight, _, gram = problem()
    with pytest.raises(PlanError, match="of 8 groups; needed are ascending numbers from 0 to 7"):
        reduce(weight, gram, HEADS, removed)


@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_an_inverse_that_is_none_is_refused(kind):
    weight, _, gram = problem()
    broken = InverseFactor(torch.zeros(IN, IN, dtype=torch.float64), gram.diagonal() == 0, DAMPING, ())
    with pytest.raises(NumericalError, match="not positive definite any more"):
        remove_groups(weight, gram, broken, SETS[kind], [1], rounds=1)
