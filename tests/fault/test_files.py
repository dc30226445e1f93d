"""F10-F14: malformed headers, truncation, flipped bits, broken indices, hostile paths."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit import fs
from sparsekit.checkpoint.manifest import read_manifest
from sparsekit.checkpoint.safetensors_file import RawTensor, encode, read_header
from sparsekit.checkpoint.source import INDEX, open_weights
from sparsekit.checkpoint.verify import verify
from sparsekit.errors import (
    CheckpointError,
    HeaderError,
    IndexMismatch,
    SparsekitError,
    TruncatedError,
    UnsafeFormat,
    UnsafePath,
    VersionError,
)

from .disk import files_of, save


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header: JSON text, bytes, or an object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **extra: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


EIGHT = bytes(8)
MALFORMED: dict[str, tuple[bytes, type[CheckpointError]]] = {
    "empty file": (b"", TruncatedError),
    "seven bytes": (bytes(7), TruncatedError),
    "header longer than file": (file_of({}, length=500), TruncatedError),
    "header of 2^63": (file_of({}, length=2**63), HeaderError),
    "header over 100 MB": (file_of({}, length=100_000_001), HeaderError),
    "header of 99 MB in a small file": (file_of({}, length=99_000_000), TruncatedError),
    "header length zero": (bytes(8), HeaderError),
    "not JSON": (file_of(b"{nonsense"), HeaderError),
    "JSON list": (file_of([]), HeaderError),
    "space before the brace": (file_of(b" {}"), HeaderError),
    "two JSON values": (file_of(b"{}{}"), HeaderError),
    "not UTF-8": (file_of(b'{"\xff": 1}'), HeaderError),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16")), HeaderError),
    "deep nesting": (file_of(b'{"a":' + b"[" * 100_000), HeaderError),
    "huge number": (file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'), HeaderError),
    "NaN": (file_of(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}'), HeaderError),
    "duplicate tensor": (file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                                 b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), HeaderError),
    "duplicate field": (file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
                        HeaderError),
    "duplicate metadata": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), HeaderError),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), HeaderError),
    "metadata a list": (file_of({"__metadata__": []}), HeaderError),
    "metadata null": (file_of({"__metadata__": None}), HeaderError),
    "entry a list": (file_of({"a": []}), HeaderError),
    "entry null": (file_of({"a": None}), HeaderError),
    "missing dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), HeaderError),
    "missing shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), HeaderError),
    "missing offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), HeaderError),
    "unknown field": (file_of({"a": entry(code="x")}, EIGHT), HeaderError),
    "unknown dtype": (file_of({"a": entry("F33")}, EIGHT), HeaderError),
    "dtype in lower case": (file_of({"a": entry("f32")}, EIGHT), HeaderError),
    "dtype a number": (file_of({"a": entry(32)}, EIGHT), HeaderError),
    "shape a number": (file_of({"a": entry(shape=2)}, EIGHT), HeaderError),
    "shape negative": (file_of({"a": entry(shape=[-2])}, EIGHT), HeaderError),
    "shape of two negatives": (file_of({"a": entry(shape=[-1, -2])}, EIGHT), HeaderError),
    "shape a float": (file_of({"a": entry(shape=[2.0])}, EIGHT), HeaderError),
    "shape a boolean": (file_of({"a": entry(shape=[2, True])}, EIGHT), HeaderError),
    "shape a text": (file_of({"a": entry(shape="2")}, EIGHT), HeaderError),
    "shape overflows": (file_of({"a": entry(shape=[2**33, 2**33])}, EIGHT), HeaderError),
    "shape overflows to zero": (file_of({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}), HeaderError),
    "offsets reversed": (file_of({"a": entry(offsets=[8, 0])}, EIGHT), HeaderError),
    "one offset": (file_of({"a": entry(offsets=[8])}, EIGHT), HeaderError),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, EIGHT), HeaderError),
    "negative offset": (file_of({"a": entry(offsets=[-8, 0])}, EIGHT), HeaderError),
    "offset overflows": (file_of({"a": entry(offsets=[2**64, 2**64 + 8])}, EIGHT), HeaderError),
    "fewer bytes than the shape": (file_of({"a": entry(shape=[3])}, EIGHT), HeaderError),
    "more bytes than the shape": (file_of({"a": entry(shape=[1])}, EIGHT), HeaderError),
    "dtype too wide": (file_of({"a": entry("F64")}, EIGHT), HeaderError),
    "half a byte": (file_of({"a": entry("F4", [1], [0, 1])}, b"x"), HeaderError),
    "hole at the start": (file_of({"a": entry(offsets=[8, 16])}, bytes(16)), HeaderError),
    "hole between": (file_of({"a": entry(), "b": entry(offsets=[16, 24])}, bytes(24)), HeaderError),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), HeaderError),
    "same place twice": (file_of({"a": entry(), "b": entry()}, EIGHT), HeaderError),
    "data missing": (file_of({"a": entry()}), TruncatedError),
    "data one byte short": (file_of({"a": entry()}, bytes(7)), TruncatedError),
    "data one byte long": (file_of({"a": entry()}, bytes(9)), TruncatedError),
    "data without tensors": (file_of({}, b"x"), TruncatedError),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.", UnsafeFormat),
    "old pickle": (b"\x80\x02}q\x00." + bytes(50), UnsafeFormat),
    "zip pickle": (b"PK\x03\x04" + bytes(100), UnsafeFormat),
    "tar pickle": (b"a" * 257 + b"ustar" + bytes(300), UnsafeFormat),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", HeaderError),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), HeaderError),
    "HTML": (b"<!DOCTYPE html><html>not found</html>", HeaderError),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_f10_malformed_header_is_refused(name: str, tmp_path: Path) -> None:
    data, expected = MALFORMED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is expected
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < 50 << 20


def test_f10_the_corpus_is_large_and_its_base_is_sound(tmp_path: Path) -> None:
    assert len(MALFORMED) >= 60
    (tmp_path / "good").write_bytes(file_of({"b": entry(offsets=[8, 16]), "a": entry()}, bytes(16)))
    header = read_header(tmp_path / "good")
    assert header.tensors["b"].start == header.size_bytes - 8


def test_f11_every_truncation_of_a_2_kib_file_is_detected(tmp_path: Path) -> None:
    data = b"".join(
        encode({f"t{n}": RawTensor("U8", (150,), memoryview(bytes(150))) for n in range(10)}, {"format": "pt"})
    )
    assert len(data) >= 2048
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert len(read_header(path).tensors) == 10
    detected = 0
    for size in range(len(data) - 1, -1, -1):
        with path.open("r+b") as handle:
            handle.truncate(size)
        with pytest.raises(TruncatedError, match=f"{size:,} bytes on disk"):
            read_header(path)
        detected += 1
    assert detected == len(data)


def findings(out: Path) -> list[str]:
    """What `verify` complains about; an unreadable manifest is a complaint about it."""
    try:
        return [problem.where for problem in verify(out).problems]
    except CheckpointError as error:
        return ["sparsekit.json"] if "sparsekit.json" in str(error) else [str(error)]


# --- F12 -----------------------------------------------------------------------------------------------------
def test_f12_any_flipped_bit_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, 3)
    assert verify(out).ok
    files = files_of(out)
    assert files is not None
    chance, flips = random.Random(12), 0
    bits = [(name, bit) for name, data in sorted(files.items()) for bit in range(8 * len(data))]
    for name, bit in chance.sample(bits, 400):
        bad = bytearray(files[name])
        bad[bit // 8] ^= 1 << bit % 8
        (out / name).write_bytes(bad)
        where = findings(out)
        assert where, f"bit {bit} of {name}"
        assert name in where or name == "sparsekit.json", f"bit {bit} of {name}: only {where} reported"
        (out / name).write_bytes(files[name])
        flips += 1
    assert flips == 400
    assert verify(out).ok


# --- F13 -----------------------------------------------------------------------------------------------------
def sharded(folder: Path) -> dict[str, object]:
    """A model of two shards; return its index."""
    folder.mkdir()
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        tensors = {f"{name}{number}": RawTensor("F32", (2,), memoryview(bytes(8))) for name in "ab"}
        (folder / file).write_bytes(b"".join(encode(tensors, {})))
        weight_map |= dict.fromkeys(tensors, file)
    index: dict[str, object] = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "shard missing": (lambda m: m.update(a1="model-9.safetensors"), "model-9.safetensors"),
    "tensor in no shard": (lambda m: m.update(ghost=ONE), "'ghost'"),
    "tensor in the other shard": (lambda m: m.update(a1=TWO), "'a1'"),
    "tensor not in the index": (lambda m: m.pop("b2"), "'b2'"),
    "tensors swapped": (lambda m: m.update(a1=TWO, a2=ONE), "'a1'"),
    "file a number": (lambda m: m.update(a1=1), "'a1'"),
    "file null": (lambda m: m.update(a1=None), "'a1'"),
    "file a list": (lambda m: m.update(a1=[ONE]), "'a1'"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_f13_index_and_shards_disagree(name: str, tmp_path: Path) -> None:
    change, named = INDEX_FAULTS[name]
    folder = tmp_path / "model"
    index = sharded(folder)
    weights = open_weights(folder)
    assert (weights.files, weights.total_bytes) == ((ONE, TWO), 32)
    change(index["weight_map"])  # type: ignore[arg-type]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(IndexMismatch) as caught:
        open_weights(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"weight_map": []}', '{"weight_map": {}}',
     '{"weight_map": {"a": "x.safetensors", "a": "y"}}',
     '{"weight_map": {}, "weight_map": {}}', "{", '{"weight_map": NaN}', "\ufeff{}", "[" * 50_000],
)  # fmt: skip
def test_f13_index_is_no_index(text: str, tmp_path: Path) -> None:
    sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(text)
    with pytest.raises(IndexMismatch) as caught:
        open_weights(tmp_path / "model")
    assert INDEX in str(caught.value)


def test_f13_tensor_in_two_shards_and_truncated_shard(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sharded(folder)
    data = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(
        b"".join(encode({n: RawTensor("F32", (2,), memoryview(bytes(8))) for n in ("a1", "a2", "b2")}, {}))
    )
    with pytest.raises(IndexMismatch, match=f"'a1' is also in {ONE}"):
        open_weights(folder)
    (folder / TWO).write_bytes(data[:-1])
    with pytest.raises(TruncatedError, match=TWO):
        open_weights(folder)


def test_f13_index_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path / "model")
    monkeypatch.setattr("sparsekit.checkpoint.source.INDEX_LIMIT_BYTES", 10)
    with pytest.raises(IndexMismatch, match="more than 10 bytes"):
        open_weights(tmp_path / "model")


def test_f15_pickles_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="whole model") as caught:
        open_weights(tmp_path)
    assert type(caught.value) is CheckpointError
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found adapter\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(UnsafeFormat, match=r"save_file\(torch.load"):
            open_weights(tmp_path)
        (tmp_path / name).unlink()


def test_hub_cache_links_into_blobs_are_followed(tmp_path: Path) -> None:
    """The Hub cache keeps snapshots as links; only those into the same repository's blobs pass."""
    sharded(tmp_path / "plain")
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert open_weights(snapshot).fingerprints() == open_weights(tmp_path / "plain").fingerprints()
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to(tmp_path / "plain" / ONE)
    with pytest.raises(UnsafePath, match="link that leads outside"):
        open_weights(snapshot)


