"""Bases of the residual stream against numpy, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsekit.solve.rotation import Basis, principal_basis, random_orientation, refitted, shortcut

HIDDEN = 12


def vectors(tokens=200, seed=0, rank=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, rank, generator=generator, dtype=torch.float64)
    mixed *= torch.linspace(3, 0.5, rank, dtype=torch.float64)
    return mixed @ torch.randn(rank, HIDDEN, generator=generator, dtype=torch.float64)


def centred(x):
    return x - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("width", [1, 5, HIDDEN])
def test_the_columns_are_the_first_principal_components(width):
    x = vectors()
    basis = principal_basis(x.T @ x, width)
    _, _, right = np.linalg.svd(x.numpy(), full_matrices=False)  # not centred: what a norm sees is not
    assert basis.width == width
    np.testing.assert_allclose(np.abs(right[:width] @ basis.columns.numpy()), np.eye(width), atol=1e-9)
    torch.testing.assert_close(basis.columns.T @ basis.columns, torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("width", [2, 6, HIDDEN])
def test_a_centred_stream_keeps_the_first_components_and_has_mean_zero(width):
    x = vectors()
    basis = principal_basis(x.T @ x, width, centred=True)
    _, _, right = np.linalg.svd(centred(x).numpy(), full_matrices=False)
    kept = right[: width - 1].T @ right[: width - 1]
    np.testing.assert_allclose((basis.columns @ basis.columns.T).numpy(), kept, atol=1e-9)
    z = x @ basis.columns
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(len(x), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layer", [False, True])
def test_norms_of_the_narrow_stream_divide_by_what_they_divided_by(layer):
    """With their own eps: of vectors that the basis holds, the mean square of z is that of x."""
    width = 7
    basis = principal_basis((x := vectors()).T @ x, width, centred=layer)
    held = basis.project(centred(x) if layer else x)
    z = basis.scale * held @ basis.columns
    torch.testing.assert_close(z.square().mean(dim=1), held.square().mean(dim=1))


@pytest.mark.parametrize("layer", [False, True])
def test_a_random_orientation_holds_the_same_in_another_order(layer):
    x = vectors()
    basis = refitted(principal_basis(x.T @ x, 6, centred=layer), x.T @ x, centred=layer)
    turned = random_orientation(basis, 3, centred=layer)
    torch.testing.assert_close(turned.columns @ turned.columns.T, basis.columns @ basis.columns.T)
    torch.testing.assert_close(turned.back @ turned.columns.T, basis.back @ basis.columns.T)
    assert not torch.allclose(turned.columns, basis.columns)
    again, other = (random_orientation(basis, seed, centred=layer) for seed in (3, 4))
    assert torch.equal(again.columns, turned.columns)
    assert not torch.allclose(other.columns, turned.columns)


@pytest.mark.parametrize("layer", [False, True])
def test_refitting_is_least_squares_on_what_is_kept(layer):
    x, y = vectors(seed=0), vectors(seed=1)
    basis = principal_basis(x.T @ x, 6, centred=layer)
    fitted = refitted(basis, y.T @ y, centred=layer, damping=1e-12 if layer else 0)
    y = centred(y) if layer else y
    z = (y @ basis.columns).numpy()
    wanted, *_ = np.linalg.lstsq(z, y.numpy(), rcond=None)
    np.testing.assert_allclose(z @ fitted.back.T.numpy(), z @ wanted, atol=1e-6)
    error, before = ((y - torch.from_numpy(z) @ b.back.T).square().sum() for b in (fitted, basis))
    assert error < 0.9 * before


def test_refitting_on_what_the_components_are_of_changes_nothing():
    x = vectors()
    basis = principal_basis(x.T @ x, 6)
    torch.testing.assert_close(refitted(basis, x.T @ x).back, basis.back)


def test_shortcuts_carry_what_both_bases_hold():
    x, y = vectors(seed=0, rank=4), vectors(seed=1)
    small, large = principal_basis(x.T @ x, 5), principal_basis(x.T @ x + 1e-3 * y.T @ y, 9)
    z = small.scale * x @ small.columns
    torch.testing.assert_close(z @ shortcut(small, None).T, x)
    through = z @ shortcut(small, large).T
    torch.testing.assert_close(through, large.scale * x @ large.columns)
    torch.testing.assert_close(x @ shortcut(None, large).T, through)
    torch.testing.assert_close(through @ shortcut(large, small).T, z, atol=1e-2, rtol=1e-2)


def test_the_basis_does_not_depend_on_signs():
    x = vectors()
    columns = principal_basis(x.T @ x, 5).columns
    assert bool((columns.gather(0, columns.abs().argmax(dim=0)[None]) > 0).all())


def test_projection_keeps_the_dtype():
    basis = Basis(eye := torch.eye(HIDDEN, 4, dtype=torch.float64), eye)
    x = torch.ones(2, 3, HIDDEN, dtype=torch.bfloat16)
    assert basis.project(x).dtype is torch.bfloat16
    assert torch.equal(basis.project(x)[..., 4:], torch.zeros(2, 3, HIDDEN - 4, dtype=torch.bfloat16))
