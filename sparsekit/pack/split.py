"""Encoding `split`: bf16 without loss, the low byte as it is, the high byte as an index into a small dictionary.

The high byte of a bf16 holds the sign and the upper seven exponent bits. After pruning almost all survivors of a
layer share eight high bytes, so three bits are enough; the rare rest is written out whole in a list of patches.
Every 16 rows have their own dictionary and their own width of a code:

* 3: index into the first 8 entries, 4: index into all 16; what is not in the dictionary has code 0 and a patch;
* 8: the high byte itself, for rows whose values share too little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.errors import BadIndex
from sparsekit.lazy import torch
from sparsekit.pack.bits import code_bytes, offsets, pack_codes, padding_is_zero, unpack_codes
from sparsekit.pack.checks import require
from sparsekit.pack.support import DenseSupport, Extent, MaskSupport, Support
from sparsekit.pack.types import ENTRIES, SPLIT_ROWS

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({"weight_low", "weight_code", "weight_width", "weight_dict"})
PATCHES = frozenset({"weight_patch_row", "weight_patch_col", "weight_patch_value"})
"""Present together when there are patches, absent together when there are none."""
WIDTHS = (3, 4, 8)
PATCH_BYTES = 10
Ranked = DenseSupport | MaskSupport
"""Layouts that can hold split values."""
_PIECE = 1 << 20  # values looked at together


@dataclass(frozen=True)
class _Plan:
    """How each row block is encoded."""

    width: Tensor  # i64 [blocks]
    dictionary: Tensor  # u8 [blocks, 16]
    code: Tensor  # u8 [blocks, 256], code of each high byte
    known: Tensor  # bool [blocks, 256], whether that code gives the high byte back


def encode(values: Tensor, support: Support) -> dict[str, Tensor]:
    """Encode `values: [nnz]` bf16 in storage order.

    Dictionary entries stand in order of falling frequency, equal ones by their value. Each block takes the width
    that needs the fewest bytes including 10 for every patch; ties go to the narrower one.
    """
    counts = support.counts
    halves = values.contiguous().view(torch.uint8).reshape(-1, 2)
    low, high = halves[:, 0].contiguous(), halves[:, 1].contiguous()
    histogram = torch.zeros((_blocks(counts), 256), dtype=torch.int64)
    for lines, part, _ in _pieces(counts, high):
        histogram[lines] = _count(part, counts[_rows(lines)])
    plan = _plan(histogram, counts)
    code, known = torch.empty_like(high), torch.empty_like(high, dtype=torch.bool)
    for lines, part, place in _pieces(counts, high):
        key = _keys(part, counts[_rows(lines)])
        code[place] = plan.code[lines].reshape(-1)[key]
        known[place] = plan.known[lines].reshape(-1)[key]
    tensors = {
        "weight_low": low,
        "weight_code": _pack(code, counts, plan.width),
        "weight_width": plan.width.to(torch.uint8),
        "weight_dict": plan.dictionary,
    }
    if not bool(known.all()):
        row, col = support.scatter(~known).nonzero().unbind(1)
        tensors["weight_patch_row"] = row.to(torch.uint32)
        tensors["weight_patch_col"] = col.to(torch.uint32)
        # Storage order is row-major, so the patches stand in the stream as they do in the matrix.
        tensors["weight_patch_value"] = values[~known].contiguous()
    return tensors


def decode(tensors: Mapping[str, Tensor], support: Ranked) -> Tensor:
    """Return the values in storage order, bf16 [nnz], of checked tensors."""
    counts = support.counts
    code = _unpack(tensors["weight_code"], counts, tensors["weight_width"].to(torch.int64))
    halves = torch.empty((len(code), 2), dtype=torch.uint8)
    halves[:, 0] = tensors["weight_low"]
    table = _table(tensors)
    for lines, part, place in _pieces(counts, code):
        halves[place, 1] = table[lines].reshape(-1)[_keys(part, counts[_rows(lines)])]
    values = halves.reshape(-1).view(torch.int16)
    if "weight_patch_row" in tensors:
        values[support.rank(*_positions(tensors))] = tensors["weight_patch_value"].view(torch.int16)
    return values.view(torch.bfloat16)


def check(tensors: Mapping[str, Tensor], extent: Extent, where: str) -> None:
    """Prove lengths, widths, dictionaries and padding.

    Raises:
        HeaderError: A dtype or shape.
        BadIndex: A content.
    """
    counts = extent.counts
    blocks = _blocks(counts)
    require(tensors["weight_low"], "weight_low", torch.uint8, (extent.nnz,), where)
    require(tensors["weight_width"], "weight_width", torch.uint8, (blocks,), where)
    require(tensors["weight_dict"], "weight_dict", torch.uint8, (blocks, ENTRIES), where)
    width = tensors["weight_width"].to(torch.int64)
    odd = ((width != 3) & (width != 4) & (width != 8)).nonzero()
    if len(odd):
        block = int(odd[0])
        raise BadIndex(f"weight_width[{block}] is {int(width[block])}, needed 3, 4 or 8", where=where)
    per_row = _per_row(width, counts)
    require(tensors["weight_code"], "weight_code", torch.uint8, (int(code_bytes(counts, per_row).sum()),), where)
    if not padding_is_zero(tensors["weight_code"], counts, per_row):
        raise BadIndex("weight_code has bits set past the last code of a row", where=where)
    entries = torch.where(width == 3, 8, torch.where(width == 4, 16, 0))
    if bool((tensors["weight_dict"].ne(0) & (torch.arange(ENTRIES) >= entries[:, None])).any()):
        raise BadIndex("weight_dict has an entry that no code of its rows can reach", where=where)


def check_patches(tensors: Mapping[str, Tensor], support: Ranked, shape: tuple[int, int], where: str) -> None:
    """Prove that patches are in range, ascending, on kept weights, and written as the encoder does.

    Args:
        tensors: What `check` has passed.
        support: The kept positions.
        shape: (rows, cols).
        where: Name for messages.

    Raises:
        HeaderError: A dtype or shape.
        BadIndex: A content.
    """
    count = tensors["weight_patch_row"].numel()
    require(tensors["weight_patch_row"], "weight_patch_row", torch.uint32, (count,), where)
    require(tensors["weight_patch_col"], "weight_patch_col", torch.uint32, (count,), where)
    require(tensors["weight_patch_value"], "weight_patch_value", torch.bfloat16, (count,), where)
    row, col = _positions(tensors)
    if not count or int(row.max()) >= shape[0] or int(col.max()) >= shape[1]:
        raise BadIndex(f"a patch outside the {shape[0]} x {shape[1]} weights, or an empty list", where=where)
    flat = row * shape[1] + col
    if bool((flat[1:] <= flat[:-1]).any()):
        raise BadIndex("patches are not in ascending order of row and column", where=where)
    place = support.rank(row, col)
    if bool((place < 0).any()):
        raise BadIndex("a patch on a weight that is not kept", where=where)
    counts = support.counts
    per_row = _per_row(tensors["weight_width"].to(torch.int64), counts)
    if bool((per_row[row] == 8).any()):
        raise BadIndex("a patch in rows that store whole bytes", where=where)
    code = _code_at(tensors["weight_code"], per_row, counts, row, place - offsets(counts)[row])
    value = tensors["weight_patch_value"].view(torch.uint8).reshape(-1, 2)
    if bool(code.any()) or not torch.equal(tensors["weight_low"][place], value[:, 0]):
        raise BadIndex("a patch disagrees with the low byte or code stored for its weight", where=where)


def _code_at(data: Tensor, per_row: Tensor, counts: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Return the codes of the `place`-th values of rows `row`, i64; no code spans more than two bytes."""
    width = per_row[row]
    bit = 8 * offsets(code_bytes(counts, per_row))[row] + place * width
    first = data[bit // 8].to(torch.int64)
    second = data[(bit // 8 + 1).clamp_max(len(data) - 1)].to(torch.int64)
    return ((first | second << 8) >> (bit % 8)) & ((1 << width) - 1)


def _plan(histogram: Tensor, counts: Tensor) -> _Plan:
    """Choose width and dictionary of each row block from how often each high byte occurs, [blocks, 256]."""
    number, entry = histogram.sort(dim=1, descending=True, stable=True)  # ties: the lower byte first
    total = histogram.sum(dim=1)
    cost = {
        3: _sum_blocks(code_bytes(counts, 3)) + PATCH_BYTES * (total - number[:, :8].sum(dim=1)),
        4: _sum_blocks(code_bytes(counts, 4)) + PATCH_BYTES * (total - number[:, :ENTRIES].sum(dim=1)),
        8: total,
    }
    width = torch.full_like(total, 3)
    width[cost[4] < cost[3]] = 4
    width[cost[8] < torch.minimum(cost[3], cost[4])] = 8
    size = torch.where(width == 3, 8, torch.where(width == 4, ENTRIES, 0))[:, None]
    place = torch.arange(ENTRIES)
    used = (place < size) & (number[:, :ENTRIES] > 0)
    dictionary = torch.where(used, entry[:, :ENTRIES], 0).to(torch.uint8)
    code = torch.zeros_like(histogram, dtype=torch.uint8)
    known = torch.zeros_like(histogram, dtype=torch.bool)
    block = torch.arange(len(total))[:, None].expand_as(used)
    code[block[used], entry[:, :ENTRIES][used]] = place.expand_as(used)[used].to(torch.uint8)
    known[block[used], entry[:, :ENTRIES][used]] = True
    whole = width == 8
    code[whole] = torch.arange(256, dtype=torch.uint8)
    known[whole] = True
    return _Plan(width, dictionary, code, known)


def _table(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the high byte of every block and code, u8 [blocks, 256]."""
    table = torch.zeros((len(tensors["weight_width"]), 256), dtype=torch.uint8)
    table[:, :ENTRIES] = tensors["weight_dict"]
    table[tensors["weight_width"] == 8] = torch.arange(256, dtype=torch.uint8)
    return table


def _pack(code: Tensor, counts: Tensor, width: Tensor) -> Tensor:
    """Pack the codes, each row with the width of its block."""
    used = [bits for bits in WIDTHS if bool((width == bits).any())]
    if len(used) <= 1:
        return pack_codes(code, counts, used[0] if used else 8)
    per_row = _per_row(width, counts)
    sizes = code_bytes(counts, per_row)
    data = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    for bits in used:
        rows = per_row == bits
        part = pack_codes(code[rows.repeat_interleave(counts)], counts[rows], bits)
        data[rows.repeat_interleave(sizes)] = part
    return data


def _unpack(data: Tensor, counts: Tensor, width: Tensor) -> Tensor:
    """Return the inverse of `_pack`."""
    used = [bits for bits in WIDTHS if bool((width == bits).any())]
    if len(used) <= 1:
        return unpack_codes(data, counts, used[0] if used else 8)
    per_row = _per_row(width, counts)
    sizes = code_bytes(counts, per_row)
    code = torch.empty(int(counts.sum()), dtype=torch.uint8)
    for bits in used:
        rows = per_row == bits
        part = unpack_codes(data[rows.repeat_interleave(sizes)], counts[rows], bits)
        code[rows.repeat_interleave(counts)] = part
    return code


def _positions(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the patches as i64."""
    return tensors["weight_patch_row"].to(torch.int64), tensors["weight_patch_col"].to(torch.int64)


def _blocks(counts: Tensor) -> int:
    return (len(counts) + SPLIT_ROWS - 1) // SPLIT_ROWS


def _rows(lines: slice) -> slice:
    """Return the rows of a range of row blocks; the last one may reach past the matrix, as slices may."""
    return slice(lines.start * SPLIT_ROWS, lines.stop * SPLIT_ROWS)


def _pieces(counts: Tensor, stream: Tensor) -> Iterator[tuple[slice, Tensor, slice]]:
    """Yield (row blocks, their part of `stream`, its place) so that temporary memory stays small."""
    totals = _sum_blocks(counts)
    ends = totals.cumsum(0).tolist()
    first, begin = 0, 0
    for block, end in enumerate(ends):
        if end - begin >= _PIECE or block == len(ends) - 1:
            yield slice(first, block + 1), stream[begin:end], slice(begin, end)
            first, begin = block + 1, end


def _keys(part: Tensor, counts: Tensor) -> Tensor:
    """Return 256 x row block + byte for each byte of some row blocks, i32."""
    block = torch.arange(len(counts), dtype=torch.int32) // SPLIT_ROWS * 256
    return block.repeat_interleave(counts) + part


def _count(part: Tensor, counts: Tensor) -> Tensor:
    """Return how often each byte occurs in each row block, i64 [blocks, 256]."""
    return torch.bincount(_keys(part, counts), minlength=_blocks(counts) * 256).reshape(-1, 256)


def _per_row(width: Tensor, counts: Tensor) -> Tensor:
    return width.repeat_interleave(SPLIT_ROWS)[: len(counts)]


def _sum_blocks(per_row: Tensor) -> Tensor:
    """Sum a value per row over each row block."""
    total = torch.zeros(_blocks(per_row), dtype=torch.int64)
    return total.index_add_(0, torch.arange(len(per_row)) // SPLIT_ROWS, per_row)
