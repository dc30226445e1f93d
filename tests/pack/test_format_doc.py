"""The examples of docs/format.md are what the writer writes and the reader reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparsekit.pack import Encoding, Layout, pack, read, unpack
from sparsekit.pattern import parse_pattern
from tests.pack.support import bits

DOC = Path(__file__).parents[2] / "docs" / "format.md"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8,
    "I64": torch.int64, "U32": torch.uint32,
}  # fmt: skip
EXAMPLES = re.findall(r"```golden\n(.*?)```", DOC.read_text(), re.DOTALL)


def tensor(dtype: str, shape: str, data: str) -> torch.Tensor:
    data = re.sub(r"\(([^)]*)\)\*(\d+)", lambda found: " ".join([found[1]] * int(found[2])), data)
    sizes = [int(size) for size in shape.strip("[]").split(",")]
    return torch.frombuffer(bytearray.fromhex(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(sizes)


def test_every_form_has_an_example() -> None:
    forms = {tuple(example.split()[:2]) for example in EXAMPLES}
    assert len(EXAMPLES) >= 10
    assert {layout.value for layout in Layout} == {form[0] for form in forms}
    assert {encoding.value for encoding in Encoding} == {form[1] for form in forms}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[0])
def test_example(example: str) -> None:
    title, *lines = example.splitlines()
    layout, encoding, pattern, *flags = title.split()
    given: dict[str, torch.Tensor] = {}
    keep = None
    for line in lines:
        if line.startswith("in: keep"):
            keep = torch.tensor([[mark == "1" for mark in row] for row in line.split()[2:]])
            continue
        found = re.fullmatch(r"(in: weight|\w+)\s+(\w+)\s+(\[[\d, ]*\])\s+(.*)", line)
        assert found is not None, line
        given[found[1]] = tensor(found[2], found[3], found[4])
    weight = given.pop("in: weight")
    keep = bits(weight) != 0 if keep is None else keep
    transposed = flags == ["transposed"]
    packed = pack(weight, keep, Layout(layout), Encoding(encoding), parse_pattern(pattern), transposed=transposed)
    assert set(packed.tensors) == set(given)
    for suffix, needed in given.items():
        assert packed.tensors[suffix].dtype == needed.dtype, suffix
        assert packed.tensors[suffix].shape == needed.shape, suffix
        assert torch.equal(packed.tensors[suffix].view(torch.uint8), needed.view(torch.uint8)), suffix
    found_again = unpack(read(packed.facts(), given, "example"))
    if packed.encoding.lossless:
        assert torch.equal(bits(found_again), bits(weight))
