"""The level database: what every linear is at every level, one byte per weight where masks are nested.

Masks of a fixed score are nested: what is kept at a level is kept at all denser ones. So one number per weight is all,
the number of levels, densest first, at which it is kept:  keep = number > position of the level. Pruners that choose
anew at every level, or move weights, need bits and values per level instead.

Each linear is one safetensors file named by its content, journalled when it is complete. A database belongs to what it
was made from: another model, recipe, calibration or version is refused by what differs.
Source: levels as in Sieberling et al. 2024, "EvoPress", arXiv 2410.14649; the byte is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import fs, ranks
from sparsekit.checkpoint.journal import Journal, JournalEntry
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.checkpoint.lock import Lock
from sparsekit.checkpoint.safetensors_file import encode
from sparsekit.checkpoint.staging import differences, run_id_of
from sparsekit.contracts import Level, LinearInfo
from sparsekit.errors import ChecksumError, ResumeMismatch, SparsekitError
from sparsekit.lazy import torch
from sparsekit.masks import zeroed
from sparsekit.models.raw import read_tensor, to_raw
from sparsekit.pattern import Pattern
from sparsekit.search.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

_JOURNAL = "levels.journal"
_MOST_LEVELS = 255  # of a byte


class LevelDatabase:
    """Levels of linears in a folder; use as a context manager, one process at a time.

    The first of several ranks opens it and sends the others copies: they read its files, and it writes them.
    """

    def __init__(self, folder: Path, identity: Mapping[str, JSON], grid: Grid) -> None:
        """Open or begin the database of `identity`, which is all that its content depends on.

        Raises:
            ResumeMismatch: The folder holds the database of something else; the message says what differs.
            Locked: Another process uses it.
        """
        self.folder = folder
        self.grid = grid
        levels: dict[str, JSON] = {
            "step": grid.step,
            "uniform": dict(grid.uniform),
            "lowest": dict(grid.lowest),
            "highest": dict(grid.highest),
        }
        self._identity: dict[str, JSON] = {**identity, "levels": levels}
        self._proven: set[str] = set()
        fs.make_folder(folder)
        self._lock = Lock.acquire(folder / "lock", str(folder))
        try:
            self._journal = self._open()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> LevelDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> Journal:
        path = self.folder / _JOURNAL
        journal = Journal.load(path) if path.exists() else None
        if journal is None:
            return Journal.create(path, run_id_of(self._identity), self._identity)
        if journal.run_id != run_id_of(self._identity):
            raise ResumeMismatch(
                f"the level database differs in {differences(journal.identity, self._identity)}",
                where=str(self.folder),
                hint="Name another folder with --database, or delete this one.",
            )
        journal.repair()
        return journal

    def missing(self, linears: Iterable[LinearInfo]) -> list[LinearInfo]:
        """Return the linears whose levels are not there yet."""
        entries = self._journal.entries
        return [each for each in linears if each.name not in entries or not self._path(entries[each.name]).exists()]

    def expected_bytes(self, linears: Iterable[LinearInfo], *, nested: bool, dtype: torch.dtype) -> int:
        """Return what the files of linears take, but for a few hundred bytes each."""
        if nested:
            return sum(linear.numel for linear in linears)
        return sum(
            linear.out_features * -(-linear.in_features // 8) + dtype.itemsize * count
            for linear in linears
            for count in self._counts(linear)
        )

    def _counts(self, linear: LinearInfo) -> list[int]:
        return [self.grid.count(linear.name, level) for level in self.grid.levels(linear.name)]

    def parts(
        self, linear: LinearInfo, dense: Tensor, at: Level, pattern: Pattern, *, nested: bool, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return what a linear is at all of its levels, as it is kept.

        Args:
            linear: Which one.
            dense: Its weight, [out, in] float32.
            at: Its levels, from the pruner's `fit`.
            pattern: Pattern of the masks.
            nested: What the pruner says of its levels; it is checked.
            dtype: What the model is stored in; values that a pruner moves are kept so.

        Raises:
            SparsekitError: Levels that are not nested though the pruner says so.
        """
        counts = self._counts(linear)
        if nested:
            return {"number": _numbers(linear.name, dense, at, pattern, counts)}
        return _separate(dtype, at, pattern, counts)

    def keep(self, linear: LinearInfo, parts: Mapping[str, Tensor]) -> None:
        """Write the parts of a linear."""
        self._journal.entries[linear.name] = ranks.share(lambda: self._write(linear, parts))

    def _write(self, linear: LinearInfo, parts: Mapping[str, Tensor]) -> JournalEntry:
        raw = {name: to_raw(part) for name, part in parts.items()}
        draft = self.folder / "draft.safetensors"
        if draft.exists():  # of a run that was killed
            fs.remove_file(draft)
        record = fs.write_file(draft, encode(raw, {"sparsekit_linear": linear.name}))
        name = f"{record.sha256[:32]}.safetensors"
        fs.move(draft, self.folder / name)
        facts: dict[str, JSON] = {"nested": "number" in parts, "levels": len(self._counts(linear))}
        entry = JournalEntry(linear.name, name, record.size_bytes, record.sha256, {}, facts)
        self._journal.add(entry)
        return entry

    def weight(self, linear: LinearInfo, dense: Tensor, level: int) -> Tensor:
        """Return a linear at a level, [out, in] of the dtype of `dense`, its weight in the dtype of the model.

        Raises:
            ChecksumError: The file is not what was written.
        """
        entry = self._journal.entries[linear.name]
        path = self._path(entry)
        if linear.name not in self._proven:
            self._prove(entry, path)
            self._proven.add(linear.name)
        position = self.grid.highest[linear.name] - level
        if entry.facts["nested"]:
            return zeroed(dense, read_tensor(path, "number") > position)
        from sparsekit.pack.bits import place, unpack_mask  # imports numpy, which listing the methods does without

        keep = unpack_mask(read_tensor(path, f"keep.{position}"), linear.in_features)
        values = read_tensor(path, f"values.{position}")
        return place(values.view(_bits(values.dtype)), keep).view(values.dtype).to(dense.dtype)

    def mask(self, linear: LinearInfo, level: int) -> Tensor:
        """Return the mask of a linear at a level that has one of its own, [out, in] bool."""
        from sparsekit.pack.bits import unpack_mask  # imports numpy, which listing the methods does without

        position = self.grid.highest[linear.name] - level
        return unpack_mask(
            read_tensor(self._path(self._journal.entries[linear.name]), f"keep.{position}"), linear.in_features
        )

    def nbytes(self) -> int:
        """Return the size of all files."""
        return sum(entry.size_bytes for entry in self._journal.entries.values())

    def _path(self, entry: JournalEntry) -> Path:
        return fs.safe_join(self.folder, entry.file)

    def _prove(self, entry: JournalEntry, path: Path) -> None:
        found = fs.sha256_file(path).sha256
        if found != entry.sha256:
            raise ChecksumError(
                f"levels of {entry.key} have sha256 {found[:16]}..., {entry.sha256[:16]}... was written",
                where=str(path),
                hint="Delete that file: the same command builds it again.",
            )


