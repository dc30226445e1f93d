"""The safetensors byte format, read strictly and written deterministically.

Layout: 8 bytes little-endian header length, a JSON header, the data. The header maps tensor names to dtype,
shape and offsets into the data, which they tile without hole or overlap up to the last byte of the file.

Stricter than the safetensors library: duplicate keys and unknown fields are refused, and each error names the
file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.errors import CheckpointError, HeaderError, TruncatedError, UnsafeFormat

MAX_HEADER_BYTES = 100_000_000
_DAMAGED = "Damaged, or no safetensors file: fetch it again."
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_MAX_ELEMENTS = (1 << 63) - 1
CONVERT_HINT = (
    "Convert it on a machine where you trust it: from safetensors.torch import save_file; "
    "save_file(torch.load(FILE, weights_only=True), 'model.safetensors')."
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `start` and `end` are absolute byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    size_bytes: int


@dataclass(frozen=True)
class RawTensor:
    """A tensor to be written: C-contiguous little-endian bytes in `data`."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


# --- reading -----------------------------------------------------------------------------------------------
def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises:
        HeaderError: The header breaks the format.
        TruncatedError: The file is shorter or longer than its header says.
        UnsafeFormat: The file is a pickle under another name.
        ResourceError: The file cannot be read.
    """
    with fs.typed_errors(path), path.open("rb") as handle:
        size_bytes = os.fstat(handle.fileno()).st_size
        start = handle.read(264)
        length = int.from_bytes(start[:8], "little")
        if size_bytes < 8 or length > MAX_HEADER_BYTES or length > size_bytes - 8 or start[8:9] != b"{":
            _refuse_foreign(path, start)
        if size_bytes < 8:
            raise TruncatedError(
                f"{size_bytes:,} bytes on disk, at least 8 needed",
                where=str(path),
                hint="Copy the file again.",
            )
        if length > MAX_HEADER_BYTES:
            raise HeaderError(
                f"a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} allowed", where=str(path), hint=_DAMAGED
            )
        if length > size_bytes - 8:
            raise TruncatedError(
                f"{size_bytes:,} bytes on disk, {length + 8:,} needed for the header alone",
                where=str(path),
                hint="Truncated copy? Copy the file again.",
            )
        if start[8:9] != b"{":
            raise HeaderError("the header does not begin with '{'", where=str(path), hint=_DAMAGED)
        handle.seek(8)
        data = handle.read(length)
    try:
        parsed = jsonio.parse(data, where=str(path), error=HeaderError)
        metadata, tensors = _parse_header(parsed, str(path), 8 + length)
        _check_tiling(tensors, str(path), 8 + length, size_bytes)
    except HeaderError as error:
        error.hint = error.hint or _DAMAGED
        raise
    return Header(path, metadata, tensors, size_bytes)


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Say what a file that is no safetensors file seems to be."""
    if (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05") or start[:4] == b"PK\x03\x04":
        raise UnsafeFormat(
            "a pickle under a safetensors name; loading it runs code", where=str(path), hint=CONVERT_HINT
        )
    if start[257:262] == b"ustar":
        raise UnsafeFormat(
            "a tar archive, an old pickle format; loading it runs code", where=str(path), hint=CONVERT_HINT
        )
    if start.startswith(b"version https://git-lfs"):
        raise HeaderError("a git-lfs pointer, not the weights", where=str(path), hint="Run: git lfs pull")
    if start[:4] == b"GGUF":
        raise HeaderError("a GGUF file under a safetensors name", where=str(path), hint="Rename it to end in .gguf.")


def _parse_header(header: JSON, where: str, base: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Check types and sizes of every field; offsets become absolute."""
    if not isinstance(header, dict):
        raise HeaderError("the header is not a JSON object", where=where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ does not map strings to strings", where=where)
    return metadata, {name: _parse_entry(name, entry, where, base) for name, entry in header.items()}


def _parse_entry(name: str, entry: JSON, where: str, base: int) -> TensorEntry:
    """Check one tensor's fields."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name!r}: need exactly dtype, shape, data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise HeaderError(f"tensor {name!r}: unknown dtype {dtype!r}", where=where)
    if not _is_sizes(shape):
        raise HeaderError(f"tensor {name!r}: shape is not a list of whole numbers >= 0", where=where)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {name!r}: data_offsets is not [begin, end]", where=where)
    needed = _needed_bytes(dtype, tuple(shape), f"tensor {name!r}", where)
    if needed != offsets[1] - offsets[0]:
        raise HeaderError(
            f"tensor {name!r}: {offsets[1] - offsets[0]:,} bytes given, {needed:,} needed for {dtype} {list(shape)}",
            where=where,
        )
    return TensorEntry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_sizes(value: JSON) -> bool:
    """Whether `value` is a list of non-negative integers (JSON's true and 1.0 are none)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _needed_bytes(dtype: str, shape: tuple[int, ...], what: str, where: str | None) -> int:
    """Return the bytes a tensor occupies."""
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_ELEMENTS:
            raise HeaderError(f"{what}: a shape of more than 2^63 elements", where=where)
    bits = count * DTYPE_BITS[dtype]
    if bits % 8:
        raise HeaderError(f"{what}: {count:,} elements of {dtype} do not fill whole bytes", where=where)
    return bits // 8


def _check_tiling(tensors: Mapping[str, TensorEntry], where: str, base: int, size_bytes: int) -> None:
    """Require that the tensors cover the data exactly."""
    position, before = base, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end, item[0])):
        if entry.start != position:
            kind = "a hole" if entry.start > position else "an overlap"
            raise HeaderError(
                f"{kind} of {abs(entry.start - position):,} bytes between {before} and tensor {name!r}",
                where=where,
            )
        position, before = entry.end, f"tensor {name!r}"
    if position != size_bytes:
        hint = "Truncated copy? Copy the file again." if size_bytes < position else "Copy the file again."
        raise TruncatedError(f"{size_bytes:,} bytes on disk, {position:,} in the header", where=where, hint=hint)


# --- writing -----------------------------------------------------------------------------------------------
def encode(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file, in pieces. The same input gives the same bytes; no clock, no version.

    Tensors are ordered by falling element size, then by name, so that each one is aligned to its element.

    Raises:
        CheckpointError: A tensor whose data does not fit its dtype and shape, or a reserved name.
    """
    header = _encode_header(tensors, metadata)
    yield len(header).to_bytes(8, "little") + header
    for name in _order(tensors):
        view = tensors[name].data
        if view.nbytes:  # a view with a zero in its shape cannot be cast
            yield view.cast("B")


def encoded_size(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> int:
    """Return the exact number of bytes that `encode` yields."""
    return 8 + len(_encode_header(tensors, metadata)) + sum(tensor.data.nbytes for tensor in tensors.values())


def _order(tensors: Mapping[str, RawTensor]) -> list[str]:
    """Return the names in the order of the data."""
    return sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name))


def _encode_header(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the JSON header, padded with spaces to a multiple of 8 bytes."""
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in DTYPE_BITS:
            raise CheckpointError(f"cannot be written as a tensor of dtype {tensor.dtype!r}", where=name)
        needed = _needed_bytes(tensor.dtype, tensor.shape, "tensor", name)
        if tensor.data.nbytes != needed or not tensor.data.c_contiguous:
            raise CheckpointError(
                f"{tensor.data.nbytes:,} {'' if tensor.data.c_contiguous else 'scattered '}bytes given, "
                f"{needed:,} contiguous bytes needed for {tensor.dtype} {list(tensor.shape)}",
                where=name,
            )
    header: dict[str, JSON] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name in _order(tensors):
        end = position + tensors[name].data.nbytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER_BYTES:
        raise CheckpointError(f"a header of {len(data):,} bytes; at most {MAX_HEADER_BYTES:,} allowed")
    return data
