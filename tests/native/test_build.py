"""What is compiled where, and what happens when nothing can be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sparsekit.runtime import build, native


def test_every_unit_has_a_source_and_only_the_kernels_get_an_instruction_set() -> None:
    for machine in ("x86_64", "aarch64", "riscv64"):
        for unit in build.units(machine):
            assert (build.SOURCES / f"{unit.source}.cpp").exists()
    flags = {unit.source + unit.suffix: unit.flags for unit in build.units("x86_64")}
    wide = {name for name, given in flags.items() if any("avx" in flag for flag in given)}
    both = {f"{kind}_{isa}" for kind in ("columns", "kernels", "quantised") for isa in ("avx2", "avx512")}
    assert wide == both | {"columns_avx512_bf16", "kernels_avx512_bf16", "repack_avx512", "gram_avx512bf16"}
    assert not any("native" in flag for given in flags.values() for flag in given)
    neon = {unit.source: unit.flags for unit in build.units("aarch64") if unit.flags}
    assert neon == {f"{kind}_neon": ("-march=armv8-a",) for kind in ("columns", "kernels")}
    assert all(unit.flags == () for unit in build.units("riscv64"))


def test_the_library_carries_the_hash_of_its_sources() -> None:
    assert native.library().sk_build_id().decode() == build.build_id()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildFailed, match="no C\\+\\+ compiler"):
        build.build(tmp_path / "lib.so")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho unknown flag >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    target = tmp_path / "out" / "lib.so"
    with pytest.raises(build.BuildFailed, match="unknown flag"):
        build.build(target)
    assert list(target.parent.iterdir()) == []
