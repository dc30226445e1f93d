"""How long steps tell that they are alive: typed calls on a Reporter, rendered by the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Receives progress. Library code never prints."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """A step called `task` begins; `total` units of work are expected (None: unknown)."""

    def advance(self, task: str, amount: int = 1) -> None:
        """`amount` more units of `task` are done."""

    def tell(self, task: str, text: str) -> None:
        """What `task` has found so far, in a few words that replace the ones before."""

    def finish(self, task: str) -> None:
        """`task` is over."""

    def note(self, text: str) -> None:
        """One line worth showing whatever the step."""


class Silent:
    """A Reporter that shows nothing."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Show nothing."""

    def advance(self, task: str, amount: int = 1) -> None:
        """Show nothing."""

    def tell(self, task: str, text: str) -> None:
        """Show nothing."""

    def finish(self, task: str) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


def track(items: Iterable[T], reporter: Reporter, task: str, total: int | None, unit: str) -> Iterator[T]:
    """Yield `items`, reporting one unit of progress after each."""
    reporter.start(task, total, unit)
    try:
        for item in items:
            yield item
            reporter.advance(task)
    finally:
        reporter.finish(task)
