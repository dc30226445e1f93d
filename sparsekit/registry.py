"""Finding methods by name. The file name is the key; adding a method edits no file.

A built-in method is the one public class of `sparsekit/<room>/<name>.py` that subclasses the room's contract.
Third parties offer classes through the entry-point groups below; built-ins win, a clash is an error.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from sparsekit.errors import NameClash, PluginBroken, UnknownName

# room (package under sparsekit) -> (singular noun for messages, class in sparsekit.contracts, entry-point group)
ROOMS: dict[str, tuple[str, str, str]] = {
    "stats": ("statistic", "Stat", "sparsekit.stats"),
    "pruners": ("pruner", "LayerPruner", "sparsekit.pruners"),
    "allocate": ("allocator", "Allocator", "sparsekit.allocators"),
    "refine": ("refiner", "MaskRefiner", "sparsekit.refiners"),
    "update": ("update", "WeightUpdate", "sparsekit.updates"),
    "reshape": ("reshaper", "Reshaper", "sparsekit.reshapers"),
    "activations": ("calibrator", "ActivationCalibrator", "sparsekit.calibrators"),
}
_MOST_SHOWN = 24
"""Names in an error: more than that nobody reads."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@cache
def names(room: str) -> tuple[str, ...]:
    """Return all method names of a room, sorted; imports nothing of them."""
    builtin = _builtin(room)
    third_party = _entry_points(room)
    for name in sorted(builtin & third_party.keys()):
        raise NameClash(
            f"{ROOMS[room][0]} {name!r} is built in; {_owner(third_party[name])} offers it again",
            hint="Uninstall that package or ask its authors to rename the method.",
        )
    return tuple(sorted(builtin | third_party.keys()))


def load(room: str, name: str) -> type[Any]:
    """Import and return the class called `name`.

    Raises:
        UnknownName: No such method; the message names near misses.
        PluginBroken: A third-party entry point that fails to import or breaks the contract.
    """
    noun, contract_name, _ = ROOMS[room]
    if name not in names(room):
        raise UnknownName(unknown(noun, name, names(room)))
    contract = getattr(importlib.import_module("sparsekit.contracts"), contract_name)
    if name in _builtin(room):
        return _class_in(importlib.import_module(f"sparsekit.{room}.{name}"), contract)
    entry_point = _entry_points(room)[name]
    try:
        loaded = entry_point.load()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, MemoryError)):
            raise
        raise PluginBroken(
            f"{noun} {name!r} of {_owner(entry_point)} failed to import: {type(error).__name__}: {error}",
            hint="Fix or uninstall that package.",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, contract)):
        raise PluginBroken(
            f"{noun} {name!r} of {_owner(entry_point)} is not a subclass of sparsekit.contracts.{contract_name}",
            hint="Fix or uninstall that package.",
        )
    return loaded


def source(room: str, name: str) -> str:
    """Return where a method comes from: `sparsekit`, or the distribution that offers it."""
    return "sparsekit" if name in _builtin(room) else _owner(_entry_points(room)[name])


def unknown(noun: str, name: str, available: Iterable[str]) -> str:
    """Return the message for a name that does not exist: near misses, then the list; of a long one what is closest."""
    choices = sorted(available)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    if len(choices) <= _MOST_SHOWN:
        return f"Unknown {noun} {name!r}.{guess} Available: {', '.join(choices) or 'none'}"
    closest = sorted(difflib.get_close_matches(name, choices, n=_MOST_SHOWN, cutoff=0.0))
    return f"Unknown {noun} {name!r}.{guess} Closest of {len(choices)}: {', '.join(closest)}"


@cache
def _builtin(room: str) -> frozenset[str]:
    package = importlib.import_module(f"sparsekit.{room}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return frozenset(name for name in found if _NAME.fullmatch(name))


@cache
def _entry_points(room: str) -> dict[str, importlib.metadata.EntryPoint]:
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry_point in importlib.metadata.entry_points(group=ROOMS[room][2]):
        if not _NAME.fullmatch(entry_point.name):
            raise PluginBroken(f"method name {entry_point.name!r} of {_owner(entry_point)} must match {_NAME.pattern}")
        if entry_point.name in found and found[entry_point.name].value != entry_point.value:
            raise NameClash(
                f"{ROOMS[room][0]} {entry_point.name!r} is offered by both {_owner(found[entry_point.name])} "
                f"and {_owner(entry_point)}",
                hint="Uninstall one of them.",
            )
        found[entry_point.name] = entry_point
    return found


def _owner(entry_point: importlib.metadata.EntryPoint) -> str:
    return f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else entry_point.value


def _class_in(module: Any, contract: type[Any]) -> type[Any]:
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, contract) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise PluginBroken(f"{module.__name__} must define exactly one {contract.__name__}, found {len(own)}")
    return own[0]
