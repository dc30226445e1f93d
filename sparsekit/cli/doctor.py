"""`sparsekit doctor`: what this machine and installation have, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json
from sparsekit.machine import cpuinfo, usable_cores
from sparsekit.units import bytes_text

_CPU_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
)
_ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2")
_EXTRAS = {"eval": "lm_eval", "report": "matplotlib"}
_EXIT_PROBLEM = 5


def doctor(json: Json = False) -> None:
    """Show versions, processor, memory, disk and Hub settings; exit code 5 if something must be repaired."""
    found: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "torch": _torch(),
        "kernels": _kernels(),
        "hub": _hub(),
        "extras": _extras(),
    }
    found["problems"] = _problems(found)
    if json:
        render.emit_json(found)
    else:
        for title in ("versions", "machine", "torch", "kernels", "hub", "extras"):
            rows = [
                [key.removesuffix("_bytes").replace("_", " "), _shown(key, value)]
                for key, value in found[title].items()
            ]
            render.emit(render.table([title, ""], rows) + "\n")
        render.emit("\n".join(f"problem: {text}" for text in found["problems"]) or "No problems found.")
    if found["problems"]:
        raise typer.Exit(_EXIT_PROBLEM)


def _versions() -> dict[str, str | None]:
    names = ("sparsekit", "torch", "transformers", "safetensors", "datasets", "tokenizers", "lm_eval")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    total, free = _memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpuinfo("model name") or platform.processor() or None,
        "cpu_flags": _cpu_flags(),
        "usable_cores": usable_cores(),
        "memory_bytes": total,
        "memory_free_bytes": free,
        "disk_free_here_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def _cpu_flags() -> list[str]:
    flags = (cpuinfo("flags") or cpuinfo("Features") or "").split()
    return [flag for flag in (*_CPU_FLAGS, *_ARM_FLAGS) if flag in flags]


def _memory() -> tuple[int | None, int | None]:
    """Return total and available memory in bytes; a container's limit counts where there is one."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None, None
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").strip()
    except OSError:  # no cgroup v2
        return None
    return int(text) if text.isdigit() else None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"imports": False, "why": f"{type(error).__name__}: {error}"}
    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "imports": True,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": cuda,
    }


def _kernels() -> dict[str, Any]:
    """Return what multiplies with packed weights; without torch nothing does."""
    try:
        from sparsekit.runtime import native

        return native.describe()
    except (ImportError, OSError) as error:
        return {"instruction_set": None, "why": f"{type(error).__name__}: {error}"}


def _hub() -> dict[str, Any]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        "cache": str(cache),
        "cache_writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "cache_disk_free_bytes": shutil.disk_usage(existing).free,
        "token_set": bool(os.environ.get("HF_TOKEN")),
    }


def _extras() -> dict[str, str]:
    return {
        extra: f"{name} {version}"
        if (version := _version(name))
        else f"not installed: pip install 'sparsekit[{extra}]'"
        for extra, name in _EXTRAS.items()
    }


def _problems(found: dict[str, Any]) -> list[str]:
    problems = [
        f"{requirement.split()[0]} is needed and missing; install sparsekit again" for requirement in _missing()
    ]
    if not found["torch"]["imports"]:
        problems.append(f"torch does not import ({found['torch']['why']}); install it again")
    if found["torch"]["imports"] and found["kernels"]["instruction_set"] is None:
        problems.append(f"packed layers cannot run: {found['kernels']['why']}")
    if not found["hub"]["cache_writable"]:
        problems.append(f"{found['hub']['cache']} is not writable; set HF_HOME to a folder that is")
    return problems


def _missing() -> list[str]:
    """Return what sparsekit requires and the environment lacks, extras aside."""
    required = importlib.metadata.requires("sparsekit") or []
    names = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in required if "extra ==" not in text]
    return [name for name in names if _version(name) is None]


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "unknown" if key.endswith("bytes") else "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return bytes_text(value)
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)
