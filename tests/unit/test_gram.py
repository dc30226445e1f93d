"""The gram statistic against a direct float64 computation."""

from __future__ import annotations

import pytest
import torch

from sparsekit.stats.gram import Gram


def inputs(tokens=300, width=1100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 2, width)


def of(x, *pieces):
    stat = Gram(x.shape[1])
    for piece in x.split(list(pieces) or [len(x)]):
        stat.update(piece)
    return stat


def assert_same(got, expected):
    """Equal to float32 rounding, relative to the channels' own norms."""
    scale = expected.diagonal().sqrt()
    assert float(((got - expected) / torch.outer(scale, scale)).abs().max()) < 1e-6


@pytest.mark.parametrize("width", [1, 7, 512, 513, 1100])
def test_equals_a_direct_computation(width):
    x = inputs(width=width)
    exact = x.double().T @ x.double()
    got = of(x).matrix
    assert torch.equal(got, got.T)
    assert_same(got, exact)


def test_is_independent_of_the_split_into_batches():
    x = inputs()
    whole, parts = of(x), of(x, 1, 99, 200)
    assert whole.tokens == parts.tokens == 300
    assert_same(parts.matrix, whole.matrix)


def test_merging_adds_what_the_other_has_seen():
    x = inputs()
    first, second = of(x[:100]), of(x[100:])
    first.merge(second)
    assert_same(first.matrix, of(x).matrix)
    first.merge(first, 0.5)
    assert first.tokens == 450


def test_nbytes_is_what_it_holds():
    stat = of(inputs(width=64))
    assert Gram.nbytes(64) == stat.matrix.numel() * 8


def test_what_is_computed_once_is_shared_until_the_sums_change():
    stat, made = of(inputs(width=16)), []

    def trace(matrix, share, *, power=1):
        made.append((share, power))
        return float(matrix.trace()) * share**power

    assert stat.once(trace, 0.5) == stat.once(trace, 0.5)
    assert stat.once(trace, 0.25) != stat.once(trace, 0.5, power=3)
    assert made == [(0.5, 1), (0.25, 1), (0.5, 3)]
    before = stat.once(trace, 0.5)
    stat.update(inputs(width=16, seed=1))
    assert stat.once(trace, 0.5) > before
    stat.merge(of(inputs(width=16)))
    assert stat.once(trace, 0.5) == float(stat.matrix.trace()) * 0.5
    assert len(made) == 5


def test_reordered_is_the_statistic_of_reordered_inputs():
    x = inputs()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))
    stat = of(x)
    got, direct = stat.reordered(order), of(x[:, order])
    assert got.tokens == 300
    assert_same(got.matrix, direct.matrix)
    got.update(x)  # goes on as any other
    direct.update(x)
    assert_same(got.matrix, direct.matrix)
