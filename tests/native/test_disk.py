"""The native reader of packed tensors accepts what `pack.validate` accepts and decodes it to the same bits."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import KernelError, SparsekitError
from sparsekit.pack import Encoding, Layout, PackedTensor, pack, read, unpack
from sparsekit.pack.tensor import from_entry, validate
from sparsekit.pattern import NM, Block, Pattern, Unstructured
from sparsekit.runtime import buffers, native, ops, repack
from tests.native.test_memory import Guarded
from tests.pack.support import FORMS, cases, random_bits, random_mask
from tests.pack.test_validate import FAULTS, Change, content, sample


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and content(a) == content(b)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_form_decodes_to_the_same_bits(form: tuple[Layout, Encoding], data: st.DataObject) -> None:
    case = data.draw(cases(form))
    packed = pack(case.weight, case.keep, case.layout, case.encoding, case.pattern, transposed=case.transposed)
    expected = unpack(packed)
    assert same_bits(repack.dense(packed.facts(), packed.tensors, "w"), expected)
    buffer = repack.repack(packed.facts(), packed.tensors, "w")
    oriented = expected.T.contiguous() if packed.transposed else expected
    if packed.encoding.lossless:
        assert same_bits(buffers.unpack(buffer), oriented)
    else:
        assert torch.equal(buffers.unpack(buffer), oriented)


def verdicts(packed: PackedTensor, tensors: dict[str, torch.Tensor]) -> tuple[SparsekitError | None, ...]:
    """Return what the validator, the native reader and the way into memory say, each None where it accepts."""
    said: list[SparsekitError | None] = []
    for action in (read, repack.read_source, repack.repack):
        try:
            action(packed.facts(), tensors, "w")
            said.append(None)
        except SparsekitError as error:
            said.append(error)
    return tuple(said)


def agreed(packed: PackedTensor, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor is accepted; both must say the same, in the same words."""
    validator, *others = verdicts(packed, tensors)
    for other in others:
        assert (type(validator), str(validator)) == (type(other), str(other))
    if validator is None:
        found = from_entry(packed.facts(), tensors, "w")
        dense = unpack(found)
        assert same_bits(repack.dense(packed.facts(), tensors, "w"), dense)
        held = buffers.unpack(repack.repack(packed.facts(), tensors, "w"))
        assert torch.equal(held.nan_to_num(7), (dense.T if packed.transposed else dense).nan_to_num(7))
    return validator is None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_damage_of_every_part_gets_the_same_verdict(
    form: tuple[Layout, Encoding], seed: int, data: st.DataObject
) -> None:
    packed = sample(*form, seed % 5)
    suffix = data.draw(st.sampled_from(sorted(packed.tensors)))
    tensor = packed.tensors[suffix]
    junk = bytearray(content(tensor))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(junk) - 1))
        junk[place] = data.draw(st.sampled_from([0, 1, 3, 4, 8, 127, 128, 255, junk[place] ^ 1, junk[place] ^ 128]))
    damaged = torch.frombuffer(junk, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
    agreed(packed, {**packed.tensors, suffix: damaged})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_single_bits_get_the_same_verdict(form: tuple[Layout, Encoding]) -> None:
    """Bits of the parts that decide where a kernel reads: refused or harmless, and the same for both."""
    packed = sample(*form, 1)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for suffix, tensor in packed.tensors.items():
        data = content(tensor)
        for bit in torch.randperm(8 * len(data), generator=generator)[:25].tolist():
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged = torch.frombuffer(flipped, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
            refused += not agreed(packed, {**packed.tensors, suffix: damaged})
    assert refused > 0 or form == (Layout.DENSE, Encoding.RAW)


# The native reader makes parts contiguous first.
@pytest.mark.parametrize(
    ("form", "change"), [pytest.param(*fault[1:3], id=fault[0]) for fault in FAULTS if fault[0] != "not contiguous"]
)
def test_known_faults_get_the_same_error(form: tuple[Layout, Encoding], change: Change) -> None:
    packed = sample(*form, 4)
    facts, tensors = dict(packed.facts()), dict(packed.tensors)
    change(facts, tensors)
    with pytest.raises(SparsekitError) as wanted:
        read(facts, tensors, "layer.weight")
    for action in (repack.read_source, repack.dense, repack.repack):
        with pytest.raises(type(wanted.value)) as caught:
            action(facts, tensors, "layer.weight")
        assert str(caught.value) == str(wanted.value)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_nothing_is_read_outside_the_parts(form: tuple[Layout, Encoding], at_end: bool) -> None:
    """Every part and both outputs between guard pages, sound and damaged."""
    lib = native.library()
    for seed in range(20):
        packed = sample(*form, seed % 5)
        tensors = dict(packed.tensors)
        if seed:
            generator = torch.Generator().manual_seed(seed)
            suffix = sorted(tensors)[seed % len(tensors)]
            data = bytearray(content(tensors[suffix]))
            for place in torch.randint(0, len(data), (1 + seed % 3,), generator=generator).tolist():
                data[place] = int(torch.randint(0, 256, (1,), generator=generator))
            damaged = torch.frombuffer(data, dtype=torch.uint8).view(tensors[suffix].dtype)
            tensors[suffix] = damaged.reshape(tensors[suffix].shape)
        found = from_entry(packed.facts(), tensors, "w")
        disk = repack._disk(found, native.dtype_of(repack.torch_dtype(found.dtype)))
        guards = []
        for field in repack._FIELDS:
            part = getattr(disk, field)
            if part.bytes > 0:
                guard = Guarded(part.bytes, at_end=at_end)
                ctypes.memmove(guard.address, part.data, part.bytes)
                part.data = guard.address
                setattr(disk, field, part)
                guards.append(guard)
        rows, cols = found.shape
        size = 1 if "weight_scales" in tensors else repack.torch_dtype(found.dtype).itemsize
        mask, values = (Guarded(n, at_end=at_end) for n in (rows * -(-cols // 8), found.nnz * size))
        status = lib.sk_disk_read(ctypes.byref(disk), mask.address, values.address, 1 + seed % 3)
        try:
            validate(found, "w")
            assert status == 0
        except SparsekitError:
            # weight_shape is compared in Python
            assert status != 0 or (seed and sorted(tensors)[seed % len(tensors)] == "weight_shape")
        plan = ctypes.c_void_p()
        moved = lib.sk_plan_from_disk(ctypes.byref(disk), 1 + seed % 3, ctypes.byref(plan))
        fast = form == (Layout.BITMASK, Encoding.SPLIT) and native.isa().startswith("avx512")
        assert moved == (status if fast else 5)
        if moved == 0:
            buffer = Guarded(-(-lib.sk_plan_bytes(plan) // 8) * 8, at_end=at_end)
            assert lib.sk_plan_pack(plan, buffer.address, lib.sk_plan_bytes(plan), 1 + seed % 3) == 0
            lib.sk_plan_free(plan)


def test_what_the_reader_alone_refuses_is_an_error() -> None:
    """Should the two ever differ, nothing is loaded."""
    packed = sample(Layout.BITMASK, Encoding.RAW, 1)
    with pytest.raises(KernelError, match="w: the native reader refuses"):
        repack._refuse(packed, "w")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_dense_to_packed_keeps_what_has_a_bit(dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, cols in [(0, 5), (5, 0), (1, 1), (33, 70), (64, 129)]:
        weight = random_bits((rows, cols), dtype, generator, None)
        keep = random_mask((rows, cols), Unstructured(), 0.5, generator)
        weight = weight.masked_fill(~keep, 0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            packed = repack.pack_dense(weight)
        finally:
            torch.set_num_threads(before)
        assert same_bits(buffers.unpack(packed), weight)
        assert buffers.info(packed).nnz == int(
            (weight.view(torch.int32 if dtype.itemsize == 4 else torch.int16) != 0).sum()
        )


def test_values_are_cast_only_where_the_dtype_cannot_hold_them() -> None:
    packed = sample(Layout.BITMASK, Encoding.SPLIT, 1)  # bf16
    facts, tensors = packed.facts(), packed.tensors
    for dtype, kept in [
        (None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ]:
        weight = buffers.unpack(repack.repack(facts, tensors, "w", dtype))
        assert same_bits(weight, unpack(packed).to(kept))


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.INT4])
@pytest.mark.parametrize("layout", [Layout.BITMASK, Layout.DENSE, Layout.NM])
def test_codes_stay_codes_in_memory(layout: Layout, encoding: Encoding) -> None:
    packed = sample(layout, encoding, 1)
    for dtype in (None, torch.float16, torch.float32):
        buffer = repack.repack(packed.facts(), packed.tensors, "w", dtype)
        assert buffers.info(buffer).layout.name == encoding.name
        assert torch.equal(buffers.unpack(buffer), unpack(packed))


@pytest.mark.parametrize("pattern", [NM(1, 3), NM(5, 16), NM(8, 64), NM(200, 256), Block(4, 1), Block(1, 7)], ids=str)
def test_patterns_with_odd_sizes(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, cols = (12, 2 * pattern.of) if isinstance(pattern, NM) else (3 * pattern.rows, 5 * pattern.cols)
    keep = random_mask((rows, cols), pattern, 0.5, generator)
    weight = random_bits((rows, cols), torch.float32, generator, None).masked_fill(~keep, 0)
    packed = pack(weight, keep, Layout.NM if isinstance(pattern, NM) else Layout.BLOCK, Encoding.RAW, pattern)
    assert same_bits(repack.dense(packed.facts(), packed.tensors, "w"), weight)
    source = repack.read_source(packed.facts(), packed.tensors, "w")
    assert source.mask is not None
    assert torch.equal(source.values, weight[keep]) or same_bits(source.values, weight[keep])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "density", "outliers"),
    [
        ((16, 64), 0.5, 0.0),
        ((33, 1), 0.5, 0.0),
        ((50, 333), 0.9, 0.01),
        ((5, 4096), 0.6, 0.2),
        ((640, 576), 0.5, 2e-4),
        ((64, 1030), 0.3, 0.5),
        ((48, 200), 1.0, 0.0),
        ((17, 700), 0.0, 0.0),
    ],
)
def test_split_tensors_of_many_strips_move_into_memory_exactly(
    shape: tuple[int, int], density: float, outliers: float, threads: int
) -> None:
    """Wide tensors of all code widths, with and without patches: the fast way equals the way through values."""
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator) * 0.02
    wild = torch.rand(shape, generator=generator) < outliers
    weight = torch.where(wild, weight * torch.exp2(40 * torch.randn(shape, generator=generator)), weight).bfloat16()
    keep = torch.rand(shape, generator=generator) < density
    weight = torch.where(keep, weight, torch.zeros_like(weight))
    packed = pack(weight, keep, Layout.BITMASK, Encoding.SPLIT)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = buffers.pack_split(repack._disk(packed, native.DType.BF16), "w", threads)
        if not native.isa().startswith("avx512"):
            assert made is None
            return
        assert made is not None
        assert same_bits(buffers.unpack(made), weight)
        slow = buffers.pack(packed.tensors["weight_bitmask"], weight[keep], shape, buffers.MemoryLayout.SPLIT)
        x = torch.randn(3, shape[1], generator=generator)
        assert torch.equal(ops.linear(x, made, None, shape[0]), ops.linear(x, slow, None, shape[0]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.INT4])
def test_a_scale_of_minus_zero_is_refused_by_all(encoding):
    weight = torch.randn(4, 64).bfloat16()
    weight[1] = 0
    packed = pack(weight, weight != 0, Layout.BITMASK, encoding, None)
    scales = packed.tensors["weight_scales"].clone()
    scales[1] = -0.0
    assert not agreed(packed, {**packed.tensors, "weight_scales": scales})
