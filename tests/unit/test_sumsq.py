from __future__ import annotations

import torch

from sparsekit.stats.sumsq import SumSq


def test_equals_a_direct_computation_in_float64_however_it_is_split():
    x = torch.randn(57, 13, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 13)
    direct = x.double().square().sum(0)
    for split in (1, 7, 57):
        stat = SumSq(13)
        for part in x.split(split):
            stat.update(part)
        assert stat.tokens == 57
        assert torch.allclose(stat.sumsq, direct, rtol=1e-12)
        assert torch.allclose(stat.norm(), direct.sqrt().float())


def test_merged_parts_are_the_whole():
    x = torch.randn(10, 4)
    whole, one, other = SumSq(4), SumSq(4), SumSq(4)
    whole.update(x)
    one.update(x[:3])
    other.update(x[3:])
    one.merge(other)
    assert one.tokens == 10
    assert torch.allclose(one.sumsq, whole.sumsq, rtol=1e-14)


def test_does_not_change_its_input():
    x = torch.randn(5, 3)
    before = x.clone()
    SumSq(3).update(x)
    assert torch.equal(x, before)


def test_reordered_is_the_statistic_of_reordered_inputs():
    x, order = torch.randn(9, 5), torch.tensor([3, 1, 4, 0, 2])
    stat, direct = SumSq(5), SumSq(5)
    stat.update(x)
    direct.update(x[:, order])
    got = stat.reordered(order)
    assert got.tokens == 9
    assert torch.equal(got.sumsq, direct.sumsq)
