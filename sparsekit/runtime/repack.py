"""From the parts of a packed tensor, as a file holds them, to what kernels multiply with, or to the dense weight.

The native reader proves all that `pack.validate` proves while it unpacks, in one pass and without a dense copy. What
it refuses goes to `validate`, which finds the words. Where there are no kernels, `dense` unpacks in Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sparsekit.errors import BadIndex, HeaderError, KernelError
from sparsekit.lazy import torch
from sparsekit.pack.bits import pack_mask
from sparsekit.pack.tensor import SHAPE, from_entry, require_parts, unpack, validate
from sparsekit.pack.types import ENTRIES, GROUP, SPLIT_ROWS, Encoding, Layout, PackedTensor, torch_dtype
from sparsekit.pattern import NM, Block, Pattern
from sparsekit.runtime import buffers, native
from sparsekit.runtime.buffers import MemoryLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_FIELDS = {
    "mask": "weight_bitmask",
    "offsets": "weight_row_offsets",
    "index": "weight_index",
    "values": "weight_nz",
    "low": "weight_low",
    "code": "weight_code",
    "width": "weight_width",
    "dictionary": "weight_dict",
    "patch_row": "weight_patch_row",
    "patch_col": "weight_patch_col",
    "patch_value": "weight_patch_value",
    "scales": "weight_scales",
}
"""Parts of `sk_disk` in order -> name of the part in a file; raw values of `dense` and `block` have names of theirs."""
_RAW = {Layout.DENSE: "weight", Layout.BLOCK: "weight_blocks"}
_LAYOUTS = {Layout.DENSE: 0, Layout.BITMASK: 1, Layout.NM: 2, Layout.BLOCK: 3}
_ENCODINGS = {Encoding.RAW: 0, Encoding.SPLIT: 1, Encoding.INT8: 2, Encoding.INT4: 3}


class _Part(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, type]]] = [("data", c_void_p), ("bytes", c_int64)]


class _Disk(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        *((name, _Part) for name in _FIELDS),
        *((name, c_int64) for name in ("rows", "cols", "nnz")),
        *((name, c_int32) for name in ("layout", "encoding", "dtype")),
        ("unit", c_int32 * 2),
    ]


@dataclass(frozen=True)
class Source:
    """What every layout in memory is packed from.

    Attributes:
        shape: (rows, cols) = (outputs, inputs).
        mask: u8 [rows, ceil(cols / 8)], bit i of byte j is column 8j + i; None: every weight is kept.
        values: [nnz] row-major: the weights, or i8 codes where there are scales.
        dtype: Dtype of the weights.
        scales: f16 [rows, ceil(cols / 64)] or None.
        transposed: The dense weight is [inputs, outputs].
        coded: The layout in memory that holds codes as they are.
        pattern: What the mask obeys, as the file says; None: nothing.
    """

    shape: tuple[int, int]
    mask: Tensor | None
    values: Tensor
    dtype: torch.dtype
    scales: Tensor | None
    transposed: bool
    coded: MemoryLayout = MemoryLayout.INT8
    pattern: Pattern | None = None

    def dequantized(self) -> Source:
        """Return the same with codes turned into weights."""
        if self.scales is None:
            return self
        values = torch.empty(self.values.numel(), dtype=self.dtype)
        codes = _bitmask(self.shape, self.mask, self.values, self.dtype)
        status = native.library().sk_dequantize(
            ctypes.byref(codes), self.scales.data_ptr(), values.data_ptr(), _threads(self.shape)
        )
        native.check(status, "codes of a packed weight")
        return replace(self, values=values, scales=None)

    def dense(self) -> Tensor:
        """Return the dense weight, bit for bit, in the orientation of the checkpoint."""
        found = self.dequantized()
        if found.mask is None:
            weight = found.values.reshape(self.shape)
        else:
            weight = torch.empty(self.shape, dtype=self.dtype)
            source = _bitmask(self.shape, found.mask, found.values, self.dtype)
            status = native.library().sk_expand(ctypes.byref(source), weight.data_ptr(), _threads(self.shape))
            native.check(status, "packed weight")
        return weight.T.contiguous() if self.transposed else weight

    def packed(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer that the kernels multiply with.

        Args:
            dtype: What the dense weight would be cast to; values are cast too unless `dtype` can hold all of them,
                when the narrower ones give the same products from fewer bytes. Codes stay codes.
        """
        if self.scales is not None:
            return self._pack_codes(self.scales)
        found = self
        if dtype is not None and torch.promote_types(found.dtype, dtype) != dtype:
            found = replace(self, values=found.values.to(dtype), dtype=dtype)
        if found.mask is None:
            return pack_dense(found.values.reshape(self.shape))
        return buffers.pack_best(found.mask, found.values, self.shape, self.pattern, threads=_threads(self.shape))

    def _pack_codes(self, scales: Tensor) -> Tensor:
        mask, codes = self.mask, self.values
        if mask is None:  # in memory int4 has no code for zero: a zero is left out
            keep = codes.reshape(self.shape) != 0
            mask, codes = pack_mask(keep), codes[keep.reshape(-1)]
        return buffers.pack_codes(mask, codes, scales, self.shape, self.coded, self.dtype, threads=_threads(self.shape))


