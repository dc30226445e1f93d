"""One non-finite value anywhere is found; a sum that overflows is no false alarm."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 511, 1023])
def test_one_bad_value_is_found(dtype, bad, place):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x.reshape(2, 512))
    x[place] = bad
    assert not all_finite(x.reshape(2, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_that_overflows_is_finite_all_the_same(dtype):
    x = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(x.sum())
    assert all_finite(x)


def test_opposite_infinities_and_empty_tensors():
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    assert all_finite(torch.empty(0, 4))
