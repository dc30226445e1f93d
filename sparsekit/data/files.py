"""Text from local files: `.jsonl`, `.json`, `.txt` and `.parquet`, one path or a glob."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsekit.data.documents import Documents, Part, TextSpec, offline_alternatives, shuffled
from sparsekit.errors import CalibrationError, EmptyText, PermissionRefused, SourceUnavailable
from sparsekit.rng import derive

STREAM_FROM_BYTES = 16 * 2**20
"""Files larger than this together are read from the beginning, as far as needed, in a shuffled stream."""


def looks_like_path(source: str) -> bool:
    """Return whether `source` means local files, whether or not they exist."""
    return (
        Path(source).suffix.lower() in READERS
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or bool(glob.has_magic(source))
        or Path(source).exists()
    )


def documents(spec: TextSpec, part: Part) -> Documents:
    """Return the documents of the files `spec.source` names.

    Raises:
        SourceUnavailable: No such file, or a file of another kind.
        EmptyText: Files that hold nothing.
    """
    if spec.config or spec.split:
        raise CalibrationError(
            "config and split choose within a Hub data set; a local file has neither",
            where=spec.source,
            hint="Remove them.",
        )
    paths = _paths(spec.source, part)
    sizes = [_size(path) for path in paths]
    if not sum(sizes):
        raise EmptyText(f"{len(paths)} file(s) of 0 bytes", where=spec.source, hint="Name a file with text.")
    field = spec.field or "text"
    streamed = sum(sizes) > STREAM_FROM_BYTES
    texts = _texts(paths, field)
    count = f", {len(paths)} files" if len(paths) > 1 else ""
    fields = "" if all(path.suffix.lower() == ".txt" for path in paths) else f", field {field}"
    return Documents(
        texts=shuffled(texts, derive(spec.seed, "text", part)) if streamed else texts,
        description=f"{spec.source}{count}{fields}",
        streamed=streamed,
    )


def _paths(source: str, part: Part) -> list[Path]:
    pattern = str(Path(source).expanduser())
    found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(name) for name in found if glob.has_magic(pattern) is False or Path(name).is_file()]
    if not paths:
        what = "no file matches" if glob.has_magic(source) else "no such file"
        raise SourceUnavailable(
            f"{what} (looked in {Path.cwd()})",
            where=source,
            hint=f"Check the path. {offline_alternatives(part)}",
        )
    for path in paths:
        if path.is_dir():
            raise SourceUnavailable(
                "is a folder, need a file", where=source, hint=f"Name the files: {source.rstrip('/')}/*.jsonl"
            )
        if path.suffix.lower() not in READERS:
            raise SourceUnavailable(
                f"unknown kind of text file {path.suffix!r}",
                where=str(path),
                hint=f"Use one of: {', '.join(READERS)}",
            )
    return paths


def _size(path: Path) -> int:
    try:
        with path.open("rb"):
            return path.stat().st_size
    except PermissionError as error:
        raise PermissionRefused("may not be read", where=str(path), hint="Change its permissions.") from error


def _texts(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        try:
            for text in READERS[path.suffix.lower()](path, field):
                if text.strip():
                    yield text
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"byte {error.start:,} is not UTF-8", where=str(path), hint="Convert the file to UTF-8."
            ) from error


def _read_txt(path: Path, field: str) -> Iterator[str]:
    """Yield the paragraphs, which blank lines separate."""
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                lines.append(line.rstrip("\n"))
            elif lines:
                yield "\n".join(lines)
                lines = []
    if lines:
        yield "\n".join(lines)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(
                    f"not JSON at column {error.colno}: {error.msg}",
                    where=f"{path}:{number}",
                    hint="Each line of a .jsonl file is one JSON object.",
                ) from error
            except RecursionError as error:
                raise _too_deep(f"{path}:{number}") from error
            yield _field(record, field, f"{path}:{number}")


def _read_json(path: Path, field: str) -> Iterator[str]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"not JSON at column {error.colno}: {error.msg}",
            where=f"{path}:{error.lineno}",
            hint="A .json file holds one list of objects or strings; for one object per line name it .jsonl.",
        ) from error
    except RecursionError as error:
        raise _too_deep(str(path)) from error
    records = loaded if isinstance(loaded, list) else [loaded]
    for number, record in enumerate(records):
        yield record if isinstance(record, str) else _field(record, field, f"{path}: record {number}")


def _too_deep(where: str) -> CalibrationError:
    return CalibrationError("JSON nested too deeply", where=where, hint="Each record is an object that holds text.")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            if field not in names:
                _field(dict.fromkeys(names), field, str(path))
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, field, f"{path}: row {row}")
                    row += 1
    except pyarrow.ArrowException as error:
        raise CalibrationError(
            f"not a readable parquet file: {str(error).splitlines()[0]}",
            where=str(path),
            hint="Copy it again.",
        ) from error


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise CalibrationError(f"need an object with the field {field!r}, got {type(record).__name__}", where=where)
    if field not in record:
        there = ", ".join(map(str, record)) or "none"
        raise CalibrationError(
            f"no field {field!r}; fields there: {there}", where=where, hint="Set field to one of them."
        )
    return _text(record[field], field, where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(
            f"field {field!r} holds {type(value).__name__}, need text", where=where, hint="Set another field."
        )
    return value


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
