"""int8 and int4 weights unpack to exactly what the files say, and nothing that disagrees is packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import BadIndex, KernelError
from sparsekit.pack import quantised as files
from sparsekit.pack.bits import pack_codes as pack_nibbles
from sparsekit.pack.bits import unpack_codes as unpack_nibbles
from sparsekit.pack.support import DenseSupport, MaskSupport, Support
from sparsekit.pack.types import Encoding
from sparsekit.runtime import buffers, native
from sparsekit.runtime.buffers import MemoryLayout
from sparsekit.runtime.native import DType
from tests.native.cases import bitmask
from tests.native.quantised_cases import LIMITS, quantised
from tests.native.test_packing import BITS, same_bits

ENCODINGS = {MemoryLayout.INT8: Encoding.INT8, MemoryLayout.INT4: Encoding.INT4}


def integers(tensors: dict[str, torch.Tensor], support: Support, layout: MemoryLayout) -> torch.Tensor:
    """The integers of a file's values, i8 [nnz]."""
    stored = tensors["weight_nz"].reshape(-1)
    if layout is MemoryLayout.INT8:
        return stored
    codes = unpack_nibbles(stored, support.counts, 4).to(torch.int8)
    return codes - 8 if isinstance(support, DenseSupport) else codes - 8 + (codes >= 8)


