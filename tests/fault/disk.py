"""A disk that fails on command, and the saves that are tried on it.

`FaultDisk` counts each call through the seam of `sparsekit.fs` and injects one fault at call `fault_at`. It also
keeps a model of what is durable (file content at its last fsync, folder entries at their last fsync), so that a
power cut can take away everything else.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparsekit import fs
from sparsekit.checkpoint import lock
from sparsekit.checkpoint.safetensors_file import RawTensor
from sparsekit.checkpoint.staging import StagedCheckpoint, recover
from sparsekit.errors import SparsekitError

ERRNO = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
POWER = ("power: unsynced data lost", "power: unsynced data and names lost")
MODES = (*ERRNO, "ENOSPC for good", "kill", "kill in mid-write", *POWER)


class Kill(BaseException):
    """The process is gone: nothing in the product may catch this, and no call works afterwards."""


@dataclass(eq=False)
class Node:
    """A file or folder. `durable*` is what a power cut leaves."""

    folder: bool
    durable_data: bytes = b""
    durable: dict[str, Node] = field(default_factory=dict)
    live: dict[str, Node] = field(default_factory=dict)


class FaultDisk(fs.FileSystem):
    """The real disk below `root`, with one fault."""

    def __init__(self, root: Path, fault_at: int | None = None, mode: str = "EIO", *, can_exchange: bool = True):
        self.root, self.fault_at, self.mode, self.can_exchange = root, fault_at, mode, can_exchange
        self.calls: list[str] = []
        self.fired = self.dead = False
        self.open_fds: dict[int, Node] = {}
        self.tree = self._scan(root)

    # the model
    def _scan(self, path: Path) -> Node:
        if not path.is_dir():
            return Node(False, path.read_bytes())
        node = Node(True)
        for child in path.iterdir():
            node.live[child.name] = self._scan(child)
        node.durable = dict(node.live)
        return node

    def _find(self, path: Path) -> Node:
        node = self.tree
        for part in path.relative_to(self.root).parts:
            node = node.live[part]
        return node

    def _entries(self, path: Path) -> dict[str, Node]:
        return self._find(path.parent).live

    def _cut_power(self) -> None:
        """Leave on the real disk only what is durable."""
        for child in self.root.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        self._restore(self.tree, self.root, names_too=self.mode == POWER[1])

    def _restore(self, node: Node, path: Path, *, names_too: bool) -> None:
        for name, child in (node.durable if names_too else node.live).items():
            if child.folder:
                (path / name).mkdir()
                self._restore(child, path / name, names_too=names_too)
            else:
                (path / name).write_bytes(child.durable_data)

    # the fault
    def _step(self, call: str, path: Path | None = None) -> None:
        if self.dead:
            raise Kill
        self.calls.append(f"{call} {path.name if path else ''}".strip())
        hit = len(self.calls) == self.fault_at
        full = self.mode == "ENOSPC for good" and self.fired and call in ("mkdir", "open", "write", "fsync")
        if not hit and not full:
            return
        if hit:
            self.fired = True
        if self.mode in ("kill in mid-write",) and call == "write":
            return  # `write` tears it
        if self.mode in ERRNO or self.mode == "ENOSPC for good":
            code = ERRNO.get(self.mode, errno.ENOSPC)
            raise OSError(code, os.strerror(code), str(path))
        self.die()

    def die(self) -> None:
        self.dead = True
        for fd in self.open_fds:
            os.close(fd)
        self.open_fds.clear()
        if self.mode in POWER:
            self._cut_power()
        raise Kill

    # the calls
    def mkdir(self, path: Path) -> None:
        self._step("mkdir", path)
        super().mkdir(path)
        self._entries(path)[path.name] = Node(True)

    def _opened(self, fd: int, path: Path) -> int:
        self.open_fds[fd] = self._entries(path).setdefault(path.name, Node(False))
        return fd

    def open_exclusive(self, path: Path) -> int:
        self._step("open", path)
        return self._opened(super().open_exclusive(path), path)

    def open_append(self, path: Path) -> int:
        self._step("open", path)
        return self._opened(super().open_append(path), path)

    def open_shared(self, path: Path) -> int:
        self._step("open", path)
        return self._opened(super().open_shared(path), path)

    def write(self, fd: int, data: memoryview) -> int:
        self._step("write")
        if self.mode == "kill in mid-write" and len(self.calls) == self.fault_at:
            super().write(fd, data[: len(data) // 2])
            self.die()
        return super().write(fd, data)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._step("truncate")
        super().truncate(fd, size_bytes)

    def fsync(self, fd: int) -> None:  # the model is the disk: no real fsync is needed
        self._step("fsync")
        self.open_fds[fd].durable_data = Path(os.readlink(f"/proc/self/fd/{fd}")).read_bytes()

    def close(self, fd: int) -> None:
        if not self.dead:
            del self.open_fds[fd]
            super().close(fd)  # a close that reports an error has closed all the same
        self._step("close")

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)
        self._entries(target)[target.name] = self._entries(source).pop(source.name)

    def exchange(self, one: Path, other: Path) -> bool:
        self._step("exchange", other)
        if not self.can_exchange:
            return False
        assert super().exchange(one, other), "this system cannot exchange names; run these tests on Linux"
        first, second = self._entries(one), self._entries(other)
        first[one.name], second[other.name] = second[other.name], first[one.name]
        return True

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)
        self._entries(path).pop(path.name)

    def rmdir(self, path: Path) -> None:
        self._step("rmdir", path)
        super().rmdir(path)
        self._entries(path).pop(path.name)

    def fsync_dir(self, path: Path) -> None:
        self._step("fsync_dir", path)
        node = self._find(path)
        node.durable = dict(node.live)


class ForgetfulDisk(FaultDisk):
    """A writer's fsyncs never reach it: the planted fault `no fsync`."""

    def fsync(self, fd: int) -> None:
        self._step("fsync")

    def fsync_dir(self, path: Path) -> None:
        self._step("fsync_dir", path)


