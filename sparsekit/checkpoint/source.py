"""The weights of a local Hugging Face model folder: found, checked, not read.

Only safetensors is accepted. Every shard's header is read strictly and compared with the index, so that what
passes here cannot turn out to be incomplete in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.safetensors_file import CONVERT_HINT, TensorEntry, read_header
from sparsekit.errors import CheckpointError, IndexMismatch, UnsafeFormat

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PACKED_STEM = "sparsekit_model"
"""What packed or narrow weights are called: no loader that cannot read them finds anything under the usual name."""
PACKED_INDEX = f"{PACKED_STEM}.safetensors.index.json"
SIDECAR = "sparsekit_activation.safetensors"
"""Gates of activation sparsity; not a weight file."""
INDEX_LIMIT_BYTES = 1 << 27
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_COPY_HINT = "Incomplete copy or download? Fetch the folder again."


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies: a file of the folder, and the place in it."""

    file: str
    entry: TensorEntry


@dataclass(frozen=True)
class WeightFiles:
    """The checked weights of a model folder; `files` and the keys of `tensors` are sorted."""

    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, TensorLocation]
    total_bytes: int
    _fingerprints: dict[str, fs.FileRecord] = field(default_factory=dict, repr=False, compare=False)

    def path(self, file: str) -> Path:
        """Return the path of one of `files`."""
        return self.folder / file

    def fingerprints(self) -> dict[str, fs.FileRecord]:
        """Return size and sha256 of each file. Reads everything, the first time it is called.

        Raises:
            ResourceError: A file cannot be read.
        """
        for file in self.files:
            if file not in self._fingerprints:
                self._fingerprints[file] = fs.sha256_file(self.path(file))
        return dict(self._fingerprints)


def open_weights(folder: Path) -> WeightFiles:
    """Find and check the safetensors weights of a local model folder; no tensor data is read.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        CheckpointError: No such folder, or no weights in it.
        IndexMismatch: Index and shards disagree.
        HeaderError: A shard breaks the format.
        TruncatedError: A shard is cut off.
        UnsafeFormat: There are only pickle files.
        UnsafePath: The index names a file outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), hint="Give the folder of a model.")
    if _present(folder, SINGLE):
        return _open_single(folder)
    for index in (INDEX, PACKED_INDEX):
        if _present(folder, index):
            return _open_sharded(folder, index)
    raise _nothing_found(folder)


def is_ours(files: Iterable[str]) -> bool:
    """Tell from the names of weight files whether only sparsekit loads them: packed, narrow, or both."""
    return any(file.startswith(PACKED_STEM) for file in files)


def _blobs(folder: Path) -> Path | None:
    """Return where links may lead: a Hub cache keeps `snapshots/<revision>/<file>` as links into `blobs`."""
    return folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None


def _present(folder: Path, name: str) -> bool:
    """Whether a file of that name is there and does not lead outside."""
    return fs.safe_join(folder, name, also=_blobs(folder)).is_file()


def _nothing_found(folder: Path) -> CheckpointError:
    """Return the error that fits what is there instead of weights."""
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern) if path.is_file())
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles and not others:
        return UnsafeFormat(
            f"only pickle weights ({pickles[0]}); loading them runs code",
            where=str(folder),
            hint=CONVERT_HINT,
        )
    found = f"; found {', '.join(others[:3])}" if others else ""
    return CheckpointError(
        f"no {SINGLE} and no {INDEX}{found}",
        where=str(folder),
        hint="Give a folder with a whole model in it.",
    )


def _open_single(folder: Path) -> WeightFiles:
    """Open a model of one file."""
    header = read_header(folder / SINGLE)
    tensors = {name: TensorLocation(SINGLE, entry) for name, entry in sorted(header.tensors.items())}
    return _weight_files(folder, (SINGLE,), tensors)


def _open_sharded(folder: Path, index: str) -> WeightFiles:
    """Open a model of several files, checking index and shards against each other."""
    weight_map = read_index(folder / index)
    files = tuple(sorted(set(weight_map.values())))
    paths = {file: fs.safe_join(folder, file, also=_blobs(folder)) for file in files}  # before any is opened
    fs.check_distinct(files, where=str(folder / index))
    tensors: dict[str, TensorLocation] = {}
    for file, path in paths.items():
        if not path.is_file():
            count = sum(shard == file for shard in weight_map.values())
            raise IndexMismatch(
                f"shard missing: the index puts {count} tensors in it", where=str(path), hint=_COPY_HINT
            )
        for name, entry in read_header(path).tensors.items():
            if name in tensors:
                raise IndexMismatch(
                    f"tensor {name!r} is also in {tensors[name].file}", where=str(path), hint=_COPY_HINT
                )
            if weight_map.get(name) != file:
                claim = f"{weight_map[name]} in the index" if name in weight_map else "not in the index"
                raise IndexMismatch(f"tensor {name!r} is in this file, but {claim}", where=str(path), hint=_COPY_HINT)
            tensors[name] = TensorLocation(file, entry)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise IndexMismatch(
            f"tensor {missing[0]!r} is in the index, but not in the file",
            where=str(folder / weight_map[missing[0]]),
            hint=_COPY_HINT,
        )
    return _weight_files(folder, files, dict(sorted(tensors.items())))


def _weight_files(folder: Path, files: tuple[str, ...], tensors: Mapping[str, TensorLocation]) -> WeightFiles:
    """Return the result; a model without tensors is refused."""
    if not tensors:
        raise CheckpointError("the weight files hold no tensors", where=str(folder))
    return WeightFiles(folder, files, tensors, sum(location.entry.size_bytes for location in tensors.values()))


def read_index(path: Path) -> dict[str, str]:
    """Read an index file and return its map from tensor to shard.

    Raises:
        IndexMismatch: It is too big, not strict JSON, or not an index.
    """
    _, index = jsonio.read(path, limit_bytes=INDEX_LIMIT_BYTES, error=IndexMismatch)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexMismatch("no weight_map in it", where=str(path), hint=_COPY_HINT)
    result = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise IndexMismatch(f"tensor {name!r}: {file!r} is not a file name", where=str(path))
        if not file.endswith(".safetensors"):
            raise UnsafeFormat(
                f"tensor {name!r} is in {file!r}, no safetensors file", where=str(path), hint=CONVERT_HINT
            )
        result[name] = file
    return result
