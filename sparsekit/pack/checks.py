"""Requirements on the tensors of a packed matrix, each failing with the tensor's name, got and needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsekit.errors import BadIndex, HeaderError, WeightMismatch
from sparsekit.lazy import torch
from sparsekit.pack.bits import popcounts

if TYPE_CHECKING:
    from torch import Tensor

COPY_HINT = "Copy the checkpoint again, then: sparsekit verify OUT."


def require_names(tensors: Mapping[str, Tensor], needed: set[str], optional: set[str], where: str) -> None:
    """Require exactly the `needed` tensors and, all together or not at all, the `optional` ones.

    Raises:
        HeaderError: One is missing or too many.
    """
    present = set(tensors)
    if present & optional:
        needed = needed | optional
    if missing := sorted(needed - present):
        raise HeaderError(f"{missing[0]} is missing; got {', '.join(sorted(present)) or 'nothing'}", where=where)
    if extra := sorted(present - needed):
        raise HeaderError(f"{extra[0]} does not belong to it; needed {', '.join(sorted(needed))}", where=where)


def require(tensor: Tensor, suffix: str, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> None:
    """Require dtype, shape and plain CPU memory.

    Raises:
        HeaderError: naming the tensor.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        got, need = _short(tensor.dtype), _short(dtype)
        raise HeaderError(
            f"{suffix} is {got} {list(tensor.shape)}, needed {need} {list(shape)}", where=where, hint=COPY_HINT
        )
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise HeaderError(f"{suffix} must be contiguous and on the CPU to be checked", where=where)


def require_mask(mask: Tensor, rows: int, cols: int, where: str) -> Tensor:
    """Require a u8 bitmask [rows, ceil(cols / 8)] whose padding bits are 0; return its bits per row.

    Raises:
        HeaderError: Dtype or shape.
        BadIndex: A bit past the last column.
    """
    require(mask, "weight_bitmask", torch.uint8, (rows, (cols + 7) // 8), where)
    if cols % 8 and bool((mask[:, -1] >> (cols % 8)).any()):
        row = int((mask[:, -1] >> (cols % 8)).nonzero()[0])
        raise BadIndex(f"weight_bitmask keeps a column past the last one, {cols - 1}, in row {row}", where=where)
    return popcounts(mask)


def require_offsets(stored: Tensor, counts: Tensor, where: str) -> None:
    """Require the exclusive prefix sums of `counts` as i64.

    Raises:
        HeaderError: Dtype or shape.
        BadIndex: A wrong offset.
    """
    require(stored, "weight_row_offsets", torch.int64, tuple(counts.shape), where)
    needed = counts.cumsum(0) - counts
    if not torch.equal(stored, needed):
        row = int((stored != needed).nonzero()[0])
        raise BadIndex(
            f"weight_row_offsets[{row}] is {int(stored[row])}, the bitmask says {int(needed[row])}",
            where=where,
            hint=COPY_HINT,
        )


def require_nnz(claimed: int, found: int, where: str) -> None:
    """Require that the mask keeps as many weights as the entry claims.

    Raises:
        WeightMismatch: It does not.
    """
    if claimed != found:
        raise WeightMismatch(f"{found:,} weights kept, {claimed:,} claimed", where=where, hint=COPY_HINT)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
