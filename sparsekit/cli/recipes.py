"""`sparsekit recipes`: what is shipped, what a recipe says in full, whether a file is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from sparsekit.cli import render
from sparsekit.cli.options import Json, Set
from sparsekit.errors import SparsekitError

Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped recipe, or a YAML file.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Recipes to check.")]


def commands(group: typer.Typer, guard: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Register the commands on `group`; plain `sparsekit recipes` lists."""

    @group.callback(invoke_without_command=True)
    def recipes(context: typer.Context) -> None:
        """List, show and check recipes."""
        if context.invoked_subcommand is None:
            guard(list_recipes)(json=False)

    group.command("list")(guard(list_recipes))
    group.command("show")(guard(show))
    group.command("validate")(guard(validate))
    group.command("schema")(guard(schema))


def list_recipes(json: Json = False) -> None:
    """List the shipped recipes."""
    from sparsekit.recipe import catalog

    found = catalog.shipped()
    if json:
        rows = [{"name": info.name, "description": info.description, "path": str(info.path)} for info in found]
        render.emit_json({"recipes": rows})
        return
    render.emit(render.table(["recipe", "what it does"], [[info.name, info.description] for info in found]))


def show(recipe: Name, changes: Set = None, json: Json = False) -> None:
    """Print a recipe in full: what it inherits, every default, the method's options."""
    from sparsekit.recipe import dump_yaml, load_recipe

    resolved = load_recipe(recipe, changes or ()).resolved()
    if json:
        render.emit_json(resolved)
    else:
        render.emit(dump_yaml(resolved).rstrip("\n"))


def validate(recipes: Names, changes: Set = None, json: Json = False) -> None:
    """Check recipes: every problem with its line and column."""
    from sparsekit.recipe import load_recipe

    checked = []
    failed: SparsekitError | None = None
    for name in recipes:
        try:
            loaded = load_recipe(name, changes or ())
        except SparsekitError as error:
            failed = failed or error
            checked.append({"recipe": name, "valid": False, "problems": str(error).splitlines()})
            if not json:
                render.show_error(error, as_json=False)
        else:
            checked.append({"recipe": name, "valid": True, "digest": loaded.digest})
            if not json:
                render.emit(f"ok: {name}")
    if json:
        render.emit_json({"recipes": checked})
    if failed:
        raise typer.Exit(failed.exit_code)


def schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    from sparsekit.recipe import catalog

    render.emit_json(catalog.json_schema())
