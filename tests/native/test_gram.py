"""X^T X in native code against float64, on every instruction set: it adds the product, or nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.runtime import native

pytestmark = pytest.mark.skipif(
    not native.available() or "avx512bf16" not in native.isas(), reason="this processor has no bf16 products"
)


def inputs(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, cols) if cols > 1 else torch.ones(cols)
    return (torch.randn(tokens, cols, generator=generator) * scale).bfloat16()


def error(got: torch.Tensor, start: torch.Tensor, x: torch.Tensor) -> float:
    """Largest error on and above the diagonal, relative to the norms of the channels."""
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt().clamp_min(1e-30)
    return float(((got - start - exact) / torch.outer(scale, scale)).triu().abs().max())


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 1100), cols=st.integers(1, 200), seed=st.integers(0, 9), threads=st.integers(1, 3))
def test_adds_the_product(tokens, cols, seed, threads):
    x = inputs(tokens, cols, seed)
    start = torch.diag(torch.arange(cols, dtype=torch.float64))
    sums = start.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert native.add_gram(sums, x)
    finally:
        torch.set_num_threads(before)
    if tokens:
        assert error(sums, start, x) < 4e-6
    else:
        assert torch.equal(sums, start)


@pytest.mark.parametrize("tokens", [1, 2, 511, 512, 513])
def test_products_of_small_integers_are_exact(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-8, 9, (tokens, 101), generator=generator).bfloat16()
    sums = torch.zeros(101, 101, dtype=torch.float64)
    assert native.add_gram(sums, x)
    assert torch.equal(sums.triu(), (x.double().T @ x.double()).triu())


def test_rows_may_lie_apart():
    x = inputs(300, 96)[:, :77]
    sums = torch.zeros(77, 77, dtype=torch.float64)
    assert native.add_gram(sums, x)
    assert error(sums, torch.zeros_like(sums), x) < 4e-6


def test_the_sums_do_not_depend_on_threads():
    x, results = inputs(700, 300), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.zeros(300, 300, dtype=torch.float64))
        assert native.add_gram(results[-1], x)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype):
    sums = torch.zeros(8, 8, dtype=torch.float64)
    assert not native.add_gram(sums, torch.ones(4, 8, dtype=dtype))
    assert not sums.any()


def test_instruction_sets_without_bf16_products_leave_it_to_torch():
    sums = torch.zeros(8, 8, dtype=torch.float64)
    for name in set(native.isas()) - {"avx512bf16"}:
        native.use_isa(name)
        assert not native.add_gram(sums, torch.ones(4, 8, dtype=torch.bfloat16))
    assert not sums.any()
