"""Writing a checkpoint so that a kill, full disk or power cut at any moment costs at most one shard.

Everything is built in a folder beside OUT. A shard is written and fsynced, then one line goes to the journal;
the same run finds both again and goes on. `commit` writes the manifest last and swaps the folder into place.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from sparsekit import fs
from sparsekit.checkpoint import jsonio, manifest, recovery
from sparsekit.checkpoint.journal import Journal, JournalEntry
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.lock import Lock
from sparsekit.checkpoint.recovery import Place, recover
from sparsekit.checkpoint.safetensors_file import RawTensor, encode, encoded_size, read_header
from sparsekit.errors import CheckpointError, IndexMismatch, ResourceError, ResumeMismatch

__all__ = ["JournalEntry", "StagedCheckpoint", "is_finished", "recover", "run_id_of"]

_log = logging.getLogger(__name__)


def run_id_of(identity: Mapping[str, JSON]) -> str:
    """Return the run id: 16 hex digits of the sha256 of the identity's canonical JSON."""
    return jsonio.digest(identity)[:16]


def is_finished(out: Path, identity: Mapping[str, JSON]) -> bool:
    """Whether `out` already is the committed result of exactly this run (its manifest says so).

    A run killed after its commit finds its work done; the same command may then end well instead of being
    refused.
    """
    return recovery.is_complete(Place.of(out).out, run_id_of(identity))


