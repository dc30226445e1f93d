"""ALPS against SparseGPT, the exact refit of its own support, and brute force over all supports of tiny linears."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsekit import masks
from sparsekit.contracts import LinearInfo
from sparsekit.errors import NonFinite
from sparsekit.masks import select
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.pruners.alps import ALPS, ALPSOptions
from sparsekit.pruners.sparsegpt import SparseGPT, SparseGPTOptions
from sparsekit.solve.factor import damped, scaled_eigen
from sparsekit.solve.masked_lstsq import masked_lstsq, row_errors
from sparsekit.stats.gram import Gram

OUT, IN = 24, 96


def problem(seed=0, tokens=500, shape=(OUT, IN)):
    """A weight and the gram matrix of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    out, width = shape
    weight = torch.randn(out, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    gram = Gram(width)
    gram.update(torch.randn(tokens, width, generator=generator) @ mixing * torch.logspace(-1, 1, width))
    return LinearInfo("l", 0, out, width), weight, {"gram": gram}


def error(weight, other, gram):
    return float(row_errors(weight, other, gram).sum())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [*((Unstructured(), s) for s in (0.3, 0.5, 0.6, 0.7, 0.9)), (NM(2, 4), 0.5), (NM(1, 4), 0.75), (Block(4, 2), 0.5)],
    ids=str,
)
def test_is_never_above_sparsegpt(pattern, sparsity, seed):
    info, weight, stats = problem(seed, tokens=[500, 200, 60][seed % 3])
    budget = round(weight.numel() * (1 - sparsity) / 8) * 8
    ours = ALPS(ALPSOptions(), 0).fit(info, weight, stats)(pattern, budget)
    masks.check(ours.weight, ours.keep, pattern, budget, where="alps")
    theirs = SparseGPT(SparseGPTOptions(), 0).fit(info, weight, stats)(pattern, budget)
    for gram in (stats["gram"].matrix, damped(stats["gram"].matrix, 0.01)):
        assert error(weight, ours.weight, gram) <= error(weight, theirs.weight, gram)


def test_the_sweep_is_taken_with_a_note_where_it_is_closer():
    """Few tokens and blocks: ADMM settles on a worse support here."""
    info, weight, stats = problem(118, tokens=16, shape=(8, 32))
    ours = ALPS(ALPSOptions(), 0).fit(info, weight, stats)(Block(4, 2), 104)
    theirs = SparseGPT(SparseGPTOptions(), 0).fit(info, weight, stats)(Block(4, 2), 104)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.keep, theirs.keep)
    assert ours.notes == ("SparseGPT's sweep was closer to the dense outputs than ADMM and was taken",)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_weights_are_the_refit_of_their_support(sparsity):
    info, weight, stats = problem()
    budget = round(weight.numel() * (1 - sparsity))
    hessian = damped(stats["gram"].matrix, 0.01)
    for steps, close in ((10, 1e-3), (200, 1e-6)):
        got = ALPS(ALPSOptions(refit_steps=steps), 0).fit(info, weight, stats)(Unstructured(), budget)
        best = error(weight, masked_lstsq(weight, got.keep, hessian, got.weight, rtol=1e-6), hessian)
        assert best * (1 - 1e-5) <= error(weight, got.weight, hessian) <= best * (1 + close)


@pytest.mark.parametrize("kept", [4, 8, 12])
def test_brute_force_is_never_beaten_and_often_reached(kept):
    """Each row's best error for each number of kept weights, then the best split of the budget over the rows."""
    gaps = []
    for seed in range(8):
        info, weight, stats = problem(seed, tokens=40, shape=(4, 4))
        hessian = damped(stats["gram"].matrix, 0.01)
        best = torch.full((4, 5), torch.inf, dtype=torch.float64)  # [row, kept in it]
        for pattern in itertools.product([False, True], repeat=4):
            keep = torch.tensor(pattern).expand(4, 4)
            errors = row_errors(weight, masked_lstsq(weight, keep, hessian, weight * keep), hessian)
            best[:, sum(pattern)] = torch.minimum(best[:, sum(pattern)], errors)
        splits = (split for split in itertools.product(range(5), repeat=4) if sum(split) == kept)
        least = min(float(sum(best[row, count] for row, count in enumerate(split))) for split in splits)
        got = ALPS(ALPSOptions(refit_steps=50), 0).fit(info, weight, stats)(Unstructured(), kept)
        ours = error(weight, got.weight, hessian)
        assert ours >= least * (1 - 1e-5)
        gaps.append(ours / least - 1)
    print(f"kept {kept}: gap to brute force, median {sorted(gaps)[4]:.3f}, worst {max(gaps):.3f}")
    assert sorted(gaps)[4] < 0.5


def test_uncorrelated_inputs_give_nearly_the_best_scores_of_the_linear_and_no_change():
    """ADMM moves weights to and fro whose scores are near the least kept one; the published steps leave some astray."""
    _, weight, _ = problem()
    gram, sizes = Gram(IN), torch.logspace(-1, 1, IN)
    gram.update(torch.diag(sizes))
    got = ALPS(ALPSOptions(), 0).fit(LinearInfo("l", 0, OUT, IN), weight, {"gram": gram})(Unstructured(), 900)
    norm = damped(gram.matrix, 0.01).diagonal().sqrt().float()
    best = select(weight.abs() * norm, Unstructured(), 900, "linear")
    assert float((got.keep == best).float().mean()) > 0.98
    least = error(weight, weight * best, gram.matrix)
    assert least <= error(weight, got.weight, gram.matrix) < 1.02 * least
    torch.testing.assert_close(got.weight, torch.where(got.keep, weight, 0), rtol=1e-5, atol=1e-6)


def test_one_decomposition_serves_all_levels_and_all_linears_of_a_gram(monkeypatch):
    info, weight, stats = problem()
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or real(matrix))
    for scale in (1, 2):
        at = ALPS(ALPSOptions(), 0).fit(info, weight * scale, stats)
        for budget in (500, 1000):
            assert int(at(Unstructured(), budget).keep.sum()) == budget
    assert len(calls) == 1


def test_the_scaled_decomposition_inverts():
    _, _, stats = problem()
    matrix = stats["gram"].matrix
    eigen = scaled_eigen(matrix, 0.01)
    hessian = damped(matrix, 0.01)
    scaled = hessian / torch.outer(eigen.scale, eigen.scale).double()
    product = (scaled + 0.3 * torch.eye(IN)) @ eigen.inverse(0.3).double()
    torch.testing.assert_close(product, torch.eye(IN, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 12])
def test_few_tokens_dead_channels_and_bad_grams(tokens):
    info, weight, stats = problem(tokens=tokens)
    gram = stats["gram"]
    gram._upper[10:20] = 0
    gram._upper[:, 10:20] = 0
    got = ALPS(ALPSOptions(), 0).fit(info, weight, stats)(Unstructured(), OUT * IN // 2)
    masks.check(got.weight, got.keep, Unstructured(), OUT * IN // 2, where="alps")
    kept = got.keep[:, 10:20]
    torch.testing.assert_close(got.weight[:, 10:20][kept], weight[:, 10:20][kept], rtol=0.02, atol=0)
    gram._upper[0, 0] = float("inf")
    gram._results.clear()
    with pytest.raises(NonFinite, match="not finite"):
        ALPS(ALPSOptions(), 0).fit(info, weight, stats)