def check_round_trip(
    keep: torch.Tensor, tensors: dict[str, torch.Tensor], support: Support, layout: MemoryLayout, dtype: torch.dtype
) -> None:
    """Unpacked from memory = decoded from the file, bit for bit."""
    rows, cols = keep.shape
    codes = integers(tensors, support, layout)
    packed = buffers.pack_codes(bitmask(keep), codes, tensors["weight_scales"], (rows, cols), layout, dtype)
    expected = support.scatter(files.decode(tensors, support, ENCODINGS[layout], cols)).to(dtype)
    assert same_bits(buffers.unpack(packed), expected)
    found = buffers.info(packed)
    assert (found.layout, found.shape, found.nnz) == (layout, (rows, cols), codes.numel())
    assert found.dtype == native.dtype_of(dtype)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 50),
    cols=st.integers(0, 200),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    layout=st.sampled_from(list(ENCODINGS)),
    dtype=st.sampled_from(list(BITS)),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    dense=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_written_weights(
    rows: int,
    cols: int,
    density: float,
    layout: MemoryLayout,
    dtype: torch.dtype,
    spread: float,
    dense: bool,
    seed: int,
) -> None:
    """What the writer makes of weights, kept zeros and empty groups included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    weight *= torch.exp(spread * torch.randn(rows, cols, generator=generator)).clamp(1e-9, 1e4)
    weight[torch.rand(rows, cols, generator=generator) < 0.05] = 0
    keep = torch.ones(rows, cols, dtype=torch.bool) if dense else torch.rand(rows, cols, generator=generator) < density
    weight = torch.where(keep, weight, 0.0).to(dtype)
    support = DenseSupport(rows, cols) if dense else MaskSupport(keep)
    check_round_trip(keep, files.encode(weight, support, ENCODINGS[layout], "w"), support, layout, dtype)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 150),
    layout=st.sampled_from(list(ENCODINGS)),
    dtype=st.sampled_from(list(BITS)),
    largest=st.sampled_from([0, 1, 3, 0x3FF, 0x400, 0x3C00, 0x7BFF]),
    seed=st.integers(0, 2**31),
)
def test_any_integers_and_scales(
    rows: int, cols: int, layout: MemoryLayout, dtype: torch.dtype, largest: int, seed: int
) -> None:
    """Every integer with denormal, ordinary and huge scales: denormal weights, ties, overflow to infinity."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=generator) < 0.5
    support = MaskSupport(keep)
    low, high = LIMITS[layout]
    nnz = int(keep.sum())
    if layout is MemoryLayout.INT8:
        stored = torch.randint(low, high + 1, (nnz,), generator=generator).to(torch.int8)
    else:
        codes = torch.randint(0, 16, (nnz,), generator=generator).to(torch.uint8)
        stored = pack_nibbles(codes, support.counts, 4)
    bits = torch.randint(0, largest + 1, (rows, -(-cols // 64)), generator=generator)
    tensors = {"weight_nz": stored, "weight_scales": bits.to(torch.int16).view(torch.float16)}
    check_round_trip(keep, tensors, support, layout, dtype)


@pytest.mark.parametrize(("layout", "bits"), [(MemoryLayout.INT8, 5.25), (MemoryLayout.INT4, 3.28)])
def test_size_is_the_arithmetic(layout: MemoryLayout, bits: float) -> None:
    made = quantised(1024, 1024, 0.5, layout)
    made.keep[3::7] = made.keep[5::7] = made.keep[0]
    made.codes = torch.where(made.keep, 3, 0).to(torch.int8)
    density = float(made.keep.double().mean())
    width = 8 if layout is MemoryLayout.INT8 else 4
    assert 8 * made.pack().numel() / 2**20 == pytest.approx(bits + width * (density - 0.5), rel=0.01)


def test_without_holes_there_are_no_masks() -> None:
    for layout, bits in ((MemoryLayout.INT8, 8.25), (MemoryLayout.INT4, 4.25)):
        full = quantised(512, 512, 1.0, layout)
        assert 8 * full.pack().numel() / 2**18 == pytest.approx(bits, rel=0.01)
        for dtype in BITS:
            assert same_bits(buffers.unpack(full.pack(dtype)), full.rounded(dtype))
        full.codes[100, 100] = LIMITS[layout][1]  # an int4 of 8 needs the codes that go with a mask
        masked = layout is MemoryLayout.INT4
        assert 8 * full.pack().numel() / 2**18 == pytest.approx(bits + masked, rel=0.04)
        assert same_bits(buffers.unpack(full.pack(torch.float32)), full.rounded(torch.float32))


@pytest.mark.parametrize("layout", list(ENCODINGS))
def test_disagreement_is_refused(layout: MemoryLayout) -> None:
    made = quantised(20, 70, 0.5, layout)
    good = {
        "mask": bitmask(made.keep), "codes": made.codes[made.keep], "scales": made.scales,
        "row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), made.keep.sum(1).cumsum(0)[:-1]]),
    }  # fmt: skip

    def pack(**changed: torch.Tensor) -> torch.Tensor:
        return buffers.pack_codes(
            shape=(20, 70), layout=layout, dtype=torch.bfloat16, where="layer.x", **{**good, **changed}
        )

    pack()
    for changed in (
        {"codes": good["codes"][:-1]}, {"mask": good["mask"][:-1]}, {"row_offsets": good["row_offsets"] + 1},
        {"scales": good["scales"][:, :1]}, {"scales": good["scales"][:-1]},
    ):  # fmt: skip
        with pytest.raises(BadIndex, match=r"layer\.x"):
            pack(**changed)
    for scale in (float("inf"), float("nan"), -1.0):
        scales = made.scales.clone()
        scales[13, 1] = scale
        with pytest.raises(KernelError, match=r"layer\.x.*bad argument"):
            pack(scales=scales)
    with pytest.raises(KernelError, match="needed int8, float16"):
        pack(codes=good["codes"].float())
    with pytest.raises(KernelError, match="needed int8, float16"):
        pack(scales=good["scales"].float())


def test_layouts_and_value_types_belong_together() -> None:
    made = quantised(4, 8, 1.0, MemoryLayout.INT8)
    with pytest.raises(KernelError, match="unsupported"):
        buffers.pack(bitmask(made.keep), made.codes[made.keep].bfloat16(), (4, 8), MemoryLayout.INT8)
    made.layout = MemoryLayout.BITMAP
    with pytest.raises(KernelError, match="unsupported"):
        made.pack()


@pytest.mark.parametrize("layout", list(ENCODINGS))
def test_threads_do_not_change_the_packing(layout: MemoryLayout) -> None:
    made = quantised(200, 300, 0.5, layout)
    one, four = (made.pack(threads=n) for n in (1, 4))
    assert torch.equal(one, four)
    assert buffers.info(one).dtype is DType.BF16
