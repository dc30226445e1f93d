"""Packing one weight matrix, unpacking it, and proving that a packed one is sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparsekit.errors import (
    HeaderError,
    NonFinite,
    PatternViolation,
    ShapeMismatch,
    SparsekitError,
    UsageError,
    WeightMismatch,
)
from sparsekit.lazy import torch
from sparsekit.pack import bitmask, block, dense, nm, quantised, split
from sparsekit.pack.bits import select
from sparsekit.pack.checks import require, require_names, require_nnz
from sparsekit.pack.support import DenseSupport, Extent, MaskSupport, Support
from sparsekit.pack.types import ALLOWED, DTYPES, Encoding, Layout, PackedTensor, as_bits, dtype_name, torch_dtype
from sparsekit.pattern import Pattern, Unstructured, parse_pattern

if TYPE_CHECKING:
    from torch import Tensor

_LAYOUTS: Mapping[Layout, ModuleType] = {
    Layout.DENSE: dense,
    Layout.BITMASK: bitmask,
    Layout.NM: nm,
    Layout.BLOCK: block,
}
SHAPE = "weight_shape"
_LONGEST = 1 << 24
"""No side of a weight is longer; a shape from a damaged file must not make us reserve memory without end."""


def pack(
    weight: Tensor,
    keep: Tensor,
    layout: Layout,
    encoding: Encoding,
    pattern: Pattern | None = None,
    *,
    transposed: bool = False,
    where: str = "weight",
) -> PackedTensor:
    """Pack a weight in one layout and encoding.

    Args:
        weight: [out, in], or [in, out] if `transposed`; bf16, f16 or f32 on the CPU.
        keep: bool, same shape; True = kept. Where it is False all bits of the weight are 0.
        layout: How the positions are stored.
        encoding: How the values are stored.
        pattern: What `keep` claims to be; N:M for `nm`, blocks for `block`. Default: unstructured.
        transposed: The stored tensor is [in, out]; rows of the packed one are outputs all the same.
        where: Name for messages.

    Raises:
        ShapeMismatch: Weight and mask differ in shape, or are no matrix.
        WeightMismatch: A removed weight has a bit that would be lost.
        PatternViolation, PlanError: The mask is not what the layout can hold.
        UsageError: A combination that does not exist.
        NonFinite: int8 or int4 of a weight they cannot hold.
    """
    pattern = pattern or Unstructured()
    name = _check_combination(layout, encoding, weight, where)
    weight, keep = _oriented(weight, keep, transposed, where)
    if layout is Layout.DENSE:
        keep = torch.ones_like(keep)
    kind: Any = _LAYOUTS[layout]
    shape = (weight.shape[0], weight.shape[1])
    structure, support = kind.pack(keep, pattern, where)
    tensors: dict[str, Tensor] = dict(structure)
    if (layout, encoding) != (Layout.DENSE, Encoding.RAW):  # a plain tensor has its shape in the file's header
        tensors[SHAPE] = torch.tensor(shape, dtype=torch.int64)
    if encoding is Encoding.RAW:
        tensors[kind.RAW] = support.gather(as_bits(weight)).reshape(support.value_shape).view(weight.dtype)
    elif encoding is Encoding.SPLIT:
        tensors |= split.encode(support.gather(as_bits(weight)).view(weight.dtype), support)
    else:
        tensors |= quantised.encode(weight, support, encoding, where)
    ordered = {suffix: tensors[suffix] for suffix in sorted(tensors)}
    packed = PackedTensor(layout, encoding, shape, name, pattern, int(support.counts.sum()), transposed, ordered)
    return packed if encoding.lossless else _with_error(packed, weight, where)


def unpack(packed: PackedTensor) -> Tensor:
    """Return the dense weight in the orientation it was packed from; `packed` has passed `validate`."""
    support = _ranked(packed) if packed.encoding is Encoding.SPLIT else _support(packed)
    dtype = torch_dtype(packed.dtype)
    if packed.encoding is Encoding.RAW:
        values = as_bits(packed.tensors[_LAYOUTS[packed.layout].RAW].reshape(-1))
    elif isinstance(support, DenseSupport | MaskSupport) and packed.encoding is Encoding.SPLIT:
        values = as_bits(split.decode(packed.tensors, support))
    else:
        values = as_bits(quantised.decode(packed.tensors, support, packed.encoding, packed.shape[1]).to(dtype))
    weight = support.scatter(values).view(dtype)
    return weight.T.contiguous() if packed.transposed else weight


def unpack_keep(packed: PackedTensor) -> Tensor:
    """Return the mask, bool, in the orientation of `unpack`; all True for the dense layout."""
    support = _support(packed)
    if isinstance(support, MaskSupport):
        keep = support.keep
    else:
        keep = support.scatter(torch.ones(packed.nnz, dtype=torch.bool))
    return keep.T.contiguous() if packed.transposed else keep


def validate(packed: PackedTensor, where: str) -> None:
    """Prove every length, index, count and padding bit; afterwards no kernel can leave its buffers.

    Checked: the set of tensors, dtypes and shapes; bitmask padding, popcounts, row offsets; nnz against the entry;
    N:M indices in range and ascending; code lengths and padding, widths, dictionaries; patches in range, ascending,
    on kept weights, agreeing with the rest; scales finite. Values cannot be wrong here: any bits are a value, so
    their integrity is the manifest's checksum.

    Args:
        packed: What came from a file.
        where: Tensor name for messages.

    Raises:
        HeaderError: A tensor is missing, extra, or has the wrong dtype or shape.
        BadIndex: An index, offset, code or padding bit.
        WeightMismatch: The mask keeps another number of weights than the entry says.
        PatternViolation, PlanError: Pattern and layout or shape do not go together.
    """
    kind: Any = _LAYOUTS[packed.layout]
    if packed.encoding not in ALLOWED[packed.layout] or packed.dtype not in DTYPES:
        raise HeaderError(f"{packed.layout} with {packed.encoding} of {packed.dtype} does not exist", where=where)
    if packed.encoding is Encoding.SPLIT and packed.dtype != "BF16":
        raise HeaderError(f"split values are bf16, the entry says {packed.dtype}", where=where)
    tensors, shape = packed.tensors, packed.shape
    require_parts(tensors, packed.layout, packed.encoding, where)
    if (packed.layout, packed.encoding) != (Layout.DENSE, Encoding.RAW):
        require(tensors[SHAPE], SHAPE, torch.int64, (2,), where)
        if tuple(tensors[SHAPE].tolist()) != shape:
            raise HeaderError(f"weight_shape is {tensors[SHAPE].tolist()}, the entry says {list(shape)}", where=where)
    extent: Extent = _typed(where, lambda: kind.check(tensors, shape, packed.pattern, where))
    require_nnz(packed.nnz, extent.nnz, where)
    if packed.encoding is Encoding.RAW:
        require(tensors[kind.RAW], kind.RAW, torch_dtype(packed.dtype), extent.value_shape, where)
    elif packed.encoding is Encoding.SPLIT:
        split.check(tensors, extent, where)
        if split.PATCHES & set(tensors):
            split.check_patches(tensors, _ranked(packed), shape, where)
    else:
        quantised.check(tensors, extent, packed.encoding, shape, where)


def require_parts(tensors: Mapping[str, Any], layout: Layout, encoding: Encoding, where: str) -> None:
    """Require that the names in `tensors` are those of a layout and encoding that exist together.

    Raises:
        HeaderError: One is missing or too many, or the combination does not exist.
    """
    if encoding not in ALLOWED[layout]:
        raise HeaderError(f"{layout} with {encoding} does not exist", where=where)
    kind: Any = _LAYOUTS[layout]
    values = {
        Encoding.RAW: frozenset({kind.RAW}),
        Encoding.SPLIT: split.SUFFIXES,
        Encoding.INT8: quantised.SUFFIXES,
        Encoding.INT4: quantised.SUFFIXES,
    }[encoding]
    shape = set() if (layout, encoding) == (Layout.DENSE, Encoding.RAW) else {SHAPE}
    optional = set(split.PATCHES) if encoding is Encoding.SPLIT else set()
    require_names(tensors, set(kind.SUFFIXES | values) | shape, optional, where)


def form_of(facts: Mapping[str, Any], where: str) -> tuple[Layout, Encoding]:
    """Return layout and encoding of a JSON entry.

    Raises:
        HeaderError: One does not exist.
    """
    return _member(Layout, facts, "layout", where), _member(Encoding, facts, "encoding", where)


def prove(packed: PackedTensor, weight: Tensor, keep: Tensor, where: str) -> None:
    """Unpack a lossless tensor and require every bit of weight and mask back.

    Args:
        packed: What will be written.
        weight: What was packed, as given to `pack`.
        keep: Its mask, as given to `pack`.
        where: Name for messages.

    Raises:
        WeightMismatch: A bit differs.
    """
    validate(packed, where)
    differ = int((as_bits(unpack(packed)) != as_bits(weight.contiguous())).count_nonzero())
    masks = 0 if packed.layout is Layout.DENSE else int((unpack_keep(packed) != keep).count_nonzero())
    if differ or masks:
        raise WeightMismatch(
            f"packing as {packed.layout}/{packed.encoding} is not exact: {differ} weights and {masks} mask bits differ",
            where=where,
            hint="This is a defect of sparsekit; write with --set save.format=dense and report it.",
        )


def read(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> PackedTensor:
    """Build a packed tensor from its JSON entry and its tensors, and validate it.

    Args:
        facts: What `PackedTensor.facts` returned, from a file; other keys are ignored.
        tensors: Suffix -> tensor.
        where: Tensor name for messages.

    Raises:
        HeaderError: The entry is not one, or names a layout, encoding or dtype that does not exist.
        SparsekitError: As `validate`.
    """
    packed = from_entry(facts, tensors, where)
    validate(packed, where)
    return packed


def from_entry(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> PackedTensor:
    """Build a packed tensor whose tensors nobody has looked at yet: `read` without `validate`.

    Raises:
        HeaderError: The entry is not one, or names a layout, encoding or dtype that does not exist.
        PatternViolation: The pattern does not exist.
    """
    layout, encoding = form_of(facts, where)
    shape, nnz, transposed = facts.get("shape"), facts.get("nnz"), facts.get("transposed", False)
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_count(size, _LONGEST) for size in shape):
        raise HeaderError(f"shape is {shape!r}, needed [rows, cols]", where=where)
    if not isinstance(transposed, bool) or not _is_count(nnz):
        raise HeaderError(f"nnz {nnz!r} or transposed {transposed!r} is not a count and a truth value", where=where)
    dtype, text, error = facts.get("dtype"), facts.get("pattern"), facts.get("error")
    if dtype not in DTYPES:
        raise HeaderError(f"dtype is {dtype!r}, needed one of {', '.join(DTYPES)}", where=where)
    if not isinstance(text, str):
        raise HeaderError(f"pattern is {text!r}, needed text such as 2:4", where=where)
    if error is not None and not isinstance(error, int | float):
        raise HeaderError(f"error is {error!r}, needed a number", where=where)
    pattern = _typed(where, lambda: parse_pattern(text))
    return PackedTensor(
        layout, encoding, (shape[0], shape[1]), dtype, pattern, int(str(nnz)), transposed, dict(tensors), error
    )


def check_removed(weight: Tensor, keep: Tensor, where: str) -> None:
    """Require that every removed weight has only zero bits, so that leaving it out loses nothing.

    Raises:
        WeightMismatch: One has not; -0.0 counts.
    """
    lost = int(select(as_bits(weight), ~keep).count_nonzero())
    if lost:
        raise WeightMismatch(
            f"{lost:,} removed weights are not +0.0, so packing would lose them",
            where=where,
            hint="Set them by weight.masked_fill(~keep, 0); weight * keep leaves -0.0 behind.",
        )


def _support(packed: PackedTensor) -> Support:
    kind: Any = _LAYOUTS[packed.layout]
    support: Support = kind.unpack(packed.tensors, packed.shape, packed.pattern)
    return support


def _ranked(packed: PackedTensor) -> DenseSupport | MaskSupport:
    """Return the positions of a layout that can hold split values."""
    support = _support(packed)
    if not isinstance(support, DenseSupport | MaskSupport):
        raise UsageError(f"layout {packed.layout} has no encoding split")
    return support


def _check_combination(layout: Layout, encoding: Encoding, weight: Tensor, where: str) -> str:
    """Return the dtype's name; refuse what does not exist."""
    name = dtype_name(weight.dtype)
    if name is None:
        raise UsageError(f"{weight.dtype} weights cannot be packed; need {', '.join(DTYPES)}", where=where)
    if encoding not in ALLOWED[layout]:
        known = ", ".join(ALLOWED[layout])
        raise UsageError(f"layout {layout} has no encoding {encoding}; it has {known}", where=where)
    if encoding is Encoding.SPLIT and name != "BF16":
        raise UsageError(f"split values need bf16 weights, got {name}", where=where, hint="Choose values: raw.")
    return name


