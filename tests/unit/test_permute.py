"""The search for an order of channels: what it promises, and how near it comes to the best there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import NonFinite, PlanError
from sparsekit.masks import select
from sparsekit.pattern import NM
from sparsekit.solve.permute import best_order, kept_score, snake

PATTERNS = [NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(4, 4), NM(1, 1)]


def scores(out, width, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(out, width, generator=generator) * (spread * torch.randn(width, generator=generator)).exp()


def whole(width):
    return torch.arange(width).reshape(1, 1, width)


@settings(max_examples=80, deadline=None)
@given(
    out=st.integers(1, 12),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    part=st.sampled_from([2, 3, 512]),
    levels=st.sampled_from([0, 2]),
)
def test_an_order_is_a_permutation_that_never_keeps_less(out, groups, pattern, seed, spread, part, levels):
    score = scores(out, groups * pattern.of, seed, spread)
    if levels:  # massive ties, columns of zeros
        score = (score * levels).floor()
    order = best_order(score, pattern, whole(score.shape[1]), part=part)
    assert torch.equal(order.sort().values, torch.arange(score.shape[1]))
    start = max(kept_score(score, pattern), kept_score(score, pattern, snake(score, pattern.of)))
    assert kept_score(score, pattern, order) >= start * (1 - 1e-12)
    assert torch.equal(order, best_order(score, pattern, whole(score.shape[1]), part=part))


@settings(max_examples=60, deadline=None)
@given(
    sets=st.integers(1, 3),
    copies=st.integers(1, 3),
    groups=st.integers(1, 4),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 999),
)
def test_inputs_stay_in_their_set_and_copies_move_alike(sets, copies, groups, pattern, seed):
    size = groups * pattern.of
    score = scores(5, sets * copies * size, seed)
    places = torch.arange(score.shape[1]).reshape(sets, copies, size)
    moved = best_order(score, pattern, places)[places]  # [sets, copies, size]: where each place's input comes from
    inner = moved - places[:, :, :1]
    assert bool(((inner >= 0) & (inner < size)).all())
    assert bool((inner == inner[:, :1]).all())
    assert kept_score(score, pattern, moved.reshape(-1)) >= kept_score(score, pattern)


def test_kept_score_is_what_the_mask_of_the_pattern_keeps():
    score, pattern = scores(6, 24, 0), NM(2, 4)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    keep = select(score[:, order], pattern, 6 * 12, "row")
    assert kept_score(score, pattern, order) == pytest.approx(float(score[:, order][keep].sum()), rel=1e-6)


def test_snake_deals_the_heaviest_channels_to_different_groups():
    score = torch.tensor([[1.0, 8, 2, 7, 3, 6, 4, 5]])
    assert score[0][snake(score, 4)].reshape(2, 4).tolist() == [[8, 5, 4, 1], [7, 6, 3, 2]]
    assert score[0][snake(score, 2)].reshape(4, 2).tolist() == [[8, 1], [7, 2], [6, 3], [5, 4]]


def partitions(channels, of):
    """All ways to put channels into unordered groups."""
    if not channels:
        yield []
        return
    first, rest = channels[0], channels[1:]
    for others in itertools.combinations(rest, of - 1):
        left = [channel for channel in rest if channel not in others]
        for more in partitions(left, of):
            yield [(first, *others), *more]


@pytest.mark.parametrize(("pattern", "width", "least"), [(NM(1, 2), 4, 1.0), (NM(1, 2), 8, 0.99), (NM(2, 4), 8, 0.97)])
def test_the_order_is_the_best_of_all_or_near_it(pattern, width, least):
    shares = []
    for seed in range(25):
        score = scores(4, width, seed)
        every = (torch.tensor(groups).reshape(-1) for groups in partitions(list(range(width)), pattern.of))
        best = max(kept_score(score, pattern, order) for order in every)
        shares.append(kept_score(score, pattern, best_order(score, pattern, whole(width))) / best)
    assert max(shares) <= 1 + 1e-9
    assert min(shares) >= least - 1e-9
    assert sum(shares) / len(shares) >= 0.998


def test_a_size_that_the_pattern_does_not_divide_is_refused():
    with pytest.raises(PlanError, match="channel permutation: pattern 2:4 needs an input width divisible by 4, got 6"):
        best_order(scores(3, 12, 0), NM(2, 4), torch.arange(12).reshape(2, 1, 6))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e37])
def test_the_scale_of_a_score_does_not_matter(scale):
    score = scores(30, 48, 0).clamp_max(8)
    order = best_order(score, NM(2, 4), whole(48))
    scaled = best_order(score * scale, NM(2, 4), whole(48))
    assert kept_score(score, NM(2, 4), scaled) == pytest.approx(kept_score(score, NM(2, 4), order), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    score = scores(4, 8, 0)
    score[1, 2] = bad
    with pytest.raises(NonFinite, match="1 of 32 scores are not finite"):
        best_order(score, NM(2, 4), whole(8))


def test_results_do_not_depend_on_the_number_of_threads():
    score, before = scores(64, 256, 0), torch.get_num_threads()
    try:
        orders = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            orders.append(best_order(score, NM(2, 4), whole(256)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*orders)
