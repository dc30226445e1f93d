"""Random int8 and int4 weights and what their products may be off by."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsekit.runtime import buffers
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import bitmask

LIMITS = {MemoryLayout.INT8: (-127, 127), MemoryLayout.INT4: (-8, 8)}
FUSED_TOKENS = {"portable": 4, "avx2": 4, "avx512": 16, "avx512bf16": 16}
"""Up to so many tokens the activations are quantised too."""


@dataclass
class Quantised:
    """A weight of small integers with a scale for every 64 columns of a row."""

    keep: torch.Tensor
    codes: torch.Tensor  # i8 [rows, cols], zero in the holes
    scales: torch.Tensor  # f16 [rows, groups]
    layout: MemoryLayout

    @property
    def shape(self) -> tuple[int, int]:
        return (self.keep.shape[0], self.keep.shape[1])

    @property
    def exact(self) -> torch.Tensor:
        """Integer x scale, float64."""
        return self.codes.double() * self.scales.double().repeat_interleave(64, 1)[:, : self.shape[1]]

    def rounded(self, dtype: torch.dtype) -> torch.Tensor:
        """What `buffers.unpack` has to return; the product of 8 and 11 bits is exact in float32."""
        return torch.where(self.keep, self.exact.float(), 0.0).to(dtype)

    def pack(self, dtype: torch.dtype = torch.bfloat16, **options: object) -> torch.Tensor:
        return buffers.pack_codes(
            bitmask(self.keep), self.codes[self.keep], self.scales, self.shape, self.layout, dtype, **options
        )


def quantised(rows: int, cols: int, density: float, layout: MemoryLayout, *, extreme: bool = False) -> Quantised:
    """Random integers, or only the largest ones; some groups have the scale 0.

    Every seventh row is empty or full. With a density of 1 all are full and int4 ends at 7: the layout without masks.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr((rows, cols, density, layout, extreme)).encode()))
    low, high = LIMITS[layout]
    high -= layout is MemoryLayout.INT4 and density == 1
    codes = torch.randint(low, high + 1, (rows, cols), generator=generator)
    if extreme:
        codes = torch.where(codes < 0, low, high)
    keep = torch.rand(rows, cols, generator=generator) < density
    keep[3::7] = density == 1
    keep[5::7] = True
    scales = torch.rand(rows, -(-cols // 64), generator=generator) * 0.01
    scales[torch.rand(scales.shape, generator=generator) < 0.05] = 0
    return Quantised(keep, torch.where(keep, codes, 0).to(torch.int8), scales.half(), layout)


def quantisation_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far a product [tokens, rows] may be off when x is rounded to 8 bits in groups of 64 columns.

    The scale of a group is its largest |x| / 127 and x is rounded to the nearest multiple: each x is off by at most
    largest / 254, so the product by at most the sum over groups of largest / 254 times the group's sum of |weight|.
    Sums of a group are exact; two scales, their product and one fused addition a group are rounded to float32.
    """
    width = -x.shape[1] % 64
    xs = F.pad(x.double().abs(), (0, width)).unflatten(1, (-1, 64))
    ws = F.pad(weight.double().abs(), (0, width)).unflatten(1, (-1, 64))
    rounding = (1 + 2**-20) / 254 * xs.amax(2) @ ws.sum(2).T
    return rounding + (xs.shape[1] + 4) * 2**-24 * (xs.flatten(1) @ ws.flatten(1).T + rounding) + 1e-30
