"""Tensors as the bytes a safetensors file holds."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.safetensors_file import RawTensor, TensorEntry, read_header
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint32": "U32", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_DTYPES = {stored: name for name, stored in _NAMES.items()}


def to_raw(tensor: Tensor) -> RawTensor:
    """Return a tensor's dtype, shape and bytes; the bytes share memory with a contiguous tensor."""
    tensor = tensor.detach().contiguous()
    name = _NAMES[str(tensor.dtype).removeprefix("torch.")]
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    buffer: Any = flat.numpy()
    return RawTensor(name, tuple(tensor.shape), memoryview(buffer))


def read_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of a safetensors file that is known to be sound, in memory of its own."""
    raw = read_raw(path, read_header(path).tensors[name])
    dtype = torch_dtype(raw.dtype)
    assert dtype is not None  # noqa: S101  (this code has written the file)
    if not raw.data.nbytes:
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)


def read_raw(path: Path, entry: TensorEntry) -> RawTensor:
    """Return a stored tensor byte for byte; the file stays mapped only as long as the result lives."""
    if entry.end == entry.start:
        return RawTensor(entry.dtype, entry.shape, memoryview(b""))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return RawTensor(entry.dtype, entry.shape, memoryview(mapped)[entry.start : entry.end])


def torch_dtype(stored: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors dtype name, None when torch has none."""
    name = _DTYPES.get(stored)
    found: torch.dtype | None = getattr(torch, name) if name else None
    return found
