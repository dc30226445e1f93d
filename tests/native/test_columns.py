"""Products that pass over inputs: every instruction set against float64, over all masks that thresholds can make."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.runtime import native
from tests.native.cases import ISAS, largest_error
from tests.native.test_memory import Guarded

TOLERANCE = 1e-5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [
    (1, 1),
    (1, 70),
    (70, 1),
    (16, 16),
    (17, 33),
    (31, 5),
    (64, 64),
    (65, 66),
    (129, 100),
    (2049, 9),
    (0, 5),
    (5, 0),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


def masked(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """What the kernels are to compute with: inputs that are not above their threshold are zero."""
    return torch.where(x.abs().float() <= threshold, torch.zeros((), dtype=x.dtype), x)


def columns(
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int = 2,
) -> torch.Tensor:
    """x [tokens, cols] times weight [rows, cols], which is brought into the order of its columns here."""
    rows, cols = weight.shape
    held = weight.t().contiguous()
    y = torch.full((x.shape[0], rows), float("nan"), dtype=dtype)
    call = native.Call(
        None, 0, x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0), rows,
        native.dtype_of(x.dtype), native.dtype_of(dtype), threads,
    )  # fmt: skip
    status = native.library().sk_columns(
        call, held.data_ptr(), rows, cols, native.dtype_of(weight.dtype), threshold.data_ptr(), threshold.numel()
    )
    native.check(status, "test")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_shapes(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for number, (rows, cols) in enumerate(SHAPES * 3):
        weight = (torch.randn(rows, cols) * 0.02).to(dtype)
        tokens, x_dtype = 1 + number % 4, DTYPES[number % 3]
        x = torch.randn(tokens, cols).to(x_dtype)
        level = (0.0, 0.5, 0.8, 3.0)[number % 4]
        for threshold in (torch.tensor([level]), level * torch.rand(cols) * 2):
            y = columns(x, weight, threshold)
            assert largest_error(y, masked(x, threshold), weight) < TOLERANCE, (rows, cols, tokens, x_dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 300),
    cols=st.integers(0, 200),
    tokens=st.integers(0, 4),
    level=st.floats(0, 3),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape(
    rows: int,
    cols: int,
    tokens: int,
    level: float,
    isa: str,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    if isa in native.isas():
        native.use_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    x = torch.randn(tokens, cols, generator=generator).to(x_dtype)
    threshold = level * torch.rand(cols, generator=generator)
    y = columns(x, weight, threshold, threads=threads)
    assert largest_error(y, masked(x, threshold), weight) < TOLERANCE


def test_the_mask_is_the_reference_to_the_bit(isa: str) -> None:
    """With the identity as weight the output is the masked input: all bf16 numbers against thresholds among them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[every.isfinite()]
    generator = torch.Generator().manual_seed(0)
    x = numbers[torch.randperm(len(numbers), generator=generator)[:4096]].reshape(64, 64)
    # Thresholds at, right below and right above |x|, and anything else.
    at = x.abs().float()
    below, above = (torch.nextafter(at, torch.tensor(float(side))) for side in ("-inf", "inf"))
    for row, threshold in enumerate(torch.cat([at, below, above, at.roll(1, 1)]).reshape(-1, 64)):
        token = x[row % 64][None]
        y = columns(token, torch.eye(64).bfloat16(), threshold, dtype=torch.bfloat16)
        assert torch.equal(y, masked(token, threshold) + 0.0)  # a sum has no -0


def test_special_inputs_and_thresholds(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, inf, -inf, nan])
    count_for = {
        0.0: values[2:],
        0.5: values[[2, 3, 5, 6, 7]],
        1.0: values[5:],
        inf: values[7:],
        nan: values,
        -1.0: values,
    }
    for threshold, counting in count_for.items():
        for value in values:
            y = columns(value.reshape(1, 1), torch.full((1, 1), 2.0), torch.tensor([threshold]))
            expected = (
                2 * value if any(torch.equal(value.view(torch.int32), c.view(torch.int32)) for c in counting) else 0.0
            )
            torch.testing.assert_close(y.squeeze(), torch.as_tensor(expected) + 0.0, rtol=0, atol=0, equal_nan=True)


