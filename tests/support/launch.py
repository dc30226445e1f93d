"""`sparsekit` in several processes, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fault.command import PROGRAM, Ended, Nursery


def torchrun(size: int, arguments: Sequence[Any], before: str = "") -> Ended:
    """Start a command with torchrun, each process after some Python statements."""
    program = ["--no-python", sys.executable, "-c", f"{before}\n{PROGRAM}"] if before else ["-m", "sparsekit"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *program]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def fork(nursery: Nursery, size: int, arguments: Sequence[Any], before: str = "") -> list[Ended]:
    """Start a command in forked processes that find each other as those of a launcher do; return how each ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    local = {"LOCAL_WORLD_SIZE": str(size)}
    children = [
        nursery.start(arguments, before=before, RANK=str(rank), LOCAL_RANK=str(rank), **address, **local)
        for rank in range(size)
    ]
    return [nursery.collect(child) for child in children]
