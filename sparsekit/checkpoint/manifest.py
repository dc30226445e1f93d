"""`sparsekit.json`: what a checkpoint consists of. Written last; its presence makes a folder complete.

    {"format": "sparsekit-checkpoint", "format_version": 1, "layout": "dense",
     "run_id": ..., "identity": {...}, "tools": {...},
     "tensors": {name: {"shape", "dtype", "kept", "pattern", "method", "sha256"}},
     "files": {name: {"size_bytes", "sha256"}}, "volatile": [names], "identity_sha256": ...}

`identity_sha256` covers everything but the records of the volatile files (reports with timings), so two runs
of one recipe have the same one. The file has exactly one spelling (`jsonio.readable`), so any changed byte
shows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.errors import CheckpointError, VersionError

FILE = "sparsekit.json"
FORMAT = "sparsekit-checkpoint"
FORMAT_VERSION = 1
LAYOUTS = ("dense", "packed")
LIMIT_BYTES = 1 << 28
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorFacts:
    """What the manifest says of one stored tensor.

    `kept` is the number of kept weights of a pruned tensor and `pattern` its pattern as text; both are None
    for a tensor that was not pruned. `transposed` tells that the tensor is stored [in, out].
    """

    shape: tuple[int, ...]
    dtype: str
    kept: int | None
    pattern: str | None
    method: str | None
    sha256: str
    transposed: bool


@dataclass(frozen=True)
class Manifest:
    """A validated manifest. `raw` is the JSON it was read from, `data` the bytes."""

    run_id: str
    layout: str
    identity: Mapping[str, JSON]
    tools: Mapping[str, JSON]
    tensors: Mapping[str, TensorFacts]
    files: Mapping[str, fs.FileRecord]
    volatile: tuple[str, ...]
    identity_sha256: str
    raw: Mapping[str, JSON]
    data: bytes


def identity_sha256(manifest: Mapping[str, JSON]) -> str:
    """Return the hash of a manifest without its volatile files' records."""
    files, volatile = manifest["files"], manifest["volatile"]
    if not isinstance(files, Mapping) or not isinstance(volatile, list | tuple):
        raise CheckpointError("files or volatile missing", where=FILE)
    stable = {name: record for name, record in files.items() if name not in volatile}
    rest = {key: value for key, value in manifest.items() if key not in ("identity_sha256", "files")}
    return jsonio.digest({**rest, "files": stable})


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `folder/sparsekit.json`.

    Raises:
        CheckpointError: There is none, or it breaks the schema.
        VersionError: A newer sparsekit wrote it.
        UnsafePath: It names a file outside the folder.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"no {FILE} in it; not a complete sparsekit checkpoint",
            where=str(folder),
            hint="Give the output folder of a finished sparsekit prune." if folder.is_dir() else "No such folder.",
        )
    data, raw = jsonio.read(path, limit_bytes=LIMIT_BYTES)
    return _Validator(str(path)).manifest(raw, data, folder)


