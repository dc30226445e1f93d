"""Products of the rows that are kept: every instruction set against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.runtime import native
from tests.native.cases import ISAS, largest_error
from tests.native.test_columns import DTYPES
from tests.native.test_memory import Guarded


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


def rows_of(
    x: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, *, bias: torch.Tensor | None = None, threads: int = 2
) -> torch.Tensor:
    rows, cols = weight.shape
    y = torch.full((x.shape[0], rows), float("nan"))
    call = native.Call(
        None, 0, x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0), rows,
        native.dtype_of(x.dtype), 2, threads,
    )  # fmt: skip
    status = native.library().sk_rows(
        call, weight.data_ptr(), rows, cols, native.dtype_of(weight.dtype), keep.data_ptr(), keep.stride(0)
    )
    native.check(status, "test")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_random_shapes(isa: str, dtype: torch.dtype, share: float) -> None:
    torch.manual_seed(1)
    for number, (rows, cols) in enumerate(
        [(1, 1), (63, 70), (64, 64), (65, 33), (200, 130), (700, 20), (0, 4), (4, 0)]
    ):
        tokens = 1 + number % 4
        x, weight = torch.randn(tokens, cols).to(dtype), torch.randn(rows, cols).to(dtype)
        keep, bias = torch.rand(tokens, rows) < share, torch.randn(rows)
        y = rows_of(x, weight, keep)
        assert (y[~keep] == 0).all()
        every = torch.where(keep, y, (x.float() @ weight.float().T))
        assert largest_error(every, x, weight) < 1e-5
        assert torch.equal(rows_of(x, weight, keep, bias=bias), torch.where(keep, y + bias, 0.0))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 300), st.integers(0, 120)),
    share=st.floats(0, 1),
    tokens=st.integers(1, 4),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
)
def test_any_mask_gives_what_the_whole_product_has(
    shape: tuple[int, int], share: float, tokens: int, isa: str, threads: int
) -> None:
    if isa in native.isas():
        native.use_isa(isa)
    x, weight = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    keep = torch.rand(tokens, shape[0]) < share
    whole = rows_of(x, weight, torch.ones_like(keep), threads=1)
    assert torch.equal(rows_of(x, weight, keep, threads=threads), torch.where(keep, whole, 0.0))


def test_passed_over_rows_are_not_read(isa: str) -> None:
    weight = torch.randn(100, 40)
    keep = (torch.arange(100) % 3 == 0)[None].contiguous()
    weight[~keep[0]] = float("nan")
    y = rows_of(torch.ones(1, 40), weight, keep)
    assert y.isfinite().all()


def test_guard_pages(isa: str) -> None:
    for rows, cols, tokens in ((1, 1, 1), (5, 3, 2), (64, 20, 3), (65, 7, 4), (130, 66, 1)):
        for at_end in (True, False):
            x, weight, keep = torch.randn(tokens, cols), torch.randn(rows, cols), torch.rand(tokens, rows) < 0.5
            held = [Guarded.of(t.view(torch.uint8), at_end=at_end) for t in (x, weight, keep)]
            y = Guarded(tokens * rows * 4, at_end=at_end)
            call = native.Call(None, 0, held[0].address, None, y.address, tokens, cols, rows, 2, 2, 1)
            native.check(native.library().sk_rows(call, held[1].address, rows, cols, 2, held[2].address, rows), "test")
            got = torch.frombuffer(y.bytes(), dtype=torch.float32).reshape(tokens, rows)
            assert torch.equal(got, rows_of(x, weight, keep))


def test_bad_calls_are_refused() -> None:
    x, y, weight, keep = torch.ones(5, 8), torch.ones(5, 8), torch.ones(8, 8), torch.ones(5, 8, dtype=torch.bool)

    def status(tokens: int, cols: int, dtype: int, mask: int | None, stride: int) -> int:
        call = native.Call(None, 0, x.data_ptr(), None, y.data_ptr(), tokens, 8, 8, 2, 2, 1)
        return int(native.library().sk_rows(call, weight.data_ptr(), 8, cols, dtype, mask, stride))

    good = keep.data_ptr()
    assert status(1, 8, 2, good, 8) == status(4, 8, 2, good, 8) == status(0, 8, 2, None, 0) == 0
    bad = [(5, 8, 2, good, 8), (1, -1, 2, good, 8), (1, 8, 3, good, 8), (1, 8, 2, None, 8), (2, 8, 2, good, 7)]
    assert [status(*arguments) for arguments in bad] == [1] * len(bad)
