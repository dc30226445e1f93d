"""Modular decompositions against plain float64 linear algebra on the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from sparsekit.models.block import pairs_to_channels
from sparsekit.solve.modular import SecondMoments, cr_scores, largest, leverage, nystrom, value_output

TOKENS, IN, OUT, SIZE = 400, 12, 7, 8


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(x):
    return x.T @ x


# --- Nystrom -----------------------------------------------------------------------------------------------
def test_leverage_is_what_a_ridge_regression_on_the_channels_recovers():
    x = rand(TOKENS, IN) @ rand(IN, IN, seed=1)
    c = gram(x)
    ridge = 0.01 * c.diagonal().mean()
    expected = (c @ torch.linalg.inv(c + ridge * torch.eye(IN))).diagonal()
    scores, damping = leverage(c, 0.01)
    assert damping == 0.01
    torch.testing.assert_close(scores, expected)
    assert bool(((scores >= 0) & (scores <= 1)).all())


@pytest.mark.parametrize("twin", [0, 5, 11])
def test_a_neuron_that_is_a_sum_of_others_goes_first_and_costs_nothing(twin):
    x = rand(TOKENS, IN)
    others = [channel for channel in range(IN) if channel != twin]
    x[:, twin] = x[:, others] @ (0.2 * rand(IN - 1, seed=2))
    weight = rand(OUT, IN, seed=3).float()
    kept, fitted = nystrom(weight, gram(x), IN - 1, 1e-9)
    assert kept.tolist() == others
    torch.testing.assert_close(x[:, kept] @ fitted.double().T, x @ weight.double().T, atol=1e-5, rtol=1e-5)


def test_a_neuron_that_never_fires_goes_before_any_other():
    x = rand(TOKENS, IN)
    x[:, 4] = 0
    weight = rand(OUT, IN, seed=3).float()
    kept, _ = nystrom(weight, gram(x), IN - 1, 0.01)
    assert 4 not in kept.tolist()


def test_all_neurons_kept_is_nothing_changed():
    weight = rand(OUT, IN, seed=3).float()
    kept, fitted = nystrom(weight, gram(rand(TOKENS, IN)), IN, 0.01)
    assert kept.tolist() == list(range(IN))
    assert torch.equal(fitted, weight)


def test_what_reads_the_rest_is_the_least_squares_solution():
    x = rand(TOKENS, IN) @ rand(IN, IN, seed=1)
    weight = rand(OUT, IN, seed=3).float()
    kept, fitted = nystrom(weight, gram(x), 6, 1e-10)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    torch.testing.assert_close(fitted.double(), expected, atol=1e-4, rtol=1e-4)


# --- queries and keys --------------------------------------------------------------------------------------
def test_energies_are_mean_squares_of_the_outputs():
    x, weight, bias = rand(TOKENS, IN) + 0.5, rand(OUT, IN, seed=1), rand(OUT, seed=2)
    moments = SecondMoments(gram(x) / TOKENS, x.mean(dim=0))
    for given in (None, bias):
        y = x @ weight.T + (0 if given is None else given)
        torch.testing.assert_close(moments.of(weight, given), gram(y) / TOKENS)
        torch.testing.assert_close(moments.energy(weight, given), y.square().mean(dim=0))


def test_scores_are_norms_of_the_columns_of_the_roots():
    x, query, key = rand(TOKENS, IN), rand(SIZE, IN, seed=1), rand(SIZE, IN, seed=2)

    def root(weight):
        values, vectors = torch.linalg.eigh(gram(x @ weight.T))
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    expected = root(query).norm(dim=0) * root(key).norm(dim=0)
    energy = [(x @ weight.T).square().sum(dim=0) for weight in (query, key)]
    found = cr_scores(energy[0][None, None], energy[1][None], paired=False)
    torch.testing.assert_close(found[0], expected)


def test_pairs_score_the_same_wherever_positions_have_turned_them():
    query, key = rand(TOKENS, 2, 3, SIZE, seed=1), rand(TOKENS, 2, SIZE, seed=2)

    def turned(x, angles):
        one, other = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)

    def scores(q, k):
        return cr_scores(q.square().mean(dim=0), k.square().mean(dim=0), paired=True)

    angles = rand(TOKENS, SIZE // 2, seed=3)
    after = scores(turned(query, angles[:, None, None]), turned(key, angles[:, None]))
    torch.testing.assert_close(scores(query, key), after)
    assert after.shape == (2, SIZE // 2)


def test_all_pairs_are_all_channels_in_their_order():
    pairs = largest(rand(SIZE // 2).abs(), SIZE // 2)
    assert pairs_to_channels(pairs, SIZE).tolist() == list(range(SIZE))
    assert pairs_to_channels(torch.tensor([0, 2]), SIZE).tolist() == [0, 2, 4, 6]


def test_of_equal_scores_the_first_stay():
    assert largest(torch.tensor([[1.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 4.0]]), 2).tolist() == [[1, 2], [0, 3]]


# --- values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 3, 5, SIZE])
def test_values_reach_the_error_of_the_best_rank(rank):
    """The singular values of X W_V W_O that a rank leaves out are its least error."""
    x, value = rand(TOKENS, IN) @ rand(IN, IN, seed=1), rand(SIZE, IN, seed=2)
    output = rand(3 * OUT, SIZE, seed=3)  # three heads read the same values
    values = x @ value.T
    onto, back = value_output(gram(values) / TOKENS, output, rank)
    assert onto.shape == (rank, SIZE)
    error = (values @ output.T - values @ onto.T @ back.T @ output.T).square().sum()
    best = torch.linalg.svd(values @ output.T).S[rank:].square().sum()
    torch.testing.assert_close(error, best, atol=1e-8, rtol=1e-6)


def test_values_that_lie_in_a_plane_need_two_channels():
    values = rand(TOKENS, 2) @ rand(2, SIZE, seed=1)
    output = rand(OUT, SIZE, seed=2)
    onto, back = value_output(gram(values) / TOKENS, output, 2)
    torch.testing.assert_close(values @ onto.T @ back.T @ output.T, values @ output.T, atol=1e-7, rtol=1e-7)
    assert bool(torch.isfinite(onto).all())