# --- F14 -----------------------------------------------------------------------------------------------------
HOSTILE = [
    "..", ".", "", "/", "/etc/passwd", "//server/share", "../x", "a/../../x", "a/..", "a/./b", "a//b", "a/", "./a",
    "..\\x", "a\\b", "\\x", "\\\\server\\share\\x", "C:x", "C:\\x", "C:/x", "c:", "file:x", "x:stream", "a\0b", "\0",
    "a\nb", "a\tb", "a\x7f", "CON", "con.safetensors", "a/NUL", "aux.json", "COM1", "lpt9.txt", "COM¹", "a.", "a ",
    " a", "a/b. /c", "x" * 256, "/".join(["x" * 100] * 11), "a*b", "a?b", 'a"b', "a<b", "a|b",
    "\uff0e\uff0e/x", "\u2025/x",
    "a\uff0fb", "a\u2044b", "a\u2215b", "\u202egpj.exe", "a\u200bb", "\ud800", "\uff41\uff1ab", "\uff3cx", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_f14_hostile_names_are_refused(name: str, tmp_path: Path) -> None:
    assert len(HOSTILE) >= 48
    with pytest.raises(UnsafePath) as caught:
        fs.safe_join(tmp_path, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "a/b/c.safetensors", ".gitattributes", "모델.json", "é", "x" * 255])
