"""Proof that a checkpoint folder is what its manifest says. Reads bytes, runs nothing, needs no torch.

Three levels, each including the one before: `structure` (names, sizes, headers, index), `full` (the hash of
every file), `semantic` (the hash of every tensor, kept counts and pattern of every pruned one).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsekit import fs
from sparsekit.checkpoint import jsonio, source
from sparsekit.checkpoint.manifest import FILE, Manifest, TensorFacts, identity_sha256, read_manifest
from sparsekit.checkpoint.safetensors_file import TensorEntry, read_header
from sparsekit.errors import CheckpointError, ChecksumError, SparsekitError
from sparsekit.pattern import NM, Block, parse_pattern

Level = Literal["structure", "full", "semantic"]
LEVELS: tuple[Level, ...] = ("structure", "full", "semantic")

_UNSIGNED: Mapping[int, type[np.unsignedinteger[Any]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
_MAGNITUDE_BITS: Mapping[str, tuple[int, int]] = {  # element bytes, and the bits that are not the sign of a float
    "F64": (8, 2**63 - 1),
    "F32": (4, 2**31 - 1),
    "F16": (2, 0x7FFF),
    "BF16": (2, 0x7FFF),
    "F8_E4M3": (1, 0x7F),
    "F8_E5M2": (1, 0x7F),
}


@dataclass(frozen=True)
class Problem:
    """One finding: the file or tensor it concerns, and what is wrong with it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `problems` is empty for a sound checkpoint."""

    folder: Path
    level: Level
    run_id: str
    problems: tuple[Problem, ...]
    files_checked: int
    tensors_checked: int
    bytes_read: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def require(self) -> None:
        """Raise ChecksumError with the first problem, if there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more problems)" if len(self.problems) > 1 else ""
            raise ChecksumError(
                f"{self.problems[0]}{more}",
                where=str(self.folder),
                hint="Copy the folder again, or run the pruning again.",
            )


def verify(folder: Path, level: Level = "full") -> VerifyReport:
    """Check a checkpoint folder against its manifest, collecting every problem.

    Args:
        folder: A folder that `sparsekit prune` wrote.
        level: How deep to look.

    Raises:
        CheckpointError: There is no readable manifest, so there is nothing to check against.
        VersionError: A newer sparsekit wrote it.
    """
    check = _Check(folder, read_manifest(folder))
    check.manifest_itself()
    check.names_and_sizes()
    check.headers()
    check.index()
    if level in ("full", "semantic"):
        check.hashes()
    if level == "semantic":
        check.tensors()
    return VerifyReport(
        folder,
        level,
        check.manifest.run_id,
        tuple(check.problems),
        len(check.manifest.files),
        len(check.manifest.tensors),
        check.bytes_read,
    )


