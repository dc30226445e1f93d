"""Masked least squares against torch.linalg.lstsq on the kept columns of each row."""

from __future__ import annotations

import pytest
import torch

from sparsekit.contracts import LinearInfo, Pruned
from sparsekit.masks import select, zeroed
from sparsekit.pattern import Block, Unstructured
from sparsekit.solve import masked_lstsq as module
from sparsekit.solve.factor import damped
from sparsekit.solve.masked_lstsq import conjugate_gradients, masked_lstsq, row_errors
from sparsekit.stats.gram import Gram
from sparsekit.update.lstsq import LstSq, LstSqOptions
from sparsekit.update.obs import OBS, OBSOptions

OUT, IN = 24, 96
INFO = LinearInfo("l", 0, OUT, IN)


def problem(seed=0, tokens=500, sparsity=0.6, pattern=None):
    """A weight, correlated inputs and Wanda's mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + 0.5 * torch.eye(IN)
    x = torch.randn(tokens, IN, generator=generator) @ mixing * torch.logspace(-1, 1, IN)
    budget = round(OUT * IN * (1 - sparsity) / 8) * 8
    keep = select(weight.abs() * x.norm(dim=0), pattern or Unstructured(), budget, "linear")
    return weight, x, Pruned(zeroed(weight, keep), keep)


def gram_of(x):
    gram = Gram(x.shape[1])
    gram.update(x)
    return gram


def by_rows(weight, x, keep, ridge=0.0):
    """min |x (w - w0)|^2 + ridge |w - w0|^2 for each row, by a dense solver."""
    inputs = torch.cat([x.double(), ridge**0.5 * torch.eye(IN, dtype=torch.float64)])
    result = torch.zeros(OUT, IN, dtype=torch.float64)
    for row in range(OUT):
        kept = keep[row]
        target = inputs @ weight[row].double()
        result[row, kept] = torch.linalg.lstsq(inputs[:, kept], target[:, None], driver="gelsd").solution[:, 0]
    return result


def error(x, weight, other):
    return float((x.double() @ (weight.double() - other.double()).T).square().sum())


@pytest.mark.parametrize("way", ["factors", "steps"])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 1)], ids=str)
def test_equals_lstsq_on_the_kept_columns(way, pattern, monkeypatch):
    monkeypatch.setattr(module, "_TYPICAL_STEPS", 1e9 if way == "factors" else 0)
    weight, x, start = problem(pattern=pattern)
    solved = masked_lstsq(weight, start.keep, gram_of(x).matrix, start.weight, rtol=1e-5)
    expected = by_rows(weight, x, start.keep)
    torch.testing.assert_close(solved.double(), expected, rtol=1e-3, atol=1e-4)
    assert error(x, weight, solved) == pytest.approx(error(x, weight, expected), rel=1e-6)
    gradient = ((weight - solved).double() @ gram_of(x).matrix)[start.keep]
    first = ((weight - start.weight).double() @ gram_of(x).matrix)[start.keep]
    assert float(gradient.norm()) < 1e-4 * float(first.norm())


def test_the_method_solves_the_damped_problem_and_beats_the_sweep():
    weight, x, start = problem()
    gram = gram_of(x)
    stats = {"gram": gram}
    solved = LstSq(LstSqOptions(damping=0.01), 0).update(INFO, weight, start, stats).weight
    ridge = 0.01 * float(gram.matrix.diagonal().mean())
    expected = by_rows(weight, x, start.keep, ridge)
    torch.testing.assert_close(solved.double(), expected, rtol=0.05, atol=0.01)
    damped_gram = damped(gram.matrix, 0.01)
    best = float(row_errors(weight, expected, damped_gram).sum())
    assert best * 0.999999 < float(row_errors(weight, solved, damped_gram).sum()) < best * 1.001
    swept = OBS(OBSOptions(damping=0.01), 0).update(INFO, weight, start, stats).weight
    assert bool((row_errors(weight, solved, damped_gram) <= row_errors(weight, swept, damped_gram) * 1.00001).all())
    assert error(x, weight, solved) < error(x, weight, swept) < error(x, weight, start.weight)


@pytest.mark.parametrize("tokens", [1, 12, IN - 1, 500])
@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_no_row_ends_above_its_start_with_few_tokens_dead_channels_and_empty_rows(tokens, damping):
    weight, x, start = problem(tokens=tokens)
    x[:, 10:20] = 0
    keep = start.keep.clone()
    keep[3], keep[4] = False, True
    stats = {"gram": gram_of(x)}
    already = OBS(OBSOptions(damping=0.3), 0).update(INFO, weight, Pruned(zeroed(weight, keep), keep), stats)
    for begin in (Pruned(zeroed(weight, keep), keep), already):
        got = LstSq(LstSqOptions(damping=damping), 0).update(INFO, weight, begin, stats).weight
        gram = stats["gram"].matrix
        assert bool((row_errors(weight, got, gram) <= row_errors(weight, begin.weight, gram)).all())
        assert bool(torch.isfinite(got).all())
        assert not bool(got[3].any())
        assert torch.equal(got[4], begin.weight[4])
        dead = keep[:, 10:20]
        torch.testing.assert_close(got[:, 10:20][dead], weight[:, 10:20][dead], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["factors", "steps"])
def test_nothing_removed_is_nothing_changed(way, monkeypatch):
    monkeypatch.setattr(module, "_TYPICAL_STEPS", 1e9 if way == "factors" else 0)
    weight, x, _ = problem()
    keep = torch.ones(OUT, IN, dtype=torch.bool)
    assert torch.equal(masked_lstsq(weight, keep, damped(gram_of(x).matrix, 0.01), weight), weight)


def test_every_step_lowers_the_error():
    weight, x, start = problem()
    hessian = damped(gram_of(x).matrix, 0.01)
    errors = [row_errors(weight, start.weight, hessian)]
    for steps in range(1, 12):
        got = conjugate_gradients(weight, start.keep, hessian, start.weight, steps=steps, rtol=0)
        errors.append(row_errors(weight, got, hessian))
        assert bool((errors[-1] <= errors[-2] * 1.000001).all())
    assert float(errors[-1].sum()) < 0.9 * float(errors[0].sum())


def test_more_steps_than_one_pass_still_reach_the_optimum(monkeypatch):
    """The residual is taken anew in float64 where float32 steps would lose it."""
    monkeypatch.setattr(module, "_TYPICAL_STEPS", 0)
    weight, x, start = problem()
    x = x * torch.logspace(-3, 0, IN)  # badly scaled: the diagonal preconditioner undoes it
    solved = masked_lstsq(weight, start.keep, gram_of(x).matrix, start.weight, rtol=1e-6)
    expected = by_rows(weight, x, start.keep)
    assert error(x, weight, solved) == pytest.approx(error(x, weight, expected), rel=1e-4)
