"""Running the command line on bad input, and what every refusal has to look like.

`invoke` runs a command inside this process, through the same guarded application that `sparsekit` starts. `Nursery`
is a process that has imported everything and forks one child per command, so that real processes can be killed and
run again without paying for the imports each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sparsekit.cli.app import build

PROGRAM = "from sparsekit.cli.app import main; main()"
SMALL = (
    "calibration.source=builtin", "calibration.samples=3", "calibration.sequence_length=32",
    "evaluate.samples=2", "evaluate.sequence_length=32", "save.format=dense",
)  # fmt: skip
_PROGRESS = re.compile(
    r"^(fetching|unpacking|Opening|Asking|Reading|tokenise|perplexity|comparison|prune|\d+ tensors) ?"
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what was wrong; progress lines before it do not count."""
        lines = [line for line in self.err.splitlines() if not _PROGRESS.match(line)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0]


def settings(*changes: str) -> list[str]:
    """Return recipe keys as options."""
    return [word for change in changes for word in ("--set", change)]


def prune_arguments(
    model: Any, out: Any, *more: Any, recipe: Any = "magnitude-50", evaluate: bool = False
) -> list[str]:
    """Return a `prune` command on a little built-in text."""
    measure = [] if evaluate else ["--no-evaluate"]
    return [str(word) for word in ("prune", model, "-r", recipe, "-o", out, *settings(*SMALL), *measure, *more)]


def invoke(*arguments: Any) -> Ended:
    """Run a command in this process."""
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments])
    return Ended(result.exit_code, result.stdout, result.stderr)


def command(*arguments: Any, before: str = "", env: Mapping[str, str | None] | None = None, cwd: Any = None) -> Ended:
    """Run `sparsekit` in a process of its own, after shell commands such as `ulimit`."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        ["bash", "-c", f'{before}\nexec "$@"', "bash", sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={name: value for name, value in environment.items() if value is not None},
        cwd=cwd,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def check_refusal(ended: Ended, code: int, *says: str) -> None:
    """One line that names what, where and the next step; the right code; nothing on standard output."""
    assert ended.code == code, (ended.code, ended.out, ended.err)
    line = ended.error
    for text in says:
        assert text in line, (text, line)
    assert ended.out == ""
    assert "bug" not in line
    assert len(line) < 700, line
    assert "  " not in line


def leftovers(out: Path) -> list[str]:
    """Return the names of OUT and of everything a run writes beside it."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name))


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def identity(out: Path) -> str:
    """Return the hash of all that may not differ between equal runs."""
    return str(json.loads((out / "sparsekit.json").read_text(encoding="utf-8"))["identity_sha256"])


def wait_for(condition: Any, seconds: float = 60) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


_NURSERY = """
import json, os, sys
from sparsekit.cli import app
import torch, transformers, accelerate, sparsekit.run, sparsekit.data.hub, sparsekit.evaluate.table
from transformers.models.llama import modeling_llama
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "collect" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["collect"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(task["logs"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        torch.set_num_threads(task["threads"])
        sys.argv = ["sparsekit", *task["arguments"]]
        os.environ.update(task["env"])
        code = 70
        try:
            exec(task["before"])
            app.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
"""


@dataclass(frozen=True)
class Child:
    """A command that a nursery has started."""

    pid: int
    logs: str


class Nursery:
    """Starts commands in forked processes; use it as a context manager.

    Attributes:
        threads: Threads that torch computes with in the commands to come.
    """

    def __init__(self, folder: Path, **env: str) -> None:
        self._folder = folder
        self._started = 0
        self.threads = 1
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def __enter__(self) -> Nursery:
        assert self._line() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, arguments: Sequence[str], *, before: str = "", **env: str) -> Child:
        """Start a command, after Python statements that break something."""
        self._started += 1
        logs = str(self._folder / f"log-{self._started}")
        arguments = [str(argument) for argument in arguments]
        task = {"arguments": arguments, "logs": logs, "threads": self.threads, "before": before, "env": env}
        return Child(int(self._ask(task)), logs)

    def collect(self, child: Child) -> Ended:
        """Wait for the end of a command."""
        code = int(self._ask({"collect": child.pid}))
        out, err = (Path(f"{child.logs}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        return Ended(code, out, err)

    def run(self, arguments: Sequence[str]) -> Ended:
        """Run a command to its end."""
        return self.collect(self.start(arguments))

    def _ask(self, task: Mapping[str, Any]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
