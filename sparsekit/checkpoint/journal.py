"""The journal of an interrupted run: what is finished, as a chain of lines that proves itself.

A line is `<hash> <JSON>`, where the hash covers the previous line's hash and this JSON. The first line holds
the run's identity, each further one a finished shard, the last one the manifest of a commit that has begun.
Reading stops at the first line that does not fit (torn, flipped, inserted, of another run); nothing after it
is trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.errors import CheckpointError

LIMIT_BYTES = 1 << 30
_SEED = "sparsekit-journal-1"


@dataclass(frozen=True)
class JournalEntry:
    """A finished shard: its file in the staged folder and what is in it.

    `tensors` maps tensor names to {"dtype", "shape", "sha256"}; `facts` is what the writer of the shard gave.
    """

    key: str
    file: str
    size_bytes: int
    sha256: str
    tensors: Mapping[str, Mapping[str, JSON]]
    facts: Mapping[str, JSON]


class Journal:
    """An open journal. Use `create` or `load`."""

    def __init__(self, path: Path, run_id: str, identity: Mapping[str, JSON], last_hash: str) -> None:
        self.path = path
        self.run_id = run_id
        self.identity = identity
        self.entries: dict[str, JournalEntry] = {}
        self.manifest_sha256: str | None = None
        self._last_hash = last_hash
        self._valid_bytes = 0

    @classmethod
    def create(cls, path: Path, run_id: str, identity: Mapping[str, JSON]) -> Journal:
        """Begin a journal, replacing one that is there.

        Raises:
            ResourceError: It cannot be written.
        """
        body = jsonio.canonical({"run_id": run_id, "identity": identity})
        last_hash = _chain(_SEED, body)
        fs.replace_file(path, last_hash.encode() + b" " + body + b"\n")
        return cls(path, run_id, identity, last_hash)

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read a journal up to its last trustworthy line; None if not even the first one is.

        Raises:
            ResourceError: It cannot be read.
        """
        with fs.typed_errors(path), path.open("rb") as handle:
            data = handle.read(LIMIT_BYTES)
        journal = None
        for line in data.splitlines(keepends=True):
            text, _, body = line[:-1].partition(b" ")
            before = journal._last_hash if journal else _SEED
            if line[-1:] != b"\n" or text != _chain(before, body).encode():
                break
            record = jsonio.parse(body, where=str(path))
            if journal is None:
                journal = cls._begin(path, record, text.decode())
                if journal is None:
                    return None
            else:
                journal._accept(record)
                journal._last_hash = text.decode()
            journal._valid_bytes += len(line)
        return journal

    @classmethod
    def _begin(cls, path: Path, record: JSON, last_hash: str) -> Journal | None:
        """Return the journal that `record` begins, if it is one."""
        if not isinstance(record, dict) or set(record) != {"run_id", "identity"}:
            return None
        run_id, identity = record["run_id"], record["identity"]
        if not isinstance(run_id, str) or not isinstance(identity, dict) or jsonio.digest(identity)[:16] != run_id:
            return None
        return cls(path, run_id, identity, last_hash)

    def _accept(self, record: JSON) -> None:
        """Take over one proven record."""
        if isinstance(record, dict) and set(record) == {"manifest_sha256"}:
            self.manifest_sha256 = str(record["manifest_sha256"])
            return
        entry = _entry(record, str(self.path))
        self.entries[entry.key] = entry

    def repair(self) -> None:
        """Cut off what could not be trusted, so that new lines continue the chain.

        Raises:
            ResourceError: It cannot be written.
        """
        with fs.typed_errors(self.path), self.path.open("rb") as handle:
            data = handle.read(LIMIT_BYTES)
        if len(data) != self._valid_bytes:
            fs.replace_file(self.path, data[: self._valid_bytes])

    def add(self, entry: JournalEntry) -> None:
        """Append a finished shard, durable when this returns.

        Raises:
            ResourceError: It cannot be written.
        """
        self._append(
            {
                "key": entry.key,
                "file": entry.file,
                "size_bytes": entry.size_bytes,
                "sha256": entry.sha256,
                "tensors": entry.tensors,
                "facts": entry.facts,
            }
        )
        self.entries[entry.key] = entry

    def add_commit(self, manifest_sha256: str) -> None:
        """Append that the manifest with this hash is about to be put in place.

        Raises:
            ResourceError: It cannot be written.
        """
        self._append({"manifest_sha256": manifest_sha256})
        self.manifest_sha256 = manifest_sha256

    def _append(self, record: Mapping[str, JSON]) -> None:
        body = jsonio.canonical(record)
        link = _chain(self._last_hash, body)
        fs.append_line(self.path, link.encode() + b" " + body)
        self._last_hash = link


def _chain(previous: str, body: bytes) -> str:
    """Return the hash that ties `body` to the line before it."""
    return hashlib.sha256(previous.encode() + b" " + body).hexdigest()


def _entry(record: JSON, where: str) -> JournalEntry:
    """Return a proven record as an entry; its types are checked all the same, a chain can be made by hand."""
    if isinstance(record, dict):
        key, file, sha256 = record.get("key"), record.get("file"), record.get("sha256")
        size_bytes, tensors, facts = record.get("size_bytes"), record.get("tensors"), record.get("facts")
        if (
            isinstance(key, str)
            and isinstance(file, str)
            and isinstance(sha256, str)
            and isinstance(size_bytes, int)
            and isinstance(tensors, dict)
            and all(isinstance(value, dict) for value in tensors.values())
            and isinstance(facts, dict)
        ):
            return JournalEntry(key, file, size_bytes, sha256, tensors, facts)
    raise CheckpointError(
        "a line that this version did not write",
        where=where,
        hint="Discard the interrupted run with --no-resume.",
    )
