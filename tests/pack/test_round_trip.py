"""Packing and unpacking give every bit back; the size is the arithmetic; nothing is random."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import NonFinite, PatternViolation, PlanError, ShapeMismatch, UsageError, WeightMismatch
from sparsekit.pack import Encoding, Layout, PackedTensor, choose, keep_of, pack, prove, read, unpack, unpack_keep
from sparsekit.pattern import NM, Block, Pattern, Unstructured
from tests.pack.support import DTYPES, LOSSLESS, LOSSY, Case, bits, cases, from_bits, random_bits, random_mask


def packed_of(case: Case) -> PackedTensor:
    return pack(case.weight, case.keep, case.layout, case.encoding, case.pattern, transposed=case.transposed, where="w")


def again(packed: PackedTensor) -> PackedTensor:
    """As a file would give it back: facts through JSON, tensors as copies."""
    tensors = {suffix: tensor.clone() for suffix, tensor in packed.tensors.items()}
    return read(json.loads(json.dumps(packed.facts())), tensors, "w")


@pytest.mark.parametrize("form", LOSSLESS, ids=lambda form: "-".join(form))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lossless_forms_give_every_bit_back(form: tuple[Layout, Encoding], data: st.DataObject) -> None:
    case = data.draw(cases(form))
    packed = packed_of(case)
    found = again(packed)
    assert found.facts() == packed.facts()
    assert torch.equal(bits(unpack(found)), bits(case.weight))
    assert unpack(found).shape == case.weight.shape
    assert torch.equal(unpack_keep(found), case.keep)
    assert packed.nnz == int(case.keep.sum())
    prove(packed, case.weight, case.keep, "w")


@pytest.mark.parametrize("form", LOSSY, ids=lambda form: "-".join(form))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lossy_forms_keep_the_mask_and_stay_within_a_step(form: tuple[Layout, Encoding], data: st.DataObject) -> None:
    case = data.draw(cases(form))
    packed = packed_of(case)
    found = again(packed)
    exact = (case.weight.T if case.transposed else case.weight).to(torch.float64)
    got = unpack(found)
    got = (got.T if case.transposed else got).to(torch.float64)
    assert torch.equal(unpack_keep(found), case.keep)
    assert not bool(got[~(case.keep.T if case.transposed else case.keep)].any())
    scale = found.tensors["weight_scales"].to(torch.float64).repeat_interleave(64, 1)[:, : exact.shape[1]]
    # Half a step; a whole one where int4 beside a mask has no zero; some for rounding to the dtype.
    step = 1.0 if case.encoding is Encoding.INT4 else 0.5
    assert bool(((exact - got).abs() <= step * scale * 1.0001 + got.abs() * 2.0**-8 + 2.0**-24).all())
    total = float(exact.square().sum())
    assert packed.error == pytest.approx(float((exact - got).square().sum()) / total if total else 0.0, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LOSSLESS).flatmap(cases))
def test_choose_loses_nothing_and_is_never_larger_than_dense(case: Case) -> None:
    packed = choose(case.weight, case.keep, case.pattern, transposed=case.transposed)
    assert torch.equal(bits(unpack(packed)), bits(case.weight))
    assert packed.encoding.lossless
    dense = case.weight.numel() * case.weight.element_size()
    assert packed.size_bytes <= dense
    assert packed.facts() == choose(case.weight, case.keep, case.pattern, transposed=case.transposed).facts()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_packing_is_deterministic(case: Case) -> None:
    one, two = packed_of(case), packed_of(case)
    assert list(one.tensors) == list(two.tensors) == sorted(one.tensors)
    for suffix, tensor in one.tensors.items():
        assert bytes(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"") == bytes(
            two.tensors[suffix].reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        )


def pruned(
    rows: int, cols: int, pattern: Pattern, density: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian weight, pruned by magnitude in each row so that exactly `density` stays."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((rows, cols), generator=generator) * 0.02
    if isinstance(pattern, Unstructured):
        kept = round(cols * density)
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep.scatter_(1, weight.abs().topk(kept, dim=1).indices, True)
    else:
        keep = random_mask((rows, cols), pattern, density, generator)
    return weight.to(dtype).masked_fill(~keep, 0), keep


@pytest.mark.parametrize(
    ("layout", "encoding", "pattern", "density", "dtype", "expected"),
    [
        (Layout.BITMASK, Encoding.RAW, Unstructured(), 0.5, torch.bfloat16, 9.0),
        (Layout.BITMASK, Encoding.RAW, Unstructured(), 0.2, torch.float16, 4.2),
        (Layout.BITMASK, Encoding.RAW, Unstructured(), 0.5, torch.float32, 17.0),
        (Layout.BITMASK, Encoding.SPLIT, Unstructured(), 0.5, torch.bfloat16, 6.5),
        (Layout.BITMASK, Encoding.SPLIT, Unstructured(), 0.3, torch.bfloat16, 4.3),
        (Layout.DENSE, Encoding.SPLIT, Unstructured(), 1.0, torch.bfloat16, 12.0),
        (Layout.BITMASK, Encoding.INT8, Unstructured(), 0.5, torch.bfloat16, 5.25),
        (Layout.BITMASK, Encoding.INT4, Unstructured(), 0.5, torch.bfloat16, 3.25),
        (Layout.NM, Encoding.RAW, NM(2, 4), 0.5, torch.bfloat16, 9.0),
        (Layout.NM, Encoding.RAW, NM(4, 8), 0.5, torch.bfloat16, 10.0),
        (Layout.NM, Encoding.RAW, NM(16, 64), 0.25, torch.bfloat16, 6.0),
        (Layout.NM, Encoding.INT8, NM(2, 4), 0.5, torch.bfloat16, 5.25),
        (Layout.BLOCK, Encoding.RAW, Block(4, 4), 0.5, torch.bfloat16, 8.0625),
        (Layout.DENSE, Encoding.INT8, Unstructured(), 1.0, torch.bfloat16, 8.25),
        (Layout.DENSE, Encoding.INT4, Unstructured(), 1.0, torch.bfloat16, 4.25),
    ],
)
def test_size_is_the_arithmetic_within_two_percent(
    layout: Layout, encoding: Encoding, pattern: Pattern, density: float, dtype: torch.dtype, expected: float
) -> None:
    weight, keep = pruned(512, 2048, pattern, density, dtype)
    packed = pack(weight, keep, layout, encoding, pattern)
    tolerance = 0.02 if layout is not Layout.BLOCK else 0.04  # a random grid does not keep exactly half of its blocks
    assert packed.bits_per_weight == pytest.approx(expected, rel=tolerance)


def test_auto_picks_split_for_pruned_bf16_and_bitmask_for_other_dtypes() -> None:
    assert form(*pruned(256, 512, Unstructured(), 0.5, torch.bfloat16), Unstructured()) == ("bitmask", "split")
    assert form(*pruned(256, 512, Unstructured(), 0.5, torch.float16), Unstructured()) == ("bitmask", "raw")
    assert form(*pruned(256, 512, NM(2, 4), 0.5, torch.float16), NM(2, 4)) == ("nm", "raw")
    assert form(*pruned(256, 512, Block(8, 8), 0.1, torch.float32), Block(8, 8)) == ("block", "raw")
    assert form(*pruned(2, 4, Unstructured(), 0.5, torch.bfloat16), Unstructured()) == ("dense", "raw")


def test_auto_leaves_incompressible_weights_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_bits((64, 256), torch.bfloat16, generator, None)
    assert form(weight, torch.ones_like(weight, dtype=torch.bool), Unstructured()) == ("dense", "raw")


def form(weight: torch.Tensor, keep: torch.Tensor, pattern: Pattern) -> tuple[str, str]:
    packed = choose(weight, keep, pattern)
    return packed.layout.value, packed.encoding.value


def test_split_falls_back_row_block_by_row_block() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [random_bits((16, 256), torch.bfloat16, generator, few) for few in (7, 16, None)]
    weight = torch.cat([from_bits(bits(part).to(torch.int64) % 65536, torch.bfloat16) for part in parts])
    packed = pack(weight, torch.ones_like(weight, dtype=torch.bool), Layout.BITMASK, Encoding.SPLIT)
    assert packed.tensors["weight_width"].tolist() == [3, 4, 8]
    assert packed.patches > 0
    assert torch.equal(bits(unpack(packed)), bits(weight))


def test_packing_does_not_depend_on_the_number_of_threads() -> None:
    weight, keep = pruned(300, 500, Unstructured(), 0.5, torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pack(weight, keep, Layout.BITMASK, Encoding.SPLIT).tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][suffix], found[1][suffix]) for suffix in found[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_removed_weight_that_is_not_plus_zero_is_refused(dtype: torch.dtype) -> None:
    weight = torch.zeros((2, 8), dtype=dtype)
    keep = torch.zeros((2, 8), dtype=torch.bool)
    weight[1, 3] = -0.0
    for layout in (Layout.BITMASK, Layout.DENSE):
        with pytest.raises(WeightMismatch, match="1 removed weights are not"):
            pack(weight, keep, layout, Encoding.RAW)


def test_what_cannot_be_packed_is_refused() -> None:
    weight, keep = torch.ones((4, 8)).bfloat16(), torch.ones((4, 8), dtype=torch.bool)
    with pytest.raises(PatternViolation, match="8 of 8 groups"):
        pack(weight[:2].repeat(2, 1), keep, Layout.NM, Encoding.RAW, NM(2, 4))
    with pytest.raises(PatternViolation, match="layout nm needs"):
        pack(weight, keep, Layout.NM, Encoding.RAW)
    with pytest.raises(PatternViolation, match="layout block needs"):
        pack(weight, keep, Layout.BLOCK, Encoding.RAW, NM(2, 4))
    with pytest.raises(PlanError, match="divisible by 5"):
        pack(weight, keep, Layout.NM, Encoding.RAW, NM(2, 5))
    with pytest.raises(PlanError, match="do not tile"):
        pack(weight, keep, Layout.BLOCK, Encoding.RAW, Block(3, 8))
    half = keep.clone()
    half[0, 0] = False
    with pytest.raises(PatternViolation, match="1 blocks of 2x2 are kept in part"):
        pack(weight.masked_fill(~half, 0), half, Layout.BLOCK, Encoding.RAW, Block(2, 2))
    with pytest.raises(UsageError, match="no encoding split"):
        pack(weight, keep, Layout.BLOCK, Encoding.SPLIT, Block(2, 2))
    with pytest.raises(UsageError, match="need bf16"):
        pack(weight.half(), keep, Layout.BITMASK, Encoding.SPLIT)
    with pytest.raises(UsageError, match="cannot be packed"):
        pack(weight.double(), keep, Layout.BITMASK, Encoding.RAW)
    with pytest.raises(ShapeMismatch, match="need two matrices"):
        pack(weight, keep[:3], Layout.BITMASK, Encoding.RAW)
    with pytest.raises(UsageError, match="format nm with values auto does not exist"):
        choose(weight, keep, Unstructured(), layout=Layout.NM)
    weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="cannot store NaN"):
        pack(weight, keep, Layout.BITMASK, Encoding.INT8)
    with pytest.raises(NonFinite, match="too large for f16"):
        pack(torch.full((1, 8), 1e30), torch.ones((1, 8), dtype=torch.bool), Layout.BITMASK, Encoding.INT4)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(16, 64), Block(2, 4)])
def test_a_mask_found_again_from_the_weight_is_legal_and_loses_nothing(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(5)
    keep = random_mask((8, 128), pattern, 0.5, generator)
    weight = random_bits((8, 128), torch.bfloat16, generator, None).masked_fill(~keep, 0)
    found = keep_of(weight, pattern)  # kept zeros are unknown to it: groups are filled up, blocks stay whole
    assert bool((found | (bits(weight) == 0)).all())
    packed = choose(weight, found, pattern)
    assert torch.equal(bits(unpack(packed)), bits(weight))


def test_proof_finds_a_packer_that_loses_a_bit() -> None:
    weight, keep = pruned(16, 64, Unstructured(), 0.5, torch.bfloat16)
    packed = pack(weight, keep, Layout.BITMASK, Encoding.RAW)
    wrong = weight.clone()
    row, col = keep.nonzero()[7].tolist()
    bits(wrong)[row, col] ^= 1
    with pytest.raises(WeightMismatch, match="1 weights and 0 mask bits differ"):
        prove(packed, wrong, keep, "w")
