"""Packed tensors in a safetensors file: both libraries agree on the bytes, and the file is as small as counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sparsekit import fs
from sparsekit.checkpoint.safetensors_file import encode
from sparsekit.errors import NonFinite
from sparsekit.models.raw import to_raw
from sparsekit.pack import Encoding, Layout, pack, read, unpack
from sparsekit.pack.types import ALLOWED, HEADER_BYTES
from sparsekit.pattern import NM, Block, Pattern, Unstructured
from tests.pack.support import bits, from_bits, random_mask


@pytest.mark.parametrize(("layout", "encoding"), [(layout, one) for layout in Layout for one in ALLOWED[layout]])
def test_through_a_file(tmp_path: Path, layout: Layout, encoding: Encoding) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern: Pattern = {Layout.NM: NM(2, 4), Layout.BLOCK: Block(4, 4)}.get(layout, Unstructured())
    keep = random_mask((128, 256), pattern, 0.5, generator)
    weight = torch.randn((128, 256), generator=generator).to(torch.bfloat16)
    if encoding is Encoding.SPLIT:
        low = torch.randint(0, 256, weight.shape, generator=generator)
        highs = 0x3F if layout is Layout.DENSE else 0x40  # eight of them, with the zeros in the dense layout
        weight = from_bits(low + torch.randint(0x38, highs, weight.shape, generator=generator) * 256, torch.bfloat16)
    weight = weight.masked_fill(~keep, 0)
    weight[keep.nonzero()[77].unbind()] = float("inf") if encoding.lossless else 3.0  # split: a patch
    packed = pack(weight, keep, layout, encoding, pattern)
    assert encoding is not Encoding.SPLIT or packed.patches > 0
    module = "model.layers.10.mlp.down_proj"
    path = tmp_path / "model.safetensors"
    fs.write_file(path, encode({f"{module}.{key}": to_raw(one) for key, one in packed.tensors.items()}, {}))
    with safe_open(path, framework="pt") as file:
        tensors = {name.removeprefix(f"{module}."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = read(json.loads(json.dumps(packed.facts())), tensors, module)
    assert torch.equal(bits(unpack(found)), bits(unpack(packed)))
    header = path.stat().st_size - packed.size_bytes
    assert header == pytest.approx(HEADER_BYTES * len(tensors), rel=0.35)


def test_a_step_that_overflows_the_dtype_is_refused() -> None:
    weight = torch.full((1, 4), 65504.0, dtype=torch.float16)
    keep = torch.ones((1, 4), dtype=torch.bool)
    with pytest.raises(NonFinite, match="int8 overflows F16"):
        pack(weight, keep, Layout.BITMASK, Encoding.INT8)


def test_importing_does_not_import_torch() -> None:
    code = "import sys, sparsekit.pack, sparsekit.pack.compressed_tensors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
