"""What a packed tensor is: its layout (where the kept weights are), its encoding (how their values are written)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sparsekit.lazy import torch
from sparsekit.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64
"""Columns that share a scale in the encodings int8 and int4."""
SPLIT_ROWS = 16
"""Rows that share a dictionary and a code width in the encoding split."""
ENTRIES = 16
"""Dictionary entries stored for each of those row blocks."""
HEADER_BYTES = 96
"""What `choose` counts for a tensor's entry in the safetensors header: name, dtype, shape, offsets as JSON."""


class Layout(StrEnum):
    """How the kept positions are stored."""

    DENSE = "dense"
    BITMASK = "bitmask"
    NM = "nm"
    BLOCK = "block"


class Encoding(StrEnum):
    """How the values of the kept positions are stored. INT8 and INT4 lose bits, RAW and SPLIT never."""

    RAW = "raw"
    SPLIT = "split"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def lossless(self) -> bool:
        """Whether unpacking gives back every bit."""
        return self in (Encoding.RAW, Encoding.SPLIT)


ALLOWED: Mapping[Layout, tuple[Encoding, ...]] = {
    Layout.DENSE: (Encoding.RAW, Encoding.SPLIT, Encoding.INT8, Encoding.INT4),
    Layout.BITMASK: (Encoding.RAW, Encoding.SPLIT, Encoding.INT8, Encoding.INT4),
    Layout.NM: (Encoding.RAW, Encoding.INT8, Encoding.INT4),
    Layout.BLOCK: (Encoding.RAW,),
}
"""The combinations that exist."""

DTYPES = ("BF16", "F16", "F32")
"""Safetensors names of the dtypes whose values can be packed."""
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of one of `DTYPES`."""
    dtype: torch.dtype = getattr(torch, _TORCH[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return the safetensors name of a torch dtype, None when its values cannot be packed."""
    short = str(dtype).removeprefix("torch.")
    return next((name for name, known in _TORCH.items() if known == short), None)


def as_bits(values: Tensor) -> Tensor:
    """Return 16 or 32 bit floats as integers of the same bits; the memory is shared."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


@dataclass(frozen=True)
class PackedTensor:
    """One weight matrix, packed.

    Attributes:
        layout: How the kept positions are stored.
        encoding: How the values are stored.
        shape: (rows, cols) = (outputs, inputs) of the linear, whatever the orientation of the stored tensor.
        dtype: Dtype of the unpacked values, a safetensors name out of `DTYPES`.
        pattern: Pattern of the kept positions; `nm` and `block` cannot be read without it.
        nnz: Number of kept weights; kept zeros count.
        transposed: The tensor that was packed is [inputs, outputs]; `unpack` gives it back in that orientation.
        tensors: Suffix -> tensor, as docs/format.md lists them; on the CPU and contiguous.
        error: Relative squared error of the values for int8 and int4, None for lossless encodings.
    """

    layout: Layout
    encoding: Encoding
    shape: tuple[int, int]
    dtype: str
    pattern: Pattern
    nnz: int
    transposed: bool
    tensors: Mapping[str, Tensor]
    error: float | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of tensor data, without file headers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the dense matrix; 0 for an empty one."""
        numel = self.shape[0] * self.shape[1]
        return 8 * self.size_bytes / numel if numel else 0.0

    @property
    def patches(self) -> int:
        """Number of values outside the dictionaries of the encoding split."""
        return self.tensors["weight_patch_row"].numel() if "weight_patch_row" in self.tensors else 0

    def facts(self) -> dict[str, Any]:
        """Return the JSON entry that describes the tensor; `read` needs its first seven keys."""
        facts: dict[str, Any] = {
            "layout": self.layout.value,
            "encoding": self.encoding.value,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "pattern": str(self.pattern),
            "nnz": self.nnz,
            "transposed": self.transposed,
            "bits_per_weight": round(self.bits_per_weight, 4),
        }
        if self.encoding is Encoding.SPLIT:
            facts["patches"] = self.patches
            facts["patch_rate"] = self.patches / self.nnz if self.nnz else 0.0
        if self.error is not None:
            facts["error"] = self.error
        return facts
