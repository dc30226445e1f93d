"""`sparsekit convert`: a checkpoint in another form, every bit kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json, Quiet, Verbose
from sparsekit.units import bytes_text


def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint, or a folder of compressed-tensors.")],
    to: Annotated[
        Literal["dense", "auto", "bitmask", "nm", "block"],
        typer.Option("--to", help="dense, or how kept weights are stored; auto: the smallest per tensor."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Output folder.")],
    values: Annotated[
        Literal["auto", "raw", "split", "int8", "int4"],
        typer.Option("--values", help="auto, raw, split: lossless. int8, int4: smaller, with loss."),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty OUT.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run, or discard it.")
    ] = True,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint in another form: dense, or packed and smaller."""
    from sparsekit.convert import convert as run_conversion

    with render.reporter(quiet=quiet) as reporter:
        done = run_conversion(folder, to, out, reporter, values=values, overwrite=overwrite, resume=resume)
    if json:
        render.emit_json(
            {
                "out": str(done.out),
                "forms": done.forms,
                "pruned": done.pruned,
                "source_bytes": done.source_bytes,
                "output_bytes": done.output_bytes,
                "already_finished": done.already_finished,
            }
        )
        return
    if done.already_finished:
        render.emit("This conversion had already finished; nothing was done.")
    forms = ", ".join(f"{count:,} as {form}" for form, count in done.forms.items()) or "all dense"
    sizes = f"{bytes_text(done.source_bytes)} -> {bytes_text(done.output_bytes)}"
    render.emit(f"{done.pruned:,} pruned tensors ({forms}), {sizes}, {done.out}")
