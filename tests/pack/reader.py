"""A second reader, written from docs/format.md alone: plain Python on bytes, every access checked.

It shares no code with the package. Where a file would lead it outside a buffer it raises `Outside`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

SIZES = {"BF16": 2, "F16": 2, "F32": 4}


class Outside(Exception):
    """An access outside a buffer, or a buffer that is not used up."""


class Buffer:
    """Bytes that refuse an index outside them and remember how far they were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.end = 0

    def byte(self, index: int) -> int:
        if not 0 <= index < len(self.data):
            raise Outside(f"byte {index} of {len(self.data)}")
        self.end = max(self.end, index + 1)
        return self.data[index]

    def bits(self, start: int, count: int) -> int:
        return sum(((self.byte((start + place) // 8) >> ((start + place) % 8)) & 1) << place for place in range(count))

    def number(self, index: int, size: int) -> int:
        return sum(self.byte(index * size + place) << (8 * place) for place in range(size))

    def used_up(self) -> None:
        if self.end != len(self.data):
            raise Outside(f"{len(self.data)} bytes, {self.end} used")


def positions(facts: Mapping[str, Any], data: Mapping[str, Buffer]) -> list[list[list[tuple[int, int]]]]:
    """Return for each row (block: block row) its stored weights, in groups that are stored together."""
    rows, cols = facts["shape"]
    layout, pattern = facts["layout"], facts["pattern"]
    if layout == "dense":
        return [[[(row, col)] for col in range(cols)] for row in range(rows)]
    if layout == "bitmask":
        mask, stride = data["weight_bitmask"], (cols + 7) // 8
        return [[[(row, col)] for col in range(cols) if mask.bits(8 * stride * row + col, 1)] for row in range(rows)]
    if layout == "nm":
        n, m = (int(part) for part in pattern.split(":"))
        width = 2 if m <= 4 else 4 if m <= 16 else 8
        kept = cols // m * n
        stride = (kept * width + 7) // 8
        return [
            [
                [(row, place // n * m + data["weight_index"].bits(8 * stride * row + place * width, width))]
                for place in range(kept)
            ]
            for row in range(rows)
        ]
    r, c = (int(part) for part in pattern.split("x"))
    stride = (cols // c + 7) // 8
    return [
        [
            [(high * r + i, wide * c + j) for i in range(r) for j in range(c)]
            for wide in range(cols // c)
            if data["weight_bitmask"].bits(8 * stride * high + wide, 1)
        ]
        for high in range(rows // r)
    ]


def read(facts: Mapping[str, Any], tensors: Mapping[str, bytes]) -> list[list[int | float]]:
    """Return the weight as bit patterns (int8, int4: as float products before rounding), [rows][cols]."""
    data = {suffix: Buffer(content) for suffix, content in tensors.items()}
    rows, cols = facts["shape"]
    dense: list[list[int | float]] = [[0] * cols for _ in range(rows)]

    def put(row: int, col: int, value: float) -> None:
        if not (0 <= row < rows and 0 <= col < cols):
            raise Outside(f"weight {row}, {col}")
        dense[row][col] = value

    lines = positions(facts, data)
    seen = 0
    for line, stored in enumerate(lines):
        if "weight_row_offsets" in data and data["weight_row_offsets"].number(line, 8) != seen:
            raise Outside("a row offset that is not the number of weights before")
        seen += len(stored)
    size = SIZES[facts["dtype"]]
    stream = [place for stored in lines for group in stored for place in group]
    if facts["encoding"] == "raw":
        buffer = data[{"dense": "weight", "block": "weight_blocks"}.get(facts["layout"], "weight_nz")]
        for index, place in enumerate(stream):
            put(*place, buffer.number(index, size))
        buffer.used_up()
    elif facts["encoding"] == "split":
        _split(lines, data, put)
    else:
        _quantised(facts, lines, data, put)
    return dense


def _split(lines: list[list[list[tuple[int, int]]]], data: Mapping[str, Buffer], put: Any) -> None:
    index = start = 0
    for line, stored in enumerate(lines):
        width = data["weight_width"].byte(line // 16)
        for place, group in enumerate(stored):
            code = data["weight_code"].bits(8 * start + place * width, width)
            high = code if width == 8 else data["weight_dict"].byte(line // 16 * 16 + code)
            put(*group[0], data["weight_low"].byte(index) | high << 8)
            index += 1
        start += (width * len(stored) + 7) // 8
    if start != len(data["weight_code"].data):
        raise Outside("weight_code is not used up")
    data["weight_low"].used_up()
    if "weight_patch_row" in data:
        kept = {group[0] for stored in lines for group in stored}
        for patch in range(len(data["weight_patch_row"].data) // 4):
            place = (data["weight_patch_row"].number(patch, 4), data["weight_patch_col"].number(patch, 4))
            if place not in kept:
                raise Outside(f"a patch on {place}, which is not stored")
            put(*place, data["weight_patch_value"].number(patch, 2))


def _quantised(facts: Mapping[str, Any], lines: Any, data: Mapping[str, Buffer], put: Any) -> None:
    groups = -(-facts["shape"][1] // 64)
    index = start = 0
    for stored in lines:
        for place, group in enumerate(stored):
            row, col = group[0]
            pattern = data["weight_scales"].number(row * groups + col // 64, 2)
            (scale,) = struct.unpack("<e", pattern.to_bytes(2, "little"))
            if facts["encoding"] == "int8":
                step = data["weight_nz"].byte(index)
                step -= 256 if step >= 128 else 0
            else:
                code = data["weight_nz"].bits(8 * start + 4 * place, 4)
                step = code - 8 if facts["layout"] == "dense" or code < 8 else code - 7
            put(row, col, step * scale)
            index += 1
        start += (len(stored) + 1) // 2
