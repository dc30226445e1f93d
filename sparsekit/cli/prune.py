"""`sparsekit prune`: one recipe applied to one model."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsekit import ranks
from sparsekit.cli import render
from sparsekit.cli.options import Dtype, Json, Quiet, RecipeName, Revision, Seed, Set, TrustRemoteCode, Verbose
from sparsekit.errors import GateMissed, UsageError
from sparsekit.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from sparsekit.prepared import Prepared
    from sparsekit.recipe.schema import Recipe


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or .gguf file.")],
    recipe: RecipeName,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="Output folder; default <model>-<recipe> here."),
    ] = None,
    overrides: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, memory, disk and time; compute nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run, or discard it.")
    ] = True,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="AMOUNT", help="What a search may spend: 10min, 2h or 20Mtokens; default: the recipe's."
        ),
    ] = None,
    database: Annotated[
        Path | None,
        typer.Option(
            "--database", metavar="DIR", help="Keep what a search measures of each linear, for other searches."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty OUT.")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure the result against the dense model.")
    ] = True,
    nulls: Annotated[
        str,
        typer.Option(
            "--nulls", metavar="LIST", help="Prune again for comparison: uniform (allocation), random (masks), or both."
        ),
    ] = "",
    dtype: Dtype = "auto",
    seed: Seed = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    json: Json = False,
) -> None:
    """Prune a model, or make its activations sparse, by a recipe; write a checkpoint that transformers loads."""
    from sparsekit.recipe.load import load_recipe

    ranks.join()
    changes = [*(overrides or ()), *([f"calibration.seed={seed}"] if seed is not None else [])]
    if nulls:
        changes.append(f"evaluate.nulls={dumps([null.strip() for null in nulls.split(',')])}")
    chosen = load_recipe(recipe, changes)
    if budget is not None:
        chosen = load_recipe(recipe, [*changes, *_search_budgets(chosen, budget)])
    from sparsekit.models.source import open_model
    from sparsekit.prepared import default_out, prepare
    from sparsekit.run import execute

    with render.reporter(quiet=quiet or ranks.here().rank > 0) as reporter:
        source = ranks.one_first(
            lambda: open_model(model, reporter, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        )
        prepared = prepare(chosen, source)
        out = out or default_out(chosen, source)
        if dry_run:
            _show_plan(prepared, out, as_json=json)
            return
        outcome = execute(
            prepared,
            out,
            reporter,
            overwrite=overwrite,
            resume=resume,
            evaluation=evaluate,
            database=database,
            command=("sparsekit", *sys.argv[1:]),
        )
    from sparsekit.evaluate.table import render_table
    from sparsekit.report.summary import one_line

    if json:
        render.emit_json({"out": str(outcome.out), "already_finished": outcome.already_finished, **outcome.report})
    else:
        if outcome.already_finished:
            render.emit("This run had already finished; nothing was done.")
        if outcome.evaluation and not quiet:
            render.emit(render_table(outcome.evaluation))
        render.emit(f"{one_line(outcome.report)}, {outcome.out}")
    if outcome.missed_gates:
        render.end_with(
            GateMissed(
                "; ".join(outcome.missed_gates), where=str(outcome.out), hint="The checkpoint was written all the same."
            )
        )


def _search_budgets(recipe: Recipe, budget: str) -> list[str]:
    """Return the changes that give every search of a recipe this budget.

    Raises:
        UsageError: Nothing in it searches.
    """
    places = {
        f"stages.{position}{key}.budget": spec
        for position, stage in enumerate(recipe.stages)
        for key, spec in (("", stage), (".allocate", getattr(stage, "allocate", None)))
    }
    searches = [place for place, spec in places.items() if "budget" in getattr(type(spec), "model_fields", ())]
    if not searches:
        raise UsageError(
            f"--budget limits a search, {recipe.name} has none",
            hint="Use a recipe that searches, such as evopress-70, or leave --budget out.",
        )
    return [f"{place}={budget}" for place in searches]


def _show_plan(prepared: Prepared, out: Path, *, as_json: bool) -> None:
    from sparsekit.describe import describe_plan

    plan = describe_plan(prepared, out)
    if as_json:
        render.emit_json(plan)
        return
    for change in plan["reshapes"]:
        options = ", ".join(f"{key} {value}" for key, value in change["options"].items() if value not in (None, []))
        render.emit(f"{change['method']}: {options}")
        _show_search(change["search"])
    for note in plan["notes"]:
        render.emit(note)
    if plan["reshapes"] and plan["stages"]:
        render.emit("What follows is pruned of what is left; its plan is shown for the whole model.")
    for stage in plan["stages"]:
        rows = [
            [kind["kind"], f"{kind['count']} x {kind['shape'][0]} x {kind['shape'][1]}", _share(kind), kind["pattern"]]
            for kind in stage["kinds"]
        ]
        title = f"{stage['method']}: {stage['targets']} linears in {plan['blocks']} blocks"
        render.emit(f"{title}, {stage['coverage']:.1%} of the block weights")
        render.emit(render.table(["linear", "shape (out x in)", "sparsity", "pattern"], rows))
        if not stage["allocated"]:
            render.emit(
                f"Averages: {stage['allocate']} looks at the model first, each linear's sparsity is its choice."
            )
        _show_search(stage["search"])
    if plan["activations"]:
        _show_activations(plan["activations"], plan["blocks"])
    cost: dict[str, Any] = plan["cost"]
    render.emit(f"memory  about {bytes_text(cost['memory_bytes'])}")
    render.emit(f"disk    {bytes_text(cost['disk_bytes'])}")
    if cost["seconds"] is not None:
        render.emit(f"time    about {seconds_text(cost['seconds'])} for {cost['tokens']:,} calibration tokens")
    for name, more in plan["nulls"].items():
        render.emit(f"null    {name}: {_null_cost(more)}")
    render.emit(f"output  {plan['out']}")


def _show_activations(said: dict[str, Any], blocks: int) -> None:
    render.emit(
        f"{said['method']}: {said['signals']} signals in {blocks} blocks, {said['coverage']:.1%} of the block weights"
    )
    render.emit(
        render.table(["signal", "count"], [[each["kind"], f"{each['count']}"] for each in said["kinds"]], right=[1])
    )
    if said["budget"]:
        wanted = f"as much as {said['budget']['perplexity']:+.2%} perplexity on text kept apart allows"
    else:
        wanted = f"{said['sparsity']:.4f} of what they are multiplied with, each token"
    render.emit(f"skips   {wanted}")
    render.emit(f"tokens  {said['protocol']}")
    render.emit(f"shares  {said['allocate']}, thresholds taken behind {said['propagate']} blocks")


def _show_search(search: dict[str, Any] | None) -> None:
    if search:
        spent = f"{search['tokens']:,} tokens" if search["tokens"] else seconds_text(search["seconds"])
        render.emit(f"search  at most {spent}; --budget sets another limit")


def _null_cost(cost: dict[str, Any]) -> str:
    time = f"about {seconds_text(cost['seconds'])}, " if cost["seconds"] is not None else ""
    return f"the run again, {time}{bytes_text(cost['disk_bytes'])} of disk meanwhile"


def _share(kind: dict[str, Any]) -> str:
    low, high = kind["sparsity_range"]
    return f"{low:.4f}" if high - low < 5e-5 else f"{low:.3f} to {high:.3f}"
