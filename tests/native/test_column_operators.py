"""The operators that pass over inputs: both backends, refusals with what was got and needed, compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sparsekit.errors import KernelError
from sparsekit.runtime import column_ops, ops

BACKENDS = """
import pytest, sys
from sparsekit.runtime import column_ops
print(column_ops.register())
chosen = ["-k", "not backend and not compile and not opcheck", "tests/native/test_column_operators.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *chosen]))
"""


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_backend(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BACKENDS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "SPARSEKIT_BACKEND": backend},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == backend


def masked(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs().float() <= threshold, torch.zeros((), dtype=x.dtype), x)


def close(y: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert y.is_contiguous()
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * 1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = column_ops.column_major((torch.randn(65, 48) * 0.1).to(dtype))
    bias = torch.randn(65).to(dtype)
    inputs = [torch.randn(48), torch.randn(1, 1, 48), torch.randn(2, 2, 48), torch.randn(48, 3).T, torch.randn(0, 48)]
    for x in [each.to(dtype) for each in (*inputs, torch.randn(4, 2, 48)[:, 1])]:
        for threshold in (torch.tensor([0.6]), torch.rand(48)):
            for b in (None, bias):
                y = column_ops.linear_columns(x, weight, b, threshold)
                exact = F.linear(masked(x, threshold).double(), weight.double(), None if b is None else b.double())
                close(y, exact, dtype)


def test_column_major_holds_the_same_weight() -> None:
    for shape in ((5, 7), (1, 9), (9, 1), (0, 3), (1100, 1024)):
        weight = torch.randn(shape).bfloat16()
        held = column_ops.column_major(weight)
        assert held.dtype == weight.dtype
        assert torch.equal(held, weight)
        assert held.t().is_contiguous()


def test_columns_packed() -> None:
    torch.manual_seed(0)
    weight = torch.where(torch.rand(65, 48) < 0.5, torch.randn(65, 48), 0.0).bfloat16()
    packed, bias, threshold = column_ops.pack_columns(weight), torch.randn(65), torch.rand(48)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for x in (torch.randn(48), torch.randn(2, 2, 48), torch.randn(48, 3).T, torch.randn(0, 48)):
            for b in (None, bias.to(dtype)):
                y = column_ops.linear_columns_packed(x.to(dtype), packed, b, threshold, 65)
                exact = F.linear(
                    masked(x.to(dtype), threshold).double(), weight.double(), None if b is None else b.double()
                )
                close(y, exact, dtype)


def test_rows_that_are_kept() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(65, 48), torch.randn(65)
    for x in (torch.randn(48), torch.randn(2, 2, 48), torch.randn(48, 3).T, torch.randn(0, 48)):
        keep = torch.rand(*x.shape[:-1], 65) < 0.5
        for b in (None, bias):
            for mask in (keep, keep.to(torch.uint8) * 3):
                y = column_ops.linear_rows(x, weight, b, mask)
                close(
                    y,
                    torch.where(keep, F.linear(x.double(), weight.double(), None if b is None else b.double()), 0),
                    x.dtype,
                )


X, W, T = torch.randn(2, 48), column_ops.column_major(torch.randn(64, 48)), torch.rand(48)
R, K, P = (
    torch.randn(64, 48),
    torch.ones(2, 64, dtype=torch.bool),
    column_ops.pack_columns(torch.randn(64, 48).bfloat16()),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: column_ops.linear_columns(X, W.contiguous(), None, T), r"column-major.*48, 1.*1, 64"),
        (lambda: column_ops.linear_columns(X, W[:60], None, T), r"column-major.*1, 64.*1, 60"),
        (lambda: column_ops.linear_columns(X, W[0], None, T), "matrix"),
        (lambda: column_ops.linear_columns(X.bfloat16(), W, None, T), "bf16|bfloat16"),
        (lambda: column_ops.linear_columns(X.double(), W.double(), None, T), "bf16|bfloat16"),
        (lambda: column_ops.linear_columns(X[:, :40], W, None, T), "48"),
        (lambda: column_ops.linear_columns(X, W, T, T), "bias must.*64"),
        (lambda: column_ops.linear_columns(X, W, torch.zeros(64).bfloat16(), T), "bias must"),
        (lambda: column_ops.linear_columns(X, W, None, T[:47]), r"threshold.*47.*|threshold.*\[48\].*\[47\]"),
        (lambda: column_ops.linear_columns(X, W, None, T.bfloat16()), "threshold.*dtype|threshold.*bfloat16"),
        (lambda: column_ops.linear_columns(X, W, None, torch.rand(96)[::2]), "contiguous"),
        (lambda: column_ops.linear_columns(X, W, None, T[None]), "threshold"),
        (lambda: column_ops.linear_columns(torch.randn(5, 48), W, None, T), "5 tokens, needed 4 at most"),
        (lambda: column_ops.linear_columns_packed(X, P, None, T, 63), "64 rows, not 63"),
        (lambda: column_ops.linear_columns_packed(X, P[:-1], None, T, 64), "not a (packed weight|weight of packed)"),
        (lambda: column_ops.linear_columns_packed(X, P.view(torch.int8), None, T, 64), "packed columns"),
        (lambda: column_ops.linear_columns_packed(X[:, :40], P, None, T, 64), "48"),
        (lambda: column_ops.linear_columns_packed(X, P, None, T[:5], 64), "threshold"),
        (lambda: column_ops.linear_columns_packed(torch.randn(5, 48), P, None, T, 64), "5 tokens, needed 4"),
        (lambda: column_ops.linear_rows(X, W, None, K), "contiguous matrix"),
        (lambda: column_ops.linear_rows(X, R, None, K[:1]), r"keep.*\[1, 64\]"),
        (lambda: column_ops.linear_rows(X, R, None, K[:, :60]), r"keep.*\[2, 60\]"),
        (lambda: column_ops.linear_rows(X, R, None, K.float()), "keep"),
        (lambda: column_ops.linear_rows(X, R, None, K.T.contiguous().T), "keep.*contiguous"),
        (lambda: column_ops.linear_rows(torch.randn(5, 48), R, None, K), "5 tokens, needed 4"),
    ],
)
def test_columns_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((RuntimeError, KernelError), match=message):
        call()


def test_columns_without_gradient() -> None:
    x = torch.randn(2, 48, requires_grad=True)
    with pytest.raises(KernelError, match="no gradient"):
        column_ops.linear_columns(x, W, None, T)
    with torch.no_grad():
        column_ops.linear_columns(x, W, None, T)
    y = torch.ops.sparsekit.linear_columns(x, W, None, T)
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()


CALLS = {
    "linear_columns": (X, W, torch.randn(64), T),
    "linear_columns_packed": (X, P, torch.randn(64), T, 64),
    "linear_rows": (X, R, torch.randn(64), K),
}


@pytest.mark.parametrize("name", CALLS)
def test_compile_whole(name: str) -> None:
    column_ops.register()
    x, *rest = CALLS[name]
    operator = getattr(column_ops, name)
    compiled = torch.compile(lambda x: operator(x, *rest) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), operator(x, *rest) * 2)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    column_ops.register()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.sparsekit, name).default, CALLS[name], test_utils=tests)