def repack(
    facts: Mapping[str, Any], parts: Mapping[str, Tensor], where: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Turn the parts of a packed tensor into a buffer for the kernels, without a dense copy.

    Args:
        facts: The tensor's entry in its file.
        parts: Suffix -> tensor.
        where: File and tensor for messages.
        dtype: As `Source.packed`.

    Raises:
        SparsekitError: As `pack.read`.
        KernelsMissing: There are no kernels.
    """
    packed = _opened(facts, parts, where)
    made = _repack_split(packed, where, dtype)
    return _read(packed, where).packed(dtype) if made is None else made


def _repack_split(packed: PackedTensor, where: str, dtype: torch.dtype | None) -> Tensor | None:
    """Move a split tensor into the layout SPLIT as it is, if that is what its values and pattern ask for."""
    if (packed.layout, packed.encoding) != (Layout.BITMASK, Encoding.SPLIT) or dtype == torch.float16:
        return None
    density = packed.nnz / max(packed.shape[0] * packed.shape[1], 1)
    if buffers.best_layout(torch.bfloat16, density, packed.pattern) is not MemoryLayout.SPLIT:
        return None
    try:
        return buffers.pack_split(_disk(packed, native.DType.BF16), where, _threads(packed.shape))
    except BadIndex:
        _refuse(packed, where)


def dense(facts: Mapping[str, Any], parts: Mapping[str, Tensor], where: str) -> Tensor:
    """Turn the parts of a packed tensor into the dense weight, in the orientation of the dense checkpoint.

    Raises:
        SparsekitError: As `pack.read`.
    """
    if native.available():
        return read_source(facts, parts, where).dense()
    packed = from_entry(facts, parts, where)
    validate(packed, where)
    return unpack(packed)


def pack_dense(weight: Tensor) -> Tensor:
    """Pack a dense `weight: [rows, cols]`; weights whose bits are all 0 are left out, and nothing else."""
    weight = weight.contiguous()
    shape = (weight.shape[0], weight.shape[1])
    mask = torch.empty((shape[0], (shape[1] + 7) // 8), dtype=torch.uint8)
    lib, threads = native.library(), _threads(shape)
    kept = lib.sk_dense_mask(weight.data_ptr(), *shape, weight.element_size(), mask.data_ptr(), threads)
    values = torch.empty(kept, dtype=weight.dtype)
    source = _bitmask(shape, mask, values, weight.dtype)
    native.check(lib.sk_compact(weight.data_ptr(), ctypes.byref(source), values.data_ptr(), threads), "weight")
    return buffers.pack_best(mask, values, shape, threads=threads)


def read_source(facts: Mapping[str, Any], parts: Mapping[str, Tensor], where: str) -> Source:
    """Read the parts of a packed tensor natively, proving on the way all that `pack.validate` proves.

    Raises:
        SparsekitError: As `pack.read`.
        KernelsMissing: There are no kernels.
    """
    return _read(_opened(facts, parts, where), where)


def _opened(facts: Mapping[str, Any], parts: Mapping[str, Tensor], where: str) -> PackedTensor:
    packed = from_entry(facts, {name: part.contiguous() for name, part in parts.items()}, where)
    if not _well_formed(packed, where):
        _refuse(packed, where)
    return packed


def _read(packed: PackedTensor, where: str) -> Source:
    dtype, positions = torch_dtype(packed.dtype), packed.layout in (Layout.NM, Layout.BLOCK)
    rows, cols = packed.shape
    mask, values = packed.tensors.get("weight_bitmask"), packed.tensors.get(_RAW.get(packed.layout, "weight_nz"))
    if positions:
        mask = torch.empty((rows, (cols + 7) // 8), dtype=torch.uint8)
    if packed.encoding is not Encoding.RAW or packed.layout is Layout.BLOCK:
        values = torch.empty(packed.nnz, dtype=torch.int8 if "weight_scales" in packed.tensors else dtype)
    assert values is not None  # noqa: S101 - require_parts has seen them
    status = native.library().sk_disk_read(
        ctypes.byref(_disk(packed, native.dtype_of(dtype))),
        mask.data_ptr() if mask is not None and positions else None,
        values.data_ptr(),
        _threads(packed.shape),
    )
    if status == 4:
        native.check(status, where)
    if status:
        _refuse(packed, where)
    scales = packed.tensors.get("weight_scales")
    coded = MemoryLayout.INT4 if packed.encoding is Encoding.INT4 else MemoryLayout.INT8
    return Source(packed.shape, mask, values.reshape(-1), dtype, scales, packed.transposed, coded, packed.pattern)


def _threads(shape: tuple[int, int]) -> int:
    """Return the threads for one weight: below a million weights each, waking them costs more than they save."""
    return max(1, min(torch.get_num_threads(), shape[0] * shape[1] >> 20))


def _refuse(packed: PackedTensor, where: str) -> NoReturn:
    validate(packed, where)
    raise KernelError("the native reader refuses a tensor that passes every check", where=where)


def _well_formed(packed: PackedTensor, where: str) -> bool:
    """Whether the parts are those of the form, with their dtypes and, as far as known ahead, their shapes."""
    rows, cols = packed.shape
    try:
        require_parts(packed.tensors, packed.layout, packed.encoding, where)
    except HeaderError:
        return False
    if packed.layout is Layout.NM and not isinstance(packed.pattern, NM):
        return False
    if packed.layout is Layout.BLOCK and not isinstance(packed.pattern, Block):
        return False
    stored = {Encoding.SPLIT: "weight_low", Encoding.RAW: _RAW.get(packed.layout, "weight_nz")}
    found = packed.tensors[stored.get(packed.encoding, "weight_nz")].numel()
    if packed.nnz > found * (2 if packed.encoding is Encoding.INT4 else 1):  # what will be allocated is in the file
        return False
    if packed.encoding is Encoding.SPLIT and packed.dtype != "BF16":
        return False
    return all(
        tensor.dtype == dtype
        and tensor.device.type == "cpu"
        and len(tensor.shape) == len(shape)
        and all(need in (-1, got) for got, need in zip(tensor.shape, shape, strict=True))
        for name, tensor in packed.tensors.items()
        for dtype, shape in [_form(name, packed)]
    ) and (SHAPE not in packed.tensors or packed.tensors[SHAPE].tolist() == [rows, cols])


def _form(name: str, packed: PackedTensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return dtype and shape of a part; -1 is a size that the native reader proves."""
    rows, cols = packed.shape
    blocks = -(-rows // SPLIT_ROWS)
    unit = packed.pattern if isinstance(packed.pattern, Block) and packed.layout is Layout.BLOCK else Block(1, 1)
    fixed: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        SHAPE: (torch.int64, (2,)),
        "weight_bitmask": (torch.uint8, (rows // unit.rows, -(-(cols // unit.cols) // 8))),
        "weight_row_offsets": (torch.int64, (rows // unit.rows,)),
        "weight_index": (torch.uint8, (rows, -1)),
        "weight": (torch_dtype(packed.dtype), (rows, cols)),
        "weight_blocks": (torch_dtype(packed.dtype), (-1, unit.rows, unit.cols)),
        "weight_low": (torch.uint8, (-1,)),
        "weight_code": (torch.uint8, (-1,)),
        "weight_width": (torch.uint8, (blocks,)),
        "weight_dict": (torch.uint8, (blocks, ENTRIES)),
        "weight_patch_row": (torch.uint32, (-1,)),
        "weight_patch_col": (torch.uint32, (-1,)),
        "weight_patch_value": (torch.bfloat16, (-1,)),
        "weight_scales": (torch.float16, (rows, -(-cols // GROUP))),
    }
    if name in fixed:
        return fixed[name]
    dtype = {Encoding.INT8: torch.int8, Encoding.INT4: torch.uint8}.get(packed.encoding, torch_dtype(packed.dtype))
    return dtype, (-1,) if packed.layout is Layout.BITMASK else (rows, -1)


def _disk(packed: PackedTensor, dtype: int) -> _Disk:
    """Describe a tensor to the native reader; the caller keeps the tensors alive."""
    found = _Disk()
    for field, name in _FIELDS.items():
        if field == "values" and packed.encoding is Encoding.RAW:
            name = _RAW.get(packed.layout, name)
        tensor = packed.tensors.get(name)
        part = (None, -1) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        setattr(found, field, _Part(*part))
    found.rows, found.cols = packed.shape
    found.nnz = packed.nnz
    found.layout, found.encoding, found.dtype = _LAYOUTS[packed.layout], _ENCODINGS[packed.encoding], dtype
    if isinstance(packed.pattern, NM):
        found.unit = (packed.pattern.keep, packed.pattern.of)
    elif isinstance(packed.pattern, Block):
        found.unit = (packed.pattern.rows, packed.pattern.cols)
    return found


def _bitmask(shape: tuple[int, int], mask: Tensor | None, values: Tensor, dtype: torch.dtype) -> native.Bitmask:
    return native.Bitmask(
        None if mask is None else mask.data_ptr(),
        values.data_ptr(),
        None,
        *shape,
        values.numel(),
        native.dtype_of(dtype),
    )