def _oriented(weight: Tensor, keep: Tensor, transposed: bool, where: str) -> tuple[Tensor, Tensor]:
    """Return weight and mask as contiguous [out, in]."""
    if weight.dim() != 2 or keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ShapeMismatch(
            f"mask {keep.dtype} {list(keep.shape)} for a weight {list(weight.shape)}; need two matrices", where=where
        )
    if transposed:
        weight, keep = weight.T, keep.T
    weight, keep = weight.detach().contiguous(), keep.contiguous()
    check_removed(weight, keep, where)
    return weight, keep


def _with_error(packed: PackedTensor, weight: Tensor, where: str) -> PackedTensor:
    """Attach the relative squared error sum (w - w')^2 / sum w^2."""
    got = unpack(replace(packed, transposed=False)).to(torch.float64)
    if not bool(torch.isfinite(got).all()):
        raise NonFinite(f"{packed.encoding} overflows {packed.dtype}", where=where, hint="Choose values: raw.")
    exact = weight.to(torch.float64)
    total = float(exact.square().sum())
    return replace(packed, error=float((exact - got).square().sum()) / total if total else 0.0)


def _member(kind: Any, facts: Mapping[str, Any], key: str, where: str) -> Any:
    """Return a member of a closed set."""
    try:
        return kind(facts.get(key))
    except ValueError as error:
        known = ", ".join(kind)
        raise HeaderError(
            f"{key} is {facts.get(key)!r}, known are {known}",
            where=where,
            hint="Written by a newer sparsekit? Upgrade with: pip install -U sparsekit",
        ) from error


def _is_count(value: object, limit: int = 2**62) -> bool:
    return type(value) is int and 0 <= value < limit


def _typed(where: str, action: Any) -> Any:
    """Run `action`; an error about a pattern from a file is about the file, not about a recipe."""
    try:
        return action()
    except SparsekitError as error:
        if error.exit_code == 2:
            raise PatternViolation(error.message, where=where) from error
        raise
