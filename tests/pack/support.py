"""Random matrices whose values are random bits, and masks that obey a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from sparsekit.pack import Encoding, Layout
from sparsekit.pack.types import ALLOWED
from sparsekit.pattern import NM, Block, Pattern, Unstructured

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HARD = {  # -0.0, smallest denormal, infinity, quiet and signalling NaN with payload, negative NaN
    2: (0x8000, 0x0001, 0x7F80, 0x7FC1, 0x7F81, 0xFFFF, 0x7C00, 0x7E01, 0x0000),
    4: (0x80000000, 0x00000001, 0x7F800000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF, 0x00000000),
}


FORMS = [(layout, encoding) for layout in Layout for encoding in ALLOWED[layout]]
LOSSLESS = [form for form in FORMS if form[1].lossless]
LOSSY = [form for form in FORMS if not form[1].lossless]


@dataclass(frozen=True)
class Case:
    """One matrix to pack."""

    weight: Tensor
    keep: Tensor
    layout: Layout
    encoding: Encoding
    pattern: Pattern
    transposed: bool


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)


def from_bits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn i64 bit patterns into floats."""
    size = torch.empty(0, dtype=dtype).element_size()
    signed = torch.where(values >= 2 ** (8 * size - 1), values - 2 ** (8 * size), values)
    return signed.to(torch.int32 if size == 4 else torch.int16).view(dtype)


def random_bits(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, few: int | None) -> Tensor:
    """Return floats of random bits, a tenth of them hard ones; `few`: only so many distinct high bytes."""
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.randint(0, 2 ** (8 * size), shape, generator=generator)
    if few is not None:
        low = values % 2 ** (8 * size - 8)
        values = low + (torch.randint(0, few, shape, generator=generator) * 37 % 256) * 2 ** (8 * size - 8)
    hard = torch.tensor(HARD[size])[torch.randint(0, len(HARD[size]), shape, generator=generator)]
    chance = torch.rand(shape, generator=generator)
    rare = 0.1 if few is None else 0.01
    return from_bits(torch.where(chance < rare, hard, values), dtype)


def random_mask(shape: tuple[int, int], pattern: Pattern, density: float, generator: torch.Generator) -> Tensor:
    rows, cols = shape
    if isinstance(pattern, NM):
        order = torch.rand((rows * cols // pattern.of, pattern.of), generator=generator).argsort(dim=1)
        return (order < pattern.keep).reshape(shape)
    if isinstance(pattern, Block):
        grid = torch.rand((rows // pattern.rows, cols // pattern.cols), generator=generator) < density
        return grid.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    keep = torch.rand(shape, generator=generator) < density
    if rows > 2:
        keep[0], keep[1] = False, True  # an empty and a full row
    return keep


@st.composite
def cases(draw: st.DrawFn, form: tuple[Layout, Encoding] | None = None) -> Case:
    """Draw a matrix for one layout and encoding, for any when none is given."""
    layout, encoding = form or draw(st.sampled_from(FORMS))
    lossless = encoding.lossless
    pattern: Pattern = Unstructured()
    rows = draw(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 40]))
    cols = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 130]))
    if layout is Layout.NM:
        of = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 64, 256]))
        pattern = NM(draw(st.integers(1, of)), of)
        cols = of * draw(st.integers(0, 3))
    if layout is Layout.BLOCK:
        pattern = Block(draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        rows, cols = pattern.rows * draw(st.integers(0, 4)), pattern.cols * draw(st.integers(0, 20))
    dtype = torch.bfloat16 if encoding is Encoding.SPLIT else draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keep = random_mask((rows, cols), pattern, draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), generator)
    if layout is Layout.DENSE:
        keep = torch.ones_like(keep)
    if lossless:
        weight = random_bits((rows, cols), dtype, generator, draw(st.sampled_from([None, 1, 7, 8, 9, 17])))
    else:
        weight = (torch.randn((rows, cols), generator=generator) * draw(st.sampled_from([1e-9, 0.02, 50.0]))).to(dtype)
    weight = from_bits(torch.where(keep, bits(weight).to(torch.int64), 0), dtype)
    transposed = draw(st.booleans())
    if transposed:
        weight, keep = weight.T.contiguous(), keep.T.contiguous()
    return Case(weight, keep, layout, encoding, pattern, transposed)