def _numbers(name: str, dense: Tensor, at: Level, pattern: Pattern, counts: list[int]) -> Tensor:
    """Return how many levels keep each weight, [out, in] u8."""
    if len(counts) > _MOST_LEVELS:
        raise SparsekitError(f"{len(counts)} levels, a byte counts {_MOST_LEVELS}", where=name)
    numbers = torch.zeros(dense.shape, dtype=torch.uint8)
    before = torch.ones(dense.shape, dtype=torch.bool)
    for count in counts:
        pruned = at(pattern, count)
        if bool((pruned.keep & ~before).any()) or not torch.equal(pruned.weight, zeroed(dense, pruned.keep)):
            raise SparsekitError(f"the level of {count:,} kept weights is not nested in the one before", where=name)
        numbers += pruned.keep
        before = pruned.keep
    return numbers


def _separate(dtype: torch.dtype, at: Level, pattern: Pattern, counts: list[int]) -> dict[str, Tensor]:
    """Return mask and kept values of every level."""
    from sparsekit.pack.bits import pack_mask, select

    parts = {}
    for position, count in enumerate(counts):
        pruned = at(pattern, count)
        parts[f"keep.{position}"] = pack_mask(pruned.keep)
        parts[f"values.{position}"] = select(pruned.weight.to(dtype).view(_bits(dtype)), pruned.keep).view(dtype)
    return parts


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Return the integers as wide as `dtype`: numpy has no bfloat16."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]
