"""One writer for each output folder.

The lock is a file beside the folder that names its holder: process id, start time, machine. A holder that is
gone (killed, power lost) is recognised by id and start time and the lock is taken over. Looking and taking
over happen under a short advisory lock on the file itself, so that of two processes exactly one wins.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sparsekit import fs
from sparsekit.checkpoint import jsonio
from sparsekit.checkpoint.jsonio import JSON
from sparsekit.errors import CheckpointError, Locked

_ATTEMPTS, _PAUSE_SECONDS = 200, 0.02


@dataclass(frozen=True)
class Process:
    """A process of some machine; `start` tells it from a later one with the same id."""

    pid: int
    start: str
    host: str


def start_of(pid: int) -> str | None:
    """Return when process `pid` of this machine began, in the system's words, or None if there is none."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces
        return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "unknown"
    except OSError:
        return None
    return "unknown"


def this_process() -> Process:
    """Return the running process."""
    return Process(os.getpid(), start_of(os.getpid()) or "unknown", socket.gethostname())


class Lock:
    """A held lock. Use `acquire`; `release` may be called again."""

    def __init__(self, path: Path, owner: Process) -> None:
        self.path = path
        self.owner = owner
        self._held = True

    @classmethod
    def acquire(cls, path: Path, what: str) -> Lock:
        """Take the lock file `path` for this process.

        Args:
            path: The lock file.
            what: The folder it protects, for the error message.

        Raises:
            Locked: Another live process holds it.
            ResourceError: It cannot be written.
        """
        owner = this_process()
        for _ in range(_ATTEMPTS):
            with fs.typed_errors(path):
                fd = fs.FS.open_shared(path)
                try:
                    if _guard(fd, path):
                        _refuse_live(os.read(fd, 4096), path, what)
                        text: dict[str, JSON] = {"pid": owner.pid, "start": owner.start, "host": owner.host}
                        fs.FS.truncate(fd, 0)
                        os.lseek(fd, 0, os.SEEK_SET)
                        fs.write_all(fd, memoryview(jsonio.canonical(text)))
                        return cls(path, owner)
                finally:
                    fs.FS.close(fd)
            time.sleep(_PAUSE_SECONDS)
        raise Locked("another process is taking the lock", where=what, hint=f"Try again, or remove {path}.")

    def __getstate__(self) -> dict[str, object]:
        """A copy in another process holds nothing, and what has such a copy can be read and closed there."""
        return {**self.__dict__, "_held": False}

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return self._held

    def release(self) -> None:
        """Give the lock back.

        Raises:
            ResourceError: The lock file cannot be removed.
        """
        if not self._held:
            return
        self._held = False
        mine = jsonio.canonical({"pid": self.owner.pid, "start": self.owner.start, "host": self.owner.host})
        with fs.typed_errors(self.path):
            if self.path.exists() and self.path.read_bytes() == mine:  # else somebody removed it by hand and took it
                fs.FS.unlink(self.path)


def _guard(fd: int, path: Path) -> bool:
    """Take the advisory lock of an open file; False if it is busy or the file was removed meanwhile.

    Closing the descriptor gives it back.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False


def _refuse_live(data: bytes, path: Path, what: str) -> None:
    """Raise Locked if the process that wrote `data` lives, or if that cannot be known."""
    try:
        record = jsonio.parse(data, where=str(path))
    except CheckpointError:
        return  # empty or torn: its writer died in this very function, else the guard would be busy
    if not isinstance(record, dict):
        return
    pid, start, host = record.get("pid"), record.get("start"), record.get("host")
    if host != socket.gethostname():
        raise Locked(
            f"process {pid} on machine {host!r} is writing it",
            where=what,
            hint=f"Wait for it. If that process is gone, remove {path}.",
        )
    if isinstance(pid, int) and start_of(pid) == start:
        raise Locked(f"process {pid} is writing it", where=what, hint="Wait for it, or choose another output with -o.")