def test_f14_ordinary_names_pass(name: str, tmp_path: Path) -> None:
    assert fs.safe_join(tmp_path, name) == tmp_path / name


def test_f14_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "inside").symlink_to("sub")
    (folder / "outside").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (tmp_path / "folder2").mkdir()
    (folder / "sibling").symlink_to(tmp_path / "folder2")
    assert fs.safe_join(folder, "inside/x") == folder / "inside/x"
    for name in ("outside", "outside/x", "sibling", "sibling/x"):
        with pytest.raises(UnsafePath, match="link"):
            fs.safe_join(folder, name)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_f14_in_index_and_manifest_nothing_outside_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "a/model", tmp_path / "a/out"
    folder.parent.mkdir()
    index = sharded(folder)
    index["weight_map"]["a1"] = name if name.endswith(".safetensors") else f"{name}/x.safetensors"  # type: ignore[index]
    (folder / INDEX).write_text(json.dumps(index))
    save(out, 1)
    manifest = json.loads((out / "sparsekit.json").read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    (out / "sparsekit.json").write_text(json.dumps(manifest))
    opened: list[Path] = []
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self) or real_open(self, *a, **k))
    with pytest.raises(UnsafePath):
        open_weights(folder)
    with pytest.raises(UnsafePath):
        read_manifest(out)
    assert opened
    assert all(path.resolve().parent in (folder, out) for path in opened)


