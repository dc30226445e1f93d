"""Masks and small codes as bytes. Everything is little-endian: bit i of byte j is item 8j + i."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_mask(keep: Tensor) -> Tensor:
    """Return `keep: [rows, cols]` bool as u8 [rows, ceil(cols / 8)]; the bits past the last column are 0."""
    return torch.from_numpy(np.packbits(keep.contiguous().numpy(), axis=1, bitorder="little"))


def unpack_mask(mask: Tensor, cols: int) -> Tensor:
    """Return the inverse of `pack_mask`, bool [rows, cols]."""
    bits = np.unpackbits(mask.contiguous().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, :cols].view(np.bool_)).contiguous()


def popcounts(mask: Tensor) -> Tensor:
    """Return the number of set bits in each row of `mask: [rows, bytes]` u8, as i64 [rows]."""
    data = mask.contiguous().numpy()
    data = data - ((data >> 1) & 0x55)
    data = (data & 0x33) + ((data >> 2) & 0x33)
    data = (data + (data >> 4)) & 0x0F
    return torch.from_numpy(data.sum(axis=1, dtype=np.int64))


def select(items: Tensor, chosen: Tensor) -> Tensor:
    """Return `items.masked_select(chosen)`, flat; ten times faster on one thread."""
    found = np.compress(chosen.numpy().reshape(-1), items.numpy().reshape(-1))
    # numpy gives an empty result a stride of 0, with which torch refuses to look at its bytes.
    return torch.from_numpy(found) if found.size else torch.empty(0, dtype=items.dtype)


def place(items: Tensor, chosen: Tensor) -> Tensor:
    """Return the inverse of `select`: zeros in the shape of `chosen`, `items` where it is True."""
    room = torch.zeros(chosen.shape, dtype=items.dtype)
    room.numpy().reshape(-1)[np.flatnonzero(chosen.numpy())] = items.numpy().reshape(-1)
    return room


def count_rows(keep: Tensor) -> Tensor:
    """Return the number of True in each row of `keep: [rows, cols]`, as i64 [rows]."""
    return torch.from_numpy(np.count_nonzero(keep.numpy(), axis=1)).to(torch.int64)


def offsets(counts: Tensor) -> Tensor:
    """Return the exclusive prefix sums of `counts: [n]`, as i64 [n]."""
    return counts.cumsum(0) - counts


def code_bytes(counts: Tensor, width: Tensor | int) -> Tensor:
    """Return the bytes that each line of codes takes: `counts` codes of `width` bits, padded to a byte."""
    return (counts * width + 7) // 8


def pack_codes(codes: Tensor, counts: Tensor, width: int) -> Tensor:
    """Pack codes of `width` bits from the low bit up, each line padded with zero bits to a byte.

    Args:
        codes: u8 [sum(counts)], each below 2**width.
        counts: i64 [lines], codes of each line.
        width: 2, 3, 4 or 8.
    """
    if width == 8:
        return codes
    padded = _spread(codes, counts, (counts + 7) // 8 * 8).reshape(-1, 8)
    word = torch.zeros(len(padded), dtype=torch.int64)
    for place in range(8):  # eight codes fill `width` whole bytes
        word |= padded[:, place].to(torch.int64) << (width * place)
    data = torch.empty((len(padded), width), dtype=torch.uint8)
    for place in range(width):
        data[:, place] = (word >> (8 * place)) & 255
    return _gather(data.reshape(-1), code_bytes(counts, width), (counts + 7) // 8 * width)


def unpack_codes(data: Tensor, counts: Tensor, width: int) -> Tensor:
    """Return the inverse of `pack_codes`, u8 [sum(counts)]; `data` has the right length."""
    if width == 8:
        return data
    padded = _spread(data, code_bytes(counts, width), (counts + 7) // 8 * width).reshape(-1, width)
    word = torch.zeros(len(padded), dtype=torch.int64)
    for place in range(width):
        word |= padded[:, place].to(torch.int64) << (8 * place)
    codes = torch.empty((len(padded), 8), dtype=torch.uint8)
    for place in range(8):
        codes[:, place] = (word >> (width * place)) & (2**width - 1)
    return _gather(codes.reshape(-1), counts, (counts + 7) // 8 * 8)


def padding_is_zero(data: Tensor, counts: Tensor, width: Tensor | int) -> bool:
    """Whether the bits past the last code of every line are 0; `data` has the right length."""
    used = (counts * width) % 8
    last = code_bytes(counts, width).cumsum(0) - 1
    partial = used > 0
    return not bool((data[last[partial]].to(torch.int64) >> used[partial]).any())


def line_prefix(lengths: Tensor, strides: Tensor) -> Tensor:
    """Return bool [sum(strides)], True for the first `lengths[i]` places of each stride."""
    start = offsets(strides)
    # One step up where a line begins, one down where its content ends; an int8 sum wraps without harm, since
    # every true prefix sum is 0 or 1.
    steps = torch.zeros(int(strides.sum()) + 1, dtype=torch.int8)
    steps.index_add_(0, start, torch.ones_like(start, dtype=torch.int8))
    steps.index_add_(0, start + lengths, torch.full_like(start, -1, dtype=torch.int8))
    return steps[:-1].cumsum(0, dtype=torch.int8) != 0


def _spread(items: Tensor, lengths: Tensor, strides: Tensor) -> Tensor:
    """Give each line of `items` the room of its stride, filled with zeros."""
    if torch.equal(lengths, strides):
        return items
    return place(items, line_prefix(lengths, strides))


def _gather(items: Tensor, lengths: Tensor, strides: Tensor) -> Tensor:
    """Return the inverse of `_spread`."""
    return items if torch.equal(lengths, strides) else select(items, line_prefix(lengths, strides))
