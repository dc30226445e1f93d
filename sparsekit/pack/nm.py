"""Layout `nm`: exactly N of every M consecutive inputs are kept, each with its index inside the group.

Indices take 2 bits for M up to 4, 4 bits up to 16, 8 bits up to 256; from the low bit up, each row padded to a byte,
ascending in a group. For 2:4 a group is thus four bits, and 64 columns a little-endian u64. With 8 bits (`n:64`,
any N) a kernel loads them with no decoding at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.errors import BadIndex, PatternViolation
from sparsekit.lazy import torch
from sparsekit.pack.bits import code_bytes, pack_codes, padding_is_zero, unpack_codes
from sparsekit.pack.checks import require
from sparsekit.pack.support import ColumnSupport, Extent, Support
from sparsekit.pattern import NM, Pattern

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({"weight_index"})
RAW = "weight_nz"
MAX_M = 256


def index_bits(pattern: NM) -> int:
    """Return the bits of one index: 2, 4 or 8."""
    return 2 if pattern.of <= 4 else 4 if pattern.of <= 16 else 8


def pack(keep: Tensor, pattern: Pattern, where: str) -> tuple[dict[str, Tensor], Support]:
    """Return the indices of `keep: [rows, cols]`, and the positions.

    Raises:
        PatternViolation: A group does not keep exactly N, or the pattern has no groups that fit.
        PlanError: M does not divide the width.
    """
    nm = _nm(pattern, where)
    pattern.check(*keep.shape, where=where)
    rows, cols = keep.shape
    groups = keep.reshape(-1, nm.of)
    wrong = int((groups.sum(dim=1) != nm.keep).sum())
    if wrong:
        raise PatternViolation(f"{wrong} of {len(groups)} groups do not keep exactly {nm}", where=where)
    inside = groups.nonzero()[:, 1].reshape(rows, cols // nm.of * nm.keep)
    bits, counts = index_bits(nm), _counts(rows, inside.shape[1])
    packed = pack_codes(inside.to(torch.uint8).reshape(-1), counts, bits).reshape(rows, _bytes(nm, cols))
    return {"weight_index": packed}, ColumnSupport(_columns(inside, nm), cols)


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern) -> Support:
    """Return the positions of checked indices."""
    nm = _nm(pattern, "")
    return ColumnSupport(_columns(_inside(tensors["weight_index"], shape, nm), nm), shape[1])


def check(tensors: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern, where: str) -> Extent:
    """Prove the indices: in range, ascending, padding 0; return the extent of the kept positions."""
    nm = _nm(pattern, where)
    pattern.check(*shape, where=where)
    rows, cols = shape
    index = tensors["weight_index"]
    require(index, "weight_index", torch.uint8, (rows, _bytes(nm, cols)), where)
    kept = cols // nm.of * nm.keep
    if rows and kept and not padding_is_zero(index.reshape(-1), _counts(rows, kept), index_bits(nm)):
        raise BadIndex("weight_index has bits set past the last index of a row", where=where)
    groups = _inside(index, shape, nm).reshape(-1, nm.keep)
    beyond = (groups >= nm.of).any(dim=1)
    falling = (groups[:, 1:] <= groups[:, :-1]).any(dim=1)
    broken = (beyond | falling).nonzero()
    if len(broken):
        group = int(broken[0])
        row, place = divmod(group, cols // nm.of)
        kind = f"an index of {nm.of} or more" if bool(beyond[group]) else "indices that do not ascend"
        raise BadIndex(f"weight_index has {kind} in row {row}, group {place}: {groups[group].tolist()}", where=where)
    return Extent(_counts(rows, kept), (rows, kept))


def _inside(index: Tensor, shape: tuple[int, int], nm: NM) -> Tensor:
    """Return the indices inside their groups, i64 [rows, kept]."""
    kept = shape[1] // nm.of * nm.keep
    codes = unpack_codes(index.reshape(-1), _counts(shape[0], kept), index_bits(nm))
    return codes.to(torch.int64).reshape(shape[0], kept)


def _columns(inside: Tensor, nm: NM) -> Tensor:
    """Turn indices inside groups into columns."""
    group = torch.arange(inside.shape[1]) // nm.keep
    return inside + group * nm.of


def _counts(rows: int, kept: int) -> Tensor:
    return torch.full((rows,), kept, dtype=torch.int64)


def _bytes(nm: NM, cols: int) -> int:
    return int(code_bytes(torch.tensor(cols // nm.of * nm.keep), index_bits(nm)))


def _nm(pattern: Pattern, where: str) -> NM:
    if not isinstance(pattern, NM) or pattern.of > MAX_M:
        raise PatternViolation(f"layout nm needs a pattern N:M with M up to {MAX_M}, got {pattern}", where=where)
    return pattern
