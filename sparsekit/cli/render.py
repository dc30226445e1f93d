"""How results, progress and errors look. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from sparsekit.errors import Interrupted, SparsekitError
from sparsekit.progress import Reporter, Silent
from sparsekit.units import seconds_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDTH = 80
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


# --- results -----------------------------------------------------------------------------------------------
def emit(text: str) -> None:
    """Print a result on standard output."""
    print(printable(text))


def emit_json(document: Any) -> None:
    """Print one JSON document on standard output; NaN and infinity are refused."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def printable(text: str) -> str:
    """Return text with control characters made visible: names from files must not steer the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = (), width: int = WIDTH
) -> str:
    """Return an aligned text table.

    Args:
        headers: One title per column.
        rows: Cells, as many per row as there are headers.
        right: Columns aligned to the right, such as numbers.
        width: Characters per line; the widest columns wrap to keep it.
    """
    cells = [[printable(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(1, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    spare = width - 2 * (len(widths) - 1)
    while sum(widths) > spare and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for number, row in enumerate(cells):
        wrapped = [textwrap.wrap(cell, widths[column]) or [""] for column, cell in enumerate(row)]
        for height in range(max(len(part) for part in wrapped)):
            parts = [part[height] if height < len(part) else "" for part in wrapped]
            aligned = [
                part.rjust(widths[column]) if column in right else part.ljust(widths[column])
                for column, part in enumerate(parts)
            ]
            lines.append("  ".join(aligned).rstrip())
        if number == 0:
            lines.append("  ".join("-" * size for size in widths))
    return "\n".join(lines)


def fill(text: str, width: int = WIDTH) -> str:
    """Return a sentence in lines of at most `width` characters; words are broken only where they do not fit."""
    return textwrap.fill(printable(text), width, break_on_hyphens=False)


def pairs(rows: Sequence[tuple[str, str]], width: int = WIDTH) -> str:
    """Return `name  value` lines; empty values are left out, long ones wrap at spaces where they can."""
    shown = [(name, value) for name, value in rows if value]
    indent = max((len(name) for name, _ in shown), default=0) + 2
    return "\n".join(
        textwrap.fill(
            printable(value),
            width,
            initial_indent=name.ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for name, value in shown
    )


# --- errors ------------------------------------------------------------------------------------------------
def show_error(error: SparsekitError, *, as_json: bool) -> None:
    """Print an expected error: one line per problem on standard error, or a JSON document."""
    if as_json:
        emit_json(error_document(type(error).__name__, error.message, error.where, error.hint))
        return
    prefix = "" if isinstance(error, Interrupted) else "error: "
    for line in str(error).splitlines() or [""]:
        print(f"{prefix}{printable(line)}", file=sys.stderr)


def end_with(error: SparsekitError) -> NoReturn:
    """End a command whose result has been printed; with --json, standard output holds that document alone."""
    show_error(error, as_json=False)
    raise typer.Exit(error.exit_code)


def error_document(kind: str, message: str, where: str | None, hint: str | None) -> Mapping[str, Any]:
    """Return the JSON document of an error."""
    return {"error": {"type": kind, "message": message, "where": where, "hint": hint}}


# --- progress ----------------------------------------------------------------------------------------------
@contextmanager
def reporter(*, quiet: bool) -> Iterator[Reporter]:
    """Yield what shows progress on standard error: bars on a terminal, lines elsewhere, nothing if quiet."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
            yield BarReporter(progress)
    else:
        lines = LineReporter(sys.stderr)
        try:
            yield lines
        finally:
            lines.close()


class BarReporter:
    """Progress bars with the time left, for a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, tuple[TaskID, int, int | None, str]] = {}
        self._told: dict[str, str] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Show a bar for the step; a bar of the same name is replaced."""
        if task in self._tasks:
            self._progress.remove_task(self._tasks[task][0])
        identity = self._progress.add_task(printable(task), total=total, amount=_amount(0, total, unit))
        self._tasks[task] = (identity, 0, total, unit)

    def advance(self, task: str, amount: int = 1) -> None:
        """Move the step's bar."""
        identity, done, total, unit = self._tasks[task]
        self._tasks[task] = (identity, done + amount, total, unit)
        text = _amount(done + amount, total, unit) + self._told.get(task, "")
        self._progress.update(identity, advance=amount, amount=text)

    def tell(self, task: str, text: str) -> None:
        """Show the words beside the amount, from the next one on."""
        self._told[task] = f", {printable(text)}"

    def finish(self, task: str) -> None:
        """Stop the step's clock; the bar stays as a record."""
        self._progress.stop_task(self._tasks[task][0])

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class LineReporter:
    """Plain lines for logs: at the start, about every tenth or ten seconds, and at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._tasks: dict[str, _Step] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Print the name of the step and how much there is to do."""
        self._tasks[task] = _Step(total, unit, self._clock())
        self.note(f"{task}: {total} {unit}" if total is not None else task)

    def advance(self, task: str, amount: int = 1) -> None:
        """Count, and print a line when it is time for one."""
        step = self._tasks[task]
        step.done += amount
        now = self._clock()
        waited = now - step.printed_at
        tenth = step.total is not None and (step.done - step.printed) * 10 >= step.total
        if step.done == step.total or not (waited >= 10 or (tenth and waited >= 1)):
            return
        step.printed, step.printed_at = step.done, now
        text = f"{task}: {_amount(step.done, step.total, step.unit)}"
        if step.total:
            left = (now - step.started_at) / step.done * (step.total - step.done)
            text += f" ({100 * step.done / step.total:.0f} %), {seconds_text(left)} left"
        self.note(text + step.told)

    def tell(self, task: str, text: str) -> None:
        """Put the words at the end of the step's lines."""
        self._tasks[task].told = f", {text}"

    def finish(self, task: str) -> None:
        """Print how much was done in what time; once."""
        step = self._tasks.pop(task, None)
        if step is None:
            return
        done = f"{step.done} {step.unit}" if step.done == step.total else _amount(step.done, step.total, step.unit)
        self.note(f"{task}: {done} in {seconds_text(self._clock() - step.started_at)}{step.told}")

    def close(self) -> None:
        """Finish what an error left open: now, before the error is shown, not when its generator is collected."""
        for task in list(self._tasks):
            self.finish(task)

    def note(self, text: str) -> None:
        """Print the line."""
        print(printable(text), file=self._stream, flush=True)


class _Step:
    def __init__(self, total: int | None, unit: str, now: float) -> None:
        self.total = total
        self.unit = unit
        self.done = self.printed = 0
        self.told = ""
        self.started_at = self.printed_at = now


def _amount(done: int, total: int | None, unit: str) -> str:
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
