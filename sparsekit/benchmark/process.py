"""A worker process as its parent sees it: questions and answers, one JSON document a line, and a certain end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import sparsekit
from sparsekit import errors
from sparsekit.errors import SparsekitError, WorkerLost

ANSWER_SECONDS = 3600.0
_TAIL_LINES = 3
_TAIL_CHARACTERS = 300


class Worker:
    """A child that computes for one contender. Use it as a context manager: at its end the child is gone.

    The child has a session of its own: Ctrl-C reaches the parent alone, which then ends all children.

    Args:
        name: For messages.
        environment: Added to this process's.
        answer_seconds: An answer that takes longer is taken for a child that hangs.
    """

    def __init__(self, name: str, environment: Mapping[str, str], answer_seconds: float = ANSWER_SECONDS) -> None:
        self.name = name
        self._answer_seconds = answer_seconds
        self._read = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        root = str(Path(sparsekit.__file__).parents[1])  # the child runs the code that the parent runs
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsekit.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path, **environment},
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def ask(self, task: str, **arguments: Any) -> Any:
        """Let the child do a task; return its answer.

        Raises:
            WorkerLost: It died or did not answer in time.
            SparsekitError: What the task itself raised.
        """
        assert self._process.stdin is not None  # noqa: S101 - a pipe, by construction
        try:
            self._process.stdin.write(json.dumps({"task": task, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost(task) from None
        answer = json.loads(self._line(task))
        if "error" in answer:
            raise _rebuilt(answer["error"])
        return answer["result"]

    def _line(self, task: str) -> bytes:
        """Return the next line of the child."""
        assert self._process.stdout is not None  # noqa: S101
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self._answer_seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                raise self._lost(task, f"did not answer within {self._answer_seconds:g} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._lost(task)
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _lost(self, task: str, how: str | None = None) -> WorkerLost:
        """Return the error of a child that is gone, with the last lines it wrote."""
        hint = "Run the same command again."
        if how is None:
            try:
                code = self._process.wait(10)
            except subprocess.TimeoutExpired:  # it closed the pipe and goes on
                self._kill()
                code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if code == -signal.SIGKILL:
                hint = "The system does that when memory runs out; close other programs, then run it again."
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
        said = " | ".join(line.strip() for line in lines)[-_TAIL_CHARACTERS:]
        return WorkerLost(
            f"{how}{f'; its last words: {said}' if said else ''}", where=f"{self.name}, {task}", hint=hint
        )

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._process.poll() is None:
            self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def _rebuilt(error: Mapping[str, Any]) -> SparsekitError:
    """Return the error that a child described."""
    kind = getattr(errors, str(error["type"]), SparsekitError)
    rebuilt: SparsekitError = kind(error["message"], where=error["where"], hint=error["hint"])
    return rebuilt
