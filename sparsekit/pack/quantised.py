"""Encodings `int8` and `int4`: small integers with one f16 scale for every 64 columns of a row. Both lose bits.

int8 holds -127..127, the scale is amax / 127. int4 beside a mask never needs a zero, so its 16 codes mean
-8..-1, 1..8; in the dense layout they mean -8..7. Its scale is amax / 7.5: the ends are off by half a step, as every
other value is at most. Scales are rounded up to f16; where a group has a weight that is not zero they are at least
2**-24, the smallest f16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.errors import BadIndex, NonFinite
from sparsekit.lazy import torch
from sparsekit.pack.bits import code_bytes, pack_codes, padding_is_zero, unpack_codes
from sparsekit.pack.checks import require
from sparsekit.pack.support import DenseSupport, Extent, Support
from sparsekit.pack.types import GROUP, Encoding

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({"weight_nz", "weight_scales"})
_STEPS = {Encoding.INT8: 127.0, Encoding.INT4: 7.5}
_SMALLEST = 2.0**-24


def encode(dense: Tensor, support: Support, encoding: Encoding, where: str) -> dict[str, Tensor]:
    """Quantise the kept weights of `dense: [rows, cols]`.

    Raises:
        NonFinite: A weight is NaN or infinite, or too large for an f16 scale.
    """
    exact = dense.to(torch.float32)
    if not bool(torch.isfinite(exact).all()):
        raise NonFinite(f"{encoding} cannot store NaN or infinity", where=where, hint="Choose values: raw or split.")
    scales = _scales(exact, _STEPS[encoding], where)
    scale = support.gather(_columns(scales, dense.shape[1]))
    steps = torch.where(scale > 0, support.gather(exact) / scale, torch.zeros_like(scale)).round_()
    if encoding is Encoding.INT8:
        codes = steps.clamp_(-127, 127).to(torch.int8)
        return {"weight_nz": codes.reshape(_int8_shape(support, len(codes))), "weight_scales": scales}
    if isinstance(support, DenseSupport):
        codes = steps.clamp_(-8, 7) + 8
    else:
        kept = support.gather(exact)
        codes = torch.where(kept < 0, steps.clamp(-8, -1) + 8, steps.clamp(1, 8) + 7)
    data = pack_codes(codes.to(torch.uint8), support.counts, 4)
    return {"weight_nz": data.reshape(_int4_shape(support)), "weight_scales": scales}


def decode(tensors: Mapping[str, Tensor], support: Support, encoding: Encoding, cols: int) -> Tensor:
    """Return the values of checked tensors in storage order, float32 [nnz]."""
    stored = tensors["weight_nz"].reshape(-1)
    if encoding is Encoding.INT8:
        steps = stored.to(torch.float32)
    else:
        codes = unpack_codes(stored, support.counts, 4).to(torch.float32)
        steps = codes - 8
        if not isinstance(support, DenseSupport):
            steps += codes >= 8
    return steps * support.gather(_columns(tensors["weight_scales"], cols))


def check(
    tensors: Mapping[str, Tensor], extent: Extent, encoding: Encoding, shape: tuple[int, int], where: str
) -> None:
    """Prove lengths, padding and scales.

    Raises:
        HeaderError: A dtype or shape.
        BadIndex: A content.
    """
    stored, scales = tensors["weight_nz"], tensors["weight_scales"]
    require(scales, "weight_scales", torch.float16, (shape[0], -(-shape[1] // GROUP)), where)
    if not bool((torch.isfinite(scales) & ~torch.signbit(scales)).all()):
        raise BadIndex("weight_scales has a scale that is negative or not finite", where=where)
    if encoding is Encoding.INT8:
        require(stored, "weight_nz", torch.int8, _int8_shape(extent, extent.nnz), where)
        if bool((stored == -128).any()):
            raise BadIndex("weight_nz has the code -128, which no writer makes", where=where)
        return
    require(stored, "weight_nz", torch.uint8, _int4_shape(extent), where)
    if not padding_is_zero(stored.reshape(-1), extent.counts, 4):
        raise BadIndex("weight_nz has bits set past the last code of a row", where=where)


def _scales(exact: Tensor, steps: float, where: str) -> Tensor:
    """Return f16 scales [rows, ceil(cols / 64)] of float32 weights."""
    rows, cols = exact.shape
    groups = -(-cols // GROUP)
    padded = torch.nn.functional.pad(exact.abs(), (0, groups * GROUP - cols)).reshape(rows, groups, GROUP)
    amax = padded.amax(dim=2) if padded.numel() else torch.zeros((rows, groups))
    exact_scales = torch.where(amax > 0, (amax / steps).clamp_min(_SMALLEST), amax)
    scales = exact_scales.to(torch.float16)
    # Rounded up, so that the largest weight never lies beyond the last code: next float = next integer of its bits.
    scales = torch.where(scales < exact_scales, (scales.view(torch.int16) + 1).view(torch.float16), scales)
    if not bool(torch.isfinite(scales).all()):
        raise NonFinite(
            f"a weight of {float(amax.max()):.3g} is too large for f16 scales", where=where, hint="Choose values: raw."
        )
    return scales


def _columns(scales: Tensor, cols: int) -> Tensor:
    """Return the scale of each weight, float32 [rows, cols]."""
    return scales.to(torch.float32).repeat_interleave(GROUP, 1)[:, :cols].contiguous()


def _int8_shape(support: Support | Extent, nnz: int) -> tuple[int, ...]:
    return support.value_shape if len(support.value_shape) == 2 else (nnz,)


def _int4_shape(support: Support | Extent) -> tuple[int, ...]:
    """Rows of equal length keep them as rows: [rows, bytes]."""
    shape = support.value_shape
    return (shape[0], (shape[1] + 1) // 2) if len(shape) == 2 else (int(code_bytes(support.counts, 4).sum()),)
