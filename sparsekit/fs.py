"""Every write to disk, in one place. Standard library only.

Each operating-system call that changes the disk goes through `FS`. Tests put another `FileSystem` there, one
that counts, fails, tears a write or forgets what was not fsynced, so that "a fault at every call" is a loop.

A file is written as: create (it must not exist), write everything, fsync, close; a name is durable once its
folder is fsynced too. Errors are typed and name the path. The file is long because no other module may write.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparsekit.errors import DiskFull, PermissionRefused, ResourceError, UnsafePath

BytesLike = bytes | bytearray | memoryview
READ_BYTES = 1 << 20
_WRITE_BYTES = 1 << 26  # one call; keeps Ctrl-C responsive and stays under the 2 GiB limit of write(2)


class FileSystem:
    """The calls that change the disk, one method each, and nothing else."""

    def mkdir(self, path: Path) -> None:
        """Create one folder."""
        os.mkdir(path)

    def open_exclusive(self, path: Path) -> int:
        """Create a file that must not exist, mode 0666 & ~umask; return its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(path, flags, 0o666)

    def open_append(self, path: Path) -> int:
        """Open an existing file for appending; return its descriptor."""
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(path, flags)

    def open_shared(self, path: Path) -> int:
        """Open a file for reading and writing, creating it if it is absent; return its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(path, flags, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data`; return how many bytes were taken."""
        return os.write(fd, data)

    def truncate(self, fd: int, size_bytes: int) -> None:
        """Cut a file to `size_bytes`."""
        os.ftruncate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        """Make a file's content durable."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename atomically; an existing file is replaced, a non-empty folder is not."""
        os.replace(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names atomically; False where the system cannot."""
        return _exchange(one, other)

    def unlink(self, path: Path) -> None:
        """Remove a file or link."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a folder durable."""
        if sys.platform == "win32":  # folders cannot be opened there; NTFS journals its names
            return
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
            ):  # some network filesystems refuse it for folders
                raise
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        """Bytes an unprivileged user can still write on the filesystem of `path`."""
        return shutil.disk_usage(path).free


FS: FileSystem = FileSystem()
"""The file system in use. Read it as `fs.FS` at each call; tests replace it."""


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names by renameat2(RENAME_EXCHANGE); False where libc, kernel or filesystem do not have it."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(one), None, os.fspath(other))


# --- errors ------------------------------------------------------------------------------------------------
@contextmanager
def typed_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError into DiskFull, PermissionRefused or ResourceError naming `path`."""
    try:
        yield
    except OSError as error:
        raise _translate(error, path, needed_bytes) from error


def _translate(error: OSError, path: Path, needed_bytes: int | None) -> ResourceError:
    """Return the typed error for `error`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = "disk quota exceeded" if error.errno == errno.EDQUOT else "no space left on the disk"
        needed = "" if needed_bytes is None else f"; {needed_bytes:,} bytes needed"
        with suppress(OSError):
            needed += f"{',' if needed else ';'} {free_bytes(path):,} bytes free"
        return DiskFull(
            f"{cause}{needed}",
            where=str(path),
            hint="Free some space, then run the same command again to go on.",
        )
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionRefused(
            f"{reason.lower()}",
            where=str(path),
            hint="Choose a place you can write to, or change its permissions.",
        )
    return ResourceError(f"{reason.lower()}", where=str(path), hint="Check the disk and the path, then try again.")


# --- files -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FileRecord:
    """Size and content hash of one file."""

    size_bytes: int
    sha256: str