def test_f14_case_clash(tmp_path: Path) -> None:
    with pytest.raises(UnsafePath, match="one file on some systems"):
        fs.check_distinct(["Model.safetensors", "model.safetensors"], where="index")
    fs.check_distinct(["a", "b"], where="index")


# --- verify ----------------------------------------------------------------------------------------------------
def problems(folder: Path, level: str = "full") -> str:
    return "; ".join(map(str, verify(folder, level).problems))  # type: ignore[arg-type]


def test_verify_collects_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, 8)
    (out / "model-0.safetensors").unlink()
    (out / "model-1.safetensors").rename(out / "x")
    (out / "model-2.safetensors").rename(out / "model-1.safetensors")
    (out / "x").rename(out / "model-2.safetensors")
    (out / "sub").mkdir()
    (out / "sub/extra.py").write_text("print()")
    (out / "link").symlink_to("/etc")
    (out / "config.json").write_bytes((out / "config.json").read_bytes()[:-1])
    data = bytearray((out / "model-5.safetensors").read_bytes())
    data[-1] ^= 128
    (out / "model-5.safetensors").write_bytes(data)
    text = problems(out)
    assert "model-0.safetensors: missing" in text
    assert "model-1.safetensors: swapped: it has the content of model-2.safetensors" in text
    assert "model-2.safetensors: swapped: it has the content of model-1.safetensors" in text
    assert "sub/extra.py: extra" in text
    assert "link: extra" in text
    assert "config.json: 22 bytes on disk, 23 in the manifest; truncated copy?" in text
    assert "model-5.safetensors: changed" in text
    assert "block.0.weight: in the manifest, but in no readable shard" in text
    assert "model-5" not in problems(out, "structure")
    with pytest.raises(CheckpointError, match="more problems"):
        verify(out).require()


def test_verify_without_manifest_and_from_the_future(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"no sparsekit.json"):
            verify(folder)
    out = tmp_path / "out"
    save(out, 1)
    manifest = json.loads((out / "sparsekit.json").read_text())
    for change in ({"format_version": 2}, {"layout": "woven"}):
        (out / "sparsekit.json").write_text(json.dumps(manifest | change))
        with pytest.raises(VersionError, match="Upgrade"):
            verify(out)
    (out / "sparsekit.json").write_text(json.dumps(manifest))
    assert "not spelt as sparsekit writes it" in problems(out)


@pytest.mark.parametrize(
    "key",
    [
        "format",
        "format_version",
        "layout",
        "run_id",
        "identity",
        "tools",
        "tensors",
        "files",
        "volatile",
        "identity_sha256",
    ],
)
@pytest.mark.parametrize("value", [None, [1], {"a": 1}, 0, "x"])
def test_manifest_fields_are_checked(key: str, value: object, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, 1)
    manifest = json.loads((out / "sparsekit.json").read_text())
    (out / "sparsekit.json").write_text(json.dumps(manifest | {key: value}))
    assert findings(out)


def test_source_and_verify_do_not_import_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, sparsekit.checkpoint.verify, sparsekit.checkpoint.staging; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_reading_errors_are_typed(tmp_path: Path) -> None:
    for action in (read_header, fs.sha256_file):
        with pytest.raises(SparsekitError, match="absent"):
            action(tmp_path / "absent")
