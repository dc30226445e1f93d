"""Reading the sparse formats that compressed-tensors wrote up to version 0.14.

`sparse-bitmask` and `sparse-24-bitmask` checkpoints load in current transformers without an exception and with random
weights. They decode exactly; `marlin-24` has no inverse and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sparsekit.errors import BadIndex, CheckpointError, HeaderError, ShapeMismatch, UnsafeFormat, WeightMismatch
from sparsekit.lazy import torch
from sparsekit.pack.bits import count_rows, place, popcounts, unpack_mask

if TYPE_CHECKING:
    from torch import Tensor

BITMASK = "sparse-bitmask"
BITMASK_24 = "sparse-24-bitmask"
FORMATS = (BITMASK, BITMASK_24)
SUFFIXES = ("compressed", "bitmask", "row_offsets", "shape")


def sparse_format(config: Mapping[str, Any], where: str) -> str | None:
    """Return the sparse format that a config.json names, None if it names none.

    Args:
        config: Content of config.json.
        where: File name for messages.

    Raises:
        UnsafeFormat: A format outside the closed set, marlin-24 among them. The string is never looked up anywhere.
    """
    outer = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(outer, Mapping):
        return None
    inner = outer.get("sparsity_config")
    found = [outer.get("format"), inner.get("format") if isinstance(inner, Mapping) else None]
    if "marlin-24" in found:
        raise UnsafeFormat(
            "marlin-24 weights cannot be read: they are permuted for one GPU kernel and no decoder exists",
            where=where,
            hint="Prune the original model again.",
        )
    sparse = found[1]
    if sparse in (None, "dense"):
        return None
    if sparse not in FORMATS:
        raise UnsafeFormat(f"unknown sparse format {sparse!r}; known are {', '.join(FORMATS)}", where=where)
    return str(sparse)


def groups(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return weight name -> {suffix: tensor name} for the packed weights among the tensors of a checkpoint.

    A packed weight is recognised by its `bitmask`; `L.weight` stands as `L.compressed`, `L.bitmask` and so on.

    Raises:
        CheckpointError: `weight_packed` with `meta`, the mark of marlin-24.
    """
    present = set(names)
    for name in sorted(present):
        module, _, suffix = name.rpartition(".")
        if suffix == "meta" and {f"{module}.weight_packed", f"{module}.scale_packed"} & present:
            raise CheckpointError(
                "marlin-24 weights cannot be read: no decoder exists", where=module, hint="Prune the model again."
            )
    found: dict[str, dict[str, str]] = {}
    for name in sorted(present):
        module, _, suffix = name.rpartition(".")
        if suffix == "bitmask":
            parts = {part: f"{module}.{part}" for part in SUFFIXES if f"{module}.{part}" in present}
            found[f"{module}.weight"] = parts
    return found


def decode(kind: str, tensors: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Decode one weight.

    Args:
        kind: `sparse-bitmask` or `sparse-24-bitmask`.
        tensors: `shape` i64 (2,) or (2, 1), `compressed` in the weight's dtype (any, fp8 too), `bitmask` u8
            [rows, ceil(cols / 8)], and perhaps `row_offsets` i64 [rows].
        where: Weight name for messages.

    Returns:
        (weight [rows, cols], keep [rows, cols] bool), removed weights +0.

    Raises:
        HeaderError: A tensor is missing or has the wrong dtype or shape.
        ShapeMismatch, WeightMismatch, BadIndex: The tensors disagree.
        UnsafeFormat: Another format.
    """
    if kind not in FORMATS:
        raise UnsafeFormat(f"unknown sparse format {kind!r}; known are {', '.join(FORMATS)}", where=where)
    if missing := sorted({"compressed", "bitmask", "shape"} - set(tensors)):
        raise HeaderError(f"{missing[0]} is missing; got {', '.join(sorted(tensors)) or 'nothing'}", where=where)
    mask, values = tensors["bitmask"], tensors["compressed"].contiguous()
    rows, cols = _shape(tensors["shape"], where)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, (cols + 7) // 8):
        raise ShapeMismatch(
            f"bitmask is {mask.dtype} {list(mask.shape)}, needed uint8 {[rows, (cols + 7) // 8]}", where=where
        )
    keep = unpack_mask(mask, cols)
    counts = count_rows(keep)
    if not torch.equal(counts, popcounts(mask)):
        raise BadIndex(f"bitmask keeps a column past the last one, {cols - 1}", where=where)
    _check_counts(kind, tensors, keep, counts, where)
    integers = _integers(values.element_size(), where)
    return place(values.view(integers).reshape(-1), keep).view(values.dtype), keep


def _check_counts(kind: str, tensors: Mapping[str, Tensor], keep: Tensor, counts: Tensor, where: str) -> None:
    """Require that mask, values and row offsets belong together."""
    values, kept = tensors["compressed"], int(counts.sum())
    if values.numel() != kept:
        raise WeightMismatch(f"{values.numel():,} values for {kept:,} weights kept by the bitmask", where=where)
    rows, cols = keep.shape
    needed = (kept,) if kind == BITMASK else (rows, cols // 2)
    if tuple(values.shape) != needed:
        raise ShapeMismatch(f"compressed is {list(values.shape)}, needed {list(needed)}", where=where)
    if kind == BITMASK_24:
        wrong = cols % 4 or int((keep.reshape(-1, 4).sum(dim=1) != 2).sum())
        if wrong:
            raise WeightMismatch(f"{wrong} groups of four do not keep exactly two", where=where)
    offsets = tensors.get("row_offsets")
    if offsets is not None and not torch.equal(offsets.reshape(-1).to(torch.int64), counts.cumsum(0) - counts):
        raise BadIndex("row_offsets are not the prefix sums of the bitmask", where=where)


def _shape(stored: Tensor, where: str) -> tuple[int, int]:
    """Return (rows, cols) of a `shape` tensor."""
    sizes = stored.reshape(-1).tolist()
    if stored.dtype != torch.int64 or len(sizes) != 2 or not all(0 <= size < 2**31 for size in sizes):
        raise HeaderError(f"shape is {stored.dtype} {sizes}, needed int64 [rows, cols]", where=where)
    return int(sizes[0]), int(sizes[1])


def _integers(size_bytes: int, where: str) -> torch.dtype:
    """Return the integer dtype of an element size, so that no bit is interpreted."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if size_bytes not in kinds:
        raise HeaderError(f"values of {size_bytes} bytes cannot be read", where=where)
    return kinds[size_bytes]
