"""Putting a staged folder in place, and cleaning up after a run that died while doing so.

Beside OUT there may be, where ID is a run id:

    OUT.partial-ID           the staged folder: exactly the files that OUT will have
    OUT.partial-ID.journal   identity and finished shards of that run
    OUT.old-ID               the replaced checkpoint, where names cannot be exchanged atomically
    OUT.trash-ID             anything on its way out; renamed first, so nothing half-removed has a good name
    OUT.partial.lock         the writer's lock

The journal lies beside the staged folder, not in it. So the folder needs no cleaning before the swap, and
there is no moment in which neither the journal nor the finished checkpoint exists: a kill then would lose the
whole run.

The order is: staged folder complete and fsynced -> journal line with the manifest's hash -> swap -> fsync the
parent -> old checkpoint to trash -> journal removed.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import manifest as manifests
from sparsekit.checkpoint.journal import Journal
from sparsekit.checkpoint.lock import Lock
from sparsekit.errors import CheckpointError, OutputExists, ResourceError, SparsekitError

_log = logging.getLogger(__name__)
_ID = "[0-9a-f]{16}"


@dataclass(frozen=True)
class Place:
    """The names around one output folder."""

    out: Path

    @classmethod
    def of(cls, out: Path) -> Place:
        """Return the place of `out`, with links resolved so that renames stay on one filesystem."""
        real = Path(os.path.realpath(out))
        if not real.name:
            raise OutputExists("the root folder cannot be an output", where=str(out), hint="Choose another with -o.")
        return cls(real)

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.out.with_name(f"{self.out.name}.partial.lock")

    def staged(self, run_id: str) -> Path:
        """The staged folder of a run."""
        return self.out.with_name(f"{self.out.name}.partial-{run_id}")

    def journal(self, run_id: str) -> Path:
        """The journal of a run."""
        return self.out.with_name(f"{self.out.name}.partial-{run_id}.journal")

    def old(self, run_id: str) -> Path:
        """The checkpoint that a run replaced."""
        return self.out.with_name(f"{self.out.name}.old-{run_id}")

    def trash(self, run_id: str) -> Path:
        """Where a folder goes before it is removed."""
        return self.out.with_name(f"{self.out.name}.trash-{run_id}")

    def find(self, pattern: str) -> list[str]:
        """Return the group of `pattern` for each sibling that matches it whole, sorted; OUT is its name."""
        if not self.out.parent.is_dir():
            return []
        expression = re.compile(pattern.replace("OUT", re.escape(self.out.name), 1))
        with fs.typed_errors(self.out.parent):
            matches = [expression.fullmatch(name) for name in sorted(os.listdir(self.out.parent))]
        return [match[1] for match in matches if match]

    def leftovers(self) -> list[str]:
        """Return the names of everything a dead run may have left, the lock apart."""
        return self.find(rf"(OUT\.(?:partial|old|trash)-{_ID}(?:\.journal)?)") + self.temporaries()

    def temporaries(self) -> list[str]:
        """Return the names of journals that were never renamed to their name."""
        return self.find(rf"(\.OUT\.partial-{_ID}\.journal\.\d+-[0-9a-f]{{12}}\.tmp)")


def recover(out: Path) -> None:
    """Finish or undo what a run that died left half-done around `out`; called again, it changes nothing.

    Afterwards `out` is absent, the complete old or the complete new checkpoint. A run that can go on is kept.

    Raises:
        Locked: A live process is writing there.
        ResourceError: The disk refuses.
    """
    place = Place.of(out)
    if not place.leftovers() and not place.lock.exists():
        return
    lock = Lock.acquire(place.lock, str(place.out))
    try:
        recover_locked(place)
    finally:
        lock.release()


def recover_locked(place: Place) -> None:
    """Do what `recover` does; the caller holds the lock."""
    for name in place.temporaries():
        fs.remove_file(place.out.parent / name)
    for run_id in place.find(rf"OUT\.trash-({_ID})"):
        fs.remove_tree(place.trash(run_id))
    for run_id in reversed(place.find(rf"OUT\.old-({_ID})")):
        if os.path.lexists(place.out):
            discard(place, place.old(run_id), run_id)
        else:
            fs.move(place.old(run_id), place.out)
            fs.sync_folder(place.out.parent)
    journals = place.find(rf"OUT\.partial-({_ID})\.journal")
    for run_id in journals:
        journal = Journal.load(place.journal(run_id))
        if journal is None or journal.run_id != run_id:
            _log.warning("%s is damaged; that run starts again", place.journal(run_id))
            drop_run(place, run_id)
        elif _is_in_place(place, journal):
            drop_run(place, run_id)
    for run_id in place.find(rf"OUT\.partial-({_ID})"):
        if run_id not in journals:  # its journal never became durable, so nothing in it can be trusted
            discard(place, place.staged(run_id), run_id)


def _is_in_place(place: Place, journal: Journal) -> bool:
    """Whether the run's manifest is OUT's and no longer the staged folder's, that is, the swap was done."""
    wanted = journal.manifest_sha256
    if wanted is None or _manifest_sha256(place.out) != wanted:
        return False
    return _manifest_sha256(place.staged(journal.run_id)) != wanted