class _Validator:
    """Checks every field the code relies on; `where` is the file in error messages."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(message, where=self.where, hint="Restore this file, or run the pruning again.")

    def manifest(self, raw: JSON, data: bytes, folder: Path) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise self.fail(f"format is not {FORMAT!r}")
        version = raw.get("format_version")
        if type(version) is not int or version < 1:
            raise self.fail(f"format_version is {version!r}, need a whole number >= 1")
        if version > FORMAT_VERSION:
            raise VersionError(
                f"format_version {version}; this sparsekit reads up to {FORMAT_VERSION}",
                where=self.where,
                hint="Upgrade: pip install --upgrade sparsekit",
            )
        layout = self.text(raw, "layout")
        if layout not in LAYOUTS:
            raise VersionError(
                f"layout {layout!r}; this sparsekit reads {', '.join(LAYOUTS)}",
                where=self.where,
                hint="Upgrade: pip install --upgrade sparsekit",
            )
        volatile = raw.get("volatile")
        if not isinstance(volatile, list) or not all(isinstance(name, str) for name in volatile):
            raise self.fail("volatile is not a list of file names")
        files = {name: self.record(name, value) for name, value in self.mapping(raw, "files").items()}
        for name in files:
            fs.safe_join(folder, name)
        fs.check_distinct(files, where=self.where)
        if unknown := sorted(set(volatile) - set(files)):
            raise self.fail(f"volatile names {unknown[0]!r}, which is not in files")
        tensors = {name: self.tensor(name, value) for name, value in self.mapping(raw, "tensors").items()}
        return Manifest(
            run_id=self.text(raw, "run_id"),
            layout=layout,
            identity=self.mapping(raw, "identity"),
            tools=self.mapping(raw, "tools"),
            tensors=tensors,
            files=files,
            volatile=tuple(volatile),
            identity_sha256=self.text(raw, "identity_sha256"),
            raw=raw,
            data=data,
        )

    def text(self, raw: Mapping[str, JSON], key: str) -> str:
        value = raw.get(key)
        if not isinstance(value, str):
            raise self.fail(f"{key} is not a text")
        return value

    def mapping(self, raw: Mapping[str, JSON], key: str) -> Mapping[str, JSON]:
        value = raw.get(key)
        if not isinstance(value, Mapping):
            raise self.fail(f"{key} is not a JSON object")
        return value

    def record(self, name: str, value: JSON) -> fs.FileRecord:
        if not isinstance(value, dict) or set(value) != {"size_bytes", "sha256"}:
            raise self.fail(f"files.{name}: need exactly size_bytes and sha256")
        size_bytes, sha256 = value["size_bytes"], value["sha256"]
        if type(size_bytes) is not int or size_bytes < 0 or not _is_sha256(sha256):
            raise self.fail(f"files.{name}: size_bytes or sha256 is malformed")
        return fs.FileRecord(size_bytes, str(sha256))

    def tensor(self, name: str, value: JSON) -> TensorFacts:
        if not isinstance(value, dict):
            raise self.fail(f"tensors.{name}: not a JSON object")
        shape, dtype, kept, sha256 = (value.get(key) for key in ("shape", "dtype", "kept", "sha256"))
        pattern, method, transposed = (
            value.get("pattern"),
            value.get("method"),
            value.get("transposed", False),
        )
        if (
            not isinstance(shape, list)
            or not all(type(size) is int and size >= 0 for size in shape)
            or not isinstance(dtype, str)
            or not (kept is None or (type(kept) is int and kept >= 0))
            or not isinstance(pattern, str | None)
            or not isinstance(method, str | None)
            or not isinstance(transposed, bool)
            or not _is_sha256(sha256)
        ):
            raise self.fail(f"tensors.{name}: shape, dtype, kept, pattern, method, transposed or sha256 is malformed")
        return TensorFacts(tuple(shape), dtype, kept, pattern, method, str(sha256), transposed)


def _is_sha256(value: JSON) -> bool:
    """Whether `value` is a sha256 in lower-case hex."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def build(
    given: Mapping[str, JSON],
    *,
    run_id: str,
    identity: Mapping[str, JSON],
    stored: Mapping[str, Mapping[str, JSON]],
    files: Mapping[str, fs.FileRecord],
    volatile: Collection[str],
) -> bytes:
    """Return the bytes of a manifest.

    Args:
        given: What the caller adds: "layout", "tools", "tensors" and whatever else is worth recording.
        run_id: Of the run that writes it.
        identity: Of that run.
        stored: For each written tensor its "dtype", "shape", "sha256".
        files: Every file of the folder.
        volatile: Those whose content may differ between two equal runs.

    Raises:
        CheckpointError: `given` contradicts what was written, or names a tensor or file that was not.
    """
    claimed = given.get("tensors", {})
    if not isinstance(claimed, Mapping):
        raise CheckpointError("tensors is not a mapping", where=FILE)
    if unknown := sorted({*claimed} - {*stored}) or sorted({*volatile} - {*files}):
        raise CheckpointError(f"{unknown[0]!r} is in the manifest but was not written", where=FILE)
    tensors: dict[str, JSON] = {}
    for name, facts in stored.items():
        extra = claimed.get(name, {})
        if not isinstance(extra, Mapping):
            raise CheckpointError(f"tensors.{name} is not a mapping", where=FILE)
        tensors[name] = {"kept": None, "pattern": None, "method": None, **extra, **facts}
        _refuse_contradiction(f"tensors.{name}", extra, facts)
    fixed: dict[str, JSON] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "run_id": run_id,
        "identity": identity,
    }
    _refuse_contradiction("the manifest", given, fixed)
    records: dict[str, JSON] = {
        name: {"size_bytes": record.size_bytes, "sha256": record.sha256} for name, record in files.items()
    }
    manifest: dict[str, JSON] = {
        "layout": "dense",
        "tools": {},
        **given,
        **fixed,
        "tensors": tensors,
        "files": records,
        "volatile": sorted(volatile),
    }
    manifest["identity_sha256"] = identity_sha256(manifest)
    data = jsonio.readable(manifest)
    _Validator(FILE).manifest(jsonio.parse(data, where=FILE), data, Path())
    return data


def _refuse_contradiction(where: str, given: Mapping[str, JSON], actual: Mapping[str, JSON]) -> None:
    """Raise if the caller claims something else than what is the case."""
    for key in sorted(set(given) & set(actual)):
        if jsonio.canonical(given[key]) != jsonio.canonical(actual[key]):
            raise CheckpointError(f"{key} is {given[key]!r} in the manifest, {actual[key]!r} in fact", where=where)
