"""The old sparse formats, written here as their own documentation says, decode to every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import SparsekitError
from sparsekit.pack.compressed_tensors import BITMASK, BITMASK_24, decode, groups, sparse_format
from sparsekit.pattern import NM, Unstructured
from tests.pack.support import random_bits, random_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


def integers(weight: torch.Tensor) -> torch.Tensor:
    return weight.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[weight.element_size()])


def written(weight: torch.Tensor, keep: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What compressed-tensors 0.11 stores."""
    rows, cols = weight.shape
    values = integers(weight)[keep].view(weight.dtype)
    return {
        "shape": torch.tensor([rows, cols]) if kind == BITMASK else torch.tensor([[rows], [cols]]),
        "compressed": values if kind == BITMASK else values.reshape(rows, cols // 2),
        "bitmask": torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little")),
        **({"row_offsets": keep.sum(1).cumsum(0) - keep.sum(1)} if kind == BITMASK else {}),
    }


def example(kind: str, dtype: torch.dtype, seed: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = random_mask((rows, cols), NM(2, 4) if kind == BITMASK_24 else Unstructured(), 0.5, generator)
    wide = dtype if dtype.itemsize > 1 else torch.float16
    weight = random_bits((rows, cols), wide, generator, None)
    if dtype.itemsize == 1:
        weight = (integers(weight) & 255).to(torch.uint8).view(dtype)
    return integers(weight).masked_fill(~keep, 0).view(dtype), keep


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([BITMASK, BITMASK_24]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0, 4, 12, 64]),
)
def test_decodes_every_bit(kind: str, dtype: torch.dtype, seed: int, rows: int, cols: int) -> None:
    weight, keep = example(kind, dtype, seed, rows, cols)
    got, mask = decode(kind, written(weight, keep, kind), "w")
    assert got.dtype == dtype
    assert torch.equal(integers(got), integers(weight))
    assert torch.equal(mask, keep)


def test_odd_widths_and_missing_offsets_decode() -> None:
    weight, keep = example(BITMASK, torch.bfloat16, 1, 7, 13)
    tensors = written(weight, keep, BITMASK)
    del tensors["row_offsets"]  # not needed
    assert torch.equal(integers(decode(BITMASK, tensors, "w")[0]), integers(weight))


@pytest.mark.parametrize(
    ("kind", "suffix", "value", "text"),
    [
        (BITMASK, "bitmask", None, "bitmask is missing"),
        (BITMASK, "compressed", torch.ones(3), "3 values for"),
        (BITMASK, "bitmask", torch.zeros((5, 3), dtype=torch.uint8), "needed uint8"),
        (BITMASK, "bitmask", torch.full((5, 2), 255, dtype=torch.uint8), "past the last one, 11"),
        (BITMASK, "row_offsets", torch.zeros(5, dtype=torch.int64), "not the prefix sums"),
        (BITMASK, "row_offsets", torch.zeros(4, dtype=torch.int64), "not the prefix sums"),
        (BITMASK, "shape", torch.tensor([5, -12]), "shape is"),
        (BITMASK, "shape", torch.tensor([5, 2**60]), "shape is"),
        (BITMASK, "shape", torch.tensor([60]), "shape is"),
        (BITMASK, "shape", torch.tensor([5.0, 12.0]), "shape is"),
        (BITMASK_24, "compressed", torch.ones((6, 5)), "needed \\[5, 6\\]"),
        (BITMASK_24, "bitmask", torch.tensor([[0x3F, 0]] * 5, dtype=torch.uint8), "do not keep exactly two"),
        ("dense", "shape", None, "unknown sparse format 'dense'"),
    ],
)
def test_damage_is_refused_by_name(kind: str, suffix: str, value: torch.Tensor | None, text: str) -> None:
    weight, keep = example(kind if kind != "dense" else BITMASK, torch.float32, 2, 5, 12)
    tensors = written(weight, keep, BITMASK_24 if kind == BITMASK_24 else BITMASK)
    if value is None:
        del tensors[suffix]
    else:
        tensors[suffix] = value
    with pytest.raises(SparsekitError, match=text) as caught:
        decode(kind, tensors, "w")
    assert str(caught.value).startswith("w: ")
    assert caught.value.exit_code == 3


def config(outer: str | None, sparse: str | None) -> dict[str, object]:
    return {"quantization_config": {"format": outer, "sparsity_config": {"format": sparse}}}


def test_the_format_is_read_from_the_config() -> None:
    assert sparse_format(config("dense", BITMASK), "config.json") == BITMASK
    assert sparse_format({"compression_config": {"sparsity_config": {"format": BITMASK_24}}}, "c") == BITMASK_24
    assert sparse_format(config("dense", "dense"), "c") is None
    assert sparse_format({"quantization_config": {"format": "pack-quantized"}}, "c") is None
    assert sparse_format({}, "c") is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (config("marlin-24", None), "marlin-24 weights cannot be read"),
        (config("dense", "marlin-24"), "Prune the original model again"),
        (config("dense", "evil.py:Format"), "unknown sparse format"),
        ({"quantization_config": {"sparsity_config": {"format": ["sparse-bitmask"]}}}, "unknown sparse format"),
    ],
)
def test_other_formats_are_refused(content: dict[str, object], text: str) -> None:
    with pytest.raises(SparsekitError, match=text):
        sparse_format(content, "config.json")


def test_tensors_are_grouped_by_weight() -> None:
    names = ["a.q.bitmask", "a.q.compressed", "a.q.shape", "a.q.row_offsets", "a.norm.weight", "lm_head.weight"]
    assert groups(names) == {
        "a.q.weight": {part: f"a.q.{part}" for part in ("compressed", "bitmask", "row_offsets", "shape")}
    }
    with pytest.raises(SparsekitError, match="marlin-24"):
        groups(["a.q.weight_packed", "a.q.scale_packed", "a.q.meta"])
