"""Weights in the kernels' own layouts: made from a mask and values, described, unpacked again."""

from __future__ import annotations

import contextlib
import ctypes
from ctypes import byref, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from sparsekit.errors import BadIndex, KernelError
from sparsekit.lazy import torch
from sparsekit.pattern import NM, Block
from sparsekit.runtime import native

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.pattern import Pattern


class MemoryLayout(IntEnum):
    """Layouts in memory.

    BITMAP and SPLIT (bf16 only) hold any mask and lose no bit; INT8 and INT4 hold integers with a scale for 64 columns
    of a row. CHUNK holds 4:64, 8:64 and 16:64 in bf16, BLOCK whole blocks of RxC with 16 dividing R and 4 dividing C;
    these two lose no bit either, and pass over what is missing, so an infinity there does not become a NaN.
    """

    BITMAP = 1
    SPLIT = 2
    INT8 = 3
    INT4 = 4
    CHUNK = 5
    BLOCK = 6


@dataclass(frozen=True)
class PackedInfo:
    """What a packed buffer holds.

    Attributes:
        layout: Its layout in memory.
        dtype: Dtype of the weight, as `unpack` returns it.
        shape: (rows, cols) of the weight.
        nnz: Number of values.
        nbytes: Size of the buffer.
        patches: Values outside their panel's dictionary (SPLIT).
        widths: Number of 16-row panels with 3-bit codes, 4-bit codes, whole high bytes (SPLIT).
    """

    layout: MemoryLayout
    dtype: native.DType
    shape: tuple[int, int]
    nnz: int
    nbytes: int
    patches: int
    widths: tuple[int, int, int]


