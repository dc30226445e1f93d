"""Weights without their zeros, column by column: round trip to the bit, products, and buffers that are refused."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import KernelError
from sparsekit.runtime import column_ops, native
from tests.native.cases import ISAS, largest_error
from tests.native.test_columns import DTYPES, masked
from tests.native.test_memory import Guarded

TOLERANCE = 1e-5
SHAPES = [
    (1, 1),
    (1, 70),
    (70, 1),
    (32, 8),
    (33, 33),
    (64, 20),
    (65, 66),
    (257, 40),
    (2100, 9),
    (9000, 3),
    (0, 5),
    (5, 0),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


def holed(rows: int, cols: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=generator) < density
    return torch.where(keep, torch.randn(rows, cols, generator=generator), 0.0).bfloat16()


def product(
    x: torch.Tensor, packed: torch.Tensor, rows: int, threshold: torch.Tensor, *, threads: int = 2
) -> torch.Tensor:
    y = torch.full((x.shape[0], rows), float("nan"))
    call = native.Call(
        packed.data_ptr(), packed.numel(), x.data_ptr(), None, y.data_ptr(), x.shape[0], x.stride(0), rows,
        native.dtype_of(x.dtype), 2, threads,
    )  # fmt: skip
    native.check(native.library().sk_columns_packed(call, threshold.data_ptr(), threshold.numel()), "test")
    return y


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_random_shapes(isa: str, density: float) -> None:
    torch.manual_seed(1)
    for number, (rows, cols) in enumerate(SHAPES):
        weight, tokens = holed(rows, cols, density), 1 + number % 4
        packed = column_ops.pack_columns(weight)
        x = torch.randn(tokens, cols).to(DTYPES[number % 3])
        for threshold in (torch.tensor([0.6]), torch.rand(cols), torch.tensor([0.0]), torch.tensor([9.0])):
            y = product(x, packed, rows, threshold)
            assert largest_error(y, masked(x, threshold), weight) < TOLERANCE, (rows, cols, tokens)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 300), st.integers(0, 120)),
    density=st.floats(0, 1),
    tokens=st.integers(0, 4),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape(shape: tuple[int, int], density: float, tokens: int, isa: str, threads: int, seed: int) -> None:
    if isa in native.isas():
        native.use_isa(isa)
    weight = holed(*shape, density, seed)
    packed = column_ops.pack_columns(weight)
    assert column_ops.packed_columns_info(packed) == (*shape, int((weight != 0).sum()))
    assert torch.equal(column_ops.unpack_columns(packed), weight)
    x, threshold = torch.randn(tokens, shape[1]), torch.rand(shape[1])
    y = product(x, packed, shape[0], threshold, threads=threads)
    assert largest_error(y, masked(x, threshold), weight) < TOLERANCE


def test_every_bit_comes_back() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).reshape(512, 128)
    weight = bits.view(torch.bfloat16)
    packed = column_ops.pack_columns(weight)
    assert column_ops.packed_columns_info(packed) == (512, 128, (1 << 16) - 1)  # all but +0
    back = column_ops.unpack_columns(packed)
    assert torch.equal(back.contiguous().view(torch.int16), bits)


def test_neither_threads_nor_other_tokens_change_a_result(isa: str) -> None:
    weight, x, threshold = holed(3000, 100, 0.5), torch.randn(4, 100), torch.rand(100)
    packed = column_ops.pack_columns(weight)
    first = product(x, packed, 3000, threshold, threads=1)
    for threads in (2, 3, 4, 7):
        assert torch.equal(product(x, packed, 3000, threshold, threads=threads), first)
    for t in range(4):
        torch.testing.assert_close(product(x[t : t + 1], packed, 3000, threshold)[0], first[t], rtol=1e-5, atol=1e-5)


def test_passed_over_weights_are_not_read(isa: str) -> None:
    weight = holed(40, 30, 0.5)
    weight[:, ::2] = float("inf")
    x = torch.ones(2, 30)
    x[:, ::2] = -0.25
    y = product(x, column_ops.pack_columns(weight), 40, torch.tensor([0.25]))
    torch.testing.assert_close(y[0], weight[:, 1::2].float().sum(1))


def test_guard_pages(isa: str) -> None:
    for number, (rows, cols) in enumerate([(1, 1), (5, 3), (64, 20), (65, 7), (300, 9)]):
        for at_end in (True, False):
            weight, x = holed(rows, cols, (0.3, 1.0)[number % 2]), torch.randn(1 + number % 4, cols)
            packed = column_ops.pack_columns(weight)
            held, given_x = (
                Guarded.of(packed, at_end=at_end, alignment=8),
                Guarded.of(x.view(torch.uint8), at_end=at_end),
            )
            y = Guarded(x.shape[0] * rows * 4, at_end=at_end)
            call = native.Call(
                held.address, held.nbytes, given_x.address, None, y.address, x.shape[0], cols, rows, 2, 2, 1
            )
            threshold = torch.tensor([0.5])
            native.check(native.library().sk_columns_packed(call, threshold.data_ptr(), 1), "test")
            got = torch.frombuffer(y.bytes(), dtype=torch.float32).reshape(-1, rows)
            assert largest_error(got, masked(x, threshold), weight) < TOLERANCE


def damaged(packed: torch.Tensor, at: int, value: int, size: int = 4) -> torch.Tensor:
    copy = packed.clone()
    ctypes.memmove(copy.data_ptr() + at, value.to_bytes(size, "little"), size)
    return copy


def test_damaged_headers_are_refused() -> None:
    packed = column_ops.pack_columns(holed(100, 20, 0.5))
    x, threshold = torch.ones(1, 20), torch.zeros(1)
    wrong = [damaged(packed, at, 7) for at in (0, 16, 32)] + [
        packed[:-1],
        packed[:40],
        torch.cat([packed, packed]),
    ]
    wrong.append(damaged(packed, 64 + 4 * 20, 9))  # where the last record ends
    for each in wrong:
        for use in (
            lambda p: column_ops.packed_columns_info(p),
            lambda p: column_ops.unpack_columns(p),
            lambda p: product(x, p, 100, threshold),
        ):
            with pytest.raises(KernelError, match="not a packed weight"):
                use(each.clone())
    with pytest.raises(KernelError, match="needed contiguous uint8"):
        column_ops.unpack_columns(packed.view(torch.int8))


def test_damaged_records_are_found_where_they_are_proven() -> None:
    packed = column_ops.pack_columns(holed(100, 20, 0.5))
    records = 64 + -(-4 * (20 + 1) // 64) * 64
    column_ops.prove_columns(packed)
    wrong = [damaged(packed, 64, 1), damaged(packed, 68, 0), damaged(packed, 72, 1 << 31), damaged(packed, 24, 5)]
    wrong += [damaged(packed, 8, 7), damaged(packed, 40, 5)]
    wrong += [damaged(packed, records + at, value, size) for at, value, size in (
        (16, 5, 2), (18, 9, 2), (18, 0xFFFF, 2), (24, 0, 4), (24, 0xFFFFFFFF, 4)
    )]  # fmt: skip
    for each in wrong:
        with pytest.raises(KernelError, match="not a packed weight"):
            column_ops.prove_columns(each)


def test_high_bytes_of_every_kind(isa: str) -> None:
    """Codes of three and four bits, patches, columns of whole high bytes: each alone, and mixed."""
    torch.manual_seed(3)
    plain = torch.randn(200, 40).bfloat16()
    pruned = torch.where(plain.abs() > 0.7, plain, 0.0).bfloat16()
    wild = torch.randint(-(1 << 15), 1 << 15, (200, 40), dtype=torch.int16)
    wild[(wild & 0x7F80) == 0x7F80] = 1  # neither infinity nor NaN
    wild = torch.where(wild.view(torch.bfloat16).abs() < 1e4, wild, 3)
    patched, mixed = pruned.clone(), pruned.clone()
    patched[::50, ::7] = 2.0**20
    mixed[:, ::5] = wild.view(torch.bfloat16)[:, ::5]
    assert width(pruned) == 3
    assert width(plain) == 4
    for weight in (plain, pruned, wild.view(torch.bfloat16), patched, mixed):
        packed = column_ops.pack_columns(weight)
        column_ops.prove_columns(packed)
        assert torch.equal(column_ops.unpack_columns(packed).view(torch.int16), weight.view(torch.int16))
        for tokens in (1, 3, 4):
            x, threshold = torch.randn(tokens, 40), torch.tensor([0.4])
            y = product(x, packed, 200, threshold)
            assert largest_error(y, masked(x, threshold), weight) < TOLERANCE


def width(weight: torch.Tensor) -> int:
    """Return the bits of a code."""
    return int(column_ops.pack_columns(weight)[40])


def test_fewer_bytes_than_plain() -> None:
    """A normal weight takes 13 bits where it has no holes, 7 where half of it is missing."""
    weight = torch.randn(2048, 64).bfloat16()
    pruned = torch.where(weight.abs() > 0.6745, weight, 0.0).bfloat16()
    assert column_ops.pack_columns(weight).numel() < 13.5 / 16 * 2 * weight.numel()
    assert column_ops.pack_columns(pruned).numel() < 7.2 / 16 * 2 * weight.numel()


def test_what_cannot_be_packed_is_refused() -> None:
    for weight in (torch.ones(4, 4), torch.ones(4).bfloat16(), torch.ones(2, 2, 2).bfloat16()):
        with pytest.raises(KernelError, match="needed a matrix of bfloat16"):
            column_ops.pack_columns(weight)