def _manifest_sha256(folder: Path) -> str | None:
    """Return the hash of a folder's manifest, None if it has none."""
    path = folder / manifests.FILE
    return fs.sha256_file(path).sha256 if path.is_file() else None


def discard(place: Place, folder: Path, run_id: str) -> None:
    """Remove a folder so that at no moment a part of it bears its name."""
    if os.path.lexists(folder):
        fs.remove_tree(place.trash(run_id))
        fs.move(folder, place.trash(run_id))
        fs.remove_tree(place.trash(run_id))


def drop_run(place: Place, run_id: str) -> None:
    """Remove a run's staged folder, then its journal."""
    discard(place, place.staged(run_id), run_id)
    fs.remove_file(place.journal(run_id))


def refuse_existing(place: Place, overwrite: bool) -> None:
    """Raise OutputExists if OUT may not be written.

    Raises:
        OutputExists: It is a file; or has content and `overwrite` is off; or holds the user's home or current
        folder.
    """
    out = place.out
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputExists("exists and is a file", where=str(out), hint="Choose another output with -o.")
    with fs.typed_errors(out):
        empty = not any(out.iterdir())
    if empty:
        return
    if not overwrite:
        raise OutputExists(
            "exists and is not empty",
            where=str(out),
            hint="Choose another output with -o, or replace it: --overwrite",
        )
    for what, folder in (("home", Path.home()), ("current", Path.cwd())):
        if Path(os.path.realpath(folder)).is_relative_to(out):
            raise OutputExists(
                f"holds your {what} folder and is not replaced",
                where=str(out),
                hint="Choose another output with -o.",
            )


def put_in_place(place: Place, run_id: str) -> None:
    """Swap the complete, fsynced staged folder with OUT.

    Raises:
        ResourceError: The disk refuses; OUT is as it was.
    """
    staged, out = place.staged(run_id), place.out
    if not os.path.lexists(out):
        fs.move(staged, out)
    elif not fs.exchange(staged, out):
        fs.move(out, place.old(run_id))
        try:
            fs.move(staged, out)
        except ResourceError:
            fs.move(place.old(run_id), out)
            raise
    fs.sync_folder(out.parent)


def clean_up(place: Place, run_id: str) -> None:
    """Remove the replaced checkpoint and the journal; what fails is left to the next `recover`."""
    try:
        discard(place, place.old(run_id), run_id)
        drop_run(place, run_id)
    except SparsekitError as error:
        _log.warning("the checkpoint is complete, but the one it replaces could not be removed: %s", error)


def is_complete(folder: Path, run_id: str) -> bool:
    """Whether `folder` is a committed checkpoint of this run (its manifest is read, not its content)."""
    if not (folder / manifests.FILE).is_file():
        return False
    try:
        return manifests.read_manifest(folder).run_id == run_id
    except CheckpointError:
        return False
