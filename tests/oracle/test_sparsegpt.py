"""SparseGPT and the OBS update against a plain float64 form of the published algorithm."""

from __future__ import annotations

import pytest
import torch

from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.errors import NonFinite, NumericalError
from sparsekit.masks import select
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.pruners.sparsegpt import SparseGPT, SparseGPTOptions
from sparsekit.pruners.wanda import Wanda, WandaOptions
from sparsekit.solve.factor import damped, inverse_factor
from sparsekit.stats.gram import Gram
from sparsekit.stats.sumsq import SumSq
from sparsekit.update.obs import OBS, OBSOptions

OUT, IN = 24, 96
INFO = LinearInfo("l", 0, OUT, IN)


def problem(seed=0, tokens=500):
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + 0.5 * torch.eye(IN)
    x = torch.randn(tokens, IN, generator=generator) @ mixing * torch.logspace(-1, 1, IN)
    return weight, x


def statistics(x):
    gram, sumsq = Gram(x.shape[1]), SumSq(x.shape[1])
    gram.update(x)
    sumsq.update(x)
    return {"gram": gram, "sumsq": sumsq}


def error(x, weight, pruned):
    return float((x.double() @ (weight - pruned).double().T).square().sum())


def by_the_book(weight, gram, pattern, budget, strip, damping=0.01):
    """Algorithm 1 in float64: explicit inverses of the trailing gram matrix, one column after the other."""
    w, keep = weight.double().clone(), torch.ones(OUT, IN, dtype=torch.bool)
    trailing = torch.linalg.inv(damped(gram, damping))
    group = pattern.of if isinstance(pattern, NM) else strip
    inverse_diagonal = torch.empty(IN, dtype=torch.float64)
    rows = []
    for j in range(IN):  # eliminate column by column: row j of the inverse once columns before it are fixed
        inverse_diagonal[j] = trailing[j, j]
        rows.append(trailing[j].clone())
        trailing = trailing - torch.outer(trailing[:, j], trailing[j]) / trailing[j, j]
    for j in range(IN):
        if j % group == 0:
            end = min(j + group, IN)
            score = (w[:, j:end].square() / inverse_diagonal[j:end]).float()
            if isinstance(pattern, NM):
                kept = OUT * (end - j) // pattern.of * pattern.keep
            else:
                units = budget // pattern.unit
                kept = (units * end // IN - units * j // IN) * pattern.unit
            keep[:, j:end] = select(score, pattern, kept, "linear")
        gone = w[:, j] * ~keep[:, j]
        w[:, j:] -= torch.outer(gone / inverse_diagonal[j], rows[j][j:])
        w[:, j] *= keep[:, j]
    return torch.where(keep, w, 0), keep


@pytest.mark.parametrize("strip", [96, 32, 12])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 3), NM(4, 8), NM(16, 32), Block(4, 2)], ids=str)
def test_equals_the_algorithm_in_float64(pattern, strip):
    weight, x = problem()
    stats = statistics(x)
    budget = OUT * IN * pattern.keep // pattern.of if isinstance(pattern, NM) else OUT * IN // 2
    got = SparseGPT(SparseGPTOptions(strip=strip), 0).fit(INFO, weight, stats)(pattern, budget)
    expected, keep = by_the_book(weight, stats["gram"].matrix, pattern, budget, strip)
    assert int(got.keep.sum()) == budget
    assert float((got.keep == keep).float().mean()) > 0.998  # float32 may swap weights of nearly equal cost
    assert error(x, weight, got.weight) == pytest.approx(error(x, weight, expected), rel=0.01)
    if torch.equal(got.keep, keep):
        torch.testing.assert_close(got.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_uncorrelated_inputs_give_magnitude_by_strip_and_leave_survivors_alone():
    weight, _ = problem()
    gram = Gram(IN)
    gram.update(torch.eye(IN) * 7)
    got = SparseGPT(SparseGPTOptions(strip=32), 0).fit(INFO, weight, {"gram": gram})(Unstructured(), OUT * IN // 2)
    for first in range(0, IN, 32):
        part = weight[:, first : first + 32]
        assert torch.equal(got.keep[:, first : first + 32], select(part.abs(), Unstructured(), OUT * 16, "linear"))
    torch.testing.assert_close(got.weight, torch.where(got.keep, weight, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_never_worse_than_its_mask_alone_or_than_wanda(sparsity, seed):
    weight, x = problem(seed)
    stats, budget = statistics(x), round(OUT * IN * (1 - sparsity))
    got = SparseGPT(SparseGPTOptions(), 0).fit(INFO, weight, stats)(Unstructured(), budget)
    wanda = Wanda(WandaOptions(), 0).fit(INFO, weight, stats)(Unstructured(), budget)
    ours = error(x, weight, got.weight)
    assert ours < error(x, weight, torch.where(got.keep, weight, 0))
    assert ours < error(x, weight, wanda.weight)


def test_the_update_alone_helps_a_given_mask_and_no_strip_matters():
    weight, x = problem()
    stats = statistics(x)
    start = Wanda(WandaOptions(), 0).fit(INFO, weight, stats)(Unstructured(), OUT * IN // 2)
    moved = OBS(OBSOptions(), 0).update(INFO, weight, start, stats)
    assert torch.equal(moved.keep, start.keep)
    assert error(x, weight, moved.weight) < 0.8 * error(x, weight, start.weight)
    # SparseGPT with that mask given is the same sweep, whatever its strips.
    from sparsekit.solve.obs import sweep

    factor = inverse_factor(stats["gram"].matrix, 0.01)
    for strip in (5, 32, 96):
        other, _ = sweep(weight, factor.upper, lambda _, first, last: start.keep[:, first:last], strip, strip)
        torch.testing.assert_close(other, moved.weight, rtol=1e-4, atol=1e-5)


def test_unseen_channels_go_first_and_keep_their_weights_if_there_is_room():
    weight, x = problem()
    x[:, 10:20] = 0
    stats = statistics(x)
    at = SparseGPT(SparseGPTOptions(strip=96), 0).fit(INFO, weight, stats)
    assert not bool(at(Unstructured(), OUT * IN // 2).keep[:, 10:20].any())
    roomy = at(Unstructured(), OUT * IN - OUT)
    kept = roomy.keep[:, 10:20]
    assert torch.equal(roomy.weight[:, 10:20][kept], weight[:, 10:20][kept])


@pytest.mark.parametrize("tokens", [1, 12, IN - 1])
def test_fewer_tokens_than_inputs_still_give_a_finite_result(tokens):
    weight, x = problem(tokens=tokens)
    got = SparseGPT(SparseGPTOptions(), 0).fit(INFO, weight, statistics(x))(Unstructured(), OUT * IN // 2)
    assert bool(torch.isfinite(got.weight).all())
    assert error(x, weight, got.weight) < error(x, weight, torch.where(got.keep, weight, 0))


def test_damping_rises_in_reported_steps_and_then_stops():
    indefinite = torch.eye(8, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    factor = inverse_factor(indefinite, 0.01)
    assert factor.damping == pytest.approx(0.09)
    assert factor.notes == ("damping raised from 0.01 to 0.09 for a Cholesky factor",)
    torch.testing.assert_close(
        factor.upper.T @ factor.upper, torch.linalg.inv(damped(indefinite, factor.damping)), rtol=1e-9, atol=1e-9
    )
    indefinite[0, 1] = indefinite[1, 0] = 2.0
    with pytest.raises(NumericalError, match="not positive definite, even with 30% damping"):
        inverse_factor(indefinite, 0.01)
    indefinite[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="not finite"):
        inverse_factor(indefinite, 0.01)


def test_removed_weights_are_positive_zeros_and_a_full_budget_changes_nothing():
    weight, x = problem()
    weight[0, :4] = -0.0
    at = SparseGPT(SparseGPTOptions(), 0).fit(INFO, weight, statistics(x))
    half = at(Unstructured(), OUT * IN // 2)
    assert not bool(torch.signbit(half.weight[~half.keep]).any())
    assert torch.equal(at(Unstructured(), OUT * IN).weight, weight)


def test_notes_reach_the_result():
    weight, x = problem()
    stats = statistics(x)
    stats["gram"]._upper.diagonal().mul_(0.97)  # as a rounding error would
    pruned = SparseGPT(SparseGPTOptions(damping=1e-6), 0).fit(INFO, weight, stats)(Unstructured(), 1000)
    assert isinstance(pruned, Pruned)
    assert len(pruned.notes) == 1
    assert "damping raised" in pruned.notes[0]
