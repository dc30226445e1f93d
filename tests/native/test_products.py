"""Every kernel of every instruction set against float64."""

from __future__ import annotations

import random

import pytest
import torch

from sparsekit.runtime import native
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import EXACT, ISAS, case, largest_error, multiply

TOLERANCE = 1e-5  # fp32 sums over up to 5000 products
SHAPES = [
    (1, 1),
    (1, 64),
    (64, 1),
    (16, 4),
    (17, 5),
    (63, 63),
    (64, 64),
    (65, 66),
    (128, 130),
    (3, 5000),
    (0, 8),
    (8, 0),
]
_rng = random.Random(5)
SHAPES += [(_rng.randint(1, 150), _rng.randint(1, 400)) for _ in range(88)]
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 25)
FORMS = [
    (MemoryLayout.BITMAP, torch.bfloat16),
    (MemoryLayout.BITMAP, torch.float16),
    (MemoryLayout.BITMAP, torch.float32),
    (MemoryLayout.SPLIT, torch.bfloat16),
]
IDS = ["bitmap-bf16", "bitmap-fp16", "bitmap-fp32", "split"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


@pytest.mark.parametrize(("layout", "dtype"), FORMS, ids=IDS)
def test_random_shapes(isa: str, layout: MemoryLayout, dtype: torch.dtype) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        density = (0.5, 0.4, 0.3, 0.2, 0.05, 1.0)[number % 6]
        made = case(rows, cols, density, dtype, wild=(0.0, 0.02)[number % 2])
        packed = made.pack(layout)
        tokens = TOKENS[number % len(TOKENS)]
        for x_dtype in (torch.bfloat16, (torch.float32, torch.float16)[number % 2]):
            x = torch.randn(tokens, cols).to(x_dtype)
            error = largest_error(multiply(packed, x, rows, dtype=torch.float32), x, made.weight)
            assert error < TOLERANCE, (isa, rows, cols, tokens, x_dtype)


@pytest.mark.parametrize(("layout", "dtype"), FORMS, ids=IDS)
def test_every_number_of_tokens(isa: str, layout: MemoryLayout, dtype: torch.dtype) -> None:
    made = case(83, 150, 0.5, dtype, wild=0.005)
    packed = made.pack(layout)
    for tokens in [*range(1, 40), 530]:  # 400: more than one pass
        x = torch.randn(tokens, 150).to(torch.bfloat16)
        y = multiply(packed, x, 83, dtype=torch.float32, threads=2)
        assert largest_error(y, x, made.weight) < TOLERANCE, tokens


def test_columns_beyond_the_scratch(isa: str) -> None:
    for layout, dtype in FORMS:
        made = case(70, 5003, 0.5, dtype, wild=0.001)
        for tokens in (1, 20):
            x = torch.randn(tokens, 5003).to(torch.bfloat16)
            y = multiply(made.pack(layout), x, 70, dtype=torch.float32)
            assert largest_error(y, x, made.weight) < TOLERANCE, (layout, dtype, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bias_and_output_dtype(isa: str, dtype: torch.dtype) -> None:
    made = case(33, 70, 0.5, torch.bfloat16)
    bias = torch.randn(33).to(dtype)
    for layout in EXACT:
        for tokens in (1, 9, 20):
            x = torch.randn(tokens, 70).to(dtype)
            y = multiply(made.pack(layout), x, 33, bias=bias)
            expected = x.double() @ made.weight.double().T + bias.double()
            # One rounding to the output dtype, on top of the fp32 sums.
            unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}[dtype]
            assert ((y.double() - expected).abs() <= unit * expected.abs() + 1e-6).all()


def test_nothing_but_the_output_is_written_and_rows_may_lie_apart(isa: str) -> None:
    made = case(70, 40, 0.5, torch.bfloat16)
    packed = made.pack(MemoryLayout.SPLIT)
    x = torch.randn(5, 64).bfloat16()[:, :40]  # rows 64 apart
    y = torch.full((5, 100), 7.0)
    call = native.Call(packed.data_ptr(), packed.numel(), x.data_ptr(), None, y.data_ptr(), 5, 64, 100, 0, 2, 1)
    native.check(native.library().sk_linear(call), "test")
    assert largest_error(y[:, :70], x, made.weight) < TOLERANCE
    assert (y[:, 70:] == 7).all()


def test_infinities_and_nan_reach_the_output_as_in_dense(isa: str) -> None:
    made = case(20, 40, 0.5, torch.bfloat16)
    for special in (float("inf"), float("nan")):
        for tokens in (1, 20):
            x = torch.randn(tokens, 40).bfloat16()
            x[0, 7] = special
            dense = x.float() @ made.weight.float().T
            for layout in EXACT:
                y = multiply(made.pack(layout), x, 20, dtype=torch.float32)
                assert torch.equal(y.isnan(), dense.isnan()), (layout, special, tokens)


@pytest.mark.parametrize("threads", [1, 3])
def test_groups_are_the_products_one_by_one(isa: str, threads: int) -> None:
    split, bitmap = MemoryLayout.SPLIT, MemoryLayout.BITMAP
    kinds = [(83, torch.bfloat16, split), (0, torch.bfloat16, split), (200, torch.bfloat16, bitmap)]
    kinds += [(7, torch.float16, bitmap)]
    packed = [case(rows, 150, 0.5, dtype, wild=0.01).pack(layout) for rows, dtype, layout in kinds]
    for members in ((0, 2), (2, 0, 1), (0, 3), (0, 0, 0), (2,)):
        for tokens in (0, 1, 5, 6, 16, 40):
            x = torch.randn(tokens, 150).bfloat16()
            ys = [torch.full((tokens, kinds[i][0]), float("nan")) for i in members]
            calls = (native.Call * len(members))()
            for call, i, y in zip(calls, members, ys, strict=True):
                call.packed, call.packed_bytes, call.x, call.y = (
                    packed[i].data_ptr(), packed[i].numel(), x.data_ptr(), y.data_ptr(),
                )  # fmt: skip
                call.tokens, call.x_stride, call.y_stride, call.y_dtype, call.threads = (
                    tokens, 150, y.shape[1], native.DType.F32, threads,
                )  # fmt: skip
            native.check(native.library().sk_linear_group(calls, len(members)), "test")
            for i, y in zip(members, ys, strict=True):
                assert torch.equal(y, multiply(packed[i], x, y.shape[1], dtype=torch.float32)), (members, tokens)
    assert native.library().sk_linear_group(calls, 0) == native.library().sk_linear_group(calls, 4) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_kernel(isa: str, dtype: torch.dtype) -> None:
    for number, (rows, cols) in enumerate(SHAPES):
        weight = (torch.randn(rows, cols) * 0.02).to(dtype)
        for tokens in (1, 2 + number % 5):  # up to four in one pass
            x = torch.randn(tokens, cols).bfloat16()
            y = torch.full((tokens, rows), float("nan"))
            call = native.Call(None, 0, x.data_ptr(), None, y.data_ptr(), tokens, cols, rows, 0, 2, 2)
            status = native.library().sk_dense(call, weight.data_ptr(), rows, cols, native.dtype_of(dtype))
            native.check(status, "test")
            assert largest_error(y, x, weight) < TOLERANCE, (rows, cols, tokens)


def test_read_sums_all_bytes(isa: str) -> None:
    data = torch.zeros(1_000_003, dtype=torch.uint8)
    assert native.library().sk_read(data.data_ptr(), data.numel(), 2) == 0
    data[-1] = 9  # behind the last whole vector, so summed as a byte
    assert native.library().sk_read(data.data_ptr(), data.numel(), 2) == 9