@dataclass
class _Check:
    """One verification under way."""

    folder: Path
    manifest: Manifest
    problems: list[Problem] = field(default_factory=list)
    entries: dict[str, tuple[str, TensorEntry]] = field(default_factory=dict)
    usable: list[str] = field(default_factory=list)  # files that are there with the right size
    bytes_read: int = 0

    def found(self, where: str, message: str) -> None:
        self.problems.append(Problem(where, message))

    def manifest_itself(self) -> None:
        """The manifest has one spelling and a hash over itself, so no byte of it can change unseen."""
        if jsonio.readable(self.manifest.raw) != self.manifest.data:
            self.found(FILE, "changed: not spelt as sparsekit writes it")
        if identity_sha256(self.manifest.raw) != self.manifest.identity_sha256:
            self.found(FILE, "changed: identity_sha256 does not fit the content")

    def names_and_sizes(self) -> None:
        """Every recorded file is there with its size, and nothing else is."""
        present = set(fs.list_files(self.folder)) - {FILE}
        for name in sorted(present - set(self.manifest.files)):
            self.found(name, "extra: not in the manifest")
        for name, record in sorted(self.manifest.files.items()):
            path = self.folder / name
            if name not in present or not path.is_file():
                self.found(name, "missing")
                continue
            size_bytes = path.stat().st_size
            if size_bytes != record.size_bytes:
                cut = "; truncated copy?" if size_bytes < record.size_bytes else ""
                self.found(name, f"{size_bytes:,} bytes on disk, {record.size_bytes:,} in the manifest{cut}")
            else:
                self.usable.append(name)

    def headers(self) -> None:
        """The shards hold exactly the tensors of the manifest, with their dtypes and shapes."""
        for name in self.usable:
            if not name.endswith(".safetensors") or name == source.SIDECAR:
                continue
            try:
                header = read_header(self.folder / name)
            except SparsekitError as error:
                self.found(name, error.message)
                continue
            for tensor, entry in sorted(header.tensors.items()):
                if tensor in self.entries:
                    self.found(tensor, f"in {self.entries[tensor][0]} and again in {name}")
                self.entries[tensor] = (name, entry)
        for tensor, facts in sorted(self.manifest.tensors.items()):
            if tensor not in self.entries:
                self.found(tensor, "in the manifest, but in no readable shard")
                continue
            name, entry = self.entries[tensor]
            if (entry.dtype, entry.shape) != (facts.dtype, facts.shape):
                self.found(
                    tensor,
                    f"{entry.dtype} {list(entry.shape)} in {name}, {facts.dtype} {list(facts.shape)} in the manifest",
                )
        for tensor in sorted(set(self.entries) - set(self.manifest.tensors)):
            self.found(tensor, f"in {self.entries[tensor][0]}, but not in the manifest")

    def index(self) -> None:
        """The index, if there is one, sends each tensor to the shard that has it."""
        name = next((known for known in (source.INDEX, source.PACKED_INDEX) if known in self.usable), None)
        if name is None:
            return
        try:
            weight_map = source.read_index(self.folder / name)
        except CheckpointError as error:
            self.found(name, error.message)
            return
        actual = {tensor: name for tensor, (name, _) in self.entries.items()}
        for tensor in sorted(weight_map.keys() | actual.keys()):
            if weight_map.get(tensor) != actual.get(tensor):
                self.found(
                    tensor,
                    f"{weight_map.get(tensor, 'nowhere')} in the index, {actual.get(tensor, 'nowhere')} in fact",
                )

    def hashes(self) -> None:
        """Every file has the content that was recorded."""
        owners = {record.sha256: name for name, record in sorted(self.manifest.files.items())}
        for name in self.usable:
            actual = self.attempt(name, lambda path: fs.sha256_file(path))
            if actual is None:
                continue
            self.bytes_read += actual.size_bytes
            if actual.sha256 != self.manifest.files[name].sha256:
                owner = owners.get(actual.sha256)
                self.found(name, f"swapped: it has the content of {owner}" if owner else "changed: sha256 differs")

    def attempt(self, name: str, action: Callable[[Path], fs.FileRecord]) -> fs.FileRecord | None:
        """Return the result of `action`, or record why the file cannot be read."""
        try:
            return action(self.folder / name)
        except SparsekitError as error:
            self.found(name, error.message)
            return None

    def tensors(self) -> None:
        """Each tensor has its recorded bytes; each pruned one its kept count and pattern."""
        for tensor, facts in sorted(self.manifest.tensors.items()):
            name, entry = self.entries.get(tensor, ("", None))
            if entry is None or (entry.dtype, entry.shape) != (facts.dtype, facts.shape):
                continue  # already reported
            data = _map(self.folder / name, entry)
            if hashlib.sha256(data.data).hexdigest() != facts.sha256:
                self.found(tensor, "changed: sha256 of the tensor differs")
            if facts.pattern is not None or facts.kept is not None:
                for message in mask_problems(data, facts):
                    self.found(tensor, message)


def _map(path: Path, entry: TensorEntry) -> NDArray[np.uint8]:
    """Return a tensor's bytes, mapped, not read."""
    if not entry.size_bytes:
        return np.empty(0, np.uint8)  # an empty range cannot be mapped
    return np.memmap(path, np.uint8, "r", entry.start, (entry.size_bytes,))


def mask_problems(data: NDArray[np.uint8], facts: TensorFacts) -> Iterator[str]:
    """Yield how a stored tensor breaks its claimed kept count or pattern.

    Args:
        data: The tensor's bytes, flat.
        facts: Its dtype, shape [..., out, in] (or [..., in, out] if transposed), kept count, pattern.
    """
    if facts.dtype not in _MAGNITUDE_BITS or len(facts.shape) < 2:
        yield f"a pruned tensor cannot be {facts.dtype} {list(facts.shape)}; need a float matrix"
        return
    element_bytes, mask = _MAGNITUDE_BITS[facts.dtype]
    unsigned = _UNSIGNED[element_bytes]
    support = (data.view(unsigned) & unsigned(mask)).astype(np.bool_).reshape((-1, *facts.shape[-2:]))
    if facts.transposed:
        support = support.transpose(0, 2, 1)
    nonzero = int(np.count_nonzero(support))
    if facts.kept is not None and nonzero > facts.kept:
        yield f"{nonzero:,} nonzero weights, only {facts.kept:,} kept by the manifest"
    try:
        pattern = parse_pattern(facts.pattern or "unstructured")
        pattern.check(support.shape[1], support.shape[2], where="pattern")
    except SparsekitError as error:
        yield error.message
        return
    if isinstance(pattern, NM):
        groups = np.count_nonzero(support.reshape(-1, pattern.of), axis=1)
        if bad := int(np.count_nonzero(groups > pattern.keep)):
            yield f"{bad:,} of {groups.size:,} groups have more than {pattern} nonzero weights"
    elif isinstance(pattern, Block) and facts.kept is not None:
        experts, rows, cols = support.shape
        grid = support.reshape(experts, rows // pattern.rows, pattern.rows, cols // pattern.cols, pattern.cols)
        blocks = int(np.count_nonzero(grid.any(axis=(2, 4))))
        if blocks * pattern.unit > facts.kept:
            yield (
                f"{blocks:,} blocks of {pattern} have nonzero weights, only "
                f"{facts.kept // pattern.unit:,} kept by the manifest"
            )
