"""How a command ends that runs in several processes: with one message, one exit code, and no rank left behind.

A rank that fails alone leaves its error where all find it, in the store through which the launcher let them find each
other, and none of them waits for it any more. The first rank that is alive reports; the others are silent and stay
until it has, for a launcher kills all ranks as soon as one of them has failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from sparsekit import errors, ranks
from sparsekit.errors import SparsekitError, WorkerLost

_ANSWER_SECONDS = 6.0
"""How long what other ranks say is waited for; launchers kill 30 s after they have asked to end."""
_REPORTED, _INTERRUPTED, _DISCONNECTED = "reported", "interrupted", "disconnected"

End = str | dict[str, str | None] | None
"""How a rank has ended: with an error, with what it felt of the end of others, or not yet."""


def hush() -> None:
    """Silence every rank but the first, and torch's warnings of connections that end."""
    if ranks.launched().size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded
    if ranks.launched().rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end


def cause(error: BaseException) -> BaseException:
    """Return what ended the ranks, from what ended this one, which may only have felt the end of another.

    Args:
        error: What the command raised, one of sparsekit's own where that was expected.
    """
    place = ranks.here()
    if place.size == 1:
        return error
    _ignore_signals()
    try:
        ranks.store().set(f"end/{place.rank}", json.dumps(_end(error)))
        ranks.store().set(ranks.ENDED, "")
        if not isinstance(error, KeyboardInterrupt | WorkerLost):
            if not isinstance(error, SparsekitError):
                sys.stderr = sys.__stderr__  # a bug: its traceback is known here and nowhere else
            return error
        ends = _ends(place.size)
    except RuntimeError:  # the store has gone, and with it the process that had it
        ends = {0: None}
    lost = [rank for rank, end in ends.items() if end is None]
    if all(rank in lost for rank in range(place.rank)):
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for rank, end in ends.items():
        if isinstance(end, dict):
            return _error(end, rank)
    if lost:
        return _lost(lost)
    return KeyboardInterrupt() if _INTERRUPTED in ends.values() else error


def leave(code: int) -> int:
    """Stay until the rank that reports has said why the command ends with `code`; return it, or end right here.

    A process that leaves others in the middle of something would wait for them while Python ends.
    """
    place, joined = ranks.launched(), ranks.here().size > 1
    if code == 0 or place.size == 1 or not (joined or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        ranks.part()
        return code
    _ignore_signals()
    try:
        if sys.stderr is sys.__stderr__ or not place.rank:
            ranks.store().set(_REPORTED, "")
        else:
            _wait(lambda: bool(ranks.store().check([_REPORTED])))
    except RuntimeError:
        pass  # whoever had the store has ended already
    if joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _ends(size: int) -> dict[int, End]:
    """Return how all ranks have ended; as soon as one has done so with an error, what is known."""
    found: dict[int, End] = dict.fromkeys(range(size))

    def known() -> bool:
        for rank in [rank for rank, end in found.items() if end is None]:
            if ranks.store().check([f"end/{rank}"]):
                found[rank] = json.loads(ranks.store().get(f"end/{rank}"))
        return all(found.values()) or any(isinstance(end, dict) for end in found.values())

    _wait(known)
    return found


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + _ANSWER_SECONDS
    while not until() and time.monotonic() < end:
        time.sleep(0.02)


def _end(error: BaseException) -> End:
    """Return what the other ranks are told of the end of this one."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, WorkerLost):
        return _DISCONNECTED
    if not isinstance(error, SparsekitError):
        message = f"this is a bug: {type(error).__name__}: {error}"
        error = SparsekitError(message, hint="Please report it with the traceback above.")
    return {"type": type(error).__name__, "message": error.message, "where": error.where, "hint": error.hint}


def _error(end: dict[str, str | None], rank: int) -> SparsekitError:
    kind: type[SparsekitError] = getattr(errors, str(end["type"]))
    return kind(f"{end['message']} (rank {rank})", where=end["where"], hint=end["hint"])


def _lost(lost: list[int]) -> WorkerLost:
    which = f"rank {lost[0]} was" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} were"
    return WorkerLost(
        f"{which} lost: killed, out of memory, or not reachable any more",
        hint="Run the same command again, with any number of ranks: it goes on where it was.",
    )


def _ignore_signals() -> None:
    """A launcher that sees one rank end asks the others to: they do already, and have something to say."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
