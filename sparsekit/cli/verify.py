"""`sparsekit verify`: is this checkpoint what its manifest says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json
from sparsekit.units import bytes_text

_SHOWN = 20  # problems; a damaged shard can have thousands
_EXIT_PROBLEMS = 3


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that sparsekit prune wrote.")],
    level: Annotated[
        Literal["structure", "full", "semantic"],
        typer.Option(
            "--level", help="structure: names, sizes, headers. full: and hashes. semantic: and zeros and patterns."
        ),
    ] = "full",
    json: Json = False,
) -> None:
    """Check a checkpoint against its manifest; exit code 3 if anything is wrong."""
    from sparsekit.pack import verify as checks

    report = checks.verify(folder, level)
    if json:
        render.emit_json(
            {
                "folder": str(report.folder),
                "level": report.level,
                "run_id": report.run_id,
                "ok": report.ok,
                "problems": [{"where": problem.where, "message": problem.message} for problem in report.problems],
                "files_checked": report.files_checked,
                "tensors_checked": report.tensors_checked,
                "bytes_read": report.bytes_read,
            }
        )
    elif report.ok:
        render.emit(
            f"ok: {report.files_checked:,} files, {report.tensors_checked:,} tensors, level {report.level} "
            f"({_read(report.bytes_read)})"
        )
    else:
        for problem in report.problems[:_SHOWN]:
            render.emit(str(problem))
        if (more := len(report.problems) - _SHOWN) > 0:
            render.emit(f"and {more:,} more; --json lists all")
        count = len(report.problems)
        render.emit(f"{count:,} problem{'s'[: count > 1]}. Copy the folder again, or run the pruning again.")
    if not report.ok:
        raise typer.Exit(_EXIT_PROBLEMS)


def _read(count: int) -> str:
    return f"{bytes_text(count)} hashed" if count else "no content read; --level full hashes it"
