"""How a command ends that runs in several processes: with one message, one exit code, and no rank left behind.

A rank that fails alone leaves the others, so that none of them waits for it, and its error where they find it: in the
store that the launcher gave them to find each other. The first rank that is alive reports; the others are silent and
stay until it has, for a launcher kills all ranks as soon as one of them has failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from datetime import timedelta
from typing import Any

from sparsekit import errors, ranks
from sparsekit.errors import SparsekitError, WorkerLost

_ANSWER = timedelta(seconds=6)
"""How long what other ranks say is waited for; launchers kill 30 s after they have asked to end."""
_REPORTED, _INTERRUPTED, _DISCONNECTED = "reported", "interrupted", "disconnected"


def hush() -> None:
    """Silence every rank but the first."""
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
    store = _store()
    if store is None:
        return error
    store.set(f"end/{place.rank}", json.dumps(_record(error)))
    ranks.part()
    if not isinstance(error, KeyboardInterrupt | WorkerLost):
        if not isinstance(error, SparsekitError):
            sys.stderr = sys.__stderr__  # a bug: its traceback is known here and nowhere else
        return error
    ends = {other: json.loads(_found(store, f"end/{other}") or "null") for other in range(place.size)}
    lost = [other for other, end in ends.items() if end is None]
    if all(other in lost for other in range(place.rank)):
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for other, end in ends.items():
        if isinstance(end, dict):
            return _error(end, other)
    if lost:
        return _lost(lost)
    return KeyboardInterrupt() if _INTERRUPTED in ends.values() else error


def leave(code: int) -> int:
    """Stay until the rank that reports has said why the command ends with `code`; return it."""
    ranks.part()
    if code and ranks.launched().size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _ignore_signals()
        if store := _store():
            if _speaks():
                sys.stdout.flush()
                store.set(_REPORTED, "")
            else:
                _found(store, _REPORTED)
    return code


def _speaks() -> bool:
    """Whether what this rank prints is seen."""
    return sys.stderr is sys.__stderr__ or not ranks.launched().rank


def _record(error: BaseException) -> str | dict[str, str | None]:
    """Return what the other ranks are told of the end of this one."""
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, WorkerLost):
        return _DISCONNECTED
    if not isinstance(error, SparsekitError):
        message = f"this is a bug: {type(error).__name__}: {error}"
        error = SparsekitError(message, hint="Please report it with the traceback above.")
    return {"type": type(error).__name__, "message": error.message, "where": error.where, "hint": error.hint}


def _error(record: dict[str, str | None], rank: int) -> SparsekitError:
    found: SparsekitError = getattr(errors, str(record["type"]))(
        f"{record['message']} (rank {rank})", where=record["where"], hint=record["hint"]
    )
    return found


def _lost(lost: list[int]) -> WorkerLost:
    which = f"rank {lost[0]} was" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} were"
    return WorkerLost(
        f"{which} lost: killed, out of memory, or not reachable any more",
        hint="Run the same command again, with any number of ranks: it goes on where it was.",
    )


def _store() -> Any:
    """Return a connection to the launcher's store, None if it has gone with the process that had it."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented all the same

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_ANSWER)
    except RuntimeError:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"sparsekit/{attempt}", store)


def _found(store: Any, key: str) -> str | None:
    """Return what a rank has left under `key`, None if it does not in time."""
    try:
        store.wait([key], _ANSWER)
        return bytes(store.get(key)).decode()
    except RuntimeError:
        return None


def _ignore_signals() -> None:
    """A launcher that sees the first rank end asks the others to: they do already, and have something to say."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
