"""Numbers with units, as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units, as the Hub shows them: `2.20 GB`."""
    return _scaled(count, ["B", "kB", "MB", "GB", "TB", "PB"])


def count_text(count: float) -> str:
    """Return a large number shortened: `134.5 M`."""
    return _scaled(count, ["", "k", "M", "G", "T"]).rstrip()


def seconds_text(seconds: float) -> str:
    """Return a duration: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(count: float, units: Sequence[str]) -> str:
    power = 0
    while abs(count) >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    if power == 0:
        return f"{count:.0f} {units[0]}"
    return f"{count:.{2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0}f} {units[power]}"