def write_file(path: Path, chunks: BytesLike | Iterable[BytesLike], *, needed_bytes: int | None = None) -> FileRecord:
    """Create `path` with the given content, durable when this returns (its folder is not fsynced).

    Args:
        path: A file that does not exist yet.
        chunks: The content, whole or in pieces.
        needed_bytes: Total size, for the error message; known by itself when `chunks` is one buffer.

    Raises:
        DiskFull: No space or quota; the partial file is removed.
        PermissionRefused: The place may not be written.
        ResourceError: Any other failure, an existing file included.
    """
    if isinstance(chunks, bytes | bytearray | memoryview):
        chunks = (chunks,)
        needed_bytes = memoryview(chunks[0]).nbytes
    with typed_errors(path, needed_bytes):
        fd = FS.open_exclusive(path)
        digest, size_bytes = hashlib.sha256(), 0
        try:
            for chunk in chunks:
                view = _byte_view(chunk)
                digest.update(view)
                size_bytes += view.nbytes
                write_all(fd, view)
            _fsync(fd)
        except BaseException:
            with suppress(OSError):
                FS.close(fd)
            _remove_partial(path)
            raise
        try:
            FS.close(fd)
        except OSError:
            _remove_partial(path)
            raise
    return FileRecord(size_bytes, digest.hexdigest())


def replace_file(path: Path, chunks: BytesLike | Iterable[BytesLike]) -> FileRecord:
    """Write `path` so that a reader sees the old content or the new one; durable when this returns.

    Raises:
        ResourceError: As for `write_file`; `path` keeps its old content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
    record = write_file(temporary, chunks)
    try:
        move(temporary, path)
    except BaseException:
        _remove_partial(temporary)
        raise
    sync_folder(path.parent)
    return record


def append_line(path: Path, line: bytes) -> None:
    """Append `line` (without its newline) to an existing file, durable when this returns.

    After a failure the file is cut back to what it was, so that the next line does not join a torn one.

    Raises:
        ResourceError: As for `write_file`.
    """
    data = memoryview(line + b"\n")
    with typed_errors(path, data.nbytes):
        fd = FS.open_append(path)
        before = os.fstat(fd).st_size
        try:
            write_all(fd, data)
            _fsync(fd)
        except BaseException:
            with suppress(OSError):
                FS.truncate(fd, before)
            with suppress(OSError):
                FS.close(fd)
            raise
        FS.close(fd)


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy content (links are followed) into the new file `target`, durable when this returns.

    Raises:
        ResourceError: `source` cannot be read or `target` not written.
    """
    with typed_errors(source):
        size_bytes = source.stat().st_size
        handle = source.open("rb")
    with handle:
        return write_file(target, iter(lambda: handle.read(READ_BYTES), b""), needed_bytes=size_bytes)


def sha256_file(path: Path) -> FileRecord:
    """Read `path` and return its size and sha256.

    Raises:
        ResourceError: The file cannot be read.
    """
    with typed_errors(path), path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
        return FileRecord(handle.tell(), digest.hexdigest())


def _byte_view(chunk: BytesLike) -> memoryview:
    """Return `chunk` as a flat view of bytes."""
    view = memoryview(chunk)
    if view.nbytes == 0:
        return memoryview(b"")  # a view with a zero in its shape cannot be cast
    return view.cast("B")


def write_all(fd: int, view: memoryview) -> None:
    """Write all of `view`, going on after short and interrupted writes."""
    done = 0
    while done < view.nbytes:
        try:
            taken = FS.write(fd, view[done : done + _WRITE_BYTES])
        except InterruptedError:
            continue
        if taken <= 0:
            raise OSError(errno.EIO, "the disk accepts no bytes")
        done += taken


def _fsync(fd: int) -> None:
    """Fsync `fd`, going on after an interruption."""
    while True:
        try:
            FS.fsync(fd)
        except InterruptedError:
            continue
        return


def _remove_partial(path: Path) -> None:
    """Remove a half-written file; the error that led here is the one to report."""
    with suppress(OSError):
        FS.unlink(path)


# --- folders and names -------------------------------------------------------------------------------------
def make_folder(path: Path) -> None:
    """Create a folder and its missing parents; an existing folder is fine."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        make_folder(path.parent)
    with typed_errors(path):
        try:
            FS.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise


def move(source: Path, target: Path) -> None:
    """Rename atomically on one filesystem."""
    with typed_errors(target):
        FS.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False where the system cannot."""
    with typed_errors(other):
        return FS.exchange(one, other)


