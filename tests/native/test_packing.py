"""Packing loses no bit and refuses what disagrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import BadIndex, KernelError
from sparsekit.runtime import buffers, native
from sparsekit.runtime.buffers import MemoryLayout
from sparsekit.runtime.native import DType
from tests.native.cases import EXACT, Case, bitmask, case

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = BITS[a.dtype]
    return torch.equal(a.view(kind), b.view(kind))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    bits=st.sampled_from([2, 6, 9, 12, 16]),
    dtype=st.sampled_from(list(BITS)),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(rows: int, cols: int, density: float, bits: int, dtype: torch.dtype, seed: int) -> None:
    """Random bit patterns: NaN payloads, -0.0, denormals; `bits` sets how many high bytes there are."""
    generator = torch.Generator().manual_seed(seed)
    width = 16 if dtype != torch.float32 else 32
    raw = torch.randint(0, 2**bits, (rows, cols), generator=generator) << (width - bits)
    low = torch.randint(0, 2 ** (width - bits), (rows, cols), generator=generator)
    integers = (raw | low) - (1 << width) * ((raw | low) >> (width - 1))  # two's complement
    weight = integers.to(BITS[dtype]).view(dtype)
    keep = torch.rand(rows, cols, generator=generator) < density
    weight = torch.where(keep, weight.view(BITS[dtype]), 0).to(BITS[dtype]).view(dtype)
    for layout in EXACT:
        if layout is MemoryLayout.SPLIT and dtype != torch.bfloat16:
            continue
        packed = Case(weight, keep).pack(layout)
        assert same_bits(buffers.unpack(packed), weight)
        assert buffers.info(packed).nnz == int(keep.sum())


def test_each_code_width_is_used() -> None:
    def panel(high_bytes: int, rare: int) -> torch.Tensor:
        values = torch.arange(16 * 256) % high_bytes << 8 | torch.arange(16 * 256) % 251
        values[:rare] = 0x7100 + torch.arange(rare) * 256
        return values.to(torch.int16).reshape(16, 256)

    weight = torch.cat([panel(8, 3), panel(16, 5), panel(60, 0)]).view(torch.bfloat16)
    keep = torch.ones(48, 256, dtype=torch.bool)
    packed = Case(weight, keep).pack(MemoryLayout.SPLIT)
    found = buffers.info(packed)
    assert found.widths == (1, 1, 1)
    assert found.patches == 8
    assert same_bits(buffers.unpack(packed), weight)


def test_size_is_the_arithmetic() -> None:
    made = case(1024, 1024, 0.5, torch.bfloat16)
    made.keep[3::7] = made.keep[5::7] = made.keep[0]  # 50 % everywhere
    weight = torch.where(made.keep, torch.randn(1024, 1024) * 0.02 + 0.05, 0.0).bfloat16()
    packed = Case(weight, made.keep)
    numel = 1024 * 1024
    bitmap, split = (8 * packed.pack(layout).numel() / numel for layout in EXACT)
    assert bitmap == pytest.approx(9.0, rel=0.005)
    assert split == pytest.approx(6.5, rel=0.02)


@pytest.mark.parametrize("layout", EXACT)
def test_disagreement_is_refused(layout: MemoryLayout) -> None:
    made = case(20, 21, 0.5, torch.bfloat16)
    mask, values = bitmask(made.keep), made.weight[made.keep]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), made.keep.sum(1).cumsum(0)[:-1]])
    buffers.pack(mask, values, (20, 21), layout, row_offsets=offsets)

    def refuse(**changed: torch.Tensor) -> None:
        arguments = {"mask": mask, "values": values, "row_offsets": offsets, **changed}
        with pytest.raises(BadIndex, match=r"layer\.x"):
            buffers.pack(shape=(20, 21), layout=layout, where="layer.x", **arguments)

    refuse(values=values[:-1])
    refuse(values=torch.cat([values, values[:1]]))
    refuse(mask=mask[:-1])
    refuse(row_offsets=offsets + 1)
    refuse(row_offsets=offsets.flip(0))
    refuse(row_offsets=offsets[:-1])
    for byte in range(0, mask.numel(), 7):
        flipped = mask.clone().reshape(-1)
        flipped[byte] ^= 1 << byte % 8
        refuse(mask=flipped.reshape(mask.shape))
    padded = mask.clone()
    padded[4, 2] |= 0x80  # a column that does not exist
    refuse(mask=padded)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(0, 40), cols=st.integers(0, 80), layout=st.sampled_from(EXACT))
def test_arbitrary_arrays_are_refused_or_packed(
    data: st.DataObject, rows: int, cols: int, layout: MemoryLayout
) -> None:
    """Whatever a file holds: a typed error, or a packed weight whose nnz is the mask's."""
    size = rows * -(-cols // 8)
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if cols % 8 and data.draw(st.booleans()):
        mask = (mask.reshape(rows, -(-cols // 8)) & torch.tensor([255] * (cols // 8) + [(1 << cols % 8) - 1])).to(
            torch.uint8
        )
    bits = sum(int(byte).bit_count() for byte in mask.reshape(-1).tolist())
    values = torch.zeros(max(0, bits + data.draw(st.sampled_from([0, 0, 0, -1, 1, 1000])))).bfloat16()
    try:
        packed = buffers.pack(mask, values, (rows, cols), layout)
    except BadIndex:
        return
    assert buffers.info(packed).nnz == bits == values.numel()
    assert int((buffers.unpack(packed) != 0).sum()) == 0


def test_only_packed_buffers_are_accepted() -> None:
    packed = case(20, 21, 0.5, torch.bfloat16).pack(MemoryLayout.SPLIT)
    for broken in (packed[:-1], packed[:100], torch.zeros(4096, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(KernelError, match="not a packed weight"):
            buffers.info(broken.clone())
    with pytest.raises(KernelError, match="unsupported"):
        case(4, 4, 0.5, torch.float16).pack(MemoryLayout.SPLIT)
    with pytest.raises(KernelError, match="dtype"):
        buffers.pack(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(0).double(), (1, 1), MemoryLayout.BITMAP)


def test_large_buffers_lie_on_huge_page_boundaries_and_are_writable() -> None:
    buffer = native.allocate((5 << 20) + 3)
    assert buffer.data_ptr() % (2 << 20) == 0
    assert buffer.numel() == (5 << 20) + 3
    buffer.fill_(3)
    assert int(buffer.clone().sum()) == 3 * buffer.numel()


def test_large_buffers_get_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    buffer = native.allocate(8 << 20)
    regions = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]
    bounds = ((int(text, 16) for text in region.split(maxsplit=1)[0].split("-")) for region in regions)
    holds = [start <= buffer.data_ptr() < end for start, end in bounds]
    assert re.search(r"THPeligible:\s+1", regions[holds.index(True)])


def test_threads_do_not_change_the_packing() -> None:
    made = case(200, 300, 0.5, torch.bfloat16, wild=0.01)
    mask, values = bitmask(made.keep), made.weight[made.keep]
    for layout in EXACT:
        one, four = (buffers.pack(mask, values, (200, 300), layout, threads=n) for n in (1, 4))
        assert torch.equal(one, four)
    assert buffers.info(one).dtype is DType.BF16
