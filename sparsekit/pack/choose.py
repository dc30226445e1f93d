"""Choosing the smallest form that loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekit.errors import UsageError
from sparsekit.pack.tensor import pack, prove
from sparsekit.pack.types import ALLOWED, HEADER_BYTES, Encoding, Layout, PackedTensor, dtype_name
from sparsekit.pattern import NM, Block, Pattern

if TYPE_CHECKING:
    from torch import Tensor


def choose(
    weight: Tensor,
    keep: Tensor,
    pattern: Pattern,
    *,
    layout: Layout | None = None,
    encoding: Encoding | None = None,
    transposed: bool = False,
    where: str = "weight",
) -> PackedTensor:
    """Pack a weight in the form that takes the fewest bytes; without `encoding` no bit is ever lost.

    Counted are tensor bytes and 96 bytes for each tensor's header entry, so tiny weights stay dense. Of equal sizes
    the first of this order wins: dense/raw, bitmask/raw, nm/raw, block/raw, bitmask/split, dense/split. So packing
    that saves nothing is not done, and a decoder with less work wins a tie. `nm` is a candidate under an N:M
    pattern (M up to 256), `block` under a block pattern, `split` for bf16. Lossless results are unpacked and
    compared with the weight before they are returned.

    Args:
        weight: [out, in], or [in, out] if `transposed`; bf16, f16 or f32.
        keep: bool, same shape; True = kept.
        pattern: What the mask obeys.
        layout: Use only this layout; None: any.
        encoding: Use only this encoding; None: the lossless ones.
        transposed: The stored tensor is [in, out].
        where: Name for messages.

    Raises:
        UsageError: Nothing exists in that layout and encoding for this weight and pattern.
        SparsekitError: As `pack`.
    """
    best: PackedTensor | None = None
    forms = candidates(weight, pattern, layout, encoding)
    numel, nnz = weight.numel(), int(keep.count_nonzero())
    for form in sorted(forms, key=lambda form: _least(form, numel, nnz, weight.element_size())):
        # Most promising first: a form that cannot win is not packed at all.
        if best is not None and _least(form, numel, nnz, weight.element_size()) > _cost(best):
            continue
        packed = pack(weight, keep, *form, pattern, transposed=transposed, where=where)
        if best is None or (_cost(packed), forms.index(form)) < (
            _cost(best),
            forms.index((best.layout, best.encoding)),
        ):
            best = packed
    if best is None:
        asked = f"format {layout or 'auto'} with values {encoding or 'auto'}"
        raise UsageError(f"{asked} does not exist for {weight.dtype} weights of pattern {pattern}", where=where)
    if best.encoding.lossless:
        prove(best, weight, keep, where)
    return best


def candidates(
    weight: Tensor, pattern: Pattern, layout: Layout | None, encoding: Encoding | None
) -> list[tuple[Layout, Encoding]]:
    """Return the forms that are possible, in the order that decides ties."""
    layouts = [Layout.DENSE, Layout.BITMASK]
    if isinstance(pattern, NM) and pattern.of <= 256:
        layouts.append(Layout.NM)
    if isinstance(pattern, Block):
        layouts.append(Layout.BLOCK)
    forms = [(where, Encoding.RAW) for where in layouts]
    if dtype_name(weight.dtype) == "BF16":
        forms += [(Layout.BITMASK, Encoding.SPLIT), (Layout.DENSE, Encoding.SPLIT)]
    if encoding is not None and not encoding.lossless:
        forms = [(where, encoding) for where in layouts if encoding in ALLOWED[where]]
    return [form for form in forms if layout in (None, form[0]) and encoding in (None, form[1])]


def _cost(packed: PackedTensor) -> int:
    """Return the bytes in the file, header entries included."""
    return packed.size_bytes + HEADER_BYTES * len(packed.tensors)


def _least(form: tuple[Layout, Encoding], numel: int, nnz: int, element_bytes: int) -> float:
    """Return a lower bound of the bytes that a form takes."""
    layout, encoding = form
    values = numel if layout is Layout.DENSE else nnz
    mask = numel / 8 if layout is Layout.BITMASK else 0
    bits = {Encoding.RAW: 8 * element_bytes, Encoding.SPLIT: 11, Encoding.INT8: 8, Encoding.INT4: 4}[encoding]
    return values * bits / 8 + mask
