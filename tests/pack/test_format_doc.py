"""The examples of docs/format.md are what the writer writes and the reader reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sparsekit.checkpoint.safetensors_file import read_header
from sparsekit.checkpoint.source import SIDECAR
from sparsekit.contracts import Remainder
from sparsekit.models.gate_files import GateFile, gate_file_bytes, read_gate_file
from sparsekit.models.gates import Gaussian, Placed, Threshold, TopK
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


def test_the_example_of_activation_sparsity_is_what_is_written_and_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```gates\n(.*?)```", DOC.read_text(), re.DOTALL)
    said, block = json.loads(example), "model.layers.0"
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(bytes(4096))
    placed = {
        f"{block}.self_attn.q_proj": Placed("input", Threshold(torch.rand(8))),
        f"{block}.self_attn.o_proj": Placed(
            "input", Threshold(torch.rand(1)), Remainder(0.52, torch.rand(6, 2), torch.rand(2, 8))
        ),
        f"{block}.mlp.act_fn": Placed("gate", TopK(16, torch.rand(48))),
        f"{block}.mlp.down_proj": Placed("input", Gaussian(0.6745)),
    }
    shares = {name: facts["share"] for name, facts in said["sites"].items() if facts["share"] is not None}
    file = GateFile(placed, said["dense_tokens"], said["prefill"], said["weights"], shares)
    (tmp_path / SIDECAR).write_bytes(gate_file_bytes(file))
    header = read_header(tmp_path / SIDECAR)
    assert header.metadata.keys() == {"sparsekit_activation"}
    assert json.loads(header.metadata["sparsekit_activation"]) == said
    shapes = {name.removeprefix(f"{block}."): (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    assert shapes == {
        "self_attn.q_proj.act_threshold": ("F32", (8,)),
        "self_attn.o_proj.act_threshold": ("F32", (1,)),
        "self_attn.o_proj.act_left": ("F32", (6, 2)),
        "self_attn.o_proj.act_right": ("F32", (2, 8)),
        "mlp.act_fn.act_importance": ("F32", (48,)),
    }
    again = read_gate_file(tmp_path)
    assert again is not None
    assert gate_file_bytes(again) == gate_file_bytes(file)


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
