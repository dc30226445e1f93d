"""Running a command as a child and measuring all of it: wall time, processor time, peak resident memory.

Standard library only, and small: the kernel counts a parent's size at the fork as part of its child's peak. A program
that is large itself asks for a run in between: `run_apart`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Usage:
    """What one run of a command took.

    Attributes:
        wall_seconds: From its start to its end.
        cpu_seconds: Processor time of all its threads, user and system.
        peak_bytes: Largest resident size, mapped files included.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Usage:
    """Run a command to its end; its output goes to `log`.

    Raises:
        SystemExit: It failed; with the last lines of its output.
    """
    words = [str(word) for word in command]
    start = time.perf_counter()
    with log.open("wb") as output:
        child = subprocess.Popen(words, stdout=output, stderr=output, env=dict(environment))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall_seconds = time.perf_counter() - start
    if child.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"error: exit code {child.returncode} from: {' '.join(words)}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(wall_seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def middle(usages: Sequence[Usage]) -> Usage:
    """Return the median of each number."""
    return Usage(
        median(usage.wall_seconds for usage in usages),
        median(usage.cpu_seconds for usage in usages),
        int(median(usage.peak_bytes for usage in usages)),
    )


def run_apart(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Usage:
    """Do what `run` does from a small process of its own; raises as it does."""
    words = [sys.executable, __file__, str(log), *(str(word) for word in command)]
    done = subprocess.run(words, env=dict(environment), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return Usage(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[2:], os.environ, Path(sys.argv[1])))))
