"""Weights as int8 and int4, beside their holes and without any, packed for the kernels."""

from __future__ import annotations

import torch

from sparsekit.pack import quantised
from sparsekit.pack.bits import pack_mask, unpack_codes
from sparsekit.pack.support import DenseSupport, MaskSupport
from sparsekit.pack.types import Encoding
from sparsekit.runtime import buffers
from sparsekit.runtime.buffers import MemoryLayout

NAMES = ("int8", "dense int8", "int4", "dense int4")


def packed(name: str, full: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a packed weight and what its integers mean, float32 [rows, cols].

    Args:
        name: One of NAMES.
        full: Weight, bf16 [rows, cols].
        keep: Which of it a name without "dense" keeps, bool [rows, cols].
    """
    encoding = Encoding(name.split()[-1])
    rows, cols = full.shape
    if name.startswith("dense"):
        keep = torch.ones_like(keep)
    support = DenseSupport(rows, cols) if name.startswith("dense") else MaskSupport(keep)
    stored = quantised.encode(torch.where(keep, full, torch.zeros_like(full)), support, encoding, name)
    codes = stored["weight_nz"].reshape(-1)
    if encoding is Encoding.INT4:
        codes = unpack_codes(codes, support.counts, 4).to(torch.int8) - 8
        if isinstance(support, MaskSupport):
            codes += codes >= 0
    layout = MemoryLayout[encoding.name]
    buffer = buffers.pack_codes(pack_mask(keep), codes, stored["weight_scales"], (rows, cols), layout, full.dtype)
    return buffer, support.scatter(quantised.decode(stored, support, encoding, cols))
