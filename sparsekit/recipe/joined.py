"""Models of a recipe whose keys stand beside the options of the method they name.

The method is looked up in the registry; the model is then the one of what is shared, joined with the method's options.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsekit import registry
from sparsekit.errors import PluginBroken, UnknownName


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys refused, no conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def near(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice a misspelt word most likely means."""
    found = difflib.get_close_matches(word, sorted(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def joined(base: type[Any], room: str, method: str) -> type[Any]:
    """Return a model of `base`'s keys and the options of a method of a room.

    Raises:
        UnknownName: No such method.
        PluginBroken: An option is called like a key of `base`.
    """
    options = registry.load(room, method).options_type
    if clash := sorted(name for name in options.model_fields if hasattr(base, name) or name in base.model_fields):
        raise PluginBroken(
            f"{registry.ROOMS[room][0]} {method!r} of {registry.source(room, method)} has an option "
            f"{clash[0]!r}, which is a key of every stage",
            hint="Ask its authors to rename the option.",
        )
    # the options first: pydantic then lists the base's keys first and takes the base's (strict) configuration
    return create_model(f"{base.__name__}_{method}", __base__=(options, base), __doc__=base.__doc__)


def options_of(joined: BaseModel, room: str) -> Any:
    """Return the options alone of an instance of a joined model: an instance of the method's `options_type`."""
    options = registry.load(room, str(getattr(joined, "method"))).options_type  # noqa: B009
    return options.model_validate({name: getattr(joined, name) for name in options.model_fields})


def with_method(raw: Any, base: type[Any], joined: Any) -> Any:
    """Validate `raw` by the model of the method it names; without a usable name, by what is shared."""
    if not isinstance(raw, dict):
        raise PydanticCustomError("kind", "must be a mapping of keys to values")
    if not isinstance(raw.get("method"), str):
        return _shared_keys_only(raw, base, [])
    try:
        model = joined(raw["method"])
    except UnknownName as error:
        unknown: InitErrorDetails = {
            "type": PydanticCustomError("unknown_method", "{text}", {"text": str(error)}),
            "loc": ("method",),
            "input": raw["method"],
        }
        return _shared_keys_only(raw, base, [unknown])
    return model.model_validate_json(json.dumps(raw))


def _shared_keys_only(raw: dict[str, Any], base: type[Any], problems: list[InitErrorDetails]) -> Any:
    """Report what is wrong in any case; a key unlike the shared ones may be the unknown method's option."""
    known = {key: value for key, value in raw.items() if key in base.model_fields or near(key, base.model_fields)}
    try:
        base.model_validate_json(json.dumps(known))
    except ValidationError as error:
        problems = problems + [detail(item) for item in error.errors()]
    raise refusal(base, problems)


def detail(item: Any) -> InitErrorDetails:
    """Return an error of pydantic as one that can be raised again."""
    kind = item["type"]
    if kind in ("missing", "extra_forbidden"):
        return {"type": kind, "loc": item["loc"], "input": item["input"]}
    error = PydanticCustomError(kind, "{text}", {"text": item["msg"]})
    return {"type": error, "loc": item["loc"], "input": item["input"]}


def refusal(model: type[BaseModel], problems: list[InitErrorDetails]) -> ValidationError:
    """Return the error that says all of these problems at once."""
    return ValidationError.from_exception_data(model.__name__, problems, input_type="json")