class StagedCheckpoint:
    """A checkpoint being written. Use `open`, then as a context manager.

    Attributes:
        out: Where it will be (links resolved).
        run_id: Names the run; see `run_id_of`.
        folder: The staged folder, OUT.partial-<run id>.
    """

    def __init__(self, place: Place, journal: Journal, lock: Lock, *, overwrite: bool) -> None:
        self.out = place.out
        self.run_id = journal.run_id
        self.folder = place.staged(journal.run_id)
        self._place = place
        self._journal = journal
        self._lock = lock
        self._overwrite = overwrite
        self._entries: dict[str, JournalEntry] = {}
        self._files: dict[str, fs.FileRecord] = {}

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, JSON], *, overwrite: bool, resume: bool) -> StagedCheckpoint:
        """Lock `out`, clean up after dead runs, and begin or go on.

        Args:
            out: The output folder; its parents are created.
            identity: Everything the result depends on, as JSON: resolved recipe, model, data, seed, versions.
            overwrite: Whether `commit` may replace a non-empty `out`.
            resume: Whether to go on with an interrupted run; if not, it is discarded.

        Raises:
            OutputExists: `out` is a file, or not empty and `overwrite` is off.
            Locked: A live process is writing there.
            ResumeMismatch: An interrupted run has another identity; each differing field is named.
            ResourceError: The disk refuses.
        """
        place = Place.of(out)
        fs.make_folder(place.out.parent)
        lock = Lock.acquire(place.lock, str(place.out))
        try:
            recovery.recover_locked(place)
            recovery.refuse_existing(place, overwrite)
            journal = _begin(place, identity, resume=resume)
            staged = cls(place, journal, lock, overwrite=overwrite)
            staged._prepare_folder()
        except BaseException:
            lock.release()
            raise
        return staged

    def _prepare_folder(self) -> None:
        """Make the staged folder hold journaled shards and nothing else."""
        shards = {entry.file for entry in self._journal.entries.values()}
        if not self.folder.is_dir():
            fs.make_folder(self.folder)
            fs.sync_folder(self.folder.parent)
            return
        for name in fs.list_files(self.folder):
            if name not in shards:
                fs.remove_file(self.folder / name)

    def finished(self, key: str) -> JournalEntry | None:
        """Return the journal entry of shard `key` if its file is, byte for byte, what was journaled.

        None means that it must be computed (again): never written, damaged, missing, or another run's.
        """
        entry = self._journal.entries.get(key)
        if entry is None:
            return None
        path = fs.safe_join(self.folder, entry.file)
        problem = _shard_problem(path, entry, self.run_id)
        if problem:
            _log.warning("%s: %s; it is computed again", path, problem)
            return None
        self._record(entry)
        return entry

    def write_shard(
        self,
        key: str,
        file_name: str,
        tensors: Mapping[str, RawTensor],
        facts: Mapping[str, JSON],
        metadata: Mapping[str, str] | None = None,
    ) -> JournalEntry:
        """Write one shard and journal it; both are durable when this returns.

        Args:
            key: The shard's name in the journal, such as "block-3".
            file_name: Its file in the checkpoint.
            tensors: What it holds.
            facts: Anything the caller wants back from `finished`, such as realised counts.
            metadata: More entries for the file's own metadata.

        Raises:
            DiskFull: Too little space, found before writing where possible.
            IndexMismatch: A tensor or file that another shard of this run already has.
        """
        self._refuse_clash(key, file_name, tensors)
        header = {"format": "pt", "sparsekit_run": self.run_id, "sparsekit_key": key, **(metadata or {})}
        needed_bytes = encoded_size(tensors, header)
        path = self._fresh(file_name)
        fs.require_space(path, needed_bytes, f"shard {file_name}")
        described: dict[str, Mapping[str, JSON]] = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": _data_sha256(tensor)}
            for name, tensor in sorted(tensors.items())
        }
        record = fs.write_file(path, encode(tensors, header), needed_bytes=needed_bytes)
        fs.sync_folder(path.parent)
        entry = JournalEntry(key, file_name, record.size_bytes, record.sha256, described, dict(facts))
        self._journal.add(entry)
        self._record(entry)
        return entry

    def write_file(self, name: str, data: bytes) -> fs.FileRecord:
        """Write a side file; one of that name from an interrupted attempt is replaced.

        Raises:
            ResourceError: The disk refuses.
            UnsafePath: `name` is no plain relative path.
        """
        record = fs.write_file(self._fresh(name), data)
        self._files[name] = record
        return record

    def copy_file(self, source: Path, name: str) -> fs.FileRecord:
        """Copy a side file; one of that name from an interrupted attempt is replaced.

        Raises:
            ResourceError: The disk refuses.
            UnsafePath: `name` is no plain relative path.
        """
        record = fs.copy_file(source, self._fresh(name))
        self._files[name] = record
        return record

    def commit(self, manifest_fields: Mapping[str, JSON], volatile: Collection[str] = ()) -> Path:
        """Complete the staged folder with its manifest and swap it into place; return OUT.

        Args:
            manifest_fields: "layout", "tools", "tensors" and more. Of each tensor only "kept", "pattern",
                "method" (and "transposed") need to be given; shape, dtype and hash come from the shards.
            volatile: Files that may differ between equal runs (timings); not part of identity_sha256.

        Raises:
            OutputExists: OUT appeared meanwhile.
            CheckpointError: The folder holds a file that was not written here, or the fields contradict the
            shards. ResourceError: The disk refuses; OUT is as it was.
        """
        recovery.refuse_existing(self._place, self._overwrite)
        data = manifest.build(
            manifest_fields,
            run_id=self.run_id,
            identity=self._journal.identity,
            stored={name: facts for entry in self._entries.values() for name, facts in entry.tensors.items()},
            files=self._files,
            volatile=volatile,
        )
        path = self._fresh(manifest.FILE)
        self._refuse_unknown_files()
        record = fs.write_file(path, data)
        for folder in sorted({(self.folder / name).parent for name in self._files} | {self.folder}):
            fs.sync_folder(folder)
        self._journal.add_commit(record.sha256)
        recovery.put_in_place(self._place, self.run_id)
        recovery.clean_up(self._place, self.run_id)
        self.close()
        return self.out

    def discard(self) -> None:
        """Remove everything this run has written here; for work that another checkpoint has taken over."""
        recovery.drop_run(self._place, self.run_id)
        self.close()

    def close(self) -> None:
        """Release the lock; an uncommitted run stays for resuming. May be called again."""
        self._lock.release()

    def _forget_if_empty(self) -> None:
        """Remove a run that failed before its first shard: there is nothing to go on with."""
        if not self._journal.entries:
            with suppress(ResourceError):  # the error that led here is the one to report
                recovery.drop_run(self._place, self.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception | KeyboardInterrupt) and self._lock.held:
            self._forget_if_empty()
        self.close()

    def _record(self, entry: JournalEntry) -> None:
        """Count a trusted shard as part of the checkpoint."""
        self._entries[entry.key] = entry
        self._files[entry.file] = fs.FileRecord(entry.size_bytes, entry.sha256)

    def _fresh(self, name: str) -> Path:
        """Return the path for `name`, with its folder there and no file of that name."""
        path = fs.safe_join(self.folder, name)
        if path.parent != self.folder:
            fs.make_folder(path.parent)
        fs.remove_file(path)
        return path

    def _refuse_clash(self, key: str, file_name: str, tensors: Mapping[str, RawTensor]) -> None:
        """Raise IndexMismatch if another shard has this file or one of these tensors."""
        for other in self._entries.values():
            if other.key == key:
                continue
            if other.file == file_name:
                raise IndexMismatch(f"shards {other.key!r} and {key!r} would both be this file", where=file_name)
            if twice := sorted(set(tensors) & set(other.tensors)):
                raise IndexMismatch(f"in {other.file} and again in {file_name}", where=twice[0])

    def _refuse_unknown_files(self) -> None:
        """Raise if the staged folder and the record of what was written differ."""
        present = set(fs.list_files(self.folder))
        if different := sorted(present ^ set(self._files)):
            what = "was not written by this run" if different[0] in present else "has disappeared"
            raise CheckpointError(f"{different[0]!r} {what}", where=str(self.folder))


