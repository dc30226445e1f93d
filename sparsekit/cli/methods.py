"""`sparsekit methods`: every method that a recipe can name, built in or brought by another package."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from typing import Annotated, Any

import typer

from sparsekit import registry
from sparsekit.cli import render
from sparsekit.cli.options import Json
from sparsekit.contracts import ActivationCalibrator, Allocator, Method
from sparsekit.errors import UnknownName

_ROOMS = ("pruners", "refine", "update", "allocate", "reshape", "activations", "stats")
_HEADING = re.compile(r"^[A-Z][A-Za-z ]+:", re.MULTILINE)


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method: its text and options.")] = None,
    json: Json = False,
) -> None:
    """List the methods, or explain one."""
    found = [_describe(room, key) for room in _ROOMS for key in registry.names(room)]
    if name is not None:
        chosen = [method for method in found if method["name"] == name]
        if not chosen:
            raise UnknownName(registry.unknown("method", name, {method["name"] for method in found}))
        found = chosen
    if json:
        render.emit_json({"methods": found})
    elif name is not None:
        render.emit("\n\n".join(_page(method) for method in found))
    else:
        rows = [[m["name"], m["kind"], m["summary"], ", ".join(m["needs"]) or "-", m["source"]] for m in found]
        render.emit(render.table(["method", "kind", "what it does", "needs", "from"], rows))
        render.emit("\nOne method in full: sparsekit methods NAME")


def _describe(room: str, name: str) -> dict[str, Any]:
    method = registry.load(room, name)
    module = sys.modules[method.__module__]
    text = inspect.cleandoc(module.__doc__ or method.__doc__ or "")
    return {
        "name": name,
        "room": room,
        "kind": registry.ROOMS[room][0],
        "summary": text.splitlines()[0] if text else "",
        "needs": _needs(method),
        "source": registry.source(room, name),
        "paper": _section(text, "Source"),
        "text": text,
        "options": _options(method),
    }


def _needs(method: type[Any]) -> list[str]:
    """Return what a method with its default options reads: statistics, and the whole model if it asks for that."""
    if not issubclass(method, Method):
        return []
    made = method(method.options_type(), 0)
    whole = isinstance(made, Allocator) and made.probes() is not None
    calibrated = isinstance(made, ActivationCalibrator)  # on the signals themselves, which are no statistic by name
    return [*sorted(made.needs), *(["whole model"] if whole else []), *(["signals"] if calibrated else [])]


def _section(text: str, heading: str) -> str | None:
    """Return the text under `Heading:` in a module's docstring, on one line; None if it has none."""
    start = re.search(rf"^{heading}:", text, re.MULTILINE)
    if start is None:
        return None
    end = _HEADING.search(text, start.end())
    return " ".join(text[start.end() : end.start() if end else None].split())


def _options(method: type[Any]) -> list[dict[str, Any]]:
    from sparsekit.recipe.problems import accepts

    if not hasattr(method, "options_type"):
        return []
    properties = method.options_type.model_json_schema().get("properties", {})
    return [
        {"key": key, "accepts": accepts(schema), "default": schema.get("default")} for key, schema in properties.items()
    ]


def _wrapped(text: str) -> str:
    """Return a docstring fitted to the terminal: a headed section or paragraph is wrapped as one."""
    sections = re.split(r"\n(?=[A-Z][A-Za-z ]+:|\n)", text)
    return "\n".join(textwrap.fill(" ".join(part.split()), render.WIDTH, subsequent_indent="    ") for part in sections)


def _page(method: dict[str, Any]) -> str:
    head = f"{method['name']} ({method['kind']}, from {method['source']})"
    needs = ", ".join(method["needs"]) or "no calibration text"
    rows = [[str(o["key"]), str(o["accepts"]), str(o["default"])] for o in method["options"]]
    options = render.table(["option", "accepts", "default"], rows) if rows else "No options."
    return f"{head}\n\n{_wrapped(method['text'])}\n\nNeeds: {needs}\n\n{options}"
