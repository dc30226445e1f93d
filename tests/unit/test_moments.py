"""The moments statistic against a direct float64 computation."""

from __future__ import annotations

import pytest
import torch

from sparsekit.stats.moments import Moments


def inputs(tokens=300, width=20):
    generator = torch.Generator().manual_seed(0)
    # Means far larger than the deviations: sums of squares would lose the variance.
    return torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 2, width) + 1000


def of(x, *pieces):
    stat = Moments(x.shape[1])
    for piece in x.split(list(pieces) or [len(x)]):
        stat.update(piece)
    return stat


@pytest.mark.parametrize("pieces", [(), (1, 99, 200), (64, 64, 172), (1,) * 300], ids=str)
def test_equals_a_direct_computation_however_it_is_split(pieces):
    x = inputs()
    stat = of(x, *pieces)
    assert stat.tokens == 300
    torch.testing.assert_close(stat.mean, x.double().mean(dim=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(stat.variance, x.double().var(dim=0, correction=0), rtol=1e-9, atol=0)


def test_merging_adds_what_the_other_has_seen():
    x = inputs()
    whole, first, second = of(x), of(x[:90]), of(x[90:])
    first.merge(second)
    first.merge(Moments(20))
    assert first.tokens == 300
    torch.testing.assert_close(first.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(first.variance, whole.variance, rtol=1e-9, atol=0)


def test_a_scaled_merge_counts_as_so_many_tokens_of_the_same_moments():
    x = inputs()
    one, twice = of(x[:100]), of(x[:100], 100)
    one.merge(of(x[100:]), 2.0)
    twice.merge(of(x[100:]))
    twice.merge(of(x[100:]))
    assert one.tokens == twice.tokens == 500
    torch.testing.assert_close(one.mean, twice.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(one.variance, twice.variance, rtol=1e-9, atol=0)


def test_nothing_seen_is_zero():
    assert not bool(Moments(4).variance.any())
    assert Moments.nbytes(4) == 64


def test_reordered_is_the_statistic_of_reordered_inputs():
    x = inputs()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    stat = of(x)
    got, direct = stat.reordered(order), of(x[:, order])
    assert got.tokens == 300
    torch.testing.assert_close(got.mean, direct.mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.variance, direct.variance, rtol=1e-6, atol=1e-9)
    got.update(x)  # goes on as any other
    direct.update(x)
    torch.testing.assert_close(got.mean, direct.mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.variance, direct.variance, rtol=1e-6, atol=1e-9)