def _begin(place: Place, identity: Mapping[str, JSON], *, resume: bool) -> Journal:
    """Return the journal of this run, new or repaired."""
    run_id = run_id_of(identity)
    for other in place.find(r"OUT\.partial-([0-9a-f]{16})\.journal"):
        journal = Journal.load(place.journal(other))
        if journal is None or not resume or (other != run_id and not journal.entries):
            recovery.drop_run(place, other)  # unreadable, unwanted, or nothing finished that would be lost
        elif other != run_id:
            raise ResumeMismatch(
                f"an interrupted run differs in {differences(journal.identity, identity)}",
                where=str(place.out),
                hint="Use the same settings to go on, or discard the interrupted run with --no-resume.",
            )
        else:
            journal.repair()
            return journal
    return Journal.create(place.journal(run_id), run_id, identity)


def differences(old: Mapping[str, JSON], new: Mapping[str, JSON]) -> str:
    """Return every field that differs as `dotted.field: old -> new`, in order, joined by semicolons."""
    before, after = _flatten(old), _flatten(new)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return "; ".join(f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}" for name in changed)


def _flatten(value: JSON, prefix: str = "") -> dict[str, str]:
    """Return leaves by dotted name, as short JSON text."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        text = jsonio.canonical(value).decode()
        return {prefix: text if len(text) <= 80 else f"{text[:60]}... (sha256 {jsonio.digest(value)[:8]})"}
    leaves: dict[str, str] = {}
    for key, item in items:
        leaves |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return leaves


def _shard_problem(path: Path, entry: JournalEntry, run_id: str) -> str | None:
    """Say why a journaled shard cannot be used, or return None."""
    if not path.is_file():
        return "missing"
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        return f"{size_bytes:,} bytes on disk, {entry.size_bytes:,} in the journal"
    if fs.sha256_file(path).sha256 != entry.sha256:
        return "changed since it was written"
    try:
        header = read_header(path)
    except CheckpointError as error:
        return error.message
    if (header.metadata.get("sparsekit_run"), header.metadata.get("sparsekit_key")) != (run_id, entry.key):
        return "a shard of another run or block"
    return None


def _data_sha256(tensor: RawTensor) -> str:
    """Return the hash of a tensor's bytes."""
    return hashlib.sha256(tensor.data).hexdigest()