class Processes:
    """Stands in for the system's process table: each `new()` is another process, the ones before are dead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pid = 5_000_000
        monkeypatch.setattr(lock, "this_process", lambda: lock.Process(self.pid, "start", lock.socket.gethostname()))
        monkeypatch.setattr(lock, "start_of", lambda pid: "start" if pid == self.pid else None)

    def new(self) -> None:
        self.pid += 1


# --- saves -------------------------------------------------------------------------------------------------
Writer = Callable[[Path, int], None]
IDENTITY = {"recipe": {"sparsity": 0.5}, "seed": 0}


def shard_tensors(number: int) -> dict[str, RawTensor]:
    """Two small tensors that differ from shard to shard."""
    data = bytes((number * 37 + position) % 251 for position in range(96))
    return {
        f"block.{number}.weight": RawTensor("F16", (4, 8), memoryview(data[:64])),
        f"block.{number}.bias": RawTensor("F32", (8,), memoryview(data[64:])),
    }


def save(out: Path, shards: int, computed: list[int] | None = None) -> None:
    """Save a checkpoint the way a run does: shards that are not finished, side files, commit."""
    with StagedCheckpoint.open(out, IDENTITY, overwrite=True, resume=True) as staged:
        for number in range(shards):
            if staged.finished(f"block-{number}") is None:
                if computed is not None:
                    computed.append(number)
                staged.write_shard(
                    f"block-{number}", f"model-{number}.safetensors", shard_tensors(number), {"kept": number}
                )
        staged.write_file("config.json", b'{"model_type": "llama"}')
        staged.commit({"tools": {"sparsekit": "0"}})


def files_of(folder: Path) -> dict[str, bytes] | None:
    """Content of every file below `folder`; None if there is no such folder."""
    if not folder.is_dir():
        return None
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OLD = {"model-0.safetensors": b"old weights", "config.json": b"old", "sub/old.txt": b"old"}


def prepare(root: Path, *, over: bool) -> Path:
    """Make an empty root with, or without, an old checkpoint; return OUT."""
    shutil.rmtree(root, ignore_errors=True)
    out = root / "out"
    root.mkdir()
    if over:
        for name, data in OLD.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    return out


@dataclass
class Trial:
    """One faulty save and what came of it."""

    fired: bool
    state: str
    calls: list[str]
    error: BaseException | None


def run_trial(
    out: Path,
    disk: FaultDisk,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    writer: Callable[[], None],
    new: dict[str, bytes],
) -> Trial:
    """Run `writer` on `disk`, then recover as the next process; say what OUT is: absent, old, new or broken."""
    error: BaseException | None = None
    processes.new()
    monkeypatch.setattr(fs, "FS", disk)
    try:
        writer()
    except (Kill, SparsekitError, OSError) as caught:
        error = caught
    processes.new()
    monkeypatch.setattr(fs, "FS", FaultDisk(disk.root))
    recover(out)
    files = files_of(out)
    state = "absent" if files is None else "old" if files == OLD else "new" if files == new else "broken"
    return Trial(disk.fired, state, disk.calls, error)
