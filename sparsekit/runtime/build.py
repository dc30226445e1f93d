"""Compiling the CPU kernels with the C++ compiler at hand: one object per instruction set, one shared library.

Standard library only, and no import of sparsekit: the build hook loads this file by its path before the package
exists. `python -m sparsekit.runtime.build` builds in place, as an editable installation needs after a change.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_lib" / "libsparsekit_kernels.so"

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt", "-mf16c")
_AVX512 = (
    *_AVX2,
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "vbmi2", "vnni")),
    "-mprefer-vector-width=512",
    # gcc's own intrinsics headers build "undefined" vectors from themselves.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
_PLAIN = (
    *("columns", "columns_pack", "columns_portable", "disk", "disk_values", "expand"),
    *("isa", "linear", "linear_quantised", "pack", "pack_bitmap", "pack_block", "pack_chunk", "pack_quantised"),
    *("pack_split", "repack", "rows", "pool", "torch_columns", "torch_shim", "unpack"),
    *("kernels_portable", "quantised_portable"),
)


class BuildFailed(Exception):
    """The compiler is missing or refused a source; the text holds its own message."""


@dataclass(frozen=True)
class Unit:
    """One object file: `source` compiled with `flags`."""

    source: str
    flags: tuple[str, ...] = ()
    suffix: str = ""


def units(machine: str) -> list[Unit]:
    """Return what is compiled for a machine type as `platform.machine()` names it."""
    plain = [Unit(name) for name in _PLAIN]
    if machine in {"x86_64", "AMD64"}:
        # The oldest processors torch itself runs on; everything faster is chosen at run time.
        baseline = ("-march=x86-64", "-msse4.2", "-mpopcnt")
        plain = [Unit(unit.source, baseline) for unit in plain]
        return [
            *plain,
            Unit("columns_avx2", ("-march=x86-64", *_AVX2)),
            Unit("columns_avx512", ("-march=x86-64", *_AVX512)),
            Unit("columns_avx512", ("-march=x86-64", *_AVX512, "-mavx512bf16", "-DSK_WITH_BF16"), "_bf16"),
            Unit("quantised_avx2", ("-march=x86-64", *_AVX2)),
            Unit("quantised_avx512", ("-march=x86-64", *_AVX512)),
            Unit("repack_avx512", ("-march=x86-64", *_AVX512)),
            Unit("gram_avx512bf16", ("-march=x86-64", *_AVX512, "-mavx512bf16")),
            Unit("kernels_avx2", ("-march=x86-64", *_AVX2)),
            Unit("kernels_avx512", ("-march=x86-64", *_AVX512)),
            Unit("kernels_avx512", ("-march=x86-64", *_AVX512, "-mavx512bf16", "-DSK_WITH_BF16"), "_bf16"),
        ]
    if machine in {"aarch64", "arm64"}:
        return [*plain, Unit("columns_neon", ("-march=armv8-a",)), Unit("kernels_neon", ("-march=armv8-a",))]
    return plain


def build_id() -> str:
    """Return a hash of everything the library is made from, which the library carries too."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, c++, g++ or clang++, whichever exists first."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(target: Path = LIBRARY, *, extra: tuple[str, ...] = (), machine: str | None = None) -> Path:
    """Compile and link the library, replacing `target` in one step.

    Args:
        target: Where the shared library goes.
        extra: Further flags for compiler and linker (sanitisers).
        machine: Machine type; default: this one.

    Returns:
        `target`.

    Raises:
        BuildFailed: No compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = compile_units(compiler, Path(folder), extra, machine or platform.machine())
        made = Path(folder) / target.name
        # libstdc++ stays shared: the torch operator reports errors as exceptions that torch catches.
        _call([compiler, "-shared", "-pthread", *extra, "-o", str(made), *map(str, objects)])
        made.replace(target)  # a process that has the old one mapped keeps it
    return target


def compile_units(compiler: str, folder: Path, extra: tuple[str, ...], machine: str) -> list[Path]:
    """Compile all units for `machine` into `folder` and return the object files."""
    identity = f'-DSK_BUILD_ID="{build_id()}"'

    def compile_one(unit: Unit) -> Path:
        made = folder / f"{unit.source}{unit.suffix}.o"
        source = SOURCES / f"{unit.source}.cpp"
        _call([compiler, *_COMMON, *unit.flags, *extra, identity, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        # The slowest first, so that none is left over at the end.
        return list(pool.map(compile_one, reversed(units(machine))))


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
