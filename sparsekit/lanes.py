"""Samples or linears side by side, one thread each or more, with the same result as one after the other.

The operations of one block on one sample are short: split over threads, each waits for the slowest at its end, and on a
machine with other work the waiting costs ten times the computing. Whole samples need no such meetings. What has to
happen in the order of the samples, such as adding to a sum, takes turns. Linears are no different.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sparsekit.lazy import torch

MAX_LANES = 16
"""More threads than this go into the operations: every lane holds the activations of one sample."""

SOLVED_AT_ONCE = 2
"""Linears of a block that are pruned side by side."""


class _Stopped(Exception):  # a signal that ends a lane, not an error
    """Another sample failed, or the user wants to stop."""


class Turns:
    """Lets lanes do a named thing in the order of their samples."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: dict[str, int] = {}  # name -> the first sample that has not done it
        self._running: set[int] = set()
        self._started = 0
        self._limit: float = float("inf")  # samples from here on are not wanted any more

    @contextmanager
    def turn(self, name: str, sample: int) -> Iterator[None]:
        """Wait until every earlier sample has done `name` or has ended; then it is the caller's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_due(name, sample) or sample >= self._limit)
            if sample >= self._limit:
                raise _Stopped
        yield
        with self._changed:
            self._next[name] = max(sample + 1, self._next.get(name, 0))
            self._changed.notify_all()

    def _is_due(self, name: str, sample: int) -> bool:
        return max(self._next.get(name, 0), min(self._running, default=self._started)) >= sample

    def _begin(self) -> int:
        """Take the next sample; they begin in order, so the earliest running one never waits."""
        with self._changed:
            sample = self._started
            if sample >= self._limit:
                raise _Stopped
            self._started += 1
            self._running.add(sample)
            return sample

    def _end(self, sample: int) -> None:
        with self._changed:
            self._running.discard(sample)
            self._changed.notify_all()

    def _stop_from(self, sample: int) -> None:
        """Samples from `sample` on are of no use any more; earlier ones go on."""
        with self._changed:
            self._limit = min(self._limit, sample)
            self._changed.notify_all()


def side_by_side(count: int, work: Callable[[int, Turns], None], *, most: int = MAX_LANES) -> None:
    """Call `work(sample, turns)` for every sample of range(count), several at a time.

    Args:
        count: Number of samples.
        work: Does one sample. It changes nothing that other samples use, except in its turn.
        most: Largest number of lanes; 1 runs the samples one after the other, in the calling thread.

    Raises:
        Exception: What `work` raised for the earliest sample that failed, whatever the number of lanes.
    """
    turns = Turns()
    threads = torch.get_num_threads()
    lanes = max(1, min(threads, count, most))
    errors: dict[int, Exception] = {}

    def one(_: int) -> None:
        try:
            sample = turns._begin()
        except _Stopped:
            return
        try:
            work(sample, turns)
        except _Stopped:
            pass
        except Exception as error:
            errors[sample] = error
            turns._stop_from(sample)
        finally:
            turns._end(sample)

    if lanes == 1:
        for number in range(count):
            one(number)
    else:
        _in_threads(one, count, lanes, threads, turns)
    if errors:
        raise errors[min(errors)]


def _in_threads(one: Callable[[int], None], count: int, lanes: int, threads: int, turns: Turns) -> None:
    """Run `one` in `lanes` threads that share torch's threads between them."""
    inside = threads // lanes
    pool = ThreadPoolExecutor(lanes, "sparsekit-lane", initializer=lambda: torch.set_num_threads(inside))
    try:
        for future in [pool.submit(one, number) for number in range(count)]:
            future.result()
    except BaseException:
        turns._stop_from(0)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
