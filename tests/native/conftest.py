"""The kernel library these tests run: built from the sources as they are now."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from sparsekit.runtime import build, native


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    """Build the library if there is none or the sources have changed since; one process at a time."""
    if "SPARSEKIT_KERNELS" in os.environ:  # built by scripts/test-native
        return
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    build.LIBRARY.parent.mkdir(exist_ok=True)
    with open(build.LIBRARY.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not build.LIBRARY.exists() or native.load(build.LIBRARY).sk_build_id().decode() != build.build_id():
            build.build()
    native.library.cache_clear()


@pytest.fixture(autouse=True)
def _best_isa(_built: None) -> Iterator[None]:
    """Leave the instruction set as it was found."""
    yield
    native.use_isa(None)
