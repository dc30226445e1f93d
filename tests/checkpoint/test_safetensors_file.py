"""The byte format against the safetensors library, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import fs
from sparsekit.checkpoint.safetensors_file import (
    DTYPE_BITS,
    RawTensor,
    encode,
    encoded_size,
    read_header,
)
from sparsekit.errors import CheckpointError


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, RawTensor]:
    result = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6)):
        if name == "__metadata__" or any(0xD800 <= ord(character) < 0xE000 for character in name):
            continue
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=3)), 4]  # a last width of 4 fills whole bytes in each dtype
        size = 1
        for width in shape:
            size *= width
        size = size * DTYPE_BITS[dtype] // 8
        result[name] = RawTensor(dtype, tuple(shape), memoryview(draw(st.binary(min_size=size, max_size=size))))
    return result


@given(tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
@settings(max_examples=150, deadline=None)
def test_round_trip_and_agreement_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, given_tensors: dict[str, RawTensor], metadata: dict[str, str]
) -> None:
    metadata = {key: value for key, value in metadata.items() if (key + value).isprintable()}
    data = b"".join(encode(given_tensors, metadata))
    assert len(data) == encoded_size(given_tensors, metadata)
    assert data == b"".join(encode(dict(reversed(given_tensors.items())), dict(reversed(metadata.items()))))
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    fs.write_file(path, data)
    header = read_header(path)
    assert dict(header.metadata) == metadata
    assert header.size_bytes == len(data)
    assert set(header.tensors) == set(given_tensors)
    for name, entry in header.tensors.items():
        assert (entry.dtype, entry.shape) == (given_tensors[name].dtype, given_tensors[name].shape)
        assert data[entry.start : entry.end] == bytes(given_tensors[name].data)
        assert entry.start % max(DTYPE_BITS[entry.dtype] // 8, 1) == 0
    theirs = {name: (facts["dtype"], bytes(facts["data"])) for name, facts in safetensors.deserialize(data)}
    assert theirs == {name: (tensor.dtype, bytes(tensor.data)) for name, tensor in given_tensors.items()}


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    arrays = {"b": np.arange(4, dtype=np.float16).reshape(2, 2), "a": np.array(1, np.int64)}
    data = safetensors.numpy.save(arrays, {"format": "pt"})
    (tmp_path / "x").write_bytes(data)
    header = read_header(tmp_path / "x")
    assert header.metadata == {"format": "pt"}
    assert (header.tensors["a"].numel, header.tensors["b"].numel, header.tensors["b"].size_bytes) == (1, 4, 8)


def test_header_is_aligned_and_has_the_documented_spelling() -> None:
    data = b"".join(encode({"w": RawTensor("BF16", (1, 2), memoryview(b"abcd"))}, {"k": "v"}))
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"k": "v"},
        "w": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
    }
    assert data[8 + length :] == b"abcd"


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("w", RawTensor("F32", (2,), memoryview(b"1234")), "4 bytes given, 8 contiguous bytes needed"),
        ("w", RawTensor("F33", (2,), memoryview(b"1234")), "dtype 'F33'"),
        ("w", RawTensor("F4", (3,), memoryview(b"12")), "whole bytes"),
        ("w", RawTensor("U8", (2,), memoryview(b"1234")[::2]), "scattered"),
        ("__metadata__", RawTensor("U8", (1,), memoryview(b"1")), "cannot be written"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, tensor: RawTensor, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        list(encode({name: tensor}, {}))
    assert str(caught.value).startswith(f"{name}: ")
