"""What the operating system tells about processor and load."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cpuinfo(key: str) -> str | None:
    """Return the first value of a key of /proc/cpuinfo, None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_per_core() -> float | None:
    """Return how many processes wanted to run in the last minute, per core; None where the system does not tell."""
    try:
        return os.getloadavg()[0] / usable_cores()
    except OSError:
        return None


def last_level_cache_bytes() -> int | None:
    """Return the size of the largest cache of the first core, None where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text(encoding="ascii").strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=None)


def resident_bytes() -> int | None:
    """Return the resident size of this process, mapped files included; None where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
