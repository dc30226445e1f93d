"""The layouts of structured masks, CHUNK (n:64) and BLOCK: products, every bit back, refusals, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import BadIndex, KernelError
from sparsekit.pack import Encoding, Layout, pack
from sparsekit.pattern import parse_pattern
from sparsekit.runtime import buffers, native, repack
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import ISAS, Case, bitmask, largest_error, multiply, structured

TOLERANCE = 1e-5
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
CHUNKS = [("4:64", torch.bfloat16), ("8:64", torch.bfloat16), ("16:64", torch.bfloat16)]
BLOCKS = [("16x4", torch.bfloat16), ("32x8", torch.float16), ("16x16", torch.float32), ("16x4", torch.float16)]
FORMS = [*CHUNKS, *BLOCKS]
IDS = [f"{pattern}-{str(dtype)[6:]}" for pattern, dtype in FORMS]
CHUNK_SHAPES = [(1, 64), (16, 64), (17, 128), (31, 320), (64, 192), (70, 64), (100, 704), (0, 64), (5, 0)]
BLOCK_SHAPES = [(32, 16), (64, 48), (96, 112), (160, 304), (32, 1600), (0, 16), (32, 0)]


def layout_of(pattern: str) -> MemoryLayout:
    return MemoryLayout.CHUNK if ":" in pattern else MemoryLayout.BLOCK


def shapes(pattern: str) -> list[tuple[int, int]]:
    return CHUNK_SHAPES if ":" in pattern else BLOCK_SHAPES


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run here")
    native.use_isa(request.param)
    return str(request.param)


@pytest.mark.parametrize(("pattern", "dtype"), FORMS, ids=IDS)
def test_products(isa: str, pattern: str, dtype: torch.dtype) -> None:
    for number, (rows, cols) in enumerate(shapes(pattern)):
        made = structured(rows, cols, pattern, (0.5, 0.1, 0.0, 1.0)[number % 4], dtype)
        packed = made.pack(layout_of(pattern))
        for tokens in (1, 2, 3, 4, 5, 7, 16, 17, 33):
            for x_dtype in (torch.bfloat16, (torch.float32, torch.float16)[number % 2]):
                x = torch.randn(tokens, cols).to(x_dtype)
                y = multiply(packed, x, rows, dtype=torch.float32, threads=1 + tokens % 2)
                assert largest_error(y, x, made.weight) < TOLERANCE, (rows, cols, tokens, x_dtype)


@pytest.mark.parametrize(("pattern", "dtype"), FORMS, ids=IDS)
def test_every_number_of_tokens(isa: str, pattern: str, dtype: torch.dtype) -> None:
    made = structured(96, 320, pattern, 0.4, dtype)
    packed = made.pack(layout_of(pattern))
    for tokens in [*range(1, 36), 530]:  # 530: more than one pass
        x = torch.randn(tokens, 320).bfloat16()
        y = multiply(packed, x, 96, dtype=torch.float32, threads=2)
        assert largest_error(y, x, made.weight) < TOLERANCE, tokens


@pytest.mark.parametrize("pattern", ["16:64", "4:64", "16x4"])
def test_columns_beyond_the_scratch_and_bias(isa: str, pattern: str) -> None:
    made = structured(80, 5056, pattern, 0.3, torch.bfloat16)
    packed, bias = made.pack(layout_of(pattern)), torch.randn(80)
    for tokens in (1, 20):
        x = torch.randn(tokens, 5056)
        y = multiply(packed, x, 80, bias=bias)
        assert largest_error(y - bias, x, made.weight) < TOLERANCE


@pytest.mark.parametrize(("pattern", "dtype"), FORMS, ids=IDS)
def test_threads_do_not_change_the_result(pattern: str, dtype: torch.dtype) -> None:
    made = structured(160, 320, pattern, 0.4, dtype)
    packed = made.pack(layout_of(pattern))
    for tokens in (1, 40):
        x = torch.randn(tokens, 320).bfloat16()
        one = multiply(packed, x, 160)
        assert all(torch.equal(multiply(packed, x, 160, threads=n), one) for n in (2, 3, 8))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    shape=st.integers(0, 6),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(form: tuple[str, torch.dtype], shape: int, density: float, seed: int) -> None:
    """Random bit patterns: NaN payloads, -0.0, denormals."""
    pattern, dtype = form
    rows, cols = shapes(pattern)[shape]
    keep = structured(rows, cols, pattern, density, dtype).keep
    kind = BITS[dtype]
    bits = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(bits.min, bits.max, (rows, cols), generator=generator).to(kind)
    raw[torch.rand(rows, cols, generator=generator) < 0.1] = bits.min  # -0.0
    weight = torch.where(keep, raw, 0).to(kind).view(dtype)
    packed = Case(weight, keep).pack(layout_of(pattern))
    assert torch.equal(buffers.unpack(packed).view(kind), weight.view(kind))
    found = buffers.info(packed)
    assert (found.layout, found.shape, found.nnz) == (layout_of(pattern), (rows, cols), int(keep.sum()))


@pytest.mark.parametrize(
    ("pattern", "dtype", "bits"),
    [("16:64", torch.bfloat16, 6), ("8:64", torch.bfloat16, 3), ("4:64", torch.bfloat16, 1.5)]
    + [
        ("16x4", dtype, 0.5 * size * (1 + 4 / (8 * size)))
        for dtype, size in ((torch.bfloat16, 16), (torch.float32, 32))
    ],
)
def test_size_is_the_arithmetic(pattern: str, dtype: torch.dtype, bits: float) -> None:
    """n:64: 24 bits a value. Blocks: the values and four bytes for 64 of them."""
    made = structured(1024, 1024, pattern, 0.5, dtype)
    expected = bits * (made.keep.sum() / 2**19 if "x" in pattern else 1)
    packed = made.pack(layout_of(pattern))
    assert 8 * packed.numel() / 2**20 == pytest.approx(float(expected), rel=0.01)


@pytest.mark.parametrize(("pattern", "dtype"), FORMS, ids=IDS)
def test_a_mask_without_the_structure_is_refused(pattern: str, dtype: torch.dtype) -> None:
    """Any one bit flipped breaks it, and so does every column moved by one."""
    made = structured(32, 128, pattern, 0.5, dtype)
    layout = layout_of(pattern)
    made.pack(layout)
    for place in range(0, 32 * 128, 331):
        flipped = made.keep.clone()
        flipped.view(-1)[place] ^= True
        with pytest.raises(BadIndex, match="structure"):
            Case(made.weight, flipped).pack(layout)
    with pytest.raises(BadIndex, match="structure"):
        Case(made.weight, made.keep.roll(1, 1)).pack(layout)


@pytest.mark.parametrize("shape", [(16, 63), (16, 65), (15, 64), (17, 64)])
def test_a_shape_without_the_structure_is_refused(shape: tuple[int, int]) -> None:
    """All is kept, so no tile is kept in part; for CHUNK it is the wrong n as well."""
    full = Case(torch.ones(shape).bfloat16(), torch.ones(shape, dtype=torch.bool))
    for layout in (MemoryLayout.CHUNK, MemoryLayout.BLOCK):
        with pytest.raises(BadIndex, match="structure"):
            full.pack(layout)


def test_chunk_holds_bf16_only() -> None:
    with pytest.raises(KernelError, match="unsupported"):
        structured(16, 64, "8:64", 1, torch.float16).pack(MemoryLayout.CHUNK)


@pytest.mark.parametrize(
    ("pattern", "dtype", "layout"),
    [
        ("8:64", torch.bfloat16, MemoryLayout.CHUNK),
        ("4:64", torch.bfloat16, MemoryLayout.CHUNK),
        ("8:64", torch.float16, MemoryLayout.BITMAP),
        ("2:4", torch.bfloat16, None),
        ("16:64", torch.bfloat16, None),
        ("16x4", torch.float32, MemoryLayout.BLOCK),
        ("32x8", torch.bfloat16, MemoryLayout.BLOCK),
        ("8x4", torch.float16, MemoryLayout.BITMAP),
        ("16x2", torch.float16, MemoryLayout.BITMAP),
    ],
)
def test_best_layout_follows_the_pattern(pattern: str, dtype: torch.dtype, layout: MemoryLayout | None) -> None:
    """None: the choice is that of an unstructured mask of the same density."""
    made = structured(64, 128, pattern, 0.4, dtype)
    density, obeyed = float(made.keep.float().mean()), parse_pattern(pattern)
    expected = buffers.best_layout(dtype, density) if layout is None else layout
    assert buffers.best_layout(dtype, density, obeyed) is expected
    packed = buffers.pack_best(bitmask(made.keep), made.weight[made.keep], made.shape, obeyed)
    assert buffers.info(packed).layout is expected
    assert torch.equal(buffers.unpack(packed), made.weight)


@pytest.mark.parametrize("pattern", ["8:64", "16x4"])
def test_a_mask_that_breaks_its_pattern_takes_a_layout_for_any_mask(pattern: str) -> None:
    made = structured(64, 128, pattern, 0.4, torch.bfloat16)
    made.keep[17, int(made.keep[17].nonzero()[0, 0])] = False
    weight = torch.where(made.keep, made.weight, 0.0).bfloat16()
    packed = buffers.pack_best(bitmask(made.keep), weight[made.keep], made.shape, parse_pattern(pattern))
    assert buffers.info(packed).layout in (MemoryLayout.BITMAP, MemoryLayout.SPLIT)
    assert torch.equal(buffers.unpack(packed), weight)


@pytest.mark.parametrize(
    ("disk", "pattern"),
    [(Layout.BITMASK, "8:64"), (Layout.NM, "8:64"), (Layout.BITMASK, "16x4"), (Layout.BLOCK, "16x4")],
)
def test_packed_tensors_of_a_file_keep_their_structure(disk: Layout, pattern: str) -> None:
    """Whatever the layout in the file, the pattern of its entry decides the layout in memory."""
    made = structured(64, 128, pattern, 0.4, torch.bfloat16)
    packed = pack(made.weight, made.keep, disk, Encoding.RAW, parse_pattern(pattern))
    buffer = repack.repack(packed.facts(), packed.tensors, "w")
    assert buffers.info(buffer).layout is layout_of(pattern)
    assert torch.equal(buffers.unpack(buffer), made.weight)
