"""What a committed folder holds, and what `verify` says of pruned tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.checkpoint.manifest import TensorFacts, read_manifest
from sparsekit.checkpoint.safetensors_file import RawTensor, read_header
from sparsekit.checkpoint.staging import StagedCheckpoint, run_id_of
from sparsekit.checkpoint.verify import mask_problems, verify
from sparsekit.errors import CheckpointError, IndexMismatch, UnsafePath

IDENTITY = {"recipe": "wanda-50", "seed": 0}


def raw(array: np.ndarray, dtype: str = "F32") -> RawTensor:
    return RawTensor(dtype, array.shape, memoryview(np.ascontiguousarray(array)))


def commit(out: Path, weight: np.ndarray, facts: dict[str, object], report: bytes = b"1 s", dtype: str = "F32") -> Path:
    with StagedCheckpoint.open(out, IDENTITY, overwrite=False, resume=True) as staged:
        staged.write_shard("block-0", "model-0.safetensors", {"w": raw(weight, dtype)}, {})
        staged.write_file("report.json", report)
        staged.write_file("sub/vocab.txt", b"vocab")
        return staged.commit({"tools": {"sparsekit": "0"}, "tensors": {"w": facts}}, volatile=["report.json"])


def test_the_manifest(tmp_path: Path) -> None:
    out = commit(tmp_path / "out", np.eye(4, dtype=np.float32), {"kept": 8, "pattern": "2:4", "method": "wanda"})
    assert out == (tmp_path / "out").resolve()
    manifest = read_manifest(out)
    assert manifest.run_id == run_id_of(IDENTITY)
    assert manifest.identity == IDENTITY
    assert sorted(manifest.files) == ["model-0.safetensors", "report.json", "sub/vocab.txt"]
    facts = manifest.tensors["w"]
    assert (facts.shape, facts.dtype, facts.kept, facts.pattern, facts.method) == ((4, 4), "F32", 8, "2:4", "wanda")
    assert read_header(out / "model-0.safetensors").metadata == {
        "format": "pt", "sparsekit_run": manifest.run_id, "sparsekit_key": "block-0",
    }  # fmt: skip
    assert verify(out, "semantic").ok


def test_volatile_files_do_not_change_the_identity(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    one = read_manifest(commit(tmp_path / "a", weight, {}, b"1 s"))
    two = read_manifest(commit(tmp_path / "b", weight, {}, b"2 s"))
    three = read_manifest(commit(tmp_path / "c", weight * 2, {}, b"1 s"))
    assert one.files["report.json"] != two.files["report.json"]
    assert one.identity_sha256 == two.identity_sha256 != three.identity_sha256


def test_contradictions_and_strangers_are_refused(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    for facts, text in (({"dtype": "F16"}, "dtype is 'F16'"), ({"shape": [2, 8]}, "shape is"), ({"kept": -1}, "kept"),
                        ({"kept": True}, "kept"), ({"pattern": 2}, "pattern")):  # fmt: skip
        with pytest.raises(CheckpointError, match=text):
            commit(tmp_path / "out", weight, facts)
    with StagedCheckpoint.open(tmp_path / "out", IDENTITY, overwrite=False, resume=True) as staged:
        assert staged.finished("block-0") is not None
        with pytest.raises(CheckpointError, match="'v' is in the manifest but was not written"):
            staged.commit({"tensors": {"v": {}}})
        with pytest.raises(CheckpointError, match="run_id is"):
            staged.commit({"run_id": "x"})
        with pytest.raises(CheckpointError, match=r"'x\.json' is in the manifest"):
            staged.commit({}, volatile=["x.json"])
        (staged.folder / "stranger").write_text("x")
        with pytest.raises(CheckpointError, match="'stranger' was not written by this run"):
            staged.commit({})
    assert not (tmp_path / "out").exists()
    assert verify(commit(tmp_path / "out", weight, {}), "semantic").ok


def test_shards_may_not_share_files_or_tensors(tmp_path: Path) -> None:
    tensor = raw(np.zeros((1, 1), np.float32))
    with StagedCheckpoint.open(tmp_path / "out", IDENTITY, overwrite=False, resume=True) as staged:
        staged.write_shard("a", "a.safetensors", {"w": tensor}, {})
        staged.write_shard("a", "a.safetensors", {"w": tensor}, {})
        with pytest.raises(IndexMismatch, match="both be this file"):
            staged.write_shard("b", "a.safetensors", {"v": tensor}, {})
        with pytest.raises(IndexMismatch, match=r"w: in a\.safetensors and again in b\.safetensors"):
            staged.write_shard("b", "b.safetensors", {"w": tensor}, {})
        with pytest.raises(UnsafePath):
            staged.write_file("../x", b"")
        with pytest.raises(UnsafePath):
            staged.copy_file(Path(__file__), "/x")
        assert staged.copy_file(Path(__file__), "copy").size_bytes == Path(__file__).stat().st_size


def test_semantic_needs_the_right_tensor(tmp_path: Path) -> None:
    """A manifest edited by hand, hashes and all, still has to agree with the weights."""
    out = commit(tmp_path / "out", np.ones((4, 4), np.float32), {"kept": 8, "pattern": "2:4", "method": "wanda"})
    assert verify(out, "full").ok
    messages = [str(problem) for problem in verify(out, "semantic").problems]
    assert messages == ["w: 16 nonzero weights, only 8 kept by the manifest",
                        "w: 4 of 4 groups have more than 2:4 nonzero weights"]  # fmt: skip
    manifest = json.loads((out / "sparsekit.json").read_text())
    manifest["tensors"]["w"]["sha256"] = "0" * 64
    (out / "sparsekit.json").write_text(json.dumps(manifest))
    assert any("sha256 of the tensor" in problem.message for problem in verify(out, "semantic").problems)


# --- patterns, against brute force -------------------------------------------------------------------------
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def problems(
    weight: np.ndarray, dtype: str, kept: int | None, pattern: str | None, transposed: bool = False
) -> list[str]:
    facts = TensorFacts(weight.shape, dtype, kept, pattern, "m", "", transposed)
    return list(mask_problems(np.frombuffer(weight.tobytes(), np.uint8), facts))


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, float("nan"), 1e-7]), min_size=48, max_size=48),
    st.sampled_from(["1:4", "2:4", "1:2", "3:4", "4:8"]),
    st.sampled_from(sorted(DTYPES)),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_nm_against_brute_force(values: list[float], pattern: str, dtype: str, transposed: bool) -> None:
    weight = np.array(values, DTYPES[dtype]).reshape(6, 8)
    keep, of = map(int, pattern.split(":"))
    groups = [row[start : start + of] for row in weight.tolist() for start in range(0, 8, of)]
    legal = all(sum(value != 0 for value in group) <= keep for group in groups)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    assert (not problems(stored, dtype, None, pattern, transposed)) == legal
    nonzero = int(np.count_nonzero(weight))
    assert not problems(stored, dtype, nonzero, None, transposed)
    if nonzero:
        assert problems(stored, dtype, nonzero - 1, None, transposed)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=48, max_size=48), st.sampled_from(["2x2", "3x4", "1x8", "6x1"])
)
@settings(max_examples=100, deadline=None)
def test_blocks_against_brute_force(values: list[float], pattern: str) -> None:
    weight = np.array(values, np.float32).reshape(6, 8)
    rows, cols = map(int, pattern.split("x"))
    blocks = sum(
        weight[r : r + rows, c : c + cols].any() for r in range(0, 6, rows) for c in range(0, 8, cols)
    )  # fmt: skip
    assert not problems(weight, "F32", int(blocks) * rows * cols, pattern)
    if blocks:
        assert problems(weight, "F32", int(blocks) * rows * cols - 1, pattern)


def test_bfloat16_experts_and_impossible_claims() -> None:
    bits = np.array([0x8000, 0x3F80, 0x0001, 0x0000] * 4, np.uint16).reshape(2, 2, 4)  # -0, 1, a denormal, 0
    assert problems(bits, "BF16", 8, "2:4") == []
    assert problems(bits, "BF16", 7, "2:4") == ["8 nonzero weights, only 7 kept by the manifest"]
    assert problems(bits, "BF16", 8, "1:4") == ["4 of 4 groups have more than 1:4 nonzero weights"]
    assert "divisible by 3" in problems(bits, "BF16", 8, "1:3")[0]
    assert "unknown pattern" in problems(bits, "BF16", 8, "zigzag")[0]
    assert "need a float matrix" in problems(np.zeros((2, 2), np.int32), "I32", 4, None)[0]
    assert "need a float matrix" in problems(np.zeros(4, np.float32), "F32", 4, None)[0]
