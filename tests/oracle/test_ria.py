"""RIA's scores against the published formula, element by element."""

from __future__ import annotations

import pytest
import torch

from sparsekit.contracts import LinearInfo
from sparsekit.masks import select
from sparsekit.pattern import NM, Unstructured
from sparsekit.pruners.ria import RIA, RIAOptions
from sparsekit.solve.permute import best_order, kept_score
from sparsekit.stats.sumsq import SumSq

OUT, IN = 12, 16
INFO = LinearInfo("l", 0, OUT, IN)


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, IN, generator=generator) * torch.logspace(-2, 2, IN)
    sumsq = SumSq(IN)
    sumsq.update(x)
    return torch.randn(OUT, IN, generator=generator), x, {"sumsq": sumsq}


def published(weight, x, a):
    score = torch.empty(OUT, IN)
    for i in range(OUT):
        for j in range(IN):
            share = weight[i, j].abs() / weight[:, j].abs().sum() + weight[i, j].abs() / weight[i].abs().sum()
            score[i, j] = share * x[:, j].norm() ** a
    return score


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group", ["row", "linear"])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_keeps_the_best_published_scores(a, group, pattern):
    weight, x, stats = problem()
    got = RIA(RIAOptions(power=a, group=group), 0).fit(INFO, weight, stats)(pattern, OUT * IN // 2)
    assert torch.equal(got.keep, select(published(weight, x, a), pattern, OUT * IN // 2, group))
    assert torch.equal(got.weight, torch.where(got.keep, weight, 0))


def test_without_activations_it_is_relative_importance_and_ignores_the_text():
    weight, x, stats = problem()
    options = RIAOptions(power=0.0)
    other = SumSq(IN)
    other.update(x.flip(1))
    one = RIA(options, 0).fit(INFO, weight, stats)(Unstructured(), 90)
    two = RIA(options, 0).fit(INFO, weight, {"sumsq": other})(Unstructured(), 90)
    assert torch.equal(one.keep, two.keep)


def test_scaling_rows_columns_and_text_does_not_empty_a_channel():
    """A weight counts by its share: a channel with small weights keeps some, where magnitude removes them all."""
    weight, _, stats = problem()
    weight[:, 3] *= 1e-4
    stats["sumsq"].sumsq.fill_(1.0)
    kept = RIA(RIAOptions(), 0).fit(INFO, weight, stats)(Unstructured(), OUT * IN // 2).keep
    assert int(kept[:, 3].sum()) > 0
    assert int(select(weight.abs(), Unstructured(), OUT * IN // 2, "linear")[:, 3].sum()) == 0


def test_rows_and_channels_of_zeros_score_zero():
    weight, _, stats = problem()
    weight[2], weight[:, 5] = 0, 0
    kept = RIA(RIAOptions(), 0).fit(INFO, weight, stats)(Unstructured(), (OUT - 1) * (IN - 1)).keep
    assert not bool(kept[2].any())
    assert not bool(kept[:, 5].any())


def test_channels_are_ordered_by_the_published_score():
    weight, x, stats = problem()
    pruner, sets = RIA(RIAOptions(permute=True), 0), torch.arange(IN).reshape(1, 1, IN)
    order = pruner.order(INFO, weight, NM(2, 4), sets, stats)
    score = published(weight, x, 0.5)
    best = best_order(score, NM(2, 4), sets)
    assert kept_score(score, NM(2, 4), order) == pytest.approx(kept_score(score, NM(2, 4), best), rel=1e-6)
    assert kept_score(score, NM(2, 4), order) > kept_score(score, NM(2, 4))
    moved = {"sumsq": stats["sumsq"].reordered(order)}
    kept = pruner.fit(INFO, weight[:, order], moved)(NM(2, 4), OUT * IN // 2).keep
    assert float(score[:, order][kept].sum()) == pytest.approx(kept_score(score, NM(2, 4), order), rel=1e-6)


def test_a_permutation_is_asked_for_by_its_option_alone():
    assert RIA(RIAOptions(permute=True), 0).permutes
    assert not RIA(RIAOptions(), 0).permutes
