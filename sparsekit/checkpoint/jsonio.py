"""JSON as sparsekit reads and writes it: strict on the way in, one spelling on the way out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from sparsekit import fs
from sparsekit.errors import CheckpointError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


def canonical(value: JSON) -> bytes:
    """Return the one compact spelling of `value`: sorted keys, ASCII, no NaN; what hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def readable(value: JSON) -> bytes:
    """Return the one indented spelling of `value`, for files that people open."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def digest(value: JSON) -> str:
    """Return the sha256 of the canonical spelling, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def parse(data: bytes, *, where: str, error: type[CheckpointError] = CheckpointError) -> JSON:
    """Read UTF-8 JSON; duplicate keys, NaN, infinities and absurd depth are refused.

    Raises:
        CheckpointError: Or the given subclass, with `where` in front.
    """

    def pairs(items: list[tuple[str, JSON]]) -> dict[str, JSON]:
        result = dict(items)
        if len(result) != len(items):
            names = [key for key, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} appears twice")
        return result

    def constant(text: str) -> JSON:
        raise ValueError(f"{text} is not JSON")

    try:
        value: JSON = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as cause:
        raise error(f"not UTF-8 at byte {cause.start:,}", where=where) from cause
    except RecursionError as cause:
        raise error("not usable JSON: nested too deeply", where=where) from cause
    except ValueError as cause:
        raise error(f"not usable JSON: {cause}", where=where) from cause
    return value


def read(path: Path, *, limit_bytes: int, error: type[CheckpointError] = CheckpointError) -> tuple[bytes, JSON]:
    """Read a JSON file of at most `limit_bytes`; return its bytes and its value.

    Raises:
        CheckpointError: Or the given subclass: too big or not strict JSON.
        ResourceError: The file cannot be read.
    """
    with fs.typed_errors(path), path.open("rb") as handle:
        data = handle.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise error(f"more than {limit_bytes:,} bytes; a file of this kind is never so big", where=str(path))
    return data, parse(data, where=str(path), error=error)
