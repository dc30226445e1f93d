"""Options that several commands share, so that they are called and explained the same everywhere.

A command takes them as `quiet: Quiet = False, verbose: Verbose = 0, json: Json = False`; `app.guard` finds
them by these types, whatever the parameter is called.
"""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only: no progress.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, metavar="", show_default=False, help="Log more; -vv logs all.")
]

RecipeName = Annotated[str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Shipped recipe, or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key: stages.0.sparsity=0.6. Repeatable."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="auto, bf16, fp16 or fp32.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Instead of the recipe's seed.")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub model.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the model brings along.",
        rich_help_panel="Security",
    ),
]
