"""What passes `read` decodes inside its buffers and to the same weights in a second, independent reader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import BadIndex, HeaderError, PatternViolation, SparsekitError, WeightMismatch
from sparsekit.pack import Encoding, Layout, PackedTensor, pack, read, unpack
from sparsekit.pattern import NM, Block, Pattern, Unstructured
from tests.pack import reader
from tests.pack.support import FORMS, Case, bits, cases, random_bits, random_mask


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def by_hand(packed: PackedTensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Decode with the second reader; bit patterns as i64 [rows, cols], float64 for int8 and int4."""
    facts = packed.facts()
    found = reader.read(facts, {suffix: content(tensor) for suffix, tensor in tensors.items()})
    dtype = torch.int64 if packed.encoding.lossless else torch.float64
    return torch.tensor(found, dtype=dtype).reshape(facts["shape"])


def agree(packed: PackedTensor) -> bool:
    weight = unpack(packed)
    weight = weight.T if packed.transposed else weight
    expected = by_hand(packed, dict(packed.tensors))
    if packed.encoding.lossless:
        return torch.equal(bits(weight).to(torch.int64) & (2 ** (8 * weight.element_size()) - 1), expected)
    return torch.equal(bits(expected.to(torch.float32).to(weight.dtype)), bits(weight)) or torch.equal(
        expected.to(torch.float32).to(weight.dtype), weight
    )


def packed_of(case: Case) -> PackedTensor:
    return pack(case.weight, case.keep, case.layout, case.encoding, case.pattern, transposed=case.transposed)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_reader_written_from_the_document_agrees(form: tuple[Layout, Encoding], data: st.DataObject) -> None:
    assert agree(packed_of(data.draw(cases(form))))


def sample(layout: Layout, encoding: Encoding, seed: int) -> PackedTensor:
    """A tensor large enough to have patches, of every width where it is split."""
    generator = torch.Generator().manual_seed(seed)
    pattern: Pattern = {Layout.NM: NM(2, 4), Layout.BLOCK: Block(2, 3)}.get(layout, Unstructured())
    rows, cols = 36, 60 if encoding is not Encoding.SPLIT else 90
    if encoding is Encoding.SPLIT:
        weight = torch.cat([random_bits((16, cols), torch.bfloat16, generator, few) for few in (7, 15, None)])
        weight[3, 5], weight[7, 2] = float("nan"), -float("inf")
    elif encoding.lossless:
        weight = random_bits((rows, cols), torch.float16, generator, None)
    else:
        weight = torch.randn((rows, cols), generator=generator).to(torch.bfloat16)
    keep = random_mask(tuple(weight.shape), pattern, 0.6, generator)
    if layout is Layout.DENSE:
        keep = torch.ones_like(keep)
    if isinstance(pattern, Unstructured):
        keep[3, 5] = keep[7, 2] = True
    packed = pack(weight.masked_fill(~keep, 0), keep, layout, encoding, pattern)
    if encoding is Encoding.SPLIT:
        assert packed.patches >= 2
        assert set(packed.tensors["weight_width"].tolist()) == {3, 4, 8}
    return packed


STRUCTURE = {
    "weight_bitmask", "weight_row_offsets", "weight_shape", "weight_index", "weight_width", "weight_dict",
    "weight_code", "weight_patch_row", "weight_patch_col", "weight_scales",
}  # fmt: skip
ALWAYS_FOUND = {"weight_bitmask", "weight_row_offsets", "weight_shape"}


