"""The C interface from C++, on this processor and on 64-bit ARM under an emulator.

`cross/check.cpp` packs, unpacks and multiplies in every layout with every instruction set, without Python or torch.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsekit.runtime import build, native

PROGRAM = Path(__file__).parent / "cross" / "check.cpp"


def make(compiler: str, folder: Path, machine: str) -> Path:
    """Compile all kernels for `machine` with the flags of the package, and the program, into one static binary."""
    objects = build.compile_units(compiler, folder, (), machine)
    program = folder / "check"
    # Static, so that the emulator needs no libraries of that machine.
    command = [compiler, "-std=c++17", "-O1", "-static", "-pthread", f"-I{build.SOURCES}", "-o", str(program)]
    subprocess.run([*command, str(PROGRAM), *map(str, objects)], check=True, timeout=300)
    return program


def run(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_here(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    command = [compiler, "-std=c++17", "-O1", "-pthread", f"-I{build.SOURCES}", "-o", str(tmp_path / "check")]
    command += [str(PROGRAM), str(build.LIBRARY), f"-Wl,-rpath,{build.LIBRARY.parent}"]
    subprocess.run(command, check=True, timeout=300)
    assert run([str(tmp_path / "check")]) == [f"{isa}: good" for isa in native.isas()]


def test_arm_under_an_emulator(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if platform.machine() in {"aarch64", "arm64"}:
        pytest.skip("this machine is 64-bit ARM: test_here runs the same")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static")
    program = make(compiler, tmp_path, "aarch64")
    assert run([emulator, str(program)]) == ["portable: good", "neon: good"]