def pack(
    mask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    layout: MemoryLayout,
    *,
    row_offsets: Tensor | None = None,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight for the kernels.

    Args:
        mask: u8 [rows, ceil(cols / 8)], as `weight_bitmask` on disk.
        values: [nnz] row-major, bf16, fp16 or fp32 (SPLIT, CHUNK: bf16).
        shape: (rows, cols).
        layout: Layout in memory.
        row_offsets: i64 [rows], checked against the mask when given.
        where: Name of the weight, for messages.
        threads: Threads to pack with; default: torch's.

    Returns:
        One u8 tensor with everything in it.

    Raises:
        BadIndex: Mask, offsets and values disagree, or the mask lacks the structure of CHUNK or BLOCK.
        KernelError: A dtype or layout that does not exist.
        KernelsMissing: There are no kernels.
    """
    source = _source(mask, values, shape, row_offsets, where)
    source.dtype = source.weight_dtype = native.dtype_of(values.dtype)
    return _pack(source, layout, where, threads)


def pack_codes(
    mask: Tensor,
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    layout: MemoryLayout,
    dtype: torch.dtype,
    *,
    row_offsets: Tensor | None = None,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight of small integers for the kernels; weight = integer x scale, in float32, rounded to `dtype`.

    A product with few tokens quantises its input too, to 8 bits in groups of 64 columns: x is off by at most the
    largest |x| of its group / 254. One with more tokens multiplies the rounded weights with x as it is.

    Args:
        mask: u8 [rows, ceil(cols / 8)], as `weight_bitmask` on disk.
        codes: i8 [nnz] row-major; INT8 takes -127..127, INT4 -8..8.
        scales: fp16 [rows, ceil(cols / 64)], finite and not negative.
        shape: (rows, cols).
        layout: INT8 or INT4.
        dtype: Of the weight: bf16, fp16 or fp32.
        row_offsets: i64 [rows], checked against the mask when given.
        where: Name of the weight, for messages.
        threads: Threads to pack with; default: torch's.

    Returns:
        One u8 tensor with everything in it.

    Raises:
        BadIndex: Mask, offsets, scales and integers disagree.
        KernelError: A dtype or layout that does not exist, or an integer or scale out of range.
        KernelsMissing: There are no kernels.
    """
    if codes.dtype != torch.int8 or scales.dtype != torch.float16:
        raise KernelError(f"integers are {codes.dtype}, scales {scales.dtype}; needed int8, float16", where=where)
    groups = (shape[1] + 63) // 64
    if scales.shape != (shape[0], groups):
        raise BadIndex(f"scales {list(scales.shape)}, needed {[shape[0], groups]}", where=where)
    source = _source(mask, codes, shape, row_offsets, where)
    held = scales.contiguous()
    source.dtype, source.weight_dtype, source.scales = native.DType.I8, native.dtype_of(dtype), held.data_ptr()
    return _pack(source, layout, where, threads)


def _source(
    mask: Tensor, values: Tensor, shape: tuple[int, int], row_offsets: Tensor | None, where: str
) -> native.Bitmask:
    """Return what both ways to pack have in common; it keeps its tensors alive."""
    rows, cols = shape
    if mask.numel() != rows * ((cols + 7) // 8) or (row_offsets is not None and row_offsets.numel() != rows):
        raise BadIndex(f"mask of {mask.numel()} bytes does not fit {rows} x {cols}", where=where)
    held = [mask.contiguous(), values.contiguous(), None if row_offsets is None else row_offsets.contiguous()]
    addresses = [None if part is None else part.data_ptr() for part in held]
    source = native.Bitmask(*addresses, rows, cols, values.numel())
    source.held = held
    return source


def _pack(source: native.Bitmask, layout: MemoryLayout, where: str, threads: int | None) -> Tensor:
    lib = native.library()
    count = threads or torch.get_num_threads()
    plan = c_void_p()
    native.check(lib.sk_plan_create(layout, byref(source), count, byref(plan)), where)
    return _carry_out(plan, where, count)


def pack_split(disk: ctypes.Structure, where: str, threads: int) -> Tensor | None:
    """Pack a tensor of the form bitmask/split as it lies on disk, proving it, without decoding its values.

    Args:
        disk: `sk_disk` of the C interface; what it points to outlives the call.
        where: Name of the weight, for messages.
        threads: Threads to pack with.

    Returns:
        The buffer in the layout SPLIT; None where the instruction set has no fast way.

    Raises:
        BadIndex: A length, index, count or padding bit is wrong.
    """
    plan = c_void_p()
    status = native.library().sk_plan_from_disk(byref(disk), threads, byref(plan))
    if status == native.UNSUPPORTED:
        return None
    native.check(status, where)
    return _carry_out(plan, where, threads)


def _carry_out(plan: c_void_p, where: str, threads: int) -> Tensor:
    lib = native.library()
    try:
        size = lib.sk_plan_bytes(plan)
        out = native.allocate(size)
        native.check(lib.sk_plan_pack(plan, out.data_ptr(), size, threads), where)
    finally:
        lib.sk_plan_free(plan)
    return out


def pack_best(
    mask: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    pattern: Pattern | None = None,
    *,
    where: str = "weight",
    threads: int | None = None,
) -> Tensor:
    """Pack one weight in the layout that multiplies fastest; arguments as `pack`, `best_layout`.

    A pattern says what pruning aimed at. Where the mask lacks its structure after all (a zero among the kept weights
    that counts as removed), the layout is one that holds any mask.
    """
    density = values.numel() / max(shape[0] * shape[1], 1)
    any_mask, layout = best_layout(values.dtype, density), best_layout(values.dtype, density, pattern)
    if layout is not any_mask:
        with contextlib.suppress(BadIndex):
            return pack(mask, values, shape, layout, where=where, threads=threads)
    return pack(mask, values, shape, any_mask, where=where, threads=threads)


def best_layout(dtype: torch.dtype, density: float, pattern: Pattern | None = None) -> MemoryLayout:
    """Return the layout in memory that multiplies fastest here.

    SPLIT moves fewer bytes, BITMAP decodes faster. One core decodes SPLIT at 50 weights a nanosecond with AVX-512,
    so down to a fifth of the weights memory is the limit and bytes decide; without AVX-512 decoding is the limit at
    every density.

    N:M patterns go the same way, as a mask takes no more bytes than indices do: 2:4 is 6.5 bits a weight in SPLIT, 9
    with indices; 16:64 is 3.8 in SPLIT, 6 in CHUNK. Below that decoding limits SPLIT, and CHUNK has nothing to decode.
    Blocks stay whole, which also spares the multiplications when there are many tokens. One core, 4096 x 4096, bf16,
    times as fast as dense at one token, and microseconds for 16 tokens at 2048 x 2048:

    | AVX-512 BF16 | SPLIT | BITMAP | CHUNK or BLOCK | 16 tokens, same order |
    |---|---|---|---|---|
    | 2:4 | 2.05 | 1.59 | | |
    | 16:64 | 2.74 | 2.56 | 2.69 | 458 441 241 |
    | 8:64 / 4:64 | 2.82 / 2.92 | 2.90 / 3.04 | 5.40 / 10.1 | 459 428 145 (8:64) |
    | 16x4 at 50 / 80 % | 2.06 / 2.02 | 1.57 / 2.82 | 1.98 / 4.87 | 523 556 226 / 576 435 107 |

    With AVX2: 8:64 BITMAP 1.18, CHUNK 1.36; 16x4 at 50 % BITMAP 1.15, BLOCK 1.74.

    Args:
        dtype: Of the values; SPLIT and CHUNK exist for bf16 only.
        density: Share of kept weights.
        pattern: What the mask obeys; default: nothing.
    """
    if isinstance(pattern, Block) and pattern.rows % 16 == 0 and pattern.cols % 4 == 0:
        return MemoryLayout.BLOCK
    if dtype == torch.bfloat16 and isinstance(pattern, NM) and pattern.of == 64 and pattern.keep in {4, 8}:
        return MemoryLayout.CHUNK
    split = dtype == torch.bfloat16 and density >= 0.2 and native.isa().startswith("avx512")
    return MemoryLayout.SPLIT if split else MemoryLayout.BITMAP


def info(packed: Tensor) -> PackedInfo:
    """Return what a packed buffer holds.

    Raises:
        KernelError: Not a packed buffer.
    """
    found = native.Info()
    native.check(native.library().sk_packed_info(packed.data_ptr(), packed.numel(), byref(found)), "packed weight")
    return PackedInfo(
        MemoryLayout(found.layout),
        native.DType(found.dtype),
        (found.rows, found.cols),
        found.nnz,
        found.bytes,
        found.patches,
        (found.panels3, found.panels4, found.panels8),
    )


def unpack(packed: Tensor) -> Tensor:
    """Return the dense weight [rows, cols] of a packed buffer, bit for bit, with +0 in the holes."""
    found = info(packed)
    dtype = next(key for key, number in native.dtypes().items() if number == found.dtype)
    dense = torch.empty(found.shape, dtype=dtype)
    status = native.library().sk_unpack(packed.data_ptr(), packed.numel(), dense.data_ptr(), torch.get_num_threads())
    native.check(status, "packed weight")
    return dense
