"""Any number of threads, two callers at once, and a fork after the first call give the same product."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from sparsekit.runtime import native
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import EXACT, case, multiply

CODE = """
import os, sys, torch
from sparsekit.runtime import native
from sparsekit.runtime.buffers import MemoryLayout
from tests.native.cases import case, multiply
if sys.argv[1] == "own":
    native.library().sk_use_own_pool()
made = case(300, 200, 0.5, torch.bfloat16)
packed, x = made.pack(MemoryLayout.SPLIT), torch.randn(2, 200).bfloat16()
first = multiply(packed, x, 300, threads=3)
child = os.fork()
if child == 0:
    same = all(torch.equal(multiply(packed, x, 300, threads=3), first) for _ in range(20))
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(multiply(packed, x, 300, threads=3), first)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("layout", EXACT)
@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(layout: MemoryLayout, tokens: int) -> None:
    made = case(500, 130, 0.5, torch.bfloat16)
    packed, x = made.pack(layout), torch.randn(tokens, 130).bfloat16()
    one = multiply(packed, x, 500)
    for threads in (2, 3, 4, 8):
        for _ in range(5):
            assert torch.equal(multiply(packed, x, 500, threads=threads), one)


def test_callers_at_the_same_time() -> None:
    made = [case(200, 130 + i, 0.5, torch.bfloat16) for i in range(4)]
    packed = [m.pack(MemoryLayout.SPLIT) for m in made]
    xs = [torch.randn(3, 130 + i).bfloat16() for i in range(4)]
    expected = [multiply(p, x, 200) for p, x in zip(packed, xs, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        results = [multiply(packed[i], xs[i], 200, threads=2) for _ in range(30)]
        wrong.extend(i for result in results if not torch.equal(result, expected[i]))

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive(), "deadlock"
    assert wrong == []


@pytest.mark.parametrize("pool", ["torch", "own"])
def test_fork_after_the_first_call(pool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, pool],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
    )
    assert done.returncode == 0, done.stderr


def test_one_openmp_runtime() -> None:
    native.library()
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) <= 1
