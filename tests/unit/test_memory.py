"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from sparsekit.memory import release_freed


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_pieces_between_used_ones_go_back():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    pieces = []
    for _ in range(400):  # 100 KiB that go, 5 KiB that stay
        piece, stays = libc.malloc(100 << 10), libc.malloc(5 << 10)
        ctypes.memset(piece, 1, 100 << 10)
        pieces.append((piece, stays))
    for piece, _ in pieces:
        libc.free(piece)
    before = resident_bytes()
    release_freed()
    assert before - resident_bytes() > 20 << 20
    for _, stays in pieces:
        libc.free(stays)
