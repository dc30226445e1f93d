"""M-FAC against explicit Fisher matrices, the published recursion and brute-force minima."""

from __future__ import annotations

import pytest
import torch

from sparsekit import masks
from sparsekit.contracts import LinearInfo
from sparsekit.errors import NumericalError
from sparsekit.masks import select
from sparsekit.pattern import NM, Block, Unstructured
from sparsekit.pruners.mfac import MFAC, MFACOptions
from sparsekit.solve import fisher
from sparsekit.solve.fisher import BlockFisher
from sparsekit.stats.grad import Grad

OUT, IN, SAMPLES = 6, 20, 9
INFO = LinearInfo("l", 0, OUT, IN)
SIZES = [7, IN, 32, OUT * IN, 10_000]  # 7 and 32 leave a shorter last block
DAMPINGS = [1e-3, 1.0, 100.0]


def problem(seed=0, samples=SAMPLES):
    """A weight, and gradients of uneven size that are correlated between weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mixing = torch.randn(OUT * IN, OUT * IN, generator=generator) / 5
    gradients = torch.randn(samples, OUT * IN, generator=generator) @ mixing * torch.logspace(-3, -1, OUT * IN)
    return weight, [*gradients.reshape(samples, OUT, IN)]


def explicit(gradients, damping, size):
    """F as it is written, [out * in, out * in] float64, zero between blocks; and lambda."""
    flat = torch.stack(gradients).flatten(1).double()
    lam = damping * float(flat.square().mean())
    whole = flat.T @ flat / len(flat)
    number = torch.arange(flat.shape[1]) // size
    return torch.where(number[:, None] == number, whole, 0) + lam * torch.eye(len(whole), dtype=torch.float64), lam


def recursion(gradients, lam):
    """The published rank-one updates for one block: the diagonal of F^-1."""
    g = torch.stack(gradients).flatten(1).double()
    m, hs, qs = len(g), [], []
    for row in g:
        h = row / lam - sum((((h @ row) / q) * h for h, q in zip(hs, qs, strict=True)), torch.zeros(()))
        hs.append(h)
        qs.append(m + row @ h)
    return 1 / lam - sum(h.square() / q for h, q in zip(hs, qs, strict=True))


def quadratic(matrix, weight, other):
    d = (other.double() - weight.double()).flatten()
    return float(d @ matrix @ d)


def pruned(weight, gradients, budget=60, pattern=None, **options):
    grad = Grad(IN)
    for gradient in gradients:
        grad.update(gradient)
    return MFAC(MFACOptions(**options), 0).fit(INFO, weight, {"grad": grad})(pattern or Unstructured(), budget)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_inverse_diagonal_is_that_of_the_explicit_inverse(size, damping):
    _, gradients = problem()
    matrix, lam = explicit(gradients, damping, size)
    ours = BlockFisher(gradients, damping, size)
    assert ours.lam == pytest.approx(lam, rel=1e-12)
    got = ours.inverse_diagonal().flatten() / lam
    torch.testing.assert_close(got, torch.linalg.inv(matrix).diagonal(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_inverse_diagonal_is_that_of_the_published_recursion(damping):
    _, gradients = problem()
    ours = BlockFisher(gradients, damping, OUT * IN)
    got = ours.inverse_diagonal().flatten() / ours.lam
    torch.testing.assert_close(got, recursion(gradients, ours.lam), rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_removed_weights_are_those_of_least_saliency(size, damping):
    weight, gradients = problem()
    matrix, _ = explicit(gradients, damping, size)
    saliency = weight.double().flatten().square() / (2 * torch.linalg.inv(matrix).diagonal())
    wanted = torch.zeros(OUT * IN, dtype=torch.bool)
    wanted[saliency.argsort(descending=True)[:60]] = True
    got = pruned(weight, gradients, damping=damping, block=size)
    assert torch.equal(got.keep.flatten(), wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_joint_is_the_constrained_minimum_of_the_quadratic(size, damping):
    weight, gradients = problem()
    matrix, _ = explicit(gradients, damping, size)
    got = pruned(weight, gradients, damping=damping, block=size)
    kept, gone = got.keep.flatten(), ~got.keep.flatten()
    wanted = weight.double().flatten() * kept
    wanted[kept] += torch.linalg.solve(matrix[kept][:, kept], matrix[kept][:, gone] @ weight.double().flatten()[gone])
    torch.testing.assert_close(got.weight.flatten().double(), wanted, rtol=1e-5, atol=1e-6)
    least = quadratic(matrix, weight, got.weight)
    generator = torch.Generator().manual_seed(3)
    for step in (1e-3, 1e-1):  # and no change of kept weights is lower
        other = got.weight + step * torch.randn(OUT, IN, generator=generator) * got.keep
        assert quadratic(matrix, weight, other) > least


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_single_is_the_sum_of_the_published_updates(size, damping):
    weight, gradients = problem()
    matrix, _ = explicit(gradients, damping, size)
    inverse = torch.linalg.inv(matrix)
    got = pruned(weight, gradients, damping=damping, block=size, compensate="single")
    wanted = weight.double().flatten().clone()
    for p in (~got.keep.flatten()).nonzero()[:, 0]:
        wanted -= weight.double().flatten()[p] * inverse[:, p] / inverse[p, p]
    wanted[~got.keep.flatten()] = 0
    torch.testing.assert_close(got.weight.flatten().double(), wanted, rtol=1e-5, atol=1e-5)


def test_one_removed_weight_makes_joint_and_single_the_same():
    weight, gradients = problem()
    joint, single = (pruned(weight, gradients, OUT * IN - 1, compensate=kind) for kind in ("joint", "single"))
    assert not torch.equal(joint.weight, weight * joint.keep)
    torch.testing.assert_close(joint.weight, single.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damping", DAMPINGS)
def test_joint_is_never_above_the_other_updates(seed, damping):
    weight, gradients = problem(seed)
    matrix, _ = explicit(gradients, damping, IN)
    joint, single, none = (
        pruned(weight, gradients, damping=damping, block=IN, compensate=kind) for kind in ("joint", "single", "none")
    )
    assert torch.equal(joint.keep, single.keep)
    assert torch.equal(none.weight, weight * none.keep)
    losses = [quadratic(matrix, weight, x.weight) for x in (joint, single, none)]
    assert losses[0] <= losses[1] * (1 + 1e-6)
    assert losses[0] < losses[2]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Block(2, 4)], ids=str)
def test_patterns_choose_by_saliency_too(pattern):
    weight, gradients = problem()
    matrix, lam = explicit(gradients, 1.0, IN)
    saliency = weight.double().square() / (lam * torch.linalg.inv(matrix).diagonal().reshape(OUT, IN))
    budget = OUT * IN // pattern.of * pattern.keep if isinstance(pattern, NM) else 64
    got = pruned(weight, gradients, budget, pattern, damping=1.0, block=IN)
    masks.check(got.weight, got.keep, pattern, budget, where="mfac")
    # A block is worth the sum of its weights' saliencies: the selection squares what it is given.
    assert torch.equal(got.keep, select(saliency.sqrt().float(), pattern, budget, "linear"))


@pytest.mark.parametrize("size", [7, IN])
def test_results_do_not_depend_on_what_is_worked_on_at_a_time(size, monkeypatch):
    weight, gradients = problem()
    for kind in ("joint", "single"):
        whole = pruned(weight, gradients, block=size, compensate=kind)
        for elements in (1, 3 * size * SAMPLES):
            with monkeypatch.context() as patch:
                patch.setattr(fisher, "_ELEMENTS", elements)
                parts = pruned(weight, gradients, block=size, compensate=kind)
            assert torch.equal(parts.keep, whole.keep)
            torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-7)


def test_the_scale_of_the_loss_does_not_matter():
    weight, gradients = problem()
    one, other = (pruned(weight, [g * scale for g in gradients]) for scale in (1, 2.0**-40))
    assert torch.equal(one.keep, other.keep)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)


def test_much_damping_is_magnitude_pruning():
    weight, gradients = problem()
    got = pruned(weight, gradients, damping=1e9)
    assert torch.equal(got.keep, select(weight.abs(), Unstructured(), 60, "linear"))
    torch.testing.assert_close(got.weight, weight * got.keep, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_magnitude_pruning_with_a_note():
    weight, _ = problem()
    got = pruned(weight, [torch.zeros(OUT, IN)] * 3)
    assert torch.equal(got.keep, select(weight.abs(), Unstructured(), 60, "linear"))
    assert torch.equal(got.weight, weight * got.keep)
    assert got.notes == ("no sample has a gradient here: ranked by magnitude",)


@pytest.mark.parametrize(("damping", "size"), [(1e-300, IN), (1e-17, 7), (1e-17, 3)])
def test_damping_that_is_lost_in_rounding_is_refused(damping, size):
    weight, gradients = problem()
    with pytest.raises(NumericalError, match=r"no inverse in float64 with lambda .* Raise the method's damping"):
        pruned(weight, gradients + gradients, damping=damping, block=size)