def remove_file(path: Path) -> None:
    """Remove a file or link; an absent one is fine."""
    with typed_errors(path), suppress(FileNotFoundError):
        FS.unlink(path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with typed_errors(path):
        FS.fsync_dir(path)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; links are removed, never followed; an absent folder is fine."""
    with typed_errors(path):
        if path.is_symlink() or path.is_file():
            FS.unlink(path)
            return
        if not path.exists():
            return
        for child in sorted(path.iterdir()):
            remove_tree(child)
        FS.rmdir(path)


def list_files(folder: Path) -> list[str]:
    """Names of files and links below `folder`, sorted, with forward slashes; links are not followed."""
    names = []
    with typed_errors(folder):
        for root, folders, files in os.walk(folder):
            links = [name for name in folders if os.path.islink(os.path.join(root, name))]
            names += [Path(root, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(names)


def free_bytes(path: Path) -> int:
    """Bytes that can still be written on the filesystem of `path` (or of its nearest existing parent)."""
    path = Path(os.path.abspath(path))
    while not path.exists() and path != path.parent:
        path = path.parent
    return FS.free_bytes(path)


def require_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse early what cannot fit.

    Raises:
        DiskFull: Fewer than `needed_bytes` are free where `path` is.
    """
    with typed_errors(path):
        free = free_bytes(path)
    if free < needed_bytes:
        raise DiskFull(
            f"{what} needs {needed_bytes:,} bytes, {free:,} bytes are free",
            where=str(path),
            hint=f"Free at least {needed_bytes - free:,} bytes, or choose another disk.",
        )


# --- names that come out of files --------------------------------------------------------------------------
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_REFUSED_CHARACTERS = '\\:*?"<>|'


def safe_join(folder: Path, name: str, *, also: Path | None = None) -> Path:
    """Return `folder / name` for a name read from a file, if it stays inside on every operating system.

    Args:
        folder: Where the file must be.
        name: A relative path with forward slashes.
        also: One more folder that links may lead into.

    Raises:
        UnsafePath: The name is absolute, climbs, is not portable, or is a link that leads outside.
    """
    reason = _unsafe_reason(name)
    if reason is None:
        path = folder / name
        try:
            real, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
        except (OSError, ValueError) as error:
            raise UnsafePath(f"{name!r} cannot be resolved ({error})", where=str(folder)) from error
        if also is not None:
            roots.append(Path(os.path.realpath(also)))
        if any(real.is_relative_to(root) for root in roots):
            return path
        reason = "is a link that leads outside the folder"
    raise UnsafePath(
        f"the name {name!r} {reason}",
        where=str(folder),
        hint="Do not use files from this source before you trust it.",
    )


def _unsafe_reason(name: str) -> str | None:
    """Say what makes `name` unsafe as a relative path on POSIX or Windows, or return None."""
    if not isinstance(name, str) or not name:
        return "is not a file name"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name):
        return "has control or invisible characters"
    for form in (
        name,
        unicodedata.normalize("NFKC", name),
    ):  # look-alikes such as a full-width slash fold in NFKC
        if form.startswith("/"):
            return "is absolute"
        bad = sorted(set(form) & set(_REFUSED_CHARACTERS))
        if bad:
            return f"has the character {bad[0]!r}, a drive, share or wildcard on some systems"
        for part in form.split("/"):
            if part in ("", ".", ".."):
                return "has an empty part" if not part else f"has the part {part!r}"
            if _RESERVED.fullmatch(part):
                return f"has the part {part!r}, a device on Windows"
            if part[-1] in ". " or part[0] == " ":
                return "has a part that begins or ends with a space or ends with a dot"
            if len(part.encode()) > 255:
                return "has a part longer than 255 bytes"
    if len(name.encode()) > 1024:
        return "is longer than 1,024 bytes"
    if "/" in unicodedata.normalize("NFKC", name.replace("/", "")) or "\u2044" in name or "\u2215" in name:
        return "has a character that looks like a slash"
    return None


def check_distinct(names: Iterable[str], *, where: str) -> None:
    """Refuse names that are one file on a system that ignores case or Unicode form.

    Raises:
        UnsafePath: Two names differ only so.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise UnsafePath(f"the names {other!r} and {name!r} are one file on some systems", where=where)
