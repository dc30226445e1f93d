"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: how much of freed memory is still held depends on everything allocated before.
_SCRIPT = """
import ctypes
from pathlib import Path
from sparsekit.memory import release_freed

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_trim"):
    print("not glibc")
    raise SystemExit
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = []
for _ in range(400):  # 100 KiB that go, 5 KiB that stay
    piece, stays = libc.malloc(100 << 10), libc.malloc(5 << 10)
    ctypes.memset(piece, 1, 100 << 10)
    pieces.append((piece, stays))
for piece, _ in pieces:
    libc.free(piece)
before = resident_bytes()
release_freed()
print(before - resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_pieces_between_used_ones_go_back():
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "not glibc":
        pytest.skip("not glibc")
    assert int(done.stdout) > 20 << 20