def flipped(tensor: torch.Tensor, bit: int) -> torch.Tensor:
    data = bytearray(content(tensor))
    data[bit // 8] ^= 1 << (bit % 8)
    return torch.frombuffer(data, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize(("layout", "encoding"), FORMS)
def test_a_flipped_bit_is_refused_or_harmless(layout: Layout, encoding: Encoding) -> None:
    packed = sample(layout, encoding, 1)
    facts = packed.facts()
    generator = torch.Generator().manual_seed(2)
    seen: Counter[tuple[str, bool]] = Counter()
    named: set[str | None] = set()
    decoded = 0
    for suffix in sorted(STRUCTURE & set(packed.tensors)):
        total = 8 * len(content(packed.tensors[suffix]))
        few = total if total <= 256 else 256
        for bit in torch.randperm(total, generator=generator)[:few].tolist():
            tensors = {**packed.tensors, suffix: flipped(packed.tensors[suffix], bit)}
            try:
                found = read(facts, tensors, "w")
            except SparsekitError as error:
                named.add(error.where)
                seen[suffix, True] += 1
                continue
            seen[suffix, False] += 1
            if decoded < 25:  # the second reader is slow
                decoded += 1
                assert agree(found)
    assert named <= {"w"}
    for suffix in ALWAYS_FOUND & set(packed.tensors):
        assert seen[suffix, True] > 0
        assert seen[suffix, False] == 0, (suffix, seen)
    if (layout, encoding) != (Layout.DENSE, Encoding.RAW):
        assert sum(count for (_, refused), count in seen.items() if refused) > 0


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 2**31), st.data())
def test_random_damage_never_decodes_outside(form: tuple[Layout, Encoding], seed: int, data: st.DataObject) -> None:
    packed = sample(*form, seed % 7)
    suffix = data.draw(st.sampled_from(sorted(packed.tensors)))
    tensor = packed.tensors[suffix]
    size = len(content(tensor))
    junk = bytearray(content(tensor))
    for _ in range(data.draw(st.integers(1, 12))):
        junk[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    damaged = torch.frombuffer(junk, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)
    try:
        found = read(packed.facts(), {**packed.tensors, suffix: damaged}, "w")
    except SparsekitError:
        return
    by_hand(found, dict(found.tensors))


def bitmask_tensor() -> PackedTensor:
    return sample(Layout.BITMASK, Encoding.RAW, 4)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def fact(key: str, value: Any) -> Change:
    return lambda facts, tensors: facts.__setitem__(key, value)


def entry(suffix: str, index: int, value: int) -> Change:
    def change(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[suffix] = tensors[suffix].clone()
        flat = tensors[suffix].reshape(-1)
        flat[index] = value

    return change


def swap(suffix: str, build: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda facts, tensors: tensors.__setitem__(suffix, build(tensors[suffix]).contiguous())


def patch(suffix: str, build: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return swap(suffix, lambda old: build(old).contiguous().view(torch.uint32))


BIT, SPL, NMF, BLK = (
    (Layout.BITMASK, Encoding.RAW), (Layout.BITMASK, Encoding.SPLIT), (Layout.NM, Encoding.RAW),
    (Layout.BLOCK, Encoding.RAW),
)  # fmt: skip
INT8, INT4 = (Layout.BITMASK, Encoding.INT8), (Layout.BITMASK, Encoding.INT4)
FAULTS: list[tuple[str, tuple[Layout, Encoding], Change, type[SparsekitError], str]] = [
    ("shape", BIT, fact("shape", [36, 59]), HeaderError, "weight_shape is"),
    ("shape swapped", BIT, fact("shape", [60, 36]), HeaderError, "weight_shape is"),
    ("shape negative", BIT, fact("shape", [-1, 60]), HeaderError, "shape is"),
    ("shape huge", BIT, fact("shape", [2**40, 60]), HeaderError, "shape is"),
    ("shape text", BIT, fact("shape", "36x60"), HeaderError, "needed \\[rows, cols\\]"),
    ("shape of truth values", BIT, fact("shape", [True, True]), HeaderError, "needed \\[rows, cols\\]"),
    ("dtype", BIT, fact("dtype", "BF16"), HeaderError, "weight_nz is float16"),
    ("dtype unknown", BIT, fact("dtype", "F64"), HeaderError, "dtype is 'F64'"),
    ("dtype of split", SPL, fact("dtype", "F16"), HeaderError, "split values are bf16"),
    ("layout unknown", BIT, fact("layout", "csr"), HeaderError, "layout is 'csr', known are"),
    ("layout no text", BIT, fact("layout", ["bitmask"]), HeaderError, "layout is"),
    ("layout missing", BIT, lambda facts, _: facts.pop("layout"), HeaderError, "layout is None"),
    ("encoding unknown", BIT, fact("encoding", "huffman"), HeaderError, "encoding is 'huffman'"),
    ("encoding other", BIT, fact("encoding", "split"), HeaderError, "split values are bf16"),
    ("combination", BLK, fact("encoding", "int8"), HeaderError, "does not exist"),
    ("pattern missing", BIT, fact("pattern", None), HeaderError, "pattern is None"),
    ("pattern unknown", BIT, fact("pattern", "banded"), PatternViolation, "unknown pattern"),
    ("pattern of nm", NMF, fact("pattern", "unstructured"), PatternViolation, "layout nm needs"),
    ("pattern 1:4 for 2:4", NMF, fact("pattern", "1:4"), SparsekitError, "weight_index is"),
    ("pattern 3:4 for 2:4", NMF, fact("pattern", "3:4"), SparsekitError, "weight_index is"),
    ("pattern 4:8 for 2:4", NMF, fact("pattern", "4:8"), SparsekitError, "divisible by 8"),
    ("pattern 2:7", NMF, fact("pattern", "2:7"), PatternViolation, "divisible by 7"),
    ("pattern 300:300", NMF, fact("pattern", "300:300"), PatternViolation, "M up to 256"),
    ("blocks other", BLK, fact("pattern", "3x2"), SparsekitError, "weight_bitmask is"),
    ("blocks do not tile", BLK, fact("pattern", "5x3"), PatternViolation, "do not tile"),
    ("nnz one more", BIT, lambda facts, _: facts.update(nnz=facts["nnz"] + 1), WeightMismatch, "claimed"),
    ("nnz text", BIT, fact("nnz", "12"), HeaderError, "nnz '12'"),
    ("nnz negative", BIT, fact("nnz", -1), HeaderError, "nnz -1"),
    ("transposed text", BIT, fact("transposed", "no"), HeaderError, "transposed 'no'"),
    ("error text", INT8, fact("error", "small"), HeaderError, "error is 'small'"),
    ("mask missing", BIT, lambda _, tensors: tensors.pop("weight_bitmask"), HeaderError, "weight_bitmask is missing"),
    ("values missing", BIT, lambda _, tensors: tensors.pop("weight_nz"), HeaderError, "weight_nz is missing"),
    ("extra tensor", BIT, lambda _, tensors: tensors.update(weight=torch.ones(1)), HeaderError, "does not belong"),
    ("mask dtype", BIT, swap("weight_bitmask", lambda mask: mask.view(torch.int8)), HeaderError, "is int8"),
    ("mask short", BIT, swap("weight_bitmask", lambda mask: mask[:-1]), HeaderError, r"is uint8 \[35, 8\]"),
    ("mask popcount", BIT, entry("weight_bitmask", 8, 0), BadIndex, r"weight_row_offsets\[2\]"),
    ("mask padding", BIT, entry("weight_bitmask", 7, 0xF0), BadIndex, "past the last one, 59"),
    ("last row of the mask", BIT, entry("weight_bitmask", 35 * 8, 0), WeightMismatch, "claimed"),
    ("offsets negative", BIT, entry("weight_row_offsets", 5, -8), BadIndex, r"\[5\] is -8"),
    ("offsets overflow", BIT, entry("weight_row_offsets", 5, 2**63 - 1), BadIndex, r"\[5\] is 9223372036854775807"),
    ("offsets falling", BIT, entry("weight_row_offsets", 9, 0), BadIndex, r"\[9\] is 0"),
    ("offsets as i32", BIT, swap("weight_row_offsets", lambda old: old.int()), HeaderError, "is int32"),
    ("values short", BIT, swap("weight_nz", lambda old: old[:-1]), HeaderError, "weight_nz is float16"),
    ("values long", BIT, swap("weight_nz", lambda old: torch.cat([old, old[:1]])), HeaderError, "weight_nz is"),
    ("values of another dtype", BIT, swap("weight_nz", lambda old: old.float()), HeaderError, "is float32"),
    ("index falls", NMF, entry("weight_index", 0, 0b01), BadIndex, "do not ascend in row 0, group 0"),
    ("index twice", NMF, entry("weight_index", 1, 0xFF), BadIndex, "do not ascend in row 0, group 2"),
    ("index padding", NMF, entry("weight_index", 7, 0xF4), BadIndex, "past the last index"),
    ("width", SPL, entry("weight_width", 0, 5), BadIndex, r"weight_width\[0\] is 5"),
    ("width of another block", SPL, entry("weight_width", 0, 4), HeaderError, "weight_code is"),
    ("code short", SPL, swap("weight_code", lambda old: old[:-1]), HeaderError, "weight_code is"),
    ("low long", SPL, swap("weight_low", lambda old: torch.cat([old, old[:1]])), HeaderError, "weight_low is"),
    ("dictionary beyond its width", SPL, entry("weight_dict", 8, 3), BadIndex, "no code of its rows can reach"),
    ("dictionary of 8", SPL, swap("weight_dict", lambda old: old[:, :8]), HeaderError, "weight_dict is"),
    ("patch list incomplete", SPL, lambda _, tensors: tensors.pop("weight_patch_col"), HeaderError, "is missing"),
    ("patch row", SPL, patch("weight_patch_row", lambda old: old.int() + 48), BadIndex, "outside"),
    ("patch column", SPL, patch("weight_patch_col", lambda old: old.int() - 100), BadIndex, "outside"),
    ("patches unsorted", SPL, patch("weight_patch_row", lambda old: old.int().flip(0)), BadIndex, "asc"),
    ("patch twice", SPL, lambda _, t: [doubled(t, name) for name in list(t) if "patch" in name], BadIndex, "ascending"),
    ("patches empty", SPL, lambda _, t: [emptied(t, name) for name in list(t) if "patch" in name], BadIndex, "empty"),
    ("patch lists differ", SPL, swap("weight_patch_value", lambda old: old[:-1]), HeaderError, "weight_patch_value is"),
    ("patch value", SPL, swap("weight_patch_value", lambda old: (old.view(torch.int16) ^ 1).view(torch.bfloat16)),
     BadIndex, "disagrees"),
    ("patch on a hole", SPL, lambda _, t: on_a_hole(t), BadIndex, "not kept"),
    ("scales infinite", INT8, swap("weight_scales", lambda old: old + float("inf")), BadIndex, "not finite"),
    ("scales negative", INT4, swap("weight_scales", lambda old: -old), BadIndex, "negative"),
    ("scales short", INT8, swap("weight_scales", lambda old: old[:-1]), HeaderError, "weight_scales is"),
    ("code -128", INT8, entry("weight_nz", 0, -128), BadIndex, "-128"),
    ("int4 length", INT4, swap("weight_nz", lambda old: old[:-1]), HeaderError, "weight_nz is"),
    ("blocks short", BLK, swap("weight_blocks", lambda old: old[:-1]), HeaderError, "weight_blocks is"),
    ("blocks turned", BLK, swap("weight_blocks", lambda old: old.transpose(1, 2)), HeaderError, "weight_blocks is"),
    ("block grid", BLK, entry("weight_bitmask", 3, 0), BadIndex, "weight_row_offsets"),
    ("shape as i32", BIT, swap("weight_shape", lambda old: old.int()), HeaderError, "weight_shape is int32"),
    ("not contiguous", BIT, lambda _, t: t.update(weight_bitmask=t["weight_bitmask"].T.contiguous().T), HeaderError,
     "contiguous"),
]  # fmt: skip


def test_an_index_of_m_is_refused_where_m_is_no_power_of_two() -> None:
    keep = torch.tensor([[True, True, False]])
    packed = pack(keep.float(), keep, Layout.NM, Encoding.RAW, NM(2, 3))
    tensors = {**packed.tensors, "weight_index": torch.tensor([[0b1100]], dtype=torch.uint8)}
    with pytest.raises(BadIndex, match=r"an index of 3 or more in row 0, group 0: \[0, 3\]"):
        read(packed.facts(), tensors, "w")


def doubled(tensors: dict[str, torch.Tensor], name: str) -> None:
    old = tensors[name]
    tensors[name] = old.view(torch.uint8).reshape(len(old), -1)[[0, 0]].reshape(-1).view(old.dtype)


def emptied(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.empty(0, dtype=tensors[name].dtype)


def on_a_hole(tensors: dict[str, torch.Tensor]) -> None:
    mask = tensors["weight_bitmask"]
    row = int(tensors["weight_patch_row"][0])
    column = next(col for col in range(90) if not (int(mask[row, col // 8]) >> (col % 8)) & 1)
    for name in [name for name in tensors if "patch" in name]:
        tensors[name] = (
            tensors[name].view(torch.uint8).reshape(len(tensors[name]), -1)[:1].reshape(-1).view(tensors[name].dtype)
        )
    tensors["weight_patch_col"] = torch.tensor([column], dtype=torch.uint32)


@pytest.mark.parametrize(
    ("form", "change", "error", "text"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_disagreement_is_refused_by_name(
    form: tuple[Layout, Encoding], change: Change, error: type[SparsekitError], text: str
) -> None:
    packed = sample(*form, 4)
    facts, tensors = json.loads(json.dumps(packed.facts())), dict(packed.tensors)
    read(facts, tensors, "layer.weight")
    change(facts, tensors)
    with pytest.raises(error, match=text) as caught:
        read(facts, tensors, "layer.weight")
    assert str(caught.value).startswith("layer.weight: ")
    assert caught.value.exit_code == 3
