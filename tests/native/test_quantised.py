"""Products with int8 and int4 weights, of every instruction set, against float64."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from sparsekit.errors import KernelError
from sparsekit.runtime import native, ops
from sparsekit.runtime.buffers import MemoryLayout
from sparsekit.runtime.native import DType
from tests.native.cases import ISAS, largest_error, multiply
from tests.native.quantised_cases import FUSED_TOKENS, LIMITS, Quantised, quantisation_bound, quantised
from tests.native.test_memory import Guarded

LAYOUTS = (MemoryLayout.INT8, MemoryLayout.INT4)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-5  # fp32 sums of exact inputs
SHAPES = [(1, 1), (1, 64), (64, 1), (16, 4), (17, 65), (33, 63), (64, 128), (3, 5000), (0, 8), (8, 0)]
_rng = random.Random(7)
SHAPES += [(_rng.randint(1, 150), _rng.randint(1, 400)) for _ in range(50)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


def check(isa: str, made: Quantised, x: torch.Tensor, dtype: torch.dtype, threads: int = 1) -> None:
    """Few tokens: exact weights, quantised x. More: rounded weights, exact x."""
    y = multiply(made.pack(dtype), x, made.shape[0], dtype=torch.float32, threads=threads)
    if x.shape[0] > FUSED_TOKENS[isa]:
        assert largest_error(y, x, made.rounded(dtype)) < TOLERANCE, (isa, made.shape, x.shape, dtype)
        return
    error = (y.double() - x.double() @ made.exact.T).abs()
    assert (error <= quantisation_bound(x, made.exact)).all(), (isa, made.shape, x.shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_shapes(isa: str, layout: MemoryLayout) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        density = (0.5, 0.4, 0.3, 0.2, 0.05, 1.0)[number % 6]
        made = quantised(rows, cols, density, layout)
        spread = torch.exp(2 * torch.randn(1, cols))  # activations have outlier channels
        for tokens in (1, 2 + number % 15, 17 + number % 3):
            x = (torch.randn(tokens, cols) * spread).to(DTYPES[number % 3])
            check(isa, made, x, DTYPES[(number + tokens) % 3])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_tokens(isa: str, layout: MemoryLayout, dtype: torch.dtype) -> None:
    made = quantised(83, 150, 0.5, layout)
    for tokens in (*range(1, 20), 25, 530):
        check(isa, made, torch.randn(tokens, 150).to(dtype), dtype, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_beyond_the_scratch(isa: str, layout: MemoryLayout) -> None:
    made = quantised(70, 5003, 0.5, layout)
    for tokens in (1, 20):
        check(isa, made, torch.randn(tokens, 5003).bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_multiplied_exactly_up_to_the_extremes(isa: str, layout: MemoryLayout) -> None:
    """x of integers with a 127 in each group is its own quantisation: only float32 rounding of sums is left.

    The largest weights and activations of all signs show that no 16-bit sum of two products saturates.
    """
    for extreme in (True, False):
        for rows, cols, density in [(33, 64, 1.0), (40, 1000, 1.0), (40, 1000, 0.99), (16, 4096, 0.5)]:
            made = quantised(rows, cols, density, layout, extreme=extreme)
            for tokens in (n for n in (1, 2, 3, 4, 9, 16) if n <= FUSED_TOKENS[isa]):
                x = torch.randint(-127, 128, (tokens, cols)).float()
                if extreme:
                    x = torch.where(x < 0, -127.0, 127.0)
                    x[0] = torch.where(made.codes[0] < 0, -127.0, 127.0)  # all products of a row positive
                x[:, ::64] = 127
                weight = made.exact
                y = multiply(made.pack(torch.float32), x, rows, dtype=torch.float32)
                assert largest_error(y, x, weight) < 70 * 2**-24, (isa, extreme, rows, cols, tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_and_output_dtype(isa: str, layout: MemoryLayout) -> None:
    made = quantised(33, 70, 0.5, layout)
    for dtype, unit in zip(DTYPES, (2**-8, 2**-11, 2**-20), strict=True):
        bias = torch.randn(33).to(dtype)
        for tokens in (1, 4, 20):
            x = torch.randn(tokens, 70).to(dtype)
            y = multiply(made.pack(dtype), x, 33, bias=bias).double()
            quantised_x = tokens <= FUSED_TOKENS[isa]
            weight = made.exact if quantised_x else made.rounded(dtype).double()
            expected = x.double() @ weight.T + bias.double()
            rounding = 70 * 2**-24 * (x.double().abs() @ weight.abs().T)  # of a sum of 70 products in float32
            off = quantisation_bound(x, weight) if quantised_x else rounding
            assert ((y - expected).abs() <= off + unit * (expected.abs() + off)).all()


def test_hopeless_activations(isa: str) -> None:
    """Zero, tiny, infinite and NaN groups of x reach the output as in a dense product."""
    for layout in LAYOUTS:
        made = quantised(20, 150, 0.7, layout)
        for special in (0.0, 1e-40, 1e-35, 3e38, float("inf"), float("-inf"), float("nan")):
            x = torch.randn(1, 150)
            x[0, 64:128] = 0
            x[0, 70] = special
            y = multiply(made.pack(torch.float32), x, 20)
            dense = x.double() @ made.exact.T
            if x.isfinite().all():
                assert ((y.double() - dense).abs() <= quantisation_bound(x, made.exact)).all(), special
            else:
                assert torch.equal(y.isnan(), dense.isnan()), (layout, special)
                assert torch.equal(y[y.isinf()], dense[dense.isinf()].float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(layout: MemoryLayout, tokens: int) -> None:
    made = quantised(500, 130, 0.5, layout)
    packed, x = made.pack(), torch.randn(tokens, 130).bfloat16()
    one = multiply(packed, x, 500)
    for threads in (2, 3, 8):
        assert torch.equal(multiply(packed, x, 500, threads=threads), one)


def test_guard_pages(isa: str) -> None:
    shapes = [(1, 1), (5, 3), (16, 64), (17, 67), (64, 128), (70, 33), (130, 257), (3, 2049)]
    for number, (rows, cols) in enumerate(shapes):
        for layout in LAYOUTS:
            made = quantised(rows, cols, (0.5, 1.0)[number % 2], layout)
            buffer = made.pack(DTYPES[number % 3])
            for at_end in (True, False):
                packed = Guarded.of(buffer, at_end=at_end, alignment=8)
                for tokens in (1, 2 + number, 19):
                    x = torch.randn(tokens, cols).to(DTYPES[(number + tokens) % 3])
                    xs = Guarded.of(x.view(torch.uint8), at_end=at_end)
                    y = Guarded(tokens * rows * 4, at_end=at_end)
                    call = native.Call(
                        packed.address, packed.nbytes, xs.address, None, y.address, tokens, cols, rows,
                        native.dtype_of(x.dtype), DType.F32, 1,
                    )  # fmt: skip
                    native.check(native.library().sk_linear(call), "linear")
                    got = torch.frombuffer(y.bytes(), dtype=torch.float32).reshape(tokens, rows)
                    bound = quantisation_bound(x, made.exact) + 2**-8 * (x.double().abs() @ made.exact.abs().T)
                    assert ((got.double() - x.double() @ made.exact.T).abs() <= bound).all()


OPERATOR = """
import torch
from sparsekit.runtime import ops
from tests.native.quantised_cases import LIMITS, quantisation_bound, quantised
print(ops.register())
for layout in LIMITS:
    made = quantised(64, 200, 0.5, layout)
    packed = made.pack()
    for x in (torch.randn(200), torch.randn(2, 200, dtype=torch.bfloat16), torch.randn(3, 7, 200)):
        y = ops.linear(x, packed, None, 64).double()
        flat = x.reshape(-1, 200)
        expected = flat.double() @ made.exact.T
        bound = quantisation_bound(flat, made.exact) + 2**-8 * (flat.double().abs() @ made.exact.abs().T)
        assert ((y.reshape(-1, 64) - expected).abs() <= bound).all()
"""


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_the_operator_takes_them(backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPERATOR],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "SPARSEKIT_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [backend]


def test_the_limits_are_those_of_the_layouts() -> None:
    for layout, (low, high) in LIMITS.items():
        made = quantised(4, 8, 1.0, layout)
        for bad in (low - 1, high + 1):
            if not -128 <= bad <= 127:
                continue
            made.codes[2, 3] = bad
            made.keep[2, 3] = True
            with pytest.raises(KernelError, match="bad argument"):
                made.pack()
