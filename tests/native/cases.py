"""Random weights, references and raw calls shared by the kernel tests."""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsekit.pattern import NM, Block, parse_pattern
from sparsekit.runtime import buffers, native
from sparsekit.runtime.buffers import MemoryLayout

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
EXACT = (MemoryLayout.BITMAP, MemoryLayout.SPLIT)  # hold any mask, and values as they are


def bitmask(keep: torch.Tensor) -> torch.Tensor:
    """Mask [rows, cols] to u8 [rows, ceil(cols / 8)], bit i of byte j = column 8j + i."""
    rows, cols = keep.shape
    bits = F.pad(keep.to(torch.uint8), (0, -cols % 8)).reshape(rows, (cols + 7) // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


@dataclass
class Case:
    """A weight with holes, its kept values and its mask."""

    weight: torch.Tensor
    keep: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    def pack(self, layout: MemoryLayout) -> torch.Tensor:
        return buffers.pack(bitmask(self.keep), self.weight[self.keep], self.shape, layout)


def case(rows: int, cols: int, density: float, dtype: torch.dtype, *, wild: float = 0.0) -> Case:
    """A weight as pruning leaves it: large values survive; every seventh row is empty or full; some are wild."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((rows, cols, density, str(dtype), wild)).encode()))
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    odd = torch.randn(rows, cols, generator=generator) * torch.exp(4 * torch.randn(rows, cols, generator=generator))
    weight = torch.where(torch.rand(rows, cols, generator=generator) < wild, odd.clamp(-3e4, 3e4), weight).to(dtype)
    count = round(density * cols)
    order = weight.float().abs().argsort(1, descending=True)
    keep = torch.zeros(rows, cols, dtype=torch.bool).scatter_(1, order[:, :count], True)
    keep[3::7] = False
    keep[5::7] = True
    return Case(torch.where(keep, weight, torch.zeros((), dtype=dtype)), keep)


def structured(rows: int, cols: int, pattern: str, density: float, dtype: torch.dtype) -> Case:
    """A random weight of a pattern `N:64` or `RxC`; blocks are kept with probability `density`."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((rows, cols, pattern, density, str(dtype))).encode()))
    parsed = parse_pattern(pattern)
    if isinstance(parsed, NM):
        order = torch.rand(rows, cols // parsed.of, parsed.of, generator=generator).argsort(-1)
        keep = (order < parsed.keep).reshape(rows, cols)
    else:
        assert isinstance(parsed, Block)
        grid = torch.rand(rows // parsed.rows, cols // parsed.cols, generator=generator) < density
        keep = grid.repeat_interleave(parsed.rows, 0).repeat_interleave(parsed.cols, 1)
    weight = (torch.randn(rows, cols, generator=generator) * 0.02).to(dtype)
    return Case(torch.where(keep, weight, torch.zeros((), dtype=dtype)), keep)


def multiply(
    packed: torch.Tensor,
    x: torch.Tensor,
    rows: int,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """x [tokens, cols] times the packed weight."""
    y = torch.full((x.shape[0], rows), float("nan"), dtype=dtype or x.dtype)
    call = native.Call(
        packed.data_ptr(), packed.numel(), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        x.shape[0], x.stride(0), rows, native.dtype_of(x.dtype), native.dtype_of(y.dtype), threads,
    )  # fmt: skip
    native.check(native.library().sk_linear(ctypes.byref(call)), "test")
    return y


def largest_error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest |y - x W^T| relative to |x| |W|^T, which is what rounding errors scale with."""
    expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    error = (y.double() - expected).abs()
    if not error.numel():
        return 0.0
    assert not error.isnan().any(), "an output was not written"
    return float((error / size.clamp_min(1e-30)).max())
