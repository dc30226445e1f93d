"""Scores, shares and rules against plain computations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.models.gates import Gaussian, Scope, Threshold, TopK, half_normal
from sparsekit.stats.absolute import Absolute
from sparsekit.stats.dropped import TOGETHER, Dropped
from sparsekit.stats.scores import Scores


def signal(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator).to(dtype)


@given(st.floats(0.02, 0.98), st.integers(0, 1000))
def test_a_quantile_has_its_share_of_the_scores_below_it(share: float, seed: int) -> None:
    x, w = signal(200, 16, seed), torch.rand(16, generator=torch.Generator().manual_seed(seed)) + 0.1
    stat = Scores(16, w)
    stat.update(x)
    assert float((x.abs() * w <= stat.quantile(share)).float().mean()) == pytest.approx(share, abs=0.005)


@given(st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_threshold_drops_the_share_it_was_asked_for(share: float, seed: int) -> None:
    x = signal(400, 32, seed, torch.bfloat16)
    stat = Scores(32)
    stat.update(x)
    t = torch.tensor([stat.quantile(share)]).to(torch.bfloat16).float()
    dropped = 1 - float(Threshold(t).keep(x).float().mean())
    assert dropped == pytest.approx(share, abs=0.01)


def test_scores_do_not_depend_on_the_split_and_leave_the_first_tokens_of_each_sample_out() -> None:
    x, y = signal(10, 8, 1), signal(12, 8, 2)
    whole, parts, other = Scores(8, skip=2), Scores(8, skip=2), Scores(8, skip=2)
    whole.update(x), whole.update(y)
    parts.update(x)
    other.update(y)
    parts.merge(other)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.tokens == parts.tokens == 8 + 10
    assert int(whole.counts.sum()) == 18 * 8


def test_zeros_and_huge_scores_have_bins_of_their_own() -> None:
    stat = Scores(4)
    stat.update(torch.tensor([[0.0, -0.0, 3e38, -3e38]]))
    assert stat.quantile(0.25) < 1e-38
    assert stat.quantile(0.9) > 2.9e38
    with pytest.raises(ValueError, match="nothing"):
        Scores(4).quantile(0.5)


def test_mean_sizes() -> None:
    x = signal(50, 6, 3)
    stat = Absolute(6)
    stat.update(x[:20]), stat.update(x[20:])
    torch.testing.assert_close(stat.mean(), x.abs().mean(dim=0))
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    torch.testing.assert_close(stat.reordered(order).mean(), x.abs().mean(dim=0)[order])


def test_what_is_dropped_is_counted_per_channel_per_token_and_together() -> None:
    x = torch.ones(TOGETHER + 3, 4)
    x[:, 0] = 0  # dropped always
    x[::2, 1] = 0  # never by all of eight
    stat = Dropped(4, skip=0)
    stat.update(x)
    dropped = x == 0
    assert stat.share == pytest.approx(float(dropped.float().mean()))
    assert stat.spread == pytest.approx(float(dropped.float().mean(dim=1).std(correction=0)))
    assert stat.together == pytest.approx(1 / 4)
    torch.testing.assert_close(stat.usage(), 1 - dropped.float().mean(dim=0))
    assert math.isnan(Dropped(4).together)
    other = Dropped(4)
    other.merge(stat)
    assert (other.share, other.spread, other.together) == (stat.share, stat.spread, stat.together)


def test_a_threshold_is_strict_and_keeps_nan() -> None:
    x = torch.tensor([[0.5, -0.5, 0.50001, float("nan"), 0.0, float("inf")]])
    assert Threshold(torch.tensor([0.5])).keep(x).tolist() == [[False, False, True, True, False, True]]
    assert Threshold(torch.tensor([0.0])).keep(x).tolist() == [[True, True, True, True, False, True]]


def test_a_threshold_of_zero_changes_no_bit() -> None:
    x = signal(5, 7, 1, torch.bfloat16)
    assert torch.equal(Threshold(torch.zeros(1))(x), x)


@given(st.integers(0, 200), st.floats(0.1, 2), st.floats(0.1, 2))
def test_masks_are_nested(seed: int, a: float, b: float) -> None:
    x, low, high = signal(4, 16, seed), min(a, b), max(a, b)
    kept = Threshold(torch.tensor([high])).keep(x)
    assert bool((Threshold(torch.tensor([low])).keep(x) | ~kept).all())


@given(st.integers(1, 16), st.integers(0, 100))
def test_top_k_keeps_exactly_k_of_distinct_scores(count: int, seed: int) -> None:
    x, w = signal(6, 16, seed), torch.rand(16, generator=torch.Generator().manual_seed(seed)) + 0.5
    keep = TopK(count, w).keep(x)
    assert keep.sum(dim=1).tolist() == [count] * 6
    score = x.abs() * w
    assert bool((score[keep].reshape(6, count).amin(1) >= score.masked_fill(keep, 0).amax(1)).all())


def test_gaussian_inputs_lose_the_share_asked_for() -> None:
    x = signal(300, 500, 4) * torch.linspace(0.1, 30, 300)[:, None]  # every token has a scale of its own
    for share in (0.25, 0.5, 0.8):
        dropped = 1 - Gaussian(half_normal(share)).keep(x).float().mean(dim=1)
        assert float(dropped.mean()) == pytest.approx(share, abs=0.005)
        assert float(dropped.std()) < 0.03


@pytest.mark.parametrize("flat", [False, True])
def test_first_tokens_stay_dense_in_every_text_of_a_batch(flat: bool) -> None:
    x = signal(3 * 5, 4, 5).reshape(3, 5, 4)
    scope, gate = Scope(dense=2), Threshold(torch.tensor([1.0]))
    scope.texts = 3
    found = scope.thinned(gate, x.reshape(15, 4) if flat else x).reshape(3, 5, 4)
    assert torch.equal(found[:, :2], x[:, :2])
    assert torch.equal(found[:, 2:], gate(x)[:, 2:])
    scope.off = True
    assert scope.thinned(gate, x) is x