def test_passed_over_columns_are_not_read(isa: str) -> None:
    weight = torch.randn(37, 40)
    weight[:, ::2] = float("nan")
    x = torch.ones(3, 40)
    x[:, ::2] = 0.5
    y = columns(x, weight, torch.tensor([0.5]))
    torch.testing.assert_close(y[0], weight[:, 1::2].sum(1))


def test_neither_threads_nor_other_tokens_change_a_result(isa: str) -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        x, weight = torch.randn(4, 300).to(dtype), torch.randn(5000, 300).to(dtype)
        threshold = torch.rand(300)
        first = columns(x, weight, threshold, threads=1)
        for threads in (2, 3, 4, 7):
            for _ in range(3):
                assert torch.equal(columns(x, weight, threshold, threads=threads), first)
        for t in range(4):
            torch.testing.assert_close(columns(x[t : t + 1], weight, threshold)[0], first[t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_rounding(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 70).to(dtype), torch.randn(33, 70).to(dtype), torch.randn(33).to(dtype)
    threshold = torch.tensor([0.4])
    sums = columns(x, weight, threshold)
    y = columns(x, weight, threshold, bias=bias, dtype=dtype)
    assert torch.equal(y, (sums + bias.float()).to(dtype))


def test_rows_of_x_and_y_may_lie_apart_and_nothing_else_is_written(isa: str) -> None:
    weight = torch.randn(70, 40)
    x = torch.randn(4, 64)[:, :40]
    y = torch.full((4, 100), 7.0)
    call = native.Call(None, 0, x.data_ptr(), None, y.data_ptr(), 4, 64, 100, 2, 2, 1)
    threshold, held = torch.tensor([0.7]), weight.t().contiguous()
    native.check(native.library().sk_columns(call, held.data_ptr(), 70, 40, 2, threshold.data_ptr(), 1), "test")
    assert largest_error(y[:, :70], masked(x, threshold), weight) < TOLERANCE
    assert (y[:, 70:] == 7).all()


def test_guard_pages(isa: str) -> None:
    for number, (rows, cols) in enumerate([(1, 1), (5, 3), (16, 64), (33, 70), (70, 33), (2050, 5)]):
        for at_end in (True, False):
            dtype, tokens = DTYPES[number % 3], 1 + number % 4
            weight, x, threshold = (
                torch.randn(rows, cols).to(dtype),
                torch.randn(tokens, cols).to(dtype),
                torch.rand(cols),
            )
            held, given_x, limits = (
                Guarded.of(t.contiguous().view(torch.uint8), at_end=at_end) for t in (weight.t(), x, threshold)
            )
            y = Guarded(tokens * rows * 4, at_end=at_end)
            kind = native.dtype_of(dtype)
            call = native.Call(None, 0, given_x.address, None, y.address, tokens, cols, rows, kind, 2, 1)
            status = native.library().sk_columns(call, held.address, rows, cols, kind, limits.address, cols)
            native.check(status, "test")
            got = torch.frombuffer(y.bytes(), dtype=torch.float32).reshape(tokens, rows)
            assert largest_error(got, masked(x, threshold), weight) < TOLERANCE


def test_bad_calls_are_refused() -> None:
    x, y, weight, threshold = torch.ones(5, 8), torch.ones(5, 8), torch.ones(8, 8), torch.ones(8)

    def status(**changed: object) -> int:
        given = {
            "tokens": 1, "stride": 8, "rows": 8, "cols": 8, "dtype": 2, "x": 2, "threads": 1, "count": 8,
            "limits": threshold.data_ptr(), "weight": weight.data_ptr(), **changed,
        }  # fmt: skip
        tokens, stride, x_dtype, threads = (given[name] for name in ("tokens", "stride", "x", "threads"))
        call = native.Call(None, 0, x.data_ptr(), None, y.data_ptr(), tokens, stride, 8, x_dtype, 2, threads)
        rest = (given[name] for name in ("weight", "rows", "cols", "dtype", "limits", "count"))
        return int(native.library().sk_columns(ctypes.byref(call), *rest))

    assert status() == status(tokens=0) == status(rows=0) == status(count=1) == 0
    for wrong in (
        {"tokens": 5}, {"tokens": -1}, {"tokens": 2, "stride": 7}, {"rows": -1}, {"cols": -1}, {"dtype": 3}, {"x": 3},
        {"threads": 0}, {"count": 7}, {"count": 0}, {"limits": None}, {"weight": None},
    ):  # fmt: skip
        assert status(**wrong) == 1, wrong
