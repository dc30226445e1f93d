"""Ranks: processes that torchrun or accelerate started with the same command, and what they tell each other.

All ranks run the same code in step. What one of them decides, reads or writes is `share`d, what can be divided is
`spread`, and an error that one of them meets in what it does alone is raised on all (`together`). In a process on its
own each of these just does what it is given, and torch.distributed is not imported. Only the main thread calls them.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsekit import fs
from sparsekit.errors import ResourceError, SparsekitError, WorkerLost
from sparsekit.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_WAIT = timedelta(days=30)
"""For what one rank does while the others wait: reading, writing, measuring."""
ENDED = "ended"
"""What the store holds once a rank has ended with an error, or was told to."""
_PAUSE_SECONDS = 0.1
_SEEN_SECONDS = 10.0
"""A network file system may remember for a few seconds that a file was not there."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and how many of them are on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 1


_here = Ranks()


def here() -> Ranks:
    """Return the place of this process; alone until it has joined others."""
    return _here


def launched() -> Ranks:
    """Return what a launcher's environment says, whether or not this process has joined; alone without a launcher."""
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if not (said["RANK"].isdigit() and said["WORLD_SIZE"].isdigit() and said["MASTER_ADDR"] and said["MASTER_PORT"]):
        return Ranks()
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return Ranks(int(said["RANK"]), int(said["WORLD_SIZE"]), int(local) if local.isdigit() else 1)


def join() -> None:
    """Join the ranks that a launcher has started; nothing happens without one.

    Raises:
        WorkerLost: They cannot be reached.
    """
    global _here
    found = launched()
    if found.size == 1 or _here.size > 1:
        return
    from accelerate import PartialState

    try:
        PartialState(cpu=True, backend="gloo", timeout=LONGEST_WAIT)  # the computing is done on the CPU
        store()  # while all are there
    except (RuntimeError, ValueError) as error:
        raise WorkerLost(
            f"rank {found.rank} cannot join the other {found.size - 1}: {' '.join(str(error).split())}",
            hint="Start all of them with the same torchrun or accelerate launch command.",
        ) from error
    _here = found


@cache
def store() -> Any:
    """Return the store through which a launcher lets its processes find each other: small texts under names.

    Raises:
        RuntimeError: It cannot be reached.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented all the same

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"sparsekit/{attempt}", TCPStore(*where, timeout=timedelta(seconds=10)))


def part() -> None:
    """Leave the other ranks when all is done."""
    global _here
    if _here.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
    _here = Ranks()


def share(make: Callable[[], Result], source: int = 0) -> Result:
    """Return what `make` returns on the rank `source`, the only one that calls it; tensors of it arrive as copies.

    Raises:
        SparsekitError: What `make` raised there.
        WorkerLost: A rank does not answer any more.
    """
    if _here.size == 1:
        return make()
    if _here.rank != source:
        result, error = _receive(source)
    else:
        result, error = _attempt(make)
        _send((result, error), source)
    if error is not None:
        raise error
    found: Result = result
    return found


def gather(value: Result) -> list[Result]:
    """Return what each rank gives, in their order."""
    return [share(lambda: value, source) for source in range(_here.size)]


@contextmanager
def together() -> Iterator[None]:
    """Do something that can fail on some ranks alone: the error of the first of them is raised on all."""
    if _here.size == 1:
        yield
        return
    own = None
    try:
        yield
    except SparsekitError as error:
        own = error
    if first := next((error for error in gather(own) if error is not None), None):
        raise first


def one_first(make: Callable[[], Result]) -> Result:
    """Return what `make` returns on each rank; the first calls it before the others, which find what it has cached."""
    found: list[Result] = []
    for is_first in (True, False):
        with together():
            if (_here.rank == 0) == is_first:
                found.append(make())
    return found[0]


def portion(count: int) -> slice:
    """Return this rank's share of `count` things: consecutive, the first ranks have one more."""
    rank, size = _here.rank, _here.size
    return slice(-(-count * rank // size), -(-count * (rank + 1) // size))


def spread(items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """Return `work(item)` of all items, each done on one rank."""
    with together():
        own = [work(item) for item in items[portion(len(items))]]
    return [result for found in gather(own) for result in found]


def require_shared(folder: Path) -> None:
    """Refuse a folder that not all ranks see; it is made where it is missing.

    Raises:
        ResourceError: naming a rank that does not find what the first has written there.
    """
    if _here.size == 1:
        return
    mark = share(lambda: _leave_mark(folder))
    try:
        with together():
            _find_mark(folder / mark)
    finally:
        if _here.rank == 0:
            fs.remove_file(folder / mark)


def _leave_mark(folder: Path) -> str:
    fs.make_folder(folder)
    name = f".sparsekit-{uuid.uuid4().hex}"
    fs.write_file(folder / name, b"")
    return name


def _find_mark(path: Path) -> None:
    until = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise ResourceError(
                f"rank {_here.rank} on {socket.gethostname()} does not see what rank 0 writes there",
                where=str(path.parent),
                hint="Name a folder on a file system that all machines share, with -o and --database.",
            )
        time.sleep(0.05)


def _attempt(make: Callable[[], Any]) -> tuple[Any, SparsekitError | None]:
    try:
        return make(), None
    except SparsekitError as error:
        return None, error


# --- objects from one rank to all: the tensors in them are not pickled but travel as they are --------------------
class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, found: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return None
        self.tensors.append(found.detach().contiguous())
        return found.dtype, tuple(found.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        dtype, shape = pid
        self.tensors.append(torch.empty(shape, dtype=dtype))
        return self.tensors[-1]


def _send(value: Any, source: int) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    _broadcast(torch.tensor([len(data)]), source)
    for tensor in (data, *pickler.tensors):
        _broadcast(tensor, source)


def _receive(source: int) -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    _broadcast(size, source)
    data = torch.empty(int(size), dtype=torch.uint8)
    _broadcast(data, source)
    unpickler = _Unpickler(io.BytesIO(data.numpy().data))
    value = unpickler.load()
    for tensor in unpickler.tensors:
        _broadcast(tensor, source)
    return value


def _broadcast(tensor: Tensor, source: int) -> None:
    """Send a contiguous tensor from `source` to all, or receive it; as bytes, which every dtype is."""
    import torch.distributed as dist

    if not tensor.numel():
        return
    try:
        work = dist.broadcast(tensor.reshape(-1).view(torch.uint8), source, async_op=True)
        _wait_for(work)
        work.wait()  # raises what went wrong
    except RuntimeError as error:
        raise WorkerLost(f"the connection to the other ranks broke: {' '.join(str(error).split())[:200]}") from error


def _wait_for(work: Any) -> None:
    """Wait in Python, which hears signals, and hears of a rank that has ended.

    Raises:
        WorkerLost: One has.
    """
    pause = 0.0002
    while not work.is_completed():
        time.sleep(pause)
        pause = min(1.25 * pause, _PAUSE_SECONDS)
        if pause == _PAUSE_SECONDS and store().check([ENDED]):
            raise WorkerLost("another rank has ended")
